"""The checks that the params of all networks have in common."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carrara.errors import UserError
from carrara.networks.params import LevelParams, Params, check_multiples
from tests.errors import refused


@dataclass(frozen=True, kw_only=True)
class Toy(Params):
    section: ClassVar[str] = "toy"
    sizes: tuple[int, ...] = (1, 2)
    count: int | None = None
    rate: float = 0.0
    word: str = "a"
    needs_count: bool = False

    def _check(self) -> None:
        self._at_least(1, "count")
        self._fraction("rate")
        self._one_of("word", ("a", "b"))
        self._needs("needs_count", "count")


def test_lists_become_tuples_and_the_section_is_no_field() -> None:
    toy = Toy(sizes=[3, 4])  # type: ignore[arg-type]
    assert toy.sizes == (3, 4)
    assert Toy(**asdict(toy)) == toy
    assert "section" not in asdict(toy)


def test_each_check_names_section_and_field() -> None:
    for field, value in {"count": 0, "rate": 1.0}.items():
        with refused("invalid", f"toy.{field}"):
            Toy(**{field: value})  # type: ignore[arg-type]
    with refused("unknown", "toy.word"):
        Toy(word="c")
    with refused("missing", "toy.count"):
        Toy(needs_count=True)
    assert Toy(needs_count=True, count=1).count == 1


@given(size=st.lists(st.integers(-3, 40), min_size=1, max_size=3), factor=st.integers(1, 9))
def test_only_positive_multiples_pass_and_the_nearest_are_multiples(size: list[int], factor: int) -> None:
    if all(side > 0 and side % factor == 0 for side in size):
        check_multiples(size, factor, "a network", "key")
        return
    with pytest.raises(UserError) as caught:
        check_multiples(size, factor, "a network", "key")
    assert (caught.value.code, caught.value.key) == ("shape", "key")
    for named in str(caught.value).rstrip(".").partition("nearest are ")[2].split(" and "):
        check_multiples([int(side) for side in named.split("×")], factor, "a network", "key")


def test_levels_need_channels_and_known_factors() -> None:
    assert LevelParams(channels=8, channel_mult=(1, 1.5), attention=(2,)).widths == (8, 12)
    for changes in ({"channel_mult": ()}, {"channel_mult": (0.1,), "channels": 4}):
        with refused("invalid", "network.channel_mult"):
            LevelParams(**changes, attention=())
    with refused("invalid", "network.attention"):
        LevelParams(attention=(3,))
