"""`carrara evaluate`: every kind of input it takes, and every bad one it refuses in a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from carrara import codecs
from carrara.classifier import Classifier
from carrara.codecs.perceptual import VGG16
from carrara.evaluation import Moments, data_pictures, frechet_distance
from carrara.evaluation.features.checksum import file_checksum
from carrara.evaluation.features.inception_network import InceptionNetwork
from carrara.images import from_uint8, save_npz, to_uint8
from carrara.interop import lpips
from carrara.model import DiffusionModel
from tests.cli.conftest import Command, photographs
from tests.codecs.small import make
from tests.evaluation.clips import save_clip
from tests.test_classifier import untrained

Refused = Callable[..., str]


def printed(carrara: Command, *words: str | Path) -> dict[str, Any]:
    """The figures that the command prints as JSON."""
    result = carrara("evaluate", *words, "--json")
    assert result.returncode == 0, result.stderr
    figures: dict[str, Any] = json.loads(result.stdout)
    return figures


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs(tmp_path_factory.mktemp("photos"), 24)


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 colour pictures of 32×32 pixels."""
    folder = tmp_path_factory.mktemp("square")
    rng = np.random.default_rng(1)
    for k in range(8):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    return folder


# ---- a model's own knowledge ----------------------------------------------------------------------------------


def test_held_out_pictures_need_no_reference(tiny_run: Path, carrara: Command, refused: Refused) -> None:
    words = (tiny_run, "--held-out", "digits", "--held-out-n", "6", "--variance", "large")
    figures = printed(carrara, *words)
    assert set(figures) == {
        "bits_per_dimension",
        "bits_prior",
        "bits_matching",
        "bits_reconstruction",
        "flow_bits_per_dimension",
    }
    assert all(figure["interval"]["low"] <= figure["value"] for figure in figures.values())
    assert figures["bits_per_dimension"]["stamp"]["settings"]["variance"] == "large"
    assert figures["bits_per_dimension"]["stamp"]["reference_split"] == "test"
    assert len(figures["bits_per_dimension"]["details"]["terms"]) == 1000
    assert "--held-out" in refused("evaluate", "digits", "--held-out", "digits")
    assert "did you mean 'small'" in refused("evaluate", *words[:-1], "smal")
    assert "--steps" in refused("evaluate", *words, "--steps", "3")


# ---- pairs of pictures ----------------------------------------------------------------------------------------


def test_pictures_are_held_against_their_originals(
    square: Path, photos: Path, tmp_path: Path, carrara: Command, refused: Refused
) -> None:
    """Two gray levels of error everywhere: 10·log₁₀(255²/4) dB."""
    worse = tmp_path / "worse"
    worse.mkdir()
    for file in square.iterdir():
        pixels = np.asarray(Image.open(file)).astype(int)
        Image.fromarray((pixels + np.where(pixels > 127, -2, 2)).astype(np.uint8)).save(worse / file.name)
    figures = printed(carrara, worse, "--originals", square)
    assert figures["psnr"]["value"] == pytest.approx(10 * np.log10(255**2 / 4))
    assert 0.9 < figures["ssim"]["value"] < 1
    assert figures["psnr"]["interval"]["low"] <= figures["psnr"]["value"] + 1e-9
    assert figures["psnr"]["stamp"]["reference"] == square.name
    same = printed(carrara, square, "--originals", square)
    assert same["ssim"]["value"] == pytest.approx(1)
    assert same["psnr"]["value"] == 100
    assert "8 of 8 pictures" in same["psnr"]["note"]
    assert "contains 8 pictures" in refused("evaluate", square, "--originals", photos)
    assert "has no partner" in refused("evaluate", photos, "--n", "8", "--originals", square)
    few = photographs(tmp_path / "few", 8)
    assert "3×32×32" in refused("evaluate", few, "--originals", square)


def test_a_learned_distance_carries_its_checksum(
    square: Path, tmp_path: Path, carrara: Command, refused: Refused
) -> None:
    """VGG-16 of random weights, under torchvision's names."""
    torch.manual_seed(0)
    state, number, channels = {}, 0, 3
    for depth, widths in enumerate(VGG16):
        number += depth > 0
        for width in widths:
            state[f"features.{number}.weight"] = torch.randn(width, channels, 3, 3) / (3 * channels**0.5)
            state[f"features.{number}.bias"] = torch.zeros(width)
            number, channels = number + 2, width
    weights = tmp_path / "vgg.pth"
    torch.save(state, weights)
    images = torch.cat(list(data_pictures(str(square)).batches()))
    copy = tmp_path / "copy.npz"
    save_npz(copy, images.flip(0))
    checksum = file_checksum(weights)
    words = (copy, "--originals", square, "--lpips", weights)
    found = printed(carrara, *words, "--lpips-checksum", checksum)["lpips"]
    with torch.no_grad():
        expected = lpips.from_state_dict(state)(images.flip(0), images).mean()
    assert found["value"] == pytest.approx(float(expected), rel=1e-4)
    assert found["stamp"]["settings"]["weights"] == checksum
    assert "another file" in refused("evaluate", *words, "--lpips-checksum", "0" * 64)
    assert "--lpips" in refused("evaluate", copy, "--reference", square, "--lpips", weights)
    small = ("--resolution", "8", "--lpips", weights)
    assert "halves images four times" in refused("evaluate", copy, "--originals", square, *small)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_codec_is_measured_by_what_it_leaves(
    kind: str, square: Path, tiny_run: Path, tmp_path: Path, carrara: Command, refused: Refused
) -> None:
    codec = make(kind)
    codecs.save(codec, tmp_path)
    images = torch.cat(list(data_pictures(str(square)).batches()))
    with torch.no_grad():
        left = from_uint8(to_uint8(codec.eval().decode(codec.encode(images).mode())))
    expected = 10 * torch.log10(4 / (left - images).double().square().mean((1, 2, 3)))
    found = printed(carrara, tmp_path, "--originals", square)["psnr"]
    assert found["value"] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert found["stamp"]["sampling"]["codec"] == kind
    assert found["stamp"]["sampling"]["codec_hash"] == codecs.content_hash(codec)
    assert "--originals" in refused("evaluate", tmp_path, "--reference", square)
    distance = printed(carrara, tmp_path, "--originals", square, "--reference", square)["frechet_distance"]
    save_npz(tmp_path / "left.npz", left)
    assert distance["value"] == pytest.approx(
        printed(carrara, tmp_path / "left.npz", "--reference", square)["frechet_distance"]["value"], rel=1e-6
    )
    assert "no codec" in refused("evaluate", tiny_run, "--originals", "digits", "--n", "4")


def test_a_codebook_is_measured_by_its_use(square: Path, tmp_path: Path, carrara: Command) -> None:
    """Indices take log₂ K bits each; a continuous latent takes its float32 numbers."""
    codec = make("vq").eval()
    codecs.save(codec, tmp_path / "vq")
    images = torch.cat(list(data_pictures(str(square)).batches()))
    with torch.no_grad():
        indices = codec.encode(images).indices  # type: ignore[attr-defined]
    entries = codec.code_usage.share.numel()  # type: ignore[union-attr]
    share = torch.bincount(indices.flatten()).double() / indices.numel()
    found = printed(carrara, tmp_path / "vq", "--originals", square)
    assert found["codebook_use"]["value"] == pytest.approx(len(indices.unique()) / entries)
    assert found["codebook_perplexity"]["value"] == pytest.approx(float(torch.special.entr(share).sum().exp()))
    assert found["latent_bytes"]["value"] == pytest.approx(indices[0].numel() * np.log2(entries) / 8)
    codecs.save(make("kl"), tmp_path / "kl")
    found = printed(carrara, tmp_path / "kl", "--originals", square)
    assert found["latent_bytes"]["value"] == 4 * make("kl").encode(images[:1]).mode().numel()
    assert "codebook_use" not in found


# ---- captions -------------------------------------------------------------------------------------------------


def test_captions_are_compared_by_clip(square: Path, tmp_path: Path, carrara: Command, refused: Refused) -> None:
    """From a file of lines, or from the data set itself."""
    (tmp_path / "clip").mkdir()
    clip = save_clip(tmp_path / "clip")
    lines = ["a cat", "a dog", "a red cat", "to rot", "a goat", "a toad", "dot", "a tree"]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    words = (square, "--reference", square, "--features", f"clip={clip}")
    given = printed(carrara, *words, "--captions", tmp_path / "lines.txt")
    assert 0 <= given["clip_score"]["value"] <= 100
    assert given["caption_recall_at_10"]["value"] == 1  # of eight captions
    assert given["clip_score"]["interval"] is not None
    assert given["clip_score"]["stamp"]["features"] == "clip clip"
    assert len(given["clip_score"]["stamp"]["features_checksum"]) == 64
    captioned = tmp_path / "captioned"
    captioned.mkdir()
    for k, line in enumerate(lines):
        (captioned / f"{k}.png").write_bytes((square / f"{k}.png").read_bytes())
        (captioned / f"{k}.txt").write_text(line)
    own = printed(carrara, captioned, "--reference", square, "--features", f"clip={clip}")
    assert own["clip_score"]["value"] == pytest.approx(given["clip_score"]["value"])
    assert "clip_score" not in printed(carrara, *words)
    options = ("--features", f"clip={clip}", "--captions")
    (tmp_path / "four.txt").write_text("a cat\n" * 4)
    assert "leave --n out" in refused("evaluate", *words, "--n", "4", "--captions", tmp_path / "four.txt")
    for k in range(8, 12):
        lines.append("a cat")
        (square / f"{k}.png").write_bytes((square / f"{k - 8}.png").read_bytes())
    (tmp_path / "more.txt").write_text("\n".join(lines))
    assert "10.png" in refused("evaluate", square, "--reference", captioned, *options, tmp_path / "more.txt")
    for k in range(8, 12):
        (square / f"{k}.png").unlink()
    (tmp_path / "few.txt").write_text("a cat\n")
    assert "holds 1 captions for 8 pictures" in refused("evaluate", *words, "--captions", tmp_path / "few.txt")
    assert "none.txt" in refused("evaluate", *words, "--captions", tmp_path / "none.txt")
    pixels = ("evaluate", square, "--reference", square, "--captions", tmp_path / "lines.txt")
    assert "--captions" in refused(*pixels)


# ---- a classifier that Carrara trained ------------------------------------------------------------------------


def test_a_trained_classifier_judges_and_tells_features(
    tiny_run: Path, tmp_path: Path, carrara: Command, refused: Refused
) -> None:
    classifier = untrained()
    classifier.save(tmp_path)
    words = (tiny_run, "--reference", "digits", "--n", "40", "--steps", "1", "--batch-size", "16")
    found = printed(carrara, *words, "--evaluator", tmp_path, "--features", f"classifier={tmp_path}")
    made = DiffusionModel.load(tiny_run).sample([k % 10 for k in range(40)], steps=1).images
    read = Classifier.load(tmp_path).read(from_uint8(to_uint8(made)))
    share = float((read == torch.arange(40) % 10).double().mean())
    # A picture at the border of two classes may be read otherwise in a batch of another size.
    assert found["class_accuracy"]["value"] == pytest.approx(share, abs=1 / 40)
    assert found["class_accuracy"]["stamp"]["settings"]["evaluator"] == "classifier, random"
    assert found["frechet_distance"]["stamp"]["features"] == "classifier"
    assert torch.tensor(found["class_accuracy"]["details"]["confusion"]).sum() == 40
    assert "'me'" in refused("evaluate", *words, "--evaluator", "me")
    assert "holds a classifier model" in refused("evaluate", tmp_path, "--reference", "digits")


# ---- ADM's archives -------------------------------------------------------------------------------------------


def test_an_archive_of_adm_tells_distance_by_its_statistics_and_pairs_by_its_images(
    tmp_path: Path, carrara: Command
) -> None:
    """Statistics of the whole set, and the first images of it; sFID's are reported as unused."""
    everything = torch.cat(list(data_pictures("digits").batches()))
    samples, archive = tmp_path / "samples.npz", tmp_path / "adm.npz"
    save_npz(samples, torch.cat(list(data_pictures("digits", "test").batches())))
    statistics = Moments.of(everything).statistics()
    np.savez(
        archive,
        arr_0=to_uint8(everything[:300]).numpy(),
        mu=statistics.mean.numpy(),
        sigma=statistics.covariance.numpy(),
        mu_s=np.zeros(5),
        sigma_s=np.eye(5),
    )
    shown = carrara("evaluate", samples, "--reference", archive)
    assert "statistics of sFID, too (mu_s, sigma_s)" in shown.stdout.replace("\n", " ")
    figures = printed(carrara, samples, "--reference", archive)
    rows = torch.cat(list(data_pictures(str(samples)).batches()))
    expected = frechet_distance(rows.flatten(1), everything.flatten(1))
    assert figures["frechet_distance"]["value"] == pytest.approx(expected, rel=1e-9)
    assert figures["precision"]["stamp"]["settings"]["reference_rows"] == 300
    # Statistics of 2,048 dimensions are of no use for pixels; the images in the same file are.
    np.savez(archive, arr_0=to_uint8(everything[:300]).numpy(), mu=np.zeros(2048), sigma=np.eye(2048))
    shown = carrara("evaluate", samples, "--reference", archive)
    assert "its 300 images are the reference instead" in shown.stdout.replace("\n", " ")
    found = printed(carrara, samples, "--reference", archive)["frechet_distance"]
    assert found["value"] == pytest.approx(frechet_distance(rows.flatten(1), everything[:300].flatten(1)), rel=1e-9)
    assert found["stamp"]["reference_n"] == 300


# ---- bad input ------------------------------------------------------------------------------------------------


def test_identical_images_are_measured_without_any_variance(tmp_path: Path, carrara: Command) -> None:
    """The distance of a point from a normal distribution: |μ - c|² + Tr Σ; every other figure is a number, too."""
    same, real = tmp_path / "same.npz", tmp_path / "real.npz"
    images = torch.cat(list(data_pictures("digits", "test").batches()))
    save_npz(same, images[:1].expand(80, -1, -1, -1), torch.zeros(80))
    save_npz(real, images, torch.zeros(360))
    figures = printed(carrara, same, "--reference", real)
    rows = images.flatten(1).double()
    expected = (rows.mean(0) - rows[0]).square().sum() + rows.var(0).sum()
    assert figures["frechet_distance"]["value"] == pytest.approx(float(expected), rel=1e-6)
    assert figures["class_std"]["value"] == 0
    assert figures["recall"]["value"] < 0.01
    backwards = printed(carrara, real, "--reference", same)
    assert backwards["frechet_distance"]["value"] == pytest.approx(float(expected), rel=1e-6)
    both = printed(carrara, same, "--reference", same)
    assert both["frechet_distance"]["value"] == 0
    for found in (figures, backwards, both):
        assert all(np.isfinite(figure["value"]) for figure in found.values())


def test_features_that_are_no_numbers_are_refused(tmp_path: Path, refused: Refused) -> None:
    """From a feature network that is broken, or in a file of statistics."""
    broken = untrained()
    with torch.no_grad():
        next(iter(broken.network.parameters())).fill_(torch.nan)
    broken.save(tmp_path)
    words = ("evaluate", "digits", "--n", "20", "--reference", "digits")
    sentence = refused(*words, "--features", f"classifier={tmp_path}")
    assert "the features contain NaN or infinite numbers, first in row 0" in sentence
    np.savez(tmp_path / "nan.npz", mu=np.full(64, np.nan), sigma=np.eye(64))
    assert "nan.npz' has NaN" in refused("evaluate", "digits", "--reference", tmp_path / "nan.npz")


def test_inception_weights_of_another_checksum_are_refused(tmp_path: Path, carrara: Command, refused: Refused) -> None:
    """With its own checksum a file is used on purpose, and its distance is not called FID."""
    torch.manual_seed(0)
    weights = tmp_path / "inception.pth"
    torch.save(InceptionNetwork().state_dict(), weights)
    few = tmp_path / "few.npz"
    save_npz(few, torch.cat(list(data_pictures("digits", "test", 10).batches())))
    words = ("evaluate", few, "--reference", few, "--features", f"inception={weights}")
    sentence = refused(*words)
    assert f"{file_checksum(weights)[:16]}" in sentence
    assert "another file" in sentence
    assert "has SHA-256" in refused(*words, "--checksum", "0" * 64)
    assert "no Inception weights" in refused(*words[:-1], "inception=nowhere.pth")
    figures = printed(carrara, *words[1:], "--checksum", file_checksum(weights))
    assert "frechet_distance" in figures
    assert "fid" not in figures
    assert figures["frechet_distance"]["stamp"]["features_checksum"] == file_checksum(weights)
    assert "only Inception's weights" in refused(*words[:-1], "pixels", "--checksum", "0" * 64)
