"""The real data sets next to the project, where they are there."""

from __future__ import annotations

import time

import pytest
import torch

from carrara.data import Batches, Preprocess, open_source
from carrara.data.check import check_data
from tests.shared import shared

COUNTS = {
    ("cifar10", "train"): 50_000,
    ("cifar10", "test"): 8_000,
    ("emoji", "train"): 3_521,
    ("emoji", "test"): 192,
    ("clothing", "train"): 3_068,
    ("clothing", "validation"): 341,
    ("clothing", "test"): 372,
}


@pytest.mark.parametrize(("name", "split"), COUNTS)
def test_splits_have_their_documented_size(name: str, split: str) -> None:
    source = open_source(shared("data", name), split=split)
    assert len(source) == COUNTS[name, split]
    assert source.class_names is not None
    assert len(source.class_names) == 10
    assert source.has_captions == (name != "cifar10")
    assert source.warnings == []


def test_cifar10_is_open_within_seconds() -> None:
    path = shared("data", "cifar10")
    began = time.perf_counter()
    source = open_source(path)
    batch = Batches(source, Preprocess(32, 32), batch_size=64, cache="none").at(0)
    # It takes 0.5 s here; ten times that still leaves two thirds of the 15 s to the first step.
    assert time.perf_counter() - began < 5
    assert batch.images.shape == (64, 3, 32, 32)


def test_cifar10_has_the_documented_mean_and_deviation() -> None:
    batches = Batches(open_source(shared("data", "cifar10"), split="test"), Preprocess(32, 32), batch_size=8000)
    pixels = (batches.at(0).images + 1) / 2
    # The training split's statistics; 8,000 pictures vary by about 0.25 / sqrt(8000) ~ 0.003, taken thrice.
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.tensor([0.4913, 0.4821, 0.4465]), atol=0.009, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3)), torch.tensor([0.2452, 0.2428, 0.2606]), atol=0.009, rtol=0)


def test_clothing_is_cropped_from_its_middle() -> None:
    report = check_data(shared("data", "clothing"), split="test", batch_size=8)
    assert report.ok
    assert report.sizes["shorter_side"] == [128, 128, 128]
    assert any("centre crop cuts away" in line for line in report.warnings)
    images = Batches(open_source(shared("data", "clothing"), "test"), Preprocess(64, 64), batch_size=8).at(0).images
    assert images.shape == (8, 3, 64, 64)


def test_emoji_captions_go_with_their_pictures() -> None:
    source = open_source(shared("data", "emoji"))
    batch = Batches(source, Preprocess(64, 64), seed=4, batch_size=16).at(2)
    assert batch.captions is not None
    assert batch.label is not None
    for image, caption, label, name in zip(
        batch.images, batch.captions, batch.label.tolist(), batch.names, strict=True
    ):
        example = source[int(name.split()[-1])]
        assert (example.caption, example.label) == (caption, label)
        assert torch.equal(((image + 1) * 127.5).round().to(torch.uint8), Preprocess(64, 64)(example.image))


def test_video_tables_are_told_apart() -> None:
    from carrara.errors import UserError

    with pytest.raises(UserError, match=r"no column of encoded images; its columns are: frames"):
        open_source(shared("data", "video", "test.parquet"))
