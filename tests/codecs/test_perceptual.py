"""Perceptual distances: LPIPS from a local file, and the features of a classifier of our own."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from carrara.codecs.perceptual import LPIPS, VGG16, ClassifierFeatures, feature_distance
from carrara.networks import EncoderClassifier, EncoderClassifierParams
from tests.codecs.small import pictures
from tests.errors import refused

CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
"""The places of VGG-16's convolutions in torchvision's sequence; pools follow 2, 7, 14, 21 and 28."""
GROUP_ENDS = (2, 7, 14, 21, 28)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """VGG-16 and channel weights, drawn; under the names of torchvision and of LPIPS."""
    generator = torch.Generator().manual_seed(0)
    widths = [width for group in VGG16 for width in group]
    state: dict[str, Tensor] = {}
    channels = 3
    for place, width in zip(CONVOLUTIONS, widths, strict=True):
        state[f"features.{place}.weight"] = (
            torch.randn(width, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
        )
        state[f"features.{place}.bias"] = 0.1 * torch.randn(width, generator=generator)
        channels = width
    for depth, group in enumerate(VGG16):
        state[f"lin{depth}.model.1.weight"] = torch.rand(1, group[-1], 1, 1, generator=generator)
    return state


def plain(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """LPIPS written out from its paper, without modules."""
    total = torch.zeros(len(x))
    shift = torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1)
    a, b = (x - shift) / scale, (y - shift) / scale
    depth = 0
    for place in CONVOLUTIONS:
        a, b = (
            F.relu(F.conv2d(h, w[f"features.{place}.weight"], w[f"features.{place}.bias"], padding=1)) for h in (a, b)
        )
        if place in GROUP_ENDS:
            unit = [h / ((h**2).sum(1, keepdim=True).sqrt() + 1e-10) for h in (a, b)]
            weighted = (unit[0] - unit[1]) ** 2 * w[f"lin{depth}.model.1.weight"]
            total = total + weighted.sum(1).mean((1, 2))
            a, b, depth = F.max_pool2d(a, 2), F.max_pool2d(b, 2), depth + 1
    return total


def test_lpips_is_its_formula(weights: dict[str, Tensor]) -> None:
    x, y = pictures(2, size=32), pictures(2, size=32, seed=9)
    with torch.no_grad():
        # Sums of five depths in float32.
        torch.testing.assert_close(LPIPS.of(weights)(x, y), plain(weights, x, y), rtol=1e-4, atol=1e-5)


def test_the_layout_within_a_checkpoint_is_read_too(weights: dict[str, Tensor]) -> None:
    theirs = {}
    for key, value in weights.items():
        place = int(key.split(".")[1]) if key.startswith("features.") else -1
        group = 1 + sum(place > end for end in GROUP_ENDS)
        theirs["loss.perceptual_loss." + key.replace("features.", f"net.slice{group}.")] = value
    theirs |= {"encoder.conv_in.bias": torch.zeros(1), "loss.perceptual_loss.scaling_layer.shift": torch.zeros(1)}
    own, other = LPIPS.of(weights).state_dict(), LPIPS.of(theirs).state_dict()
    assert all(torch.equal(value, other[key]) for key, value in own.items())


def test_files_are_checked_by_path_and_checksum(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "vgg16.safetensors"
    with refused("missing", "loss.perceptual_from"):
        LPIPS.load(path)
    save_file(weights, path)
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert isinstance(LPIPS.load(path, right.upper()), LPIPS)
    with refused("mismatch", "loss.perceptual_checksum"):
        LPIPS.load(path, "0" * 64)
    del weights["features.5.weight"]
    try:
        with refused("damaged", "loss.perceptual_from"):
            LPIPS.of(weights)
    finally:
        weights["features.5.weight"] = torch.zeros(128, 64, 3, 3)


def damaged(path: Path, content: object) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vgg.safetensors", b"\xff" * 100),
        ("vgg.safetensors", b""),
        ("vgg.pt", b"no pickle"),
        ("vgg.pt", [torch.zeros(1)]),
        ("vgg.pt", torch.zeros(1)),
        ("vgg.pt", {"state_dict": [1]}),
        ("vgg.pt", {0: torch.zeros(1)}),
    ],
    ids=["damaged", "empty", "no pickle", "a list", "a tensor", "a wrapped list", "numbered weights"],
)
def test_files_without_weights_are_refused(name: str, content: object, tmp_path: Path) -> None:
    with refused("damaged", "loss.perceptual_from"):
        LPIPS.load(damaged(tmp_path / name, content))


def test_pictures_that_the_network_cannot_look_at_are_refused(weights: dict[str, Tensor]) -> None:
    vgg, own = LPIPS.of(weights), ClassifierFeatures(classifier())
    vgg.check_size(1, 16, 16)
    for shape in ((4, 32, 32), (3, 8, 32)):
        with refused("shape", "loss.perceptual_from"):
            vgg(torch.zeros(1, *shape), torch.zeros(1, *shape))
    with refused("shape", "loss.perceptual_from"):
        own(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16))


def test_a_position_without_features_has_a_gradient_of_zero() -> None:
    """Where all rectifiers are shut the length is 0, whose root has no derivative."""
    features = torch.zeros(1, 4, 2, 2, requires_grad=True)
    feature_distance([features], [torch.ones(1, 4, 2, 2)]).sum().backward()
    assert features.grad is not None
    assert bool(features.grad.isfinite().all())


def classifier() -> EncoderClassifier:
    torch.manual_seed(0)
    return EncoderClassifier(
        EncoderClassifierParams(image_size=(16, 16), channels=8, channel_mult=(1, 2, 2), attention=(), norm_groups=4)
    )


def test_the_features_of_a_classifier() -> None:
    distance = ClassifierFeatures(classifier())
    x, y = pictures(3, size=16), pictures(3, size=16, seed=5)
    assert [tuple(m.shape[1:]) for m in distance.features(x)] == [(8, 16, 16), (16, 8, 8), (16, 4, 4)]
    far = distance(x, y)
    assert far.shape == (3,)
    assert bool((far > 0).all())
    torch.testing.assert_close(distance(x, x), torch.zeros(3))
    torch.testing.assert_close(distance(x, y), distance(y, x))
    # Nearer pictures are nearer.
    assert bool((distance(x, 0.9 * x + 0.1 * y) < far).all())


def test_the_classifier_is_frozen_but_lets_gradients_through() -> None:
    distance = ClassifierFeatures(classifier()).train()
    assert not distance.classifier.training
    x = pictures(2, size=16).requires_grad_()
    distance(x, pictures(2, size=16, seed=5)).sum().backward()
    assert x.grad is not None
    assert bool((x.grad != 0).any())
    assert all(parameter.grad is None for parameter in distance.parameters())
    with refused("shape", "network.image_size"):
        distance(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32))
