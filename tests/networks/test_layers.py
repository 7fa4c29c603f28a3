"""The layers: closed forms, and the shortcuts against what they stand for."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carrara.condition import Condition, Site
from carrara.networks.fused import FEW_POSITIONS, norm_silu, upsampled_convolution
from carrara.networks.layers import (
    GroupNorm,
    ResidualBlock,
    SelfAttention,
    Upsample,
    attention,
    convolution,
    count_heads,
    largest_divisor,
    sinusoidal_embedding,
    split_heads,
)
from tests.errors import refused
from tests.shared import shared


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_sinusoids_are_cosines_then_sines_of_geometric_frequencies() -> None:
    time = torch.tensor([0.0, 1.0, 999.5])
    waves = sinusoidal_embedding(time, 7)
    assert waves.shape == (3, 7)
    for i, rate in enumerate((1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3))):
        # float32 angles near 1000 are 6e-5 apart.
        torch.testing.assert_close(waves[:, i], (time * rate).cos(), rtol=0, atol=1e-4)
        torch.testing.assert_close(waves[:, 3 + i], (time * rate).sin(), rtol=0, atol=1e-4)
    assert waves[:, 6].tolist() == [0, 0, 0]


def test_sinusoids_match_the_original_program() -> None:
    from safetensors.torch import load_file

    tensors = load_file(shared("golden", "c7_schedules_and_helpers.safetensors"))
    for width in (32, 33, 128):
        expected = tensors[f"output.timestep_embedding.{width}"]
        got = sinusoidal_embedding(tensors["input.t"], width)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)  # one step of a float32 angle near 1000


@given(channels=st.integers(1, 300), most=st.integers(1, 64))
def test_largest_divisor(channels: int, most: int) -> None:
    divisor = largest_divisor(channels, most)
    assert channels % divisor == 0
    assert divisor <= most
    assert all(channels % other for other in range(divisor + 1, min(most, channels) + 1))


@pytest.mark.parametrize("channels", [1, 7, 32, 40, 96])
def test_group_norm_takes_any_channel_count_and_half_types_in_float32(channels: int) -> None:
    norm = GroupNorm(channels)
    x = 3 + 2 * noise(2, channels, 4, 4).float()
    groups = norm(x).reshape(2, norm.num_groups, -1)
    torch.testing.assert_close(groups.mean(2), torch.zeros(2, norm.num_groups), rtol=0, atol=1e-5)
    # The variance falls short of 1 by eps over the group's own variance, 1e-5/4.
    torch.testing.assert_close(groups.var(2, correction=0), torch.ones(2, norm.num_groups), rtol=0, atol=1e-4)
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        assert torch.equal(norm(half), norm(half.float()).to(dtype))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("out", [4, 6])
@pytest.mark.parametrize("large", [False, True])
def test_the_upsampled_convolution_is_the_convolution_of_the_repeated_map(dims: int, out: int, large: bool) -> None:
    size = {1: (70,), 2: (8, 9), 3: (3, 6, 5)}[dims] if large else (3, 4, 5)[-dims:]
    assert (math.prod(size) >= FEW_POSITIONS) is large
    conv = convolution(dims, 4, out).double()
    factors = (1.0, 2.0, 2.0) if dims == 3 else (2.0,) * dims
    gradients = []
    for short in (True, False):
        x = noise(2, 4, *size).requires_grad_()
        if short:
            y = upsampled_convolution(x, conv.weight, conv.bias)
        else:
            y = conv(F.interpolate(x, scale_factor=factors, mode="nearest"))
        weight = noise(*y.shape, seed=1)
        assert conv.bias is not None
        gradients.append((y, *torch.autograd.grad((y * weight).sum(), (x, conv.weight, conv.bias))))
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain)
    assert Upsample(dims, 4, learned=False)(noise(1, 4, *size)).shape[2:] == y.shape[2:]


def test_attention_is_the_softmax_formula_unless_the_seam_takes_it() -> None:
    q, k, v = noise(2, 3, 5, 4), noise(2, 3, 7, 4, seed=1), noise(2, 3, 7, 4, seed=2)
    expected = (q @ k.transpose(-1, -2) / math.sqrt(4)).softmax(-1) @ v
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    called: list[tuple[Site, Tensor | None]] = []

    def seam(site: Site, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        called.append((site, mask))
        return q

    for condition in (None, Condition()):
        out = attention(q, k, v, condition, name="here", kind="cross", size=(5,))
        torch.testing.assert_close(out, expected)
        out = attention(q, k, v, condition, name="here", kind="cross", size=(5,), mask=mask)
        torch.testing.assert_close(out[0], expected[0])
        torch.testing.assert_close(out[1], (q @ k.mT / 2)[1, ..., :4].softmax(-1) @ v[1, :, :4])
    listened = Condition(attend=seam, branches=2)
    assert attention(q, k, v, listened, name="here", kind="cross", size=(5,), mask=mask) is q
    assert called == [(Site("here", "cross", (5,), 2), mask)]


def test_both_channel_orders_hold_the_same_heads() -> None:
    parts = noise(2, 5, 3, 4, 6)  # [B, N, q/k/v, head, d]
    new = split_heads(parts.flatten(2), 4, "new")
    legacy = split_heads(parts.transpose(2, 3).flatten(2), 4, "legacy")
    for i in range(3):
        assert torch.equal(new[i], parts[:, :, i].transpose(1, 2))
        assert torch.equal(legacy[i], new[i])


def test_heads_are_counted_and_refused() -> None:
    assert count_heads(128, None, None) == 2
    assert count_heads(40, None, None) == 1
    assert count_heads(200, None, None) == 4  # 50 channels each: the largest divisor up to 64
    assert count_heads(64, 4, None) == 4
    assert count_heads(64, None, 16) == 4
    for heads, width in ((3, None), (None, 24), (None, 128)):
        with refused("invalid", "network.heads" if width is None else "network.head_channels"):
            count_heads(64, heads, width)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_fused_norm_is_its_three_layers_and_so_are_its_gradients(dims: int, adaptive: bool) -> None:
    norm = GroupNorm(6, 3).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = (2 + noise(2, 6, *(3, 4, 2)[:dims])).requires_grad_()
    scale = noise(2, 6, seed=1).requires_grad_() if adaptive else None
    shift = noise(2, 6, seed=2).requires_grad_() if adaptive else None
    inputs = [value for value in (x, norm.weight, norm.bias, scale, shift) if value is not None]
    fused = norm_silu(norm, x, scale, shift)
    plain = norm(x)
    if scale is not None and shift is not None:
        column = (2, 6, *[1] * dims)
        plain = plain * (1 + scale.reshape(column)) + shift.reshape(column)
    plain = F.silu(plain)
    torch.testing.assert_close(fused, plain)
    weight = noise(*x.shape, seed=3)
    ours = torch.autograd.grad((fused * weight).sum(), inputs)
    theirs = torch.autograd.grad((plain * weight).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert torch.equal(norm_silu(norm, x, scale, shift), fused)
    assert torch.autograd.gradcheck(
        lambda *given_: norm_silu(norm, *given_), [v for v in (x, scale, shift) if v is not None]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_normalised_in_float32_with_and_without_gradients(dtype: torch.dtype) -> None:
    norm = GroupNorm(6, 3)
    x = (2 + noise(2, 6, 4, 4)).to(dtype)
    expected = F.silu(norm(x.float()))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got = norm_silu(norm, x)
        assert got.dtype == dtype
        # One rounding to the half type after SiLU, one more before it where gradients are stored.
        torch.testing.assert_close(got.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@settings(max_examples=10, deadline=None)
@given(dims=st.integers(1, 3), out=st.sampled_from([4, 6]), adaptive=st.booleans())
def test_a_residual_block_starts_as_its_skip(dims: int, out: int, adaptive: bool) -> None:
    block = ResidualBlock(dims, 4, out, embedding=8, adaptive=adaptive, groups=2, dropout=0.0).double()
    x = noise(2, 4, *(4,) * dims)
    assert torch.equal(block(x, noise(2, 8)), block.skip(x))


def test_self_attention_starts_as_the_identity_and_ignores_the_order_of_positions() -> None:
    layer = SelfAttention("here", 2, 8, 2, order="new", groups=4).double()
    x = noise(2, 8, 4, 4)
    assert torch.equal(layer(x), x)
    torch.nn.init.normal_(layer.out.weight)
    assert not torch.equal(layer(x), x)
    torch.testing.assert_close(layer(x.flip(2, 3)), layer(x).flip(2, 3))
