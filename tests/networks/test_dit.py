"""The diffusion transformer: against a plain reference, its conditions, shapes and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from carrara import networks
from carrara.condition import Condition, Site
from carrara.errors import Code
from carrara.networks import DiT, DiTParams
from carrara.networks.dit import PUBLISHED, position_embedding
from tests.errors import refused
from tests.networks.test_unet import awake, noise, times

SMALL = DiTParams(image_size=(8, 12), patch_size=2, width=16, depth=2, heads=2)


def reference(w: dict[str, Tensor], p: DiTParams, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
    """The forward pass written from the paper's formulas, token by token, in float64."""

    def linear(h: Tensor, name: str) -> Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(h: Tensor) -> Tensor:
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    size, d, (rows, columns) = p.patch_size, p.width, (side // p.patch_size for side in p.image_size)
    kernel = w["patches.weight"].flatten(1)
    tokens = []
    for row in range(rows):
        for column in range(columns):
            patch = x[:, :, row * size : (row + 1) * size, column * size : (column + 1) * size]
            waves = [
                torch.tensor([f(at / 10000 ** (4 * k / d)) for k in range(d // 4)])
                for at in (column, row)
                for f in (
                    lambda a: torch.sin(torch.tensor(a, dtype=torch.float64)).item(),
                    lambda a: torch.cos(torch.tensor(a, dtype=torch.float64)).item(),
                )
            ]
            tokens.append(patch.flatten(1) @ kernel.T + w["patches.bias"] + torch.cat(waves))
    h = torch.stack(tokens, dim=1)
    angles = time[:, None] * torch.exp(-torch.arange(128, dtype=torch.float64) / 128 * torch.log(torch.tensor(1e4)))
    c = linear(F.silu(linear(torch.cat([angles.cos(), angles.sin()], 1), "time.hidden")), "time.out")
    c = F.silu(c + w["label.weight"][label])[:, None]
    for i in range(p.depth):
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = linear(c, f"blocks.{i}.modulation").split(d, dim=-1)
        q, k, v = linear(norm(h) * (1 + scale_1) + shift_1, f"blocks.{i}.qkv").split(d, dim=-1)
        heads = []
        for one in range(p.heads):
            part = slice(one * d // p.heads, (one + 1) * d // p.heads)
            scores = q[..., part] @ k[..., part].mT / (d // p.heads) ** 0.5
            heads.append(scores.softmax(-1) @ v[..., part])
        h = h + gate_1 * linear(torch.cat(heads, -1), f"blocks.{i}.attention_out")
        inner = linear(norm(h) * (1 + scale_2) + shift_2, f"blocks.{i}.hidden")
        h = h + gate_2 * linear(F.gelu(inner, approximate="tanh"), f"blocks.{i}.out")
    shift, scale = linear(c, "modulation").split(d, dim=-1)
    raw = linear(norm(h) * (1 + scale) + shift, "out")
    image = torch.zeros(len(x), p.raw_channels, *p.image_size, dtype=x.dtype)
    for index in range(rows * columns):
        top, left = index // columns * size, index % columns * size
        patch = raw[:, index].reshape(len(x), size, size, p.raw_channels)
        image[:, :, top : top + size, left : left + size] = patch.permute(0, 3, 1, 2)
    return image


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_the_forward_pass_is_the_papers(patch: int, learned: bool) -> None:
    params = replace(SMALL, patch_size=patch, num_classes=5, learned_variance=learned)
    network = awake(DiT(params))
    x, time, label = noise(3, 3, 8, 12), torch.tensor([0.0, 37.5, 999.0]), torch.tensor([4, 0, 2])
    weights = {name: tensor.double() for name, tensor in network.state_dict().items()}
    with torch.no_grad():
        raw = network(x, time, Condition(label=label))
    expected = reference(weights, params, x.double(), time.double(), label)
    # Angles up to 999 in float32 are good to 6e-5; their embedding's weights are small.
    torch.testing.assert_close(raw, expected.float(), rtol=0, atol=1e-5 * float(expected.abs().max()) + 1e-5)


def test_every_block_starts_as_the_identity_and_the_output_at_zero() -> None:
    network = DiT(replace(SMALL, num_classes=3, context_channels=5))
    condition = Condition(label=torch.tensor([0, 1]), context=noise(2, 4, 5))
    tokens, embedding = noise(2, 24, 16), noise(2, 16)
    assert torch.equal(network.blocks[0](tokens, embedding, (4, 6), condition), tokens)
    raw = network(noise(2, 3, 8, 12), times(2), condition)
    assert raw.shape == (2, 3, 8, 12)
    assert not raw.any()


def test_every_slot_of_the_condition_changes_the_prediction() -> None:
    params = replace(SMALL, num_classes=4, null_label=True, vector_channels=5, concat_channels=2, context_channels=6)
    network = awake(DiT(params))
    slots: dict[str, Any] = {"label": torch.tensor([0]), "vector": torch.zeros(1, 5)}
    slots |= {"concat": torch.zeros(1, 2, 8, 12), "context": noise(1, 3, 6)}
    changed: dict[str, Any] = {"label": torch.tensor([4]), "vector": torch.ones(1, 5)}
    changed |= {"concat": torch.ones(1, 2, 8, 12), "context": noise(1, 3, 6, seed=1)}
    x, t = noise(1, 3, 8, 12), torch.tensor([5.0])
    assert {name: width for name, width in network.takes.items() if width} == {
        "label": 5,
        "vector": 5,
        "concat": 2,
        "context": 6,
    }
    with torch.no_grad():
        plain = network(x, t, Condition(**slots))
        for slot in slots:
            assert (network(x, t, Condition(**slots | {slot: changed[slot]})) - plain).abs().max() > 1e-4, slot
        assert (network(x, t + 0.5, Condition(**slots)) - plain).abs().max() > 1e-5
    for slot in slots:
        with refused("missing", slot):
            network(x, t, Condition(**{name: value for name, value in slots.items() if name != slot}))


def test_the_attention_seam_gets_every_layer_and_the_mask() -> None:
    network, sites = awake(DiT(replace(SMALL, context_channels=6))), list[Site]()
    mask = torch.tensor([[True, False, True]])

    def seam(site: Site, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        sites.append(site)
        assert (mask is not None) == (site.kind == "cross")
        return F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])

    condition = Condition(context=noise(1, 3, 6), context_mask=mask)
    x = noise(1, 3, 8, 12)
    with torch.no_grad():
        seen = network(x, times(1), replace(condition, attend=seam))
        torch.testing.assert_close(seen, network(x, times(1), condition), rtol=0, atol=1e-5)
    assert tuple(site.name for site in sites) == network.attention_sites
    assert sites[1] == Site("blocks.0.cross", "cross", (4, 6), 1)


def test_gradient_checkpointing_changes_no_number() -> None:
    results = []
    for checkpointing in (False, True):
        network = awake(DiT(replace(SMALL, checkpointing=checkpointing))).train()
        x = noise(2, 3, 8, 12).requires_grad_()
        network(x, times(2)).square().mean().backward()
        results.append([x.grad, *[p.grad for p in network.parameters()]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_other_sizes_have_their_own_positions() -> None:
    network = awake(DiT(SMALL))
    assert network(noise(1, 3, 4, 20), times(1)).shape == (1, 3, 4, 20)
    assert torch.equal(network.positions, position_embedding(16, 4, 6))
    assert "positions" not in network.state_dict()


@pytest.mark.parametrize(("name", "million"), [("S/2", 33), ("B/2", 130), ("L/2", 458), ("XL/2", 675), ("XL/8", 676)])
def test_published_shapes_have_the_published_numbers_of_weights(name: str, million: int) -> None:
    """Table 1 and appendix A: at latents of 32×32×4, 1,000 classes and learned variances."""
    changes: dict[str, Any] = {"image_size": (32, 32), "in_channels": 4, "num_classes": 1000, "null_label": True}
    with torch.device("meta"):
        network = DiT(DiTParams.published(f"DiT-{name}", learned_variance=True, **changes))
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == million
    assert len(PUBLISHED) == 12


@pytest.mark.parametrize(
    ("changes", "code", "key"),
    [
        ({"image_size": (8,)}, "unsupported", "image_size"),
        ({"image_size": (9, 8)}, "shape", "image_size"),
        ({"width": 18}, "invalid", "width"),
        ({"heads": 3}, "invalid", "heads"),
        ({"depth": 0}, "invalid", "depth"),
        ({"patch_size": 0}, "invalid", "patch_size"),
        ({"mlp_ratio": 0.0}, "invalid", "mlp_ratio"),
        ({"dropout": 1.0}, "invalid", "dropout"),
        ({"null_label": True}, "missing", "num_classes"),
    ],
)
def test_impossible_params_are_refused(changes: dict[str, Any], code: Code, key: str) -> None:
    with refused(code, f"network.{key}"):
        replace(SMALL, **changes)


def test_unknown_shapes_and_sizes_are_refused() -> None:
    with refused("unknown"):
        DiTParams.published("DiT-M/2")
    with refused("shape", "network.image_size"):
        DiT(SMALL)(noise(1, 3, 7, 12), times(1))


def test_registered_with_blocks_to_shard() -> None:
    network = networks.build({"kind": "dit", "image_size": [8, 8], "width": 16, "depth": 3, "heads": 2})
    assert isinstance(network, DiT)
    assert list(network.shard_units) == list(network.blocks)
    assert networks.build(networks.config(network)).params == network.params


def test_float64_and_autocast_agree_with_float32() -> None:
    network = awake(DiT(replace(SMALL, num_classes=3, context_channels=6)))
    x, condition = noise(2, 3, 8, 12), Condition(label=torch.tensor([0, 2]), context=noise(2, 4, 6))
    with torch.no_grad():
        single = network(x, times(2), condition)
        with torch.autocast("cpu", torch.bfloat16):
            half = network(x, times(2), condition)
        double = network.double()(x.double(), times(2).double(), condition)
    assert half.dtype == torch.float32
    scale = float(single.abs().max())
    torch.testing.assert_close(single.double(), double, rtol=0, atol=2e-5 * scale)  # angles are good to 6e-5
    torch.testing.assert_close(half, single, rtol=0, atol=0.06 * scale)  # 8 bits through two blocks


@pytest.mark.slow
def test_the_whole_network_compiles_as_one_graph() -> None:
    network = awake(DiT(replace(SMALL, context_channels=6)))
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    x, condition = noise(2, 3, 8, 12), Condition(context=noise(2, 4, 6))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(compiled(x, times(2), condition), network(x, times(2), condition))
