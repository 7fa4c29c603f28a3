"""Encoder, decoder and patch discriminator: shapes, checkpointing, memory layouts, refusals."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carrara.errors import Code
from carrara.networks.autoencoder import AutoencoderParams, Decoder, Encoder
from carrara.networks.discriminator import Discriminator, DiscriminatorParams
from tests.errors import refused

SMALL = AutoencoderParams(
    channels=8, channel_mult=(1, 2, 2), blocks_per_level=1, latent_channels=3, attention=(2,), norm_groups=4
)


@settings(max_examples=8, deadline=None)
@given(
    mult=st.lists(st.sampled_from([1, 1.5, 2]), min_size=1, max_size=3),
    blocks=st.integers(1, 2),
    hidden=st.sampled_from([None, 5]),
    learned=st.booleans(),
    height=st.integers(1, 3),
    width=st.integers(1, 3),
)
def test_shapes(mult: list[float], blocks: int, hidden: int | None, learned: bool, height: int, width: int) -> None:
    params = replace(
        SMALL,
        channel_mult=tuple(mult),
        blocks_per_level=blocks,
        hidden_channels=hidden,
        learned_resampling=learned,
        attention=(1,),
        out_channels=2,
    )
    x = torch.randn(2, 3, height * params.reduction, width * params.reduction)
    moments = Encoder(params, moments=2)(x)
    assert moments.shape == (2, 6, height, width)
    assert Decoder(params)(moments[:, :3]).shape == (2, 2, *x.shape[2:])


def test_the_params_are_plain_data() -> None:
    assert AutoencoderParams(**asdict(SMALL)) == SMALL
    assert AutoencoderParams(**{**asdict(SMALL), "channel_mult": [1, 2, 2]}) == SMALL


def test_checkpointing_changes_nothing() -> None:
    x = torch.randn(2, 3, 8, 8)
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = Encoder(replace(SMALL, checkpointing=checkpointing))
        decoder = Decoder(replace(SMALL, checkpointing=checkpointing))
        for part in (encoder, decoder):
            for parameter in part.parameters():
                torch.nn.init.normal_(parameter, 0.1, 0.1)
        image = decoder(encoder(x))
        image.square().sum().backward()
        found.append([image.detach(), *(p.grad for p in encoder.parameters())])
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other)


def test_tanh_bounds_the_image() -> None:
    decoder = Decoder(replace(SMALL, tanh=True))
    with torch.no_grad():
        decoder.out.weight.mul_(100)
        image = decoder(torch.randn(2, 3, 2, 2))
    assert float(image.abs().max()) <= 1


def test_inputs_in_channels_last_memory_are_taken_alike() -> None:
    encoder = Encoder(SMALL)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(encoder(x), encoder(x.contiguous(memory_format=torch.channels_last)))


def test_wrong_params_are_refused() -> None:
    choices: list[tuple[dict[str, Any], Code, str]] = [
        ({"channels": 0}, "invalid", "channels"),
        ({"channel_mult": ()}, "invalid", "channel_mult"),
        ({"dropout": 1.0}, "invalid", "dropout"),
        ({"attention": (3,)}, "invalid", "attention"),
        ({"hidden_channels": 5, "decoder_map": False}, "missing", "decoder_map"),
    ]
    for changes, code, key in choices:
        with refused(code, f"codec.{key}"):
            replace(SMALL, **changes)


@settings(max_examples=10, deadline=None)
@given(layers=st.integers(1, 3), height=st.integers(8, 40), width=st.integers(8, 40))
def test_a_patch_for_every_position_or_a_refusal(layers: int, height: int, width: int) -> None:
    network = Discriminator(DiscriminatorParams(channels=8, layers=layers, norm="group"))
    x = torch.randn(1, 3, height, width)
    if min(height, width) // 2**layers < 3:
        with refused("shape", "discriminator.layers"):
            network(x)
        return
    expected = (side // 2**layers - 2 for side in (height, width))
    assert network(x).shape == (1, 1, *expected)


def test_group_norm_sees_each_picture_alone_and_batch_norm_does_not() -> None:
    x = torch.randn(4, 3, 32, 32)
    for norm, alone in (("group", True), ("batch", False)):
        torch.manual_seed(0)
        network = Discriminator(DiscriminatorParams(channels=8, layers=2, norm=norm))  # type: ignore[arg-type]
        with torch.no_grad():
            together, single = network(x)[:1], network(x[:1])
        # Group norm: other batch sizes round otherwise. Batch norm: the statistics are others.
        assert (float((together - single).abs().max()) < 1e-5) == alone


def test_wrong_discriminators_are_refused() -> None:
    with refused("unknown", "discriminator.norm"):
        DiscriminatorParams(norm="bach")  # type: ignore[arg-type]
    with refused("invalid", "discriminator.layers"):
        DiscriminatorParams(layers=0)
