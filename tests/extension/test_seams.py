"""A network and a conditioner from outside of the package go through recipe, training, disk, sampling and processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from carrara import DiffusionModel, load
from carrara.recipe import Recipe, validate
from tests.errors import refused
from tests.extension.toys import Brightness, Pixelwise
from tests.processes import together
from tests.runs import train

RECIPE: dict[str, Any] = {
    "name": "toy",
    "data": {"path": "digits", "resolution": 8, "channels": 1},
    "network": {"kind": "pixelwise", "width": 8},
    "conditioning": {"kind": "brightness", "dropout": 0.2, "highest": 0.9},
    "objective": {"predicts": "v"},
    "training": {"steps": 12, "batch_size": 16, "log_every": 6, "checkpoint_every": 6, "sample_every": 100},
    "sampling": {"steps": 3, "guidance": 2.0, "count": 4},
}


def recipe(**changes: Any) -> Recipe:
    return validate({**RECIPE, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "run"
    train(recipe(), folder)
    return folder


def test_it_trains_and_loads(run: Path) -> None:
    model = load(run)
    assert isinstance(model, DiffusionModel)
    assert isinstance(model.network, Pixelwise)
    assert model.conditioners == (Brightness(0.2, 0.9),)
    assert (model.network.params.width, model.network.params.vector_channels) == (8, 1)


def test_it_is_sampled_and_guided(run: Path) -> None:
    model = DiffusionModel.load(run)
    one, two, plain = (
        model.sample(brightness=[b, -0.5], guidance=g, seed=1).images for b, g in ((0.5, 2.0), (-0.9, 2.0), (0.5, 1.0))
    )
    assert not torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one, plain)
    other, same = (model.plan(brightness=[b, -0.5]).metadata for b in (0.5, 0.6)), model.plan(brightness=[0.5, -0.5])
    assert [metadata["brightness"] == same.metadata["brightness"] for metadata in other] == [True, False]
    assert same.metadata["needs"] == ["brightness"]
    with refused("missing", "brightness"):
        model.sample(count=1)
    with refused("unsupported", "labels"):
        model.sample([1], brightness=[0.5])


def test_it_resumes(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    longer = recipe(training={**RECIPE["training"], "steps": 14})
    assert [progress.step for progress in train(longer, tmp_path / "run")][-2:] == [13, 14]


def losses(folder: Path) -> list[float]:
    import tests.extension.toys  # noqa: F401 (registers in the other process)

    short = {**RECIPE["training"], "steps": 3, "tracker": "none"}
    return [progress.loss for progress in train(recipe(training=short), folder)]


def test_two_processes_take_the_same_steps(tmp_path: Path) -> None:
    alone = losses(tmp_path / "alone")
    for found in together(2, losses, tmp_path / "together"):
        # the same samples with the same noise; sums of two halves round differently
        assert found == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "code", "key"),
    [
        ({"network": {"kind": "pixelwize"}}, "unknown", "network.kind"),
        ({"conditioning": {"kind": "brightnes"}}, "unknown", "conditioning.kind"),
        ({"conditioning": {"kind": "labels", "highest": 0.5}}, "unknown", "conditioning.highest"),
        ({"conditioning": {"kind": "low_res"}}, "unknown", "conditioning.kind"),
    ],
)
def test_what_is_unknown_is_named(changes: dict[str, Any], code: Any, key: str) -> None:
    with refused(code, key):
        recipe(**{"network": {}, **changes})


def test_the_command_line_takes_a_file(tmp_path: Path) -> None:
    """In a process of its own, which has not imported the toys."""
    import subprocess
    import sys

    short = {**RECIPE, "training": {**RECIPE["training"], "steps": 2, "tracker": "none"}}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(short))
    toys = Path(__file__).with_name("toys.py")

    def carrara(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "carrara", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    assert carrara("train", tmp_path / "toy.yaml", "--out", tmp_path / "run").returncode == 2
    done = carrara("--extension", toys, "train", tmp_path / "toy.yaml", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["network"]["kind"] == "pixelwise"
    words = ("sample", tmp_path / "run", "--steps", 1, "--out", tmp_path / "samples", "--brightness")
    assert carrara(*words, 0.5).returncode == 2, "without the file there is no such option"
    for value in (2, "bright"):
        failed = carrara("--extension", toys, *words, value)
        assert (failed.returncode, "brightness" in failed.stderr, "Traceback" in failed.stderr) == (2, True, False)
    done = carrara("--extension", toys, *words, 0.5, "--brightness", -0.5, "--count", 3)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "samples").glob("seed*.png"))) == 3
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('no')")
    for path in (broken, tmp_path / "nowhere.py"):
        failed = carrara("--extension", path, "recipes")
        assert (failed.returncode, "Traceback" in failed.stderr, path.name in failed.stderr) == (2, False, True)
