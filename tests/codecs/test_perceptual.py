"""Perceptual distances: LPIPS, and the features of a classifier of our own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from carrara.codecs.perceptual import ClassifierFeatures, feature_distance
from carrara.interop import lpips
from carrara.networks import EncoderClassifier, EncoderClassifierParams
from tests.codecs.small import pictures
from tests.errors import refused
from tests.interop.vgg import CONVOLUTIONS, GROUP_ENDS, vgg_weights


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return vgg_weights()


def plain(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """LPIPS written out from its paper, without modules."""
    total = torch.zeros(len(x))
    shift = torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1)
    a, b = (x - shift) / scale, (y - shift) / scale
    depth = 0
    for number in CONVOLUTIONS:
        a, b = (
            F.relu(F.conv2d(h, w[f"features.{number}.weight"], w[f"features.{number}.bias"], padding=1)) for h in (a, b)
        )
        if number in GROUP_ENDS:
            unit = [h / ((h**2).sum(1, keepdim=True).sqrt() + 1e-10) for h in (a, b)]
            weighted = (unit[0] - unit[1]) ** 2 * w[f"lin{depth}.model.1.weight"]
            total = total + weighted.sum(1).mean((1, 2))
            a, b, depth = F.max_pool2d(a, 2), F.max_pool2d(b, 2), depth + 1
    return total


def test_lpips_is_its_formula(weights: dict[str, Tensor]) -> None:
    x, y = pictures(2, size=32), pictures(2, size=32, seed=9)
    with torch.no_grad():
        # Sums of five depths in float32.
        torch.testing.assert_close(lpips.from_state_dict(weights)(x, y), plain(weights, x, y), rtol=1e-4, atol=1e-5)


def test_pictures_of_other_shapes_are_refused(weights: dict[str, Tensor]) -> None:
    vgg, own = lpips.from_state_dict(weights), ClassifierFeatures(classifier())
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
