"""The U-Net and the classifier as networks: params, conditions, sizes, precision, checkpointing, layout."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from carrara.condition import Condition, Site
from carrara.errors import Code, UserError
from carrara.networks import EncoderClassifier, EncoderClassifierParams, UNet, UNetParams
from tests.errors import refused

SMALL = UNetParams(
    image_size=(8, 8), channels=16, channel_mult=(1, 2), blocks_per_level=1, attention=(2,), norm_groups=8
)
CLASSIFIER = EncoderClassifierParams(
    image_size=(8, 8), channels=16, channel_mult=(1, 2), blocks_per_level=1, attention=(2,), norm_groups=8
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def awake(network: nn.Module) -> Any:
    """The network with every parameter drawn, so that layers that start at zero do not hide the rest."""
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return network.eval()


def times(count: int) -> Tensor:
    return torch.linspace(1, 900, count)


sizes = st.integers(1, 4).map(lambda n: 2 * n)


@settings(max_examples=15, deadline=None)
@given(
    height=sizes,
    width=sizes,
    channels_in=st.integers(1, 4),
    channels=st.sampled_from([3, 7, 10, 16]),
    learned=st.booleans(),
    resampling=st.sampled_from(["residual", "convolution", "pooling"]),
)
def test_any_channel_count_and_size_that_the_levels_allow(
    height: int, width: int, channels_in: int, channels: int, learned: bool, resampling: str
) -> None:
    params = UNetParams(
        image_size=(height, width),
        in_channels=channels_in,
        channels=channels,
        channel_mult=(1, 2),
        blocks_per_level=1,
        attention=(2,),
        learned_variance=learned,
        resampling=resampling,  # type: ignore[arg-type]
    )
    assert UNetParams(**json.loads(json.dumps(asdict(params)))) == params
    raw = UNet(params)(noise(2, channels_in, height, width), times(2))
    assert raw.shape == (2, channels_in * (1 + learned), height, width)
    assert not raw.any()  # the output layer starts at zero
    assert raw.is_contiguous()


def test_params_survive_json() -> None:
    for params in (SMALL, CLASSIFIER, replace(SMALL, channel_mult=(0.5, 1), num_classes=3, null_label=True)):
        assert type(params)(**json.loads(json.dumps(asdict(params)))) == params


@pytest.mark.parametrize(
    ("changes", "code", "key"),
    [
        ({"channels": 0}, "invalid", "channels"),
        ({"dropout": 1.0}, "invalid", "dropout"),
        ({"channel_mult": ()}, "invalid", "channel_mult"),
        ({"attention": (3,)}, "invalid", "attention"),
        ({"heads": 2, "head_channels": 16}, "conflict", "heads"),
        ({"head_channels": 24}, "invalid", "head_channels"),
        ({"heads": 5}, "invalid", "heads"),
        ({"qkv_order": "old"}, "unknown", "qkv_order"),
        ({"resampling": "residul"}, "unknown", "resampling"),
        ({"image_size": (9, 8)}, "shape", "image_size"),
        ({"image_size": ()}, "shape", "image_size"),
        ({"null_label": True}, "missing", "num_classes"),
        ({"num_classes": 0}, "invalid", "num_classes"),
        ({"vector_channels": -1}, "invalid", "vector_channels"),
        ({"upsample_concat": True}, "missing", "concat_channels"),
        ({"up_heads": 2}, "missing", "heads"),
    ],
)
def test_impossible_params_are_refused(changes: dict[str, Any], code: Code, key: str) -> None:
    with refused(code, f"network.{key}"):
        replace(SMALL, **changes)


def test_impossible_classifiers_are_refused() -> None:
    choices: list[tuple[dict[str, Any], Code, str]] = [
        ({"image_size": (8,)}, "unsupported", "image_size"),
        ({"num_classes": 0}, "invalid", "num_classes"),
        ({"pool": "attn"}, "unknown", "pool"),
        ({"transformer_depth": 1, "context_channels": 3}, "unsupported", "context_channels"),
    ]
    for changes, code, key in choices:
        with refused(code, f"network.{key}"):
            replace(CLASSIFIER, **changes)


def test_sizes_that_do_not_fit_name_the_nearest_that_do() -> None:
    params = replace(SMALL, channel_mult=(1, 1, 1), attention=(), image_size=(16, 16))
    params.check_size(4, 12)
    for size, near in (((10, 13), "8×12 and 12×16"), ((1, 4), "4×4 and 4×4"), ((8,), "2 dimensions")):
        with pytest.raises(UserError) as caught:
            params.check_size(*size)
        assert (caught.value.code, caught.value.key) == ("shape", "network.image_size")
        assert near in str(caught.value)
    with refused("shape", "network.image_size"):
        UNet(params)(noise(1, 3, 10, 13), times(1))


def test_every_slot_of_the_condition_changes_the_prediction() -> None:
    params = replace(SMALL, num_classes=4, null_label=True, vector_channels=5, concat_channels=2)
    network = awake(UNet(params))
    x, t = noise(1, 3, 8, 8), torch.tensor([5.0])
    base: dict[str, Any] = {"label": torch.tensor([0]), "vector": torch.zeros(1, 5), "concat": torch.zeros(1, 2, 8, 8)}
    changed: dict[str, Any] = {"label": torch.tensor([4]), "vector": torch.ones(1, 5), "concat": torch.ones(1, 2, 8, 8)}
    with torch.no_grad():
        plain = network(x, t, Condition(**base))
        for slot in base:
            other = network(x, t, Condition(**base | {slot: changed[slot]}))
            assert (other - plain).abs().max() > 1e-3, slot
        assert (network(x, t + 0.5, Condition(**base)) - plain).abs().max() > 1e-5
    assert network.null_label == 4


@pytest.mark.parametrize(
    ("filled", "code", "key"),
    [
        ({}, "missing", "label"),
        ({"label": torch.tensor([3])}, "invalid", "label"),
        ({"label": torch.tensor([-1])}, "invalid", "label"),
        ({"label": torch.tensor([0, 1, 2])}, "shape", "label"),
        ({"label": torch.tensor([0]), "vector": torch.zeros(1, 3)}, "unsupported", "vector"),
        ({"label": torch.tensor([0]), "context": torch.zeros(1, 3, 4)}, "unsupported", "context"),
        ({"label": torch.tensor([0]), "concat": torch.zeros(1, 3, 8, 8)}, "unsupported", "concat"),
    ],
)
def test_nothing_in_a_condition_is_silently_ignored(filled: dict[str, Any], code: Code, key: str) -> None:
    network = UNet(replace(SMALL, num_classes=3))
    with refused(code, key):
        network(noise(2, 3, 8, 8), times(2), Condition(**filled))
    with refused("unsupported", "network.null_label"):
        _ = network.null_label


def test_concatenated_images_must_fit() -> None:
    network = UNet(replace(SMALL, concat_channels=2))
    for shape in ((1, 3, 8, 8), (1, 2, 4, 4)):
        with refused("shape", "concat"):
            network(noise(2, 3, 8, 8), times(2), Condition(concat=torch.zeros(shape)))
    with refused("unsupported", "label"):
        EncoderClassifier(CLASSIFIER)(noise(1, 3, 8, 8), times(1), Condition(label=torch.tensor([0])))


def test_every_attention_layer_calls_the_seam_with_its_site() -> None:
    network = awake(UNet(replace(SMALL, attention=(1, 2))))
    names: list[str] = []

    def seam(site: Site, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert (site.kind, site.branches, mask) == ("self", 1, None)
        assert site.size == ((4, 4) if site.name.startswith(("down.1", "middle", "up.1")) else (8, 8))
        names.append(site.name)
        return nn.functional.scaled_dot_product_attention(q, k, v)

    x = noise(2, 3, 8, 8)
    with torch.no_grad():
        seen = network(x, times(2), Condition(attend=seam))
        torch.testing.assert_close(seen, network(x, times(2)))
    assert tuple(names) == network.attention_sites
    assert names == [
        *("down.0.0.self", "down.1.0.self", "middle.self"),
        *("up.1.0.self", "up.1.1.self", "up.0.0.self", "up.0.1.self"),
    ]


@pytest.mark.parametrize("resampling", ["residual", "convolution", "pooling"])
def test_gradient_checkpointing_changes_no_number(resampling: str) -> None:
    results = []
    for checkpointing in (False, True):
        params = replace(SMALL, checkpointing=checkpointing, resampling=resampling, dropout=0.3)  # type: ignore[arg-type]
        network = awake(UNet(params)).train()
        torch.manual_seed(0)  # dropout
        x = noise(2, 3, 8, 8).requires_grad_()
        loss = network(x, times(2)).square().mean()
        loss.backward()
        results.append((loss.detach(), x.grad, *[p.grad for p in network.parameters()]))
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def test_frozen_networks_give_input_gradients_with_checkpointing() -> None:
    # guided-diffusion's own checkpointing fails here (facts/originals.md).
    network = awake(EncoderClassifier(replace(CLASSIFIER, checkpointing=True))).requires_grad_(False)
    x = noise(2, 3, 8, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(network(x, times(2)).log_softmax(1)[:, 0].sum(), x)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
def test_classifiers_read_any_image_their_pool_can(pool: str) -> None:
    params = replace(CLASSIFIER, pool=pool, num_classes=7, image_size=(8, 12))  # type: ignore[arg-type]
    network = awake(EncoderClassifier(params))
    with torch.no_grad():
        assert network(noise(2, 3, 8, 12), times(2)).shape == (2, 7)
        if pool == "attention":
            with refused("shape", "network.image_size"):
                network(noise(2, 3, 8, 8), times(2))
        else:
            assert network(noise(2, 3, 8, 8), times(2)).shape == (2, 7)


@pytest.mark.parametrize("make", [lambda: UNet(SMALL), lambda: EncoderClassifier(CLASSIFIER)])
def test_one_row_of_a_batch_does_not_depend_on_the_others(make: Any) -> None:
    network = awake(make())
    x, t = noise(3, 3, 8, 8), times(3)
    with torch.no_grad():
        together = network(x, t)
        alone = torch.cat([network(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    # Kernels may sum in another order: float32 rounding of values up to 4.
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: UNet(SMALL), lambda: EncoderClassifier(CLASSIFIER)])
def test_float64_and_autocast_agree_with_float32(make: Any) -> None:
    network = awake(make())
    x, t = noise(2, 3, 8, 8), times(2)
    with torch.no_grad():
        single = network(x, t)
        with torch.autocast("cpu", torch.bfloat16):
            half = network(x, t)
        double = network.double()(x.double(), t.double())
    assert half.dtype == torch.float32
    assert double.dtype == torch.float64
    scale = float(single.abs().max())
    # Times near 900 in float32 give angles good to 6e-5.
    torch.testing.assert_close(single.double(), double, rtol=0, atol=2e-5 * scale)
    # bfloat16 keeps 8 bits; about ten layers in a row.
    torch.testing.assert_close(half, single, rtol=0, atol=0.06 * scale)


def test_the_layout_of_the_input_changes_nothing_but_the_order_of_memory() -> None:
    network = awake(UNet(SMALL))
    x = noise(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(network(x, times(2)), network(x.contiguous(memory_format=torch.channels_last), times(2)))
    before = x.clone()
    network(x, times(2)).sum().backward()
    assert torch.equal(x, before)  # working in place never reaches the caller's tensor
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.slow
def test_the_whole_network_compiles_as_one_graph() -> None:
    network = awake(UNet(replace(SMALL, num_classes=3)))
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    x, condition = noise(2, 3, 8, 8), Condition(label=torch.tensor([0, 1]))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(compiled(x, times(2), condition), network(x, times(2), condition))


def test_training_and_inference_compute_the_same() -> None:
    network = awake(UNet(SMALL))
    x = noise(2, 3, 8, 8)
    with torch.no_grad():
        plain_raw = network(x, times(2))
    assert torch.equal(network(x, times(2)), plain_raw)


def test_gradients_are_those_of_finite_differences() -> None:
    network = awake(UNet(replace(SMALL, channels=4, norm_groups=2, image_size=(2, 2)))).double()
    x = noise(1, 3, 2, 2).double().requires_grad_()
    t = torch.tensor([3.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: network(x, t), (x,))
