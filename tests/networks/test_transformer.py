"""The spatial transformer, alone and in the U-Net: the context, its mask, the attention seam, precision, memory."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from carrara.condition import Attend, Condition, Site
from carrara.errors import Code
from carrara.guidance import classifier_free
from carrara.networks import UNet, UNetParams
from carrara.networks.transformer import SpatialTransformer
from carrara.process import NetworkDenoiser, schedules
from tests.errors import refused
from tests.networks.test_unet import awake, noise, times

LATENT = UNetParams(
    image_size=(8, 8),
    in_channels=4,
    channels=16,
    channel_mult=(1, 2),
    blocks_per_level=1,
    attention=(1, 2),
    resampling="convolution",
    transformer_depth=1,
    context_channels=6,
    norm_groups=8,
)
CONTEXT = Condition(context=noise(2, 5, 6, seed=1))


def softmax_seam(sites: list[Site]) -> Attend:
    """Takes softmax(QKᵀ/√d)·V by hand and records the sites."""

    def seam(site: Site, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        sites.append(site)
        scores: Tensor = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        return scores.softmax(-1) @ v

    return seam


def test_every_attention_calls_the_seam_with_its_site_in_order() -> None:
    network = awake(UNet(replace(LATENT, transformer_depth=(1, 2), context_only=(1,))))
    sites: list[Site] = []
    x = noise(2, 4, 8, 8)
    with torch.no_grad():
        listened = network(x, times(2), replace(CONTEXT, attend=softmax_seam(sites)))
        # The fused kernel sums in another order: float32 rounding of values near 1 through some ten layers.
        torch.testing.assert_close(listened, network(x, times(2), CONTEXT), rtol=0, atol=2e-5)
    names = [site.name for site in sites]
    assert tuple(names) == network.attention_sites
    assert names[:6] == [
        *("down.0.0.context", "down.0.0.cross"),
        *("down.1.0.0.self", "down.1.0.0.cross", "down.1.0.1.self", "down.1.0.1.cross"),
    ]
    assert "middle.1.cross" in names
    assert sites[0] == Site("down.0.0.context", "cross", (8, 8), 1)
    assert sites[2] == Site("down.1.0.0.self", "self", (4, 4), 1)


def test_a_listener_can_distinguish_the_branches_of_guidance() -> None:
    network, sites = awake(UNet(LATENT)), list[Site]()
    denoiser = NetworkDenoiser(network, schedules.linear(50))
    guided = classifier_free(scale=2.0, null=Condition(context=torch.zeros(1, 5, 6)))(denoiser)
    with torch.no_grad():
        guided(noise(2, 4, 8, 8), 5.0, replace(CONTEXT, attend=softmax_seam(sites)))
        assert {site.branches for site in sites} == {2}
        sites.clear()
        denoiser(noise(2, 4, 8, 8), 5.0, replace(CONTEXT, attend=softmax_seam(sites)))
    assert {site.branches for site in sites} == {1}
    assert len(sites) == len(network.attention_sites)


def test_a_listener_sees_the_mask_too() -> None:
    network = awake(UNet(replace(LATENT, context_only=(2,), context_only_middle=True)))
    x, context = noise(2, 4, 8, 8), noise(2, 5, 6, seed=1)
    mask = torch.tensor([[True, False, True, True, False], [False, True, True, True, True]])
    with torch.no_grad():
        fused = network(x, times(2), Condition(context=context, context_mask=mask))
        listened = network(x, times(2), Condition(context=context, context_mask=mask, attend=softmax_seam([])))
        torch.testing.assert_close(listened, fused, rtol=0, atol=2e-5)
        changed = torch.where(mask[..., None], context, 100.0)
        for attend in (None, softmax_seam([])):
            hidden = Condition(context=changed, context_mask=mask, attend=attend)
            torch.testing.assert_close(network(x, times(2), hidden), fused, rtol=0, atol=2e-5)
        everything = Condition(context=context, context_mask=torch.ones(2, 5, dtype=torch.bool))
        torch.testing.assert_close(network(x, times(2), everything), network(x, times(2), Condition(context=context)))
        nothing_visible = Condition(context=context, context_mask=torch.zeros(2, 5, dtype=torch.bool))
        assert network(x, times(2), nothing_visible).isfinite().all()


@pytest.mark.parametrize(
    ("filled", "code", "key"),
    [
        ({}, "missing", "context"),
        ({"context": noise(2, 5, 7)}, "shape", "context"),
        ({"context": noise(2, 6)}, "shape", "context"),
        ({"context": noise(3, 5, 6)}, "shape", "context"),
        ({"context": noise(2, 5, 6), "context_mask": torch.ones(2, 4, dtype=torch.bool)}, "shape", "context_mask"),
        ({"context": noise(2, 5, 6), "context_mask": torch.ones(2, 5)}, "invalid", "context_mask"),
    ],
)
def test_contexts_that_do_not_fit_are_refused(filled: dict[str, Any], code: Code, key: str) -> None:
    with refused(code, key):
        UNet(LATENT)(noise(2, 4, 8, 8), times(2), Condition(**filled))


def test_a_network_without_a_context_takes_none() -> None:
    network = UNet(replace(LATENT, context_channels=0))
    assert network(noise(2, 4, 8, 8), times(2)).shape == (2, 4, 8, 8)
    with refused("unsupported", "context"):
        network(noise(2, 4, 8, 8), times(2), Condition(context=noise(2, 5, 6)))
    with refused("shape", "context_mask"):
        network(noise(2, 4, 8, 8), times(2), Condition(context_mask=torch.ones(2, 5, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("changes", "code", "key"),
    [
        ({"transformer_depth": 0}, "missing", "transformer_depth"),
        ({"transformer_depth": (1, 2, 3)}, "invalid", "transformer_depth"),
        ({"transformer_depth": -1}, "invalid", "transformer_depth"),
        ({"blocks_per_level": (1, 0)}, "invalid", "blocks_per_level"),
        ({"context_channels": -1}, "invalid", "context_channels"),
        ({"context_channels": 0, "context_only": (1,)}, "missing", "context_channels"),
        ({"context_only": (4,)}, "invalid", "context_only"),
        ({"projection": "conv"}, "unknown", "projection"),
        ({"vector_layers": 3}, "invalid", "vector_layers"),
        ({"label_tokens": 1}, "missing", "num_classes"),
        ({"label_tokens": 1, "num_classes": 3, "context_channels": 0}, "missing", "context_channels"),
    ],
)
def test_impossible_params_are_refused(changes: dict[str, Any], code: Code, key: str) -> None:
    with refused(code, f"network.{key}"):
        replace(LATENT, **changes)


def test_params_with_transformers_survive_json() -> None:
    for changes in ({}, {"transformer_depth": (0, 2), "blocks_per_level": (1, 2), "context_only": (2,)}):
        params = replace(LATENT, **changes)  # type: ignore[arg-type]
        assert UNetParams(**json.loads(json.dumps(asdict(params)))) == params


@pytest.mark.parametrize("masked", [False, True])
def test_gradient_checkpointing_changes_no_number(masked: bool) -> None:
    results = []
    for checkpointing in (False, True):
        network = awake(UNet(replace(LATENT, transformer_depth=2, checkpointing=checkpointing))).train()
        x, context = noise(2, 4, 8, 8).requires_grad_(), noise(2, 5, 6, seed=1).requires_grad_()
        mask = torch.tensor([[True] * 3 + [False] * 2] * 2) if masked else None
        network(x, times(2), Condition(context=context, context_mask=mask)).square().mean().backward()
        results.append((x.grad, context.grad, *[p.grad for p in network.parameters()]))
    for plain, again in zip(*results, strict=True):
        assert plain is not None
        assert torch.equal(plain, again)


def test_frozen_networks_give_input_gradients_with_checkpointing() -> None:
    # The original's own checkpointing fails here (facts/originals.md).
    network = awake(UNet(replace(LATENT, checkpointing=True))).requires_grad_(False)
    x, context = noise(2, 4, 8, 8).requires_grad_(), noise(2, 5, 6, seed=1).requires_grad_()
    gradients = torch.autograd.grad(network(x, times(2), Condition(context=context)).square().sum(), (x, context))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_float64_and_autocast_agree_with_float32() -> None:
    network = awake(UNet(LATENT))
    x = noise(2, 4, 8, 8)
    with torch.no_grad():
        single = network(x, times(2), CONTEXT)
        with torch.autocast("cpu", torch.bfloat16):
            half = network(x, times(2), CONTEXT)
        double = network.double()(x.double(), times(2).double(), CONTEXT)
    assert half.dtype == torch.float32
    assert double.dtype == torch.float64
    scale = float(single.abs().max())
    # As for the plain U-Net (test_unet.py): angles good to 6e-5, and 8 bits through some ten layers.
    torch.testing.assert_close(single.double(), double, rtol=0, atol=2e-5 * scale)
    torch.testing.assert_close(half, single, rtol=0, atol=0.06 * scale)


def test_gradients_are_those_of_finite_differences() -> None:
    network = awake(UNet(replace(LATENT, channels=4, norm_groups=2, image_size=(2, 2)))).double()
    x, context = noise(1, 4, 2, 2).double().requires_grad_(), noise(1, 3, 6).double().requires_grad_()
    t = torch.tensor([3.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, c: network(x, t, Condition(context=c)), (x, context))


def test_a_transformer_starts_as_the_identity_and_leaves_its_input_alone() -> None:
    layer = SpatialTransformer("here", 8, 6, 2, depth=2, groups=4)
    x = noise(2, 8, 4, 4)
    before = x.clone()
    assert torch.equal(layer(x, CONTEXT), x)
    awake(layer)(x, CONTEXT).sum().backward()
    assert torch.equal(x, before)


def test_positions_have_no_order_to_a_transformer() -> None:
    layer = awake(SpatialTransformer("here", 8, 6, 2, groups=4)).double()
    x = noise(2, 8, 4, 4).double()
    with torch.no_grad():
        torch.testing.assert_close(layer(x.flip(2, 3), CONTEXT), layer(x, CONTEXT).flip(2, 3))
        swapped = Condition(context=CONTEXT.context.flip(1))  # type: ignore[union-attr]
        torch.testing.assert_close(layer(x, swapped), layer(x, CONTEXT))


@pytest.mark.slow
def test_the_whole_network_compiles_as_one_graph() -> None:
    network = awake(UNet(LATENT))
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    x = noise(2, 4, 8, 8)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(compiled(x, times(2), CONTEXT), network(x, times(2), CONTEXT))


@pytest.mark.parametrize("tokens", [1, 3])
def test_classes_can_be_the_context(tokens: int) -> None:
    network = awake(UNet(replace(LATENT, num_classes=3, null_label=True, label_tokens=tokens)))
    x = noise(1, 4, 8, 8).expand(4, -1, -1, -1)
    label = torch.arange(4)
    with torch.no_grad():
        raw = network(x, times(1), Condition(label=label))
        plain = UNet(LATENT).eval()
        plain.load_state_dict({key: value for key, value in network.state_dict().items() if key != "label.weight"})
        context = network.label.weight[label].reshape(4, tokens, 6)
        torch.testing.assert_close(raw, plain(x, times(1), Condition(context=context)))
    assert (raw[0] - raw[1]).abs().max() > 1e-3
    with refused("unsupported", "context"):
        network(x, times(1), Condition(label=label, context=context))
    with refused("invalid", "label"):
        network(x, times(1), Condition(label=label + 1))
    with refused("missing", "label"):
        network(x, times(1), Condition())
