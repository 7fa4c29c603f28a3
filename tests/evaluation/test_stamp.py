"""The protocol on the number: what differs is named, what is varied on purpose is allowed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from carrara.errors import UserError
from carrara.evaluation import Interval, Measurement, Measurements, Stamp, compare
from carrara.evaluation.stamp import from_json, load, to_json
from tests.errors import refused

STAMP = Stamp(
    n=1000,
    shape=(1, 8, 8),
    reference="digits",
    reference_split="all",
    reference_hash="ab12",
    reference_n=1797,
    features="pixels",
    sampling={"solver": "ddim", "steps": 20, "seed": 0, "weights": "EMA"},
)


def run(value: float, stamp: Stamp = STAMP, width: float = 0.1) -> Measurements:
    return {"frechet_distance": Measurement(value, Interval(value - width, value + width), stamp)}


def test_equal_protocols_are_compared() -> None:
    (row,) = compare(run(0.5), run(0.9))
    assert row.difference == pytest.approx(0.4)
    assert row.beyond_chance is True
    assert compare(run(0.5), run(0.55))[0].beyond_chance is False


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"n": 5000}, "n is 1000 and 5000"),
        ({"reference_split": "train"}, "reference_split is 'all' and 'train'"),
        ({"reference_hash": "cd34"}, "reference_hash is 'ab12' and 'cd34'"),
        ({"features": "inception-2015", "features_checksum": "67"}, "features is 'pixels' and 'inception-2015'; "),
        ({"resize": "bicubic"}, "resize is None and 'bicubic'"),
        ({"dtype": "float32"}, "dtype is 'uint8' and 'float32'"),
        ({"sampling": {**STAMP.sampling, "steps": 50}}, "sampling.steps is 20 and 50"),
        ({"sampling": {**STAMP.sampling, "weights": "raw"}}, "sampling.weights is 'EMA' and 'raw'"),
        ({"settings": {"k": 5}}, "settings.k is None and 5"),
    ],
)
def test_any_other_protocol_is_refused_and_the_place_is_named(changed: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        compare(run(0.5), run(0.5, replace(STAMP, **changed)))  # type: ignore[arg-type]
    assert sentence in str(error.value)
    assert "frechet_distance was measured differently" in str(error.value)


def test_what_is_varied_on_purpose_may_differ_by_name_or_group() -> None:
    other = replace(STAMP, sampling={**STAMP.sampling, "steps": 50, "solver": "heun"})
    assert compare(run(0.5), run(0.4, other), varied=["sampling"])[0].difference == pytest.approx(-0.1)
    assert compare(run(0.5), run(0.4, other), varied=["sampling.steps", "sampling.solver"])
    with refused("mismatch", "sampling.solver"):
        compare(run(0.5), run(0.4, other), varied=["sampling.steps"])
    with refused("unknown", "varied"):
        compare(run(0.5), run(0.4, other), varied=["sampling.step"])


def test_versions_are_recorded_not_compared() -> None:
    older = replace(STAMP, versions={"torch": "2.6"})
    assert STAMP.versions.keys() == {"carrara", "torch", "python"}
    assert compare(run(0.5), run(0.6, older))


def test_figures_in_common_only() -> None:
    second = {**run(0.6), "precision": Measurement(0.9, None, STAMP)}
    assert [row.name for row in compare(run(0.5), second)] == ["frechet_distance"]
    with refused("mismatch", "varied"):
        compare(run(0.5), {"precision": second["precision"]})


def test_json_round_trip(tmp_path: Path) -> None:
    figures = {**run(0.1 + 0.2), "x": Measurement(1.0, None, STAMP.with_settings(k=3), "a note")}
    path = tmp_path / "figures.json"
    path.write_text(to_json(figures), encoding="utf-8")
    assert load(path) == figures
    assert compare(load(path), figures)[0].difference == 0


def test_files_that_hold_no_figures_are_told(tmp_path: Path) -> None:
    with refused("missing"):
        load(tmp_path / "none.json")
    for text in ("not json", "[1, 2]", '{"fid": 3.2}', '{"fid": {"value": 1}}'):
        with refused("damaged"):
            from_json(text)


def test_one_line_for_reports() -> None:
    assert STAMP.text().startswith("n 1000, shape [1, 8, 8], dtype uint8")
    assert "steps 20" in STAMP.text()


def test_files_of_earlier_names_are_read_and_compared() -> None:
    settings = {"evaluator": "SVC(C=10) on the reference's features", "evaluator_rows": 9}
    stamp = Stamp(n=4, sampling={"classes": "in the reference's proportions"}, settings=settings)
    names = ("class_accuracy", "class_std[a b]", "memorised_fraction", "memorised_fraction_held_out", "fid")
    today = {name: Measurement(0.5, None, stamp) for name in names}
    text = to_json(today)
    for new, old in (
        ("memorised_fraction", "memorised_share"),
        ("class_std", "class_spread"),
        ('"evaluator', '"judge'),
        ("reference's proportions", "reference's shares"),
    ):
        text = text.replace(new, old)
    assert "evaluator" not in text
    former = from_json(text)
    assert former == today
    assert len(compare(former, today)) == len(names)
