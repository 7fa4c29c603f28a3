"""Packed weights: the same numbers to the last bit, and never those of older weights."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from carrara.networks import UNet, UNetParams, packed
from carrara.networks.packed import Convolution2d, packed_weights


def network(channels: int) -> UNet:
    """A U-Net whose last convolutions are no zeros."""
    torch.manual_seed(0)
    found = UNet(UNetParams(image_size=(16, 16), channels=channels, channel_mult=(1, 2), attention=(2,))).eval()
    with torch.no_grad():
        for weight in found.parameters():
            if not weight.any():
                weight.normal_(0, 0.1)
    return found


def maps(size: int, channels: int = 64, side: int = 16) -> Tensor:
    x = torch.randn(size, channels, side, side, generator=torch.Generator().manual_seed(size))
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("channels", [32, 64])  # below and above the width at which channels lie side by side
@pytest.mark.parametrize("size", [1, 2, 5])
def test_same_numbers_to_the_last_bit(channels: int, size: int, threads: int) -> None:
    unet, x, t = network(channels), torch.randn(size, 3, 16, 16), torch.tensor([3.0])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            plain = unet(x, t)
            with packed_weights():
                assert torch.equal(unet(x, t), plain)
                assert torch.equal(unet(x, t), plain)  # from the weights that are kept
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("sizes", [(4, 3), (3, 4, 3)])
def test_batches_of_other_sizes(sizes: tuple[int, ...]) -> None:
    layer = Convolution2d(64, 64, 3, padding=1)
    with torch.no_grad():
        plain = [layer(maps(size)) for size in sizes]
        with packed_weights():
            for size, expected in zip(sizes, plain, strict=True):
                assert torch.equal(layer(maps(size)), expected)


def test_weights_that_change_between_runs() -> None:
    layer, x = Convolution2d(64, 64, 3, padding=1), maps(2)
    with torch.no_grad():
        with packed_weights():
            layer(x)
        layer.weight.data.mul_(2)  # PyTorch counts no version of this change
        with packed_weights():
            assert torch.equal(layer(x), nn.Conv2d.forward(layer, x))


def test_other_threads_keep_nothing() -> None:
    layer, x = Convolution2d(64, 64, 3, padding=1), maps(2)
    found: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            found.append(layer(x))

    with torch.no_grad(), packed_weights():
        layer(x)
        layer.weight.data.zero_()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert layer.bias is not None
    torch.testing.assert_close(found[0], layer.bias[None, :, None, None].expand_as(found[0]))


@pytest.mark.parametrize("kind", ["gradient", "double", "autocast", "contiguous"])
def test_what_is_not_packed_is_computed_as_ever(kind: str) -> None:
    layer, x = Convolution2d(64, 64, 3, padding=1), maps(2)
    if kind == "double":
        layer, x = layer.double(), x.double()
    x = x.contiguous() if kind == "contiguous" else x
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast")
    with torch.set_grad_enabled(kind == "gradient"), autocast, packed_weights():
        result = layer(x)
        assert torch.equal(result, nn.Conv2d.forward(layer, x))
        if kind == "gradient":
            result.sum().backward()
            assert layer.weight.grad is not None


def test_no_more_is_packed_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, x, t = network(64), torch.randn(2, 3, 16, 16), torch.tensor([3.0])
    with torch.no_grad():
        plain = unet(x, t)
        monkeypatch.setattr("carrara.networks.packed._MOST_BYTES", 1_000_000)
        with packed_weights():
            assert torch.equal(unet(x, t), plain)
            kept = sum(module.weight.nbytes for module in packed._run.packed)
    assert 0 < kept <= 1_000_000
