"""Image losses against plain autograd: sums, weights, and a learned scale."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from carrara.objectives.image_loss import ImageLoss


def network(x: Tensor) -> Tensor:
    """A stand-in for a codec whose one weight is `x` itself."""
    return torch.tanh(3 * x)


def first(image: Tensor) -> Tensor:
    return image.square().flatten(1).mean(1)


def second(image: Tensor) -> Tensor:
    return image.flatten(1).sin().sum(1)


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 5), seed=st.integers(0, 100))
def test_a_weighted_sum_has_the_values_and_gradients_of_autograd(batch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 2, 3, 3, generator=generator, dtype=torch.float64).float().requires_grad_()
    weights = torch.rand(batch, generator=generator)
    scale = nn.Parameter(torch.tensor(0.3))

    made = network(x)
    image = made.detach().requires_grad_()
    loss = ImageLoss.of(first(image), image) * torch.exp(-scale) + scale
    loss = loss + ImageLoss.of(second(image), image) * weights
    ours = loss.at(made)
    plain = first(network(x)) * torch.exp(-scale) + scale + weights * second(network(x))

    # Float32, the terms added up in another order.
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    for one, other in zip(*(torch.autograd.grad(v.mean(), (x, scale)) for v in (ours, plain)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_each_term_is_differentiated_once() -> None:
    calls = 0

    def counted(gradient: Tensor) -> None:
        nonlocal calls
        calls += 1

    made = network(torch.randn(2, 1, 2, 2, requires_grad=True))
    image = made.detach().requires_grad_()
    value = first(image)
    value.register_hook(counted)
    ImageLoss.of(value, image).at(made).sum().backward()
    assert calls == 1


def test_zero_adds_nothing() -> None:
    image = torch.randn(2, 1, 2, 2, requires_grad=True)
    loss = ImageLoss.of(first(image), image)
    total = loss + ImageLoss.zero(image) * torch.tensor(7.0)
    assert torch.equal(total.value, loss.value)
    assert torch.equal(total.gradient, loss.gradient)


def test_without_gradients_there_are_values_alone() -> None:
    image = torch.randn(2, 1, 2, 2)
    with torch.no_grad():
        loss = ImageLoss.of(first(image), image)
        assert torch.equal(loss.at(image), first(image))
    assert not loss.gradient.any()
