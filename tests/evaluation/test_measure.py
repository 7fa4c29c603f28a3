"""All figures together: names, stamps, and bad models told apart by the right figure each time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from carrara.evaluation import Collected, Stamp, collect, compare, likeness, write_statistics
from carrara.evaluation.features import Pixels
from carrara.evaluation.measure import (
    measure_accuracy,
    measure_captions,
    measure_diversity,
    measure_frechet,
    measure_inception_score,
    measure_memory,
    measure_pairs,
)
from carrara.evaluation.pairs import measure_reconstruction
from carrara.evaluation.reference import read_statistics
from carrara.evaluation.stamp import from_json, to_json
from tests.errors import refused


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scanned digits: training images and labels, held-out ones; float32 [N, 1, 8, 8] in [-1, 1]."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels / 8 - 1, labels, test_size=360, random_state=0, stratify=labels)
    train, held_out = (torch.tensor(part).float().reshape(-1, 1, 8, 8) for part in parts[:2])
    return train, torch.tensor(parts[2]), held_out, torch.tensor(parts[3])


def seen(images: Tensor) -> Collected:
    return collect(images.split(100), Pixels())


STAMP = Stamp(n=360, shape=(1, 8, 8), reference="digits", reference_split="train", features="pixels")


def test_a_figure_is_called_fid_only_in_the_fid_networks_features(digits: tuple[Tensor, ...]) -> None:
    train, _, held_out, _ = digits
    assert set(measure_frechet(seen(held_out), seen(train), STAMP)) == {
        "frechet_distance",
        "frechet_distance_infinity",
    }
    official = replace(STAMP, features="inception-2015")
    assert set(measure_frechet(seen(held_out), seen(train), official)) == {"fid", "fid_infinity"}
    assert "kid" in measure_pairs(seen(held_out), seen(train), official)
    assert "kernel_distance" in measure_pairs(seen(held_out), seen(train), STAMP)
    assert "inception_score" in measure_inception_score(torch.zeros(20, 5), official)
    assert "class_score" in measure_inception_score(torch.zeros(20, 5), STAMP)


def test_every_figure_has_an_interval_that_holds_it_and_survives_the_disk(digits: tuple[Tensor, ...]) -> None:
    train, _, held_out, held_out_labels = digits
    figures = {
        **measure_frechet(seen(held_out), seen(train), STAMP),
        **measure_pairs(seen(held_out), seen(train), STAMP),
        **measure_memory(held_out, train, held_out, STAMP),
        **measure_diversity(held_out, held_out_labels, STAMP),
        **measure_accuracy(held_out_labels, held_out_labels, STAMP),
    }
    assert figures["frechet_distance"].value == pytest.approx(0.41, abs=0.005)  # known of this split
    for name, figure in figures.items():
        assert figure.interval is not None, name
        slack = 0.01 if name == "class_std" else 1e-12  # resampling within a class lowers its spread
        assert figure.interval.low - slack <= figure.value <= figure.interval.high + slack, name
    assert figures["precision"].stamp.settings["k"] == 3
    assert figures["coverage"].stamp.settings["k"] == 5
    assert from_json(to_json(figures)) == figures
    assert len(compare(figures, from_json(to_json(figures)))) == len(figures)


def test_a_reference_of_another_size_or_colour_is_refused(digits: tuple[Tensor, ...]) -> None:
    train, _, held_out, _ = digits
    with refused("shape", "resolution"):
        measure_frechet(seen(held_out), seen(train.expand(-1, 3, -1, -1)), STAMP)
    with refused("shape", "resolution"):
        measure_pairs(seen(held_out), seen(train[:, :, ::2, ::2]), STAMP)


def test_reconstructions_and_captions_are_measured_too(digits: tuple[Tensor, ...]) -> None:
    train, _, held_out, _ = digits
    figures = measure_reconstruction(likeness((held_out + 0.2).clamp(-1, 1), held_out), STAMP)
    assert figures["psnr"].value >= 20  # an error of 0.2, or less where it was clamped
    assert figures["psnr"].interval is not None
    equal = measure_reconstruction(likeness(held_out, held_out), STAMP)
    assert equal["psnr"].interval is not None
    assert equal["psnr"].value == 100
    assert "360 of 360 pictures count as equal" in equal["psnr"].note
    assert equal["ssim"].value == pytest.approx(1)
    embeddings = train.flatten(1)
    captions = measure_captions(embeddings, embeddings, STAMP)
    assert captions["clip_score"].value == pytest.approx(100)
    assert captions["caption_recall_at_1"].value == 1


def test_few_samples_are_said_to_be_few(digits: tuple[Tensor, ...]) -> None:
    train, _, held_out, _ = digits
    few = measure_frechet(seen(held_out[:40]), seen(train), STAMP)
    assert "40 samples for 64 dimensions" in few["frechet_distance"].note
    assert "frechet_distance_infinity" not in few


def test_without_all_rows_there_is_no_interval(digits: tuple[Tensor, ...]) -> None:
    train, _, held_out, _ = digits
    partial = collect([held_out], Pixels(), rows=100)
    figures = measure_frechet(partial, seen(train), STAMP)
    assert figures["frechet_distance"].interval is None
    assert measure_pairs(partial, seen(train), STAMP)["precision"].stamp.settings["rows"] == 100


def test_a_statistics_file_serves_as_reference(
    digits: tuple[Tensor, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    train, _, held_out, _ = digits
    path = tmp_path_factory.mktemp("stats") / "digits.npz"
    write_statistics(path, seen(train).statistics, {"features": "pixels"})
    from_file = measure_frechet(seen(held_out), read_statistics(path), STAMP)
    assert from_file == measure_frechet(seen(held_out), seen(train), STAMP)


class TestBadModelsAreToldApart:
    """Each failure moves its own figure far from where 360 held-out digits stand, as samples of 1,437."""

    def test_untrained(self, digits: tuple[Tensor, ...]) -> None:
        train, _, held_out, _ = digits
        noise = torch.randn(360, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
        bad, fine = measure_pairs(seen(noise), seen(train), STAMP), measure_pairs(seen(held_out), seen(train), STAMP)
        assert bad["precision"].value < 0.02 < 0.8 < fine["precision"].value
        far = measure_frechet(seen(noise), seen(train), STAMP)["frechet_distance"]
        assert far.value > 10

    def test_one_class_only(self, digits: tuple[Tensor, ...]) -> None:
        train, labels, held_out, _ = digits
        one = train[labels == 0]
        half, rest = one[: len(one) // 2], torch.cat([one[len(one) // 2 :], train[labels != 0]])
        bad, fine = measure_pairs(seen(half), seen(rest), STAMP), measure_pairs(seen(held_out), seen(train), STAMP)
        assert bad["precision"].value > 0.6  # every picture is a good digit
        assert bad["coverage"].value < 0.15 < 0.6 < fine["coverage"].value
        assert bad["recall"].value < 0.5 < 0.85 < fine["recall"].value

    def test_one_picture_a_class(self, digits: tuple[Tensor, ...]) -> None:
        train, labels, held_out, held_out_labels = digits
        means = torch.stack([train[labels == k].mean(0) for k in range(10)])
        bad = measure_diversity(means[held_out_labels], held_out_labels, STAMP)["class_std"]
        fine = measure_diversity(held_out, held_out_labels, STAMP)["class_std"]
        assert bad.value < 1e-6 < 0.6 * fine.value

    def test_a_copy_of_the_training_set(self, digits: tuple[Tensor, ...]) -> None:
        train, _, held_out, _ = digits
        jitter = 0.02 * torch.randn(train.shape, generator=torch.Generator().manual_seed(0))
        bad = measure_memory(train + jitter, train, held_out, STAMP)
        # Distances between sets see nothing wrong: it is the memorised share that tells.
        assert measure_frechet(seen(train + jitter), seen(train), STAMP)["frechet_distance"].value < 0.1
        assert bad["memorised_fraction"].value == 1
        assert bad["memorised_fraction"].interval is not None
        assert bad["memorised_fraction_held_out"].interval is not None
        assert bad["memorised_fraction_held_out"].interval.high < bad["memorised_fraction"].interval.low
        assert bad["distance_ratio"].value < 0.2 < 0.8 < bad["distance_ratio_held_out"].value

    def test_blurred(self, digits: tuple[Tensor, ...]) -> None:
        train, _, held_out, _ = digits
        blurred = F.avg_pool2d(F.pad(held_out, (1, 1, 1, 1), mode="replicate"), 3, 1)
        bad, fine = (
            measure_frechet(seen(images), seen(train), STAMP)["frechet_distance"] for images in (blurred, held_out)
        )
        assert bad.interval is not None
        assert fine.interval is not None
        assert bad.interval.low > 5 * fine.interval.high
        kernels = [measure_pairs(seen(x), seen(train), STAMP)["kernel_distance"] for x in (blurred, held_out)]
        assert kernels[0].interval is not None
        assert kernels[1].interval is not None
        assert kernels[0].interval.low > kernels[1].interval.high

    def test_the_wrong_class(self, digits: tuple[Tensor, ...]) -> None:
        labels = digits[3]
        shuffled = labels[torch.randperm(360, generator=torch.Generator().manual_seed(0))]
        figures = measure_accuracy(labels, shuffled, STAMP)
        assert figures["class_accuracy"].value < 0.2


def test_few_images_leave_out_what_needs_more_neighbours(digits: tuple[Tensor, ...]) -> None:
    train, _, held_out, _ = digits
    few, enough = (measure_pairs(seen(held_out[:n]), seen(train), STAMP) for n in (3, 6))
    assert few.keys() == {"kernel_distance"}
    assert "precision" in few["kernel_distance"].note
    assert {"kernel_distance", "precision", "recall", "density", "coverage"} == enough.keys()
