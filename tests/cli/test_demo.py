"""The demo: what it writes, that it repeats itself to the byte, and (slow) what it must reach."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from carrara.app.demo import Budget, DemoRequest, demo
from carrara.app.events import Event, Metrics, Preview, Saved
from tests.browser import Tree, browse
from tests.runs import TINY

SMALL = Budget(guided=40, unguided=40, curve_samples=30, curve_steps=(2, 3), solvers=("ddim", "dpm++2m"))


def make_demo(folder: Path) -> list[Event]:
    return list(demo(DemoRequest(out=folder, changes=TINY), SMALL))


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    make_demo(folder)
    return folder


def test_the_files_that_others_read(demo_run: Path) -> None:
    assert (demo_run / "model" / "config.json").exists()
    for name, count in (("samples.npz", 40), ("samples_unguided.npz", 40)):
        with np.load(demo_run / "samples" / name) as archive:
            assert archive["arr_0"].shape == (count, 8, 8, 1)
            assert archive["arr_0"].dtype == np.uint8
            assert archive["arr_1"].shape == (count,)
    report = json.loads((demo_run / "report.json").read_text())
    names = [figure["name"] for figure in report["metrics"]]
    assert len(names) == len(set(names)) == 8
    assert all(np.isfinite(figure["value"]) and figure["protocol"] for figure in report["metrics"])
    assert {"setting up", "training", "sampling", "comparing solvers", "measuring"} == set(report["timings"])


def test_what_is_measured_is_what_the_files_hold(demo_run: Path) -> None:
    """The evaluator's predictions and the distance, computed again from the npz files alone."""
    import torch
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from sklearn.svm import SVC

    from carrara.evaluation import frechet_distance

    pixels, labels = load_digits(return_X_y=True)
    train, held_out, train_labels, _ = train_test_split(pixels, labels, test_size=360, random_state=0, stratify=labels)
    evaluator = SVC(C=10).fit(train / 8 - 1, train_labels)
    report = json.loads((demo_run / "report.json").read_text())
    figures = {figure["name"]: figure["value"] for figure in report["metrics"]}
    assert figures["Digits predicted rightly, held-out images"] == pytest.approx(99.44, abs=0.01)
    real = frechet_distance(torch.from_numpy(train / 8 - 1), torch.from_numpy(held_out / 8 - 1))
    # float32 pixels, multiples of 1/8, are exact; the distance itself is float64.
    assert figures["Fréchet distance, training to held-out images"] == pytest.approx(real, rel=1e-6)
    with np.load(demo_run / "samples" / "samples.npz") as archive:
        read = evaluator.predict(archive["arr_0"].reshape(-1, 64) / 127.5 - 1) == archive["arr_1"]
    assert figures["Digits of the requested class, guided"] == pytest.approx(100 * read.mean())


def test_two_demos_of_one_seed_are_equal(demo_run: Path, tmp_path: Path) -> None:
    make_demo(tmp_path / "run")
    same = [
        "model/network.safetensors",
        "model/config.json",
        "samples/samples.npz",
        "samples/samples_unguided.npz",
        "samples/grid.png",
        "samples/step-00000012-ema.png",
    ]
    for name in same:
        assert (demo_run / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name
    mine, theirs = (json.loads((run / "report.json").read_text()) for run in (demo_run, tmp_path / "run"))
    mine.pop("timings")
    theirs.pop("timings")
    assert mine == theirs


def test_samples_and_a_first_report_come_before_the_comparison_of_solvers(tmp_path: Path) -> None:
    """And closing the generator after them leaves both."""
    events = demo(DemoRequest(out=tmp_path / "run", changes=TINY), SMALL)
    seen: list[str] = []
    for event in events:
        seen += [event.what] if isinstance(event, Saved) else [event.name] if isinstance(event, Metrics) else []
        seen += ["preview"] if isinstance(event, Preview) else []
        if seen[-1:] == ["report"]:
            break
    events.close()  # type: ignore[attr-defined]
    assert [name for name in seen if name != "log"] == ["start", "model", "preview", "samples", "demo", "report"]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Quality against number of steps" not in page
    assert "Nearest training image" in page


def test_the_budget_is_at_most_45_per_cent_of_the_first_demos() -> None:
    """In passes of one image through the network, of which a training step takes three (forward, backward)."""
    from carrara.app.demo import CHANGES, STEPS
    from carrara.recipe import DiffusionRecipe, load

    budget, recipe = Budget(), load("digits", CHANGES)
    assert isinstance(recipe, DiffusionRecipe)
    training = recipe.training
    previews = training.steps // training.sample_every * 2 * recipe.sampling.count * recipe.sampling.steps * 2
    samples = STEPS * (2 * budget.guided + budget.unguided)
    curves = len(budget.solvers) * budget.curve_samples * sum(budget.curve_steps)
    work = 3 * training.steps * training.batch_size + previews + samples + curves
    first = 3 * 800 * 128 + 2 * 2 * 40 * 20 * 2 + 3 * 20 * (2 * 1000 + 1797) + 4 * 500 * (5 + 10 + 20 + 50)
    assert work <= 0.45 * first


def test_the_report_has_every_section(demo_run: Path) -> None:
    page = (demo_run / "report.html").read_text(encoding="utf-8")
    root = Tree(page).root
    for words in (
        "Samples",
        "Held-out images",
        "Nearest training image",
        "being denoised",
        "Loss by quarter of t",
        "Quality against number of steps",
        "Metrics and their protocol",
        "learning_rate",
        "Versions",
        "Timings",
    ):
        assert words in page, words
    assert len(root.all("img")) > 150
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_the_report_fits_a_phone_and_a_desktop(demo_run: Path, tmp_path: Path, width: int, scheme: str) -> None:
    page = (demo_run / "report.html").read_text(encoding="utf-8")
    measured, complaints, _ = browse(page, width, scheme, tmp_path)
    assert measured["overflow"] == 0
    assert complaints == []
    assert measured["pictures"] == len(Tree(page).root.all("img"))


@pytest.mark.slow
def test_the_demo_reaches_its_targets(tmp_path: Path) -> None:
    """The real thing, as a user starts it: every metric with a target, and the memory."""
    command = [sys.executable, "-m", "carrara", "demo", "--out", str(tmp_path / "demo")]
    subprocess.run(command, check=True, timeout=1200)
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    missed = [figure["name"] for figure in report["metrics"] if figure["reached"] is False]
    assert missed == []
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    assert peak < 2, f"{peak:.2f} GiB at the peak"
