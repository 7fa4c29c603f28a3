"""Sampling as a use case: the same picture again, folders that are not mixed, labels, early refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin

from carrara.app.events import Event, Notice, Saved, StepDone
from carrara.app.sample import SampleRequest, sample
from carrara.conditioning import ClassLabels
from carrara.model import DiffusionModel
from tests.errors import refused


def run(**values: Any) -> list[Event]:
    return list(sample(SampleRequest(**values)))


@pytest.fixture(scope="module")
def run_folder(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of its own, as samples go into its folder."""
    folder = tmp_path_factory.mktemp("sampled") / "model"
    DiffusionModel.load(tiny_run).save(folder)
    return folder


WAYS: list[dict[str, Any]] = [
    {"inputs": {"labels": ("3", "7", "1")}, "steps": 3, "guidance": 2.0},
    {"inputs": {"labels": (4, 5, 6)}, "steps": 2, "solver": "ddim", "eta": 0.5, "seed": 9},
    {
        "inputs": {"labels": ("0", "2", "8")},
        "steps": 3,
        "solver": "unipc",
        "spacing": "log_snr",
        "guidance": 1.5,
        "rescale": 0.7,
    },
    {"inputs": {"labels": ("1", "2", "3")}, "steps": 3, "solver": "euler-ancestral", "eta": 0.5},
    {"inputs": {"labels": ("1", "2", "3")}, "steps": 3, "solver": "DPM++ 2M SDE", "eta": 0.25},
    {"inputs": {"labels": ("1", "2", "3")}, "steps": 3, "solver": "dpm++3m", "spacing": "optimised"},
]


@pytest.mark.parametrize("way", WAYS, ids=["guided", "eta", "rescaled", "ancestral", "sde", "optimised"])
def test_a_picture_is_made_again_from_its_metadata(way: dict[str, Any], run_folder: Path, tmp_path: Path) -> None:
    run(model=run_folder, out=tmp_path / "a", **way)
    third = next((tmp_path / "a").glob("seed*-00002.png"))
    events = run(model=run_folder, out=tmp_path / "b", like=third)
    assert isinstance(events[-1], Saved)
    again = tmp_path / "b" / third.name
    with Image.open(third) as first, Image.open(again) as second:
        assert first.tobytes() == second.tobytes()
        assert json.loads(first.info["carrara"]) == json.loads(second.info["carrara"]) | {"first": 0}


def changed(picture: Path, to: Path, **change: Any) -> Path:
    """The picture with other metadata."""
    with Image.open(picture) as image:
        metadata = {**json.loads(image.info["carrara"]), **change}
        info = PngImagePlugin.PngInfo()
        info.add_text("carrara", json.dumps(metadata))
        image.save(to, pnginfo=info)
    return to


def test_pictures_that_cannot_be_made_again_are_refused(run_folder: Path, tmp_path: Path) -> None:
    run(model=run_folder, out=tmp_path / "a", inputs={"labels": ("1",)}, steps=1)
    picture = tmp_path / "a" / "seed0-00000.png"
    newer = changed(picture, tmp_path / "newer.png", format=99)
    other = changed(picture, tmp_path / "other.png", weights="EMA of step 3")
    with refused("newer"):
        run(model=run_folder, like=newer)
    with refused("mismatch", key="model"):
        run(model=run_folder, like=other)
    for bad in (tmp_path / "a" / "grid.png", tmp_path / "a" / "samples.npz", tmp_path / "none.png"):
        with refused("missing", key="like"):
            run(model=run_folder, like=bad)
    for key, values in (
        ("steps", {"steps": 3}),
        ("seed", {"seed": 1}),
        ("labels", {"inputs": {"labels": ("2",)}}),
        ("count", {"count": 4}),
    ):
        with refused("conflict", key=key):
            run(model=run_folder, like=picture, **values)


def test_two_sets_of_samples_are_never_mixed(run_folder: Path, tmp_path: Path) -> None:
    words: dict[str, Any] = {"model": run_folder, "steps": 1}
    first = run(**words, inputs={"labels": ("1", "2", "3")}, out=tmp_path / "s")[-1]
    assert isinstance(first, Saved)
    before = {file: file.read_bytes() for file in (tmp_path / "s").iterdir()}
    with refused("exists", key="out"):
        run(**words, inputs={"labels": ("4",)}, out=tmp_path / "s")
    assert {file: file.read_bytes() for file in (tmp_path / "s").iterdir()} == before
    run(**words, inputs={"labels": ("4",)}, out=tmp_path / "s", overwrite=True)
    assert len(list((tmp_path / "s").glob("seed*.png"))) == 1
    folders = [run(**words, inputs={"labels": ("4",)}, seed=5)[-1].path.name for _ in range(3)]  # type: ignore[union-attr]
    assert folders == ["samples-seed5", "samples-seed5-2", "samples-seed5-3"]
    (tmp_path / "s" / "notes.txt").write_text("mine")
    run(**words, inputs={"labels": ("4",)}, out=tmp_path / "s", overwrite=True)
    assert (tmp_path / "s" / "notes.txt").read_text() == "mine"


def test_what_cannot_be_written_is_refused_before_the_first_step(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "deep"):
        events = sample(SampleRequest(model=run_folder, inputs={"labels": ("1",)}, out=out))
        with refused("exists", key="out"):
            next(events)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("labels", {"inputs": {"labels": ("²",)}}),
        ("labels", {"inputs": {"labels": ("①",)}}),
        ("labels", {"inputs": {"labels": ("-1",)}}),
        ("labels", {"inputs": {"labels": ("three",)}}),
        ("count", {"count": 0}),
        ("batch_size", {"batch_size": 0}),
        ("device", {"device": "cuda:99"}),
        ("precision", {"precision": "int8"}),
        ("classifier_scale", {"classifier_scale": 2.0}),
    ],
)
def test_values_that_mean_nothing_are_refused(key: str, values: dict[str, Any], run_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        run(**{"model": run_folder, "inputs": {"labels": ("1",)}, "steps": 1, **values})
    assert getattr(caught.value, "key", None) == key


def test_a_label_is_a_name_first_and_it_is_said(run_folder: Path, tmp_path: Path) -> None:
    """Classes named by numbers in another order: the text "2" is the class of that name, the number 2 the third."""
    model = DiffusionModel.load(run_folder)
    names = ("10", "2", *(str(k) for k in range(20, 28)))
    replace(model, conditioners=(ClassLabels(names, 0.1),)).save(tmp_path / "m")
    by_name = run(model=tmp_path / "m", inputs={"labels": ("2",)}, steps=1, out=tmp_path / "a")
    by_number = run(model=tmp_path / "m", inputs={"labels": (2,)}, steps=1, out=tmp_path / "b")
    assert [event.about["labels"] for event in (by_name[-1], by_number[-1])] == [[1], [2]]  # type: ignore[union-attr]
    assert any(isinstance(event, Notice) and "number 1" in event.text for event in by_name)
    assert not any(isinstance(event, Notice) for event in by_number)


def test_sampling_is_cancelled_by_closing(run_folder: Path, tmp_path: Path) -> None:
    events = sample(SampleRequest(model=run_folder, inputs={"labels": ("1",)}, steps=1000, out=tmp_path / "s"))
    first = next(events)
    assert isinstance(first, StepDone)
    assert first.preview is not None
    events.close()  # type: ignore[attr-defined]
    assert not (tmp_path / "s").exists()


def test_bf16_is_recorded_and_repeated(run_folder: Path, tmp_path: Path) -> None:
    run(model=run_folder, inputs={"labels": ("1",)}, steps=2, out=tmp_path / "a", precision="bf16")
    run(model=run_folder, inputs={"labels": ("1",)}, steps=2, out=tmp_path / "b")
    run(model=run_folder, out=tmp_path / "c", like=tmp_path / "a" / "seed0-00000.png")
    pixels = []
    for name in "abc":
        with Image.open(tmp_path / name / "seed0-00000.png") as image:
            pixels.append(torch.tensor(list(image.getdata())))
            assert json.loads(image.info["carrara"])["weights"].endswith("bf16") is (name != "b")
    assert torch.equal(pixels[0], pixels[2])


def test_a_picture_in_a_models_folder_needs_no_model(run_folder: Path, tmp_path: Path) -> None:
    saved = run(model=run_folder, inputs={"labels": ("6",)}, steps=2, seed=77)[-1]
    assert isinstance(saved, Saved)
    picture = next(saved.path.glob("seed*.png"))
    run(like=picture, out=tmp_path / "again")
    with Image.open(picture) as first, Image.open(tmp_path / "again" / picture.name) as second:
        assert first.tobytes() == second.tobytes()
    (tmp_path / picture.name).write_bytes(picture.read_bytes())
    with refused("missing", key="model"):
        run(like=tmp_path / picture.name)
    with refused("missing", key="model"):
        run(inputs={"labels": ("1",)})
