"""The options that conditioners' inputs become."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import typer
from typer.testing import CliRunner

from carrara import conditioning
from carrara.cli.inputs import Sampling, Upscaling, given_inputs
from carrara.conditioning import ClassLabels, Input
from tests.cli.conftest import Command
from tests.errors import refused as refused_in_python


class Mood(ClassLabels):
    """Declares an input of every type."""

    kind: ClassVar[str] = "mood"
    declared: ClassVar[tuple[Input, ...]] = (
        Input("joy", "number", "how joyful"),
        Input("warm_tone", "number", "how warm", per_sample=False),
        Input("title", "text", "its title", flags=("--title", "-t")),
        Input("sketch", "image", "a sketch"),
    )


@pytest.fixture
def mood() -> Iterator[None]:
    conditioning.register(Mood)
    yield
    del conditioning.KINDS["mood"]


def parsed(*words: str, cls: type[Any] = Sampling) -> dict[str, Any]:
    """The inputs that a command gets."""
    app, found = typer.Typer(), dict[str, Any]()

    @app.command(cls=cls)
    def command(context: typer.Context, steps: int = 3) -> None:
        found.update(given_inputs(context), steps=steps)

    result = CliRunner().invoke(app, words)
    if isinstance(result.exception, ValueError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return found


def test_each_input_is_an_option(mood: None) -> None:
    words = ("--joy", "1", "--joy", "0.5", "--warm-tone", "2", "-t", "Sea", "--sketch", "a.png", "--steps", "4")
    assert parsed(*words) == {
        "joy": [1.0, 0.5],
        "warm_tone": 2.0,
        "title": ["Sea"],
        "sketch": [Path("a.png")],
        "steps": 4,
    }
    assert parsed("-l", "3", "--label", "cat") == {"labels": ["3", "cat"], "steps": 3}
    assert parsed("--noise-level", "0", cls=Upscaling) == {"noise_level": 0.0, "steps": 3}
    assert parsed() == {"steps": 3}


def test_an_input_that_takes_the_spelling_of_another_option_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClassLabels, "declared", (Input("steps", "number", "taken"),))
    with refused_in_python("conflict", "steps"):
        parsed()


def test_values_are_checked_by_the_models_inputs(refused: Callable[..., str], tiny_run: Path, tmp_path: Path) -> None:
    words = ("sample", tiny_run, "--steps", "1", "--out", tmp_path / "out")
    assert "label 10" in refused(*words, "--label", "10")
    assert "prompts" in refused(*words, "--prompt", "a cat")
    assert not (tmp_path / "out").exists()


def test_help_names_them(carrara: Command) -> None:
    text = carrara("sample", "--help").stdout
    assert all(flag in text for flag in ("--label", "--prompt", "--negative"))
    assert "--noise-level" not in text
    assert "--noise-level" in carrara("upscale", "--help").stdout
