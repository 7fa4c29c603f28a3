"""`carrara evaluate`: what it measures, what it stamps, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from carrara.errors import UserError
from carrara.evaluation import Moments, frechet_distance, write_statistics
from carrara.evaluation.collect import collect
from carrara.evaluation.features import Inception, Pixels
from carrara.evaluation.features.inception_network import InceptionNetwork
from carrara.evaluation.pictures import Size, data_pictures
from carrara.images import from_uint8, save_npz, to_uint8
from carrara.model import DiffusionModel
from tests.cli.conftest import Command, photographs

Refused = Callable[..., str]


def everything(path: str | Path, split: str = "train") -> torch.Tensor:
    """All pictures of a data set, [N, C, H, W]."""
    return torch.cat(list(data_pictures(str(path), split).batches()))


def printed(carrara: Command, *words: str | Path) -> dict[str, Any]:
    """The figures that the command prints as JSON."""
    result = carrara("evaluate", *words, "--json")
    assert result.returncode == 0, result.stderr
    figures: dict[str, Any] = json.loads(result.stdout)
    return figures


@pytest.fixture
def halves(tmp_path: Path) -> tuple[Path, Path]:
    """The digits' held-out images cut in two, as archives with their labels."""
    pictures = data_pictures("digits", "test")
    images, labels = everything("digits", "test"), torch.tensor([int(name) for name in pictures.labels or ()])
    paths = tmp_path / "a.npz", tmp_path / "b.npz"
    for path, part in zip(paths, (slice(0, 180), slice(180, 360)), strict=True):
        save_npz(path, images[part], labels[part])
    return paths


def test_a_model_is_measured_as_its_own_samples_are(tiny_run: Path, carrara: Command) -> None:
    """The classes in turn, picture k from row k of the seed, rounded to 8 bits, whatever the batch size."""
    words = (
        "--reference",
        "digits",
        "--classes",
        "turn",
        "-n",
        "30",
        "--steps",
        "2",
        "--seed",
        "3",
        "--batch-size",
        "7",
    )
    figures = printed(carrara, tiny_run, *words)
    made = DiffusionModel.load(tiny_run).sample([i % 10 for i in range(30)], steps=2, seed=3)
    expected = frechet_distance(from_uint8(to_uint8(made.images)).flatten(1), everything("digits").flatten(1))
    # Batches of other sizes take their sums in another order: a pixel in some thousands may round to its neighbour.
    assert figures["frechet_distance"]["value"] == pytest.approx(expected, rel=1e-3)
    stamp = figures["frechet_distance"]["stamp"]
    assert stamp["n"] == 30
    assert stamp["sampling"]["seed"] == 3
    assert stamp["sampling"]["steps"] == 2
    assert stamp["sampling"]["classes"] == "in turn"
    assert "EMA" in stamp["sampling"]["weights"]
    assert stamp["reference_n"] == 1437
    assert "30 samples for 64 dimensions" in figures["frechet_distance"]["note"]
    assert "fid" not in figures
    assert {"kernel_distance", "precision", "recall", "density", "coverage", "class_std"} <= figures.keys()
    assert all(figure["interval"] is not None for figure in figures.values())


def uneven(tmp_path: Path) -> Path:
    """An archive of digits, three quarters of them ones and a quarter sevens."""
    pictures = data_pictures("digits", "test")
    assert pictures.labels is not None
    rows = [[i for i, label in enumerate(pictures.labels) if label == digit] for digit in ("1", "7")]
    chosen = rows[0][:24] + rows[1][:8]
    labels = torch.tensor([int(pictures.labels[i]) for i in chosen])
    save_npz(tmp_path / "uneven.npz", everything("digits", "test")[chosen], labels)
    return tmp_path / "uneven.npz"


def test_samples_take_the_classes_in_the_references_shares(tiny_run: Path, tmp_path: Path, carrara: Command) -> None:
    """Else the distance would be one of shares: rare classes would count as much as frequent ones."""
    words = ("--reference", uneven(tmp_path), "-n", "12", "--steps", "1", "--per-class")
    figures = printed(carrara, tiny_run, *words)
    assert figures["frechet_distance"]["stamp"]["sampling"]["classes"] == "in the reference's proportions"
    assert figures["frechet_distance[1]"]["stamp"]["n"] == 9
    assert figures["frechet_distance[7]"]["stamp"]["n"] == 3
    in_turn = printed(carrara, tiny_run, *words[:-1], "--classes", "turn")
    assert in_turn["frechet_distance"]["stamp"]["sampling"]["classes"] == "in turn"
    assert in_turn["frechet_distance"]["value"] != figures["frechet_distance"]["value"]


def test_shares_of_classes_that_are_not_there_are_refused(
    tiny_run: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    save_npz(tmp_path / "plain.npz", everything("digits", "test")[:20])
    save_npz(tmp_path / "other.npz", everything("digits", "test")[:20], torch.arange(20))
    words = ("evaluate", tiny_run, "-n", "4", "--steps", "1", "--classes", "reference", "--reference")
    assert "plain.npz" in refused(*words, tmp_path / "plain.npz")
    assert "'10'" in refused(*words, tmp_path / "other.npz")
    unknown = refused("evaluate", tiny_run, "--reference", "digits", "--classes", "turns")
    assert "did you mean 'turn'" in unknown


def test_nothing_is_written_unless_asked(tiny_run: Path, tmp_path: Path, carrara: Command) -> None:
    before = sorted(tiny_run.rglob("*"))
    words = ("--reference", "digits", "--n", "8", "--steps", "1")
    assert carrara("evaluate", tiny_run, *words, "--out", tmp_path / "f.json").returncode == 0
    assert sorted(tiny_run.rglob("*")) == before
    assert json.loads((tmp_path / "f.json").read_text()) == printed(carrara, tiny_run, *words)


def test_real_images_pass_for_real_and_copies_are_found(halves: tuple[Path, Path], carrara: Command) -> None:
    """One half of the held-out digits against the other; then the training images themselves as samples."""
    words = ("--train", "digits", "--evaluator", "svc")
    honest = printed(carrara, halves[0], "--reference", halves[1], *words)
    assert honest["class_accuracy"]["value"] > 0.85  # an SVC that learned from 180 digits
    assert honest["class_accuracy"]["stamp"]["settings"]["evaluator_rows"] == 180
    share, unseen = honest["memorised_fraction"], honest["memorised_fraction_held_out"]
    assert share["interval"]["low"] < unseen["interval"]["high"]  # both halves are unseen: their intervals overlap
    assert unseen["interval"]["low"] < share["interval"]["high"]
    copied = printed(carrara, "digits", "--n", "180", "--reference", halves[1], *words)
    assert copied["memorised_fraction"]["value"] == 1
    assert copied["distance_ratio"]["value"] == 0


def test_an_exact_copy_of_the_reference_is_at_distance_0(halves: tuple[Path, Path], carrara: Command) -> None:
    figures = printed(carrara, halves[0], "--reference", halves[0])
    assert figures["frechet_distance"]["value"] == pytest.approx(0, abs=1e-9)  # float64, distances of order 10
    assert figures["precision"]["value"] == figures["recall"]["value"] == figures["coverage"]["value"] == 1


def test_statistics_stand_in_for_their_images(halves: tuple[Path, Path], tmp_path: Path, carrara: Command) -> None:
    """The Fréchet distance is the same; figures that need pairs are not there."""
    moments = Moments.of(everything(halves[1]))
    path = tmp_path / "stats.npz"
    write_statistics(path, moments, {"features": "pixels", "features_checksum": ""})
    whole, known = (printed(carrara, halves[0], "--reference", real) for real in (halves[1], path))
    assert known["frechet_distance"]["value"] == pytest.approx(whole["frechet_distance"]["value"], rel=1e-9)
    assert "precision" in whole
    assert "precision" not in known


def test_the_folder_that_sample_wrote_is_read_without_its_grid(
    tiny_run: Path, tmp_path: Path, carrara: Command
) -> None:
    assert carrara("sample", tiny_run, "-n", "12", "--steps", "1", "--out", tmp_path / "s").returncode == 0
    figures = printed(carrara, tmp_path / "s", "--reference", "digits")
    assert figures["frechet_distance"]["stamp"]["n"] == 12
    assert "class_std" in figures


def test_the_table_shows_figures_and_protocol(halves: tuple[Path, Path], carrara: Command) -> None:
    result = carrara("evaluate", halves[0], "--reference", halves[1])
    assert result.returncode == 0, result.stderr
    for word in ("frechet_distance", "95 % interval", "reference_hash", "own size, [-1, 1]"):
        assert word in result.stdout


def test_alike_results_are_compared_and_others_refused(
    halves: tuple[Path, Path], tmp_path: Path, carrara: Command, refused: Refused
) -> None:
    a, b, c = (tmp_path / f"{name}.json" for name in "abc")
    for out, n in ((a, "100"), (b, "100"), (c, "90")):
        words = ("--reference", "digits", "--n", n, "--out", out)
        assert carrara("evaluate", halves[0] if out == a else halves[1], *words).returncode == 0
    shown = carrara("compare", a, b)
    assert shown.returncode == 0, shown.stderr
    assert "frechet_distance" in shown.stdout
    pairs = json.loads(carrara("compare", a, b, "--json").stdout)
    old = carrara("evaluate", "--compare", a, b, "--json")  # the spelling of the last release
    assert json.loads(old.stdout) == pairs
    assert "carrara compare" in old.stderr
    first, second = (json.loads(path.read_text())["recall"]["value"] for path in (a, b))
    assert pairs["recall"]["difference"] == second - first
    assert "n is 100 and 90" in refused("compare", a, c)
    varied = ("--varied", "n", "--varied", "settings")
    assert carrara("compare", a, c, *varied).returncode == 0
    assert "--subject" in refused("evaluate", halves[0], "--compare", a, b)
    assert "--reference" in refused("evaluate", "--compare", a, b, "--reference", "digits")
    assert "missing.json" in refused("compare", a, tmp_path / "missing.json")


def test_pictures_of_another_size_or_colour_mode_are_refused(
    tiny_run: Path, halves: tuple[Path, Path], tmp_path: Path, carrara: Command, refused: Refused
) -> None:
    photos = photographs(tmp_path / "photos", 12)
    assert "1×8×8" in refused("evaluate", halves[0], "--reference", photos)
    assert "3×20×17" in refused("evaluate", tiny_run, "--reference", photos, "--n", "8", "--steps", "1")
    assert "3×8×8" in refused("evaluate", halves[0], "--reference", photos, "--resolution", "8")
    brought = ("--reference", photos, "--resolution", "8", "--channels", "1", "--resize", "box")
    stamp = printed(carrara, halves[0], *brought)["frechet_distance"]["stamp"]
    assert stamp["shape"] == [1, 8, 8]
    assert "box" in stamp["resize"]
    Image.new("RGB", (9, 9)).save(photos / "small.png")
    assert "small.png has 9×9 pixels" in refused("evaluate", photos, "--reference", photos)
    Image.new("L", (17, 20)).save(photos / "small.png")
    assert "small.png has 1 channels" in refused("evaluate", photos, "--reference", photos)


def test_damaged_and_missing_inputs_are_named(
    tiny_run: Path, halves: tuple[Path, Path], tmp_path: Path, refused: Refused
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty is empty" in refused("evaluate", empty, "--reference", "digits")
    assert "empty is empty" in refused("evaluate", tiny_run, "--reference", empty)
    photos = photographs(tmp_path / "photos", 12)
    (photos / "7.png").write_bytes((photos / "7.png").read_bytes()[:200])
    assert "7.png cannot be read" in refused("evaluate", photos, "--reference", photos)
    cut = tmp_path / "cut.npz"
    cut.write_bytes(halves[0].read_bytes()[:500])
    assert "cut.npz" in refused("evaluate", halves[0], "--reference", cut)
    assert "no data at" in refused("evaluate", tmp_path / "missing", "--reference", "digits")
    assert "fewer than the 181" in refused("evaluate", halves[0], "--reference", "digits", "--n", "181")
    assert "n must be at least 1" in refused("evaluate", tiny_run, "--reference", "digits", "--n", "0")


def test_statistics_of_other_features_are_refused(halves: tuple[Path, Path], tmp_path: Path, refused: Refused) -> None:
    other, wide = tmp_path / "other.npz", tmp_path / "wide.npz"
    write_statistics(other, Moments.of(everything(halves[1])), {"features": "inception-2015"})
    assert "'inception-2015'" in refused("evaluate", halves[0], "--reference", other)
    np.savez(wide, mu=np.zeros(2048), sigma=np.eye(2048))
    assert "2048 dimensions" in refused("evaluate", halves[0], "--reference", wide)
    assert "--reference of images" in refused("evaluate", halves[0], "--reference", wide, "--train", "digits")


def test_words_that_would_change_nothing_are_refused(
    tiny_run: Path, halves: tuple[Path, Path], tmp_path: Path, refused: Refused
) -> None:
    real = ("--reference", "digits")
    assert "--steps" in refused("evaluate", halves[0], *real, "--steps", "5")
    assert "--split" in refused("evaluate", tiny_run, *real, "--split", "test")
    assert "--varied" in refused("evaluate", tiny_run, *real, "--varied", "n")
    assert "--train-split" in refused("evaluate", tiny_run, *real, "--train-split", "test")
    assert "--resize" in refused("evaluate", tiny_run, *real, "--resize", "box")
    assert "--reference" in refused("evaluate", tiny_run)
    assert "'me'" in refused("evaluate", tiny_run, *real, "--evaluator", "me")
    assert "'moon'" in refused("evaluate", tiny_run, *real, "--device", "moon")
    assert "reference itself" in refused("evaluate", tiny_run, *real, "--train", "digits")
    photos = photographs(tmp_path / "photos", 8)
    assert "samples with classes" in refused("evaluate", photos, *real, "--evaluator", "svc")


def test_a_part_of_a_sorted_data_set_holds_every_class(tmp_path: Path) -> None:
    """The first 20 of 40 pictures sorted by class are of two classes of four; a part that is drawn is not."""
    folder = photographs(tmp_path / "sorted", 40, classes=4)
    part = data_pictures(str(folder), count=20)
    assert len(set(part.labels or ())) == 4
    assert sum(map(len, part.batches())) == 20


def test_the_batch_size_of_reading_changes_nothing(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "photos", 11)
    size = Size((8, 8))
    found = [collect(data_pictures(str(folder), size=size, batch_size=b).batches(), Pixels()) for b in (3, 256)]
    assert found[0].content == found[1].content
    assert torch.equal(found[0].statistics.covariance, found[1].statistics.covariance)


def inception(official: bool) -> Inception:
    """The FID network with random weights, under either name."""
    torch.manual_seed(0)
    return Inception(InceptionNetwork(), "0" * 64, official)


@pytest.mark.parametrize(("official", "names"), [(True, {"fid", "kid", "inception_score"}), (False, {"class_score"})])
def test_only_the_weights_of_2015_make_a_fid(
    official: bool, names: set[str], tmp_path: Path, carrara: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("carrara.app.evaluate.open_features", lambda word, device, checksum: inception(official))
    few = tmp_path / "few.npz"
    save_npz(few, everything("digits", "test")[:10])
    figures = printed(carrara, few, "--reference", few, "--features", "inception=weights.pth")
    assert names <= figures.keys()
    assert ("fid" in figures) is official
    note = figures["fid" if official else "frechet_distance"]["note"]
    assert "10 samples for 2,048 dimensions" in note


def test_what_would_fail_late_is_refused_before_the_reference_is_read(
    tiny_run: Path, halves: tuple[Path, Path], tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the reference was read")

    monkeypatch.setattr("carrara.evaluation.reference.collected_reference", never)
    real = ("--reference", "digits")
    (tmp_path / "file").write_text("mine")
    assert "2000" in refused("evaluate", tiny_run, *real, "--steps", "2000")
    assert "foo" in refused("evaluate", tiny_run, *real, "--solver", "foo")
    assert "foo" in refused("evaluate", tiny_run, *real, "--spacing", "foo")
    assert "nowhere" in refused("evaluate", tmp_path / "nowhere", *real)
    assert "181" in refused("evaluate", halves[0], *real, "--n", "181")
    photos = photographs(tmp_path / "photos", 4)
    for wish in (("--evaluator", "svc"), ("--per-class",)):
        assert wish[0] in refused("evaluate", photos, *real, *wish)
    for option in ("--out", "--report"):
        assert str(tmp_path) in refused("evaluate", halves[0], *real, option, tmp_path)
        assert "file" in refused("evaluate", halves[0], *real, option, tmp_path / "file" / "x")
    assert "no table" in refused("evaluate", halves[0], *real, "--report", tmp_path / "r.html", "--tables", tmp_path)
    assert "file" in refused("sweep", tiny_run, *real, "--table", "guidance", "--out", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_metrics_are_printed_although_they_cannot_be_written(
    halves: tuple[Path, Path], tmp_path: Path, carrara: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk may be full by then."""

    def full(*_: object) -> None:
        raise UserError("the disk is full.", key="out", code="resources")

    monkeypatch.setattr("carrara.app.evaluate.write_whole", full)
    result = carrara("evaluate", halves[0], "--reference", halves[1], "--out", tmp_path / "x.json", "--json")
    assert result.returncode == 2
    assert "frechet_distance" in json.loads(result.stdout)


def test_names_that_look_like_markup_are_printed_as_they_are(tmp_path: Path, carrara: Command) -> None:
    rng = np.random.default_rng(0)
    root = tmp_path / "[v2]"
    for name in ("[INST]", "[bold]", ":smile:"):
        (root / name).mkdir(parents=True)
        for k in range(4):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / name / f"{k}.png")
    out = root / "[red]x.json"
    result = carrara("evaluate", root, "--reference", root, "--per-class", "--out", out)
    assert result.returncode == 0, result.stderr
    for name in ("[INST]", "[bold]", ":smile:", "[red]x.json"):
        assert name in result.stdout
    assert str(out) in result.stdout
