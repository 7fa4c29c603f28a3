"""Tiled encoding and decoding: exact for codecs that do not see far, without seams for all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from carrara import codecs
from carrara.codecs import Codec, DiagonalGaussian, Exact, Identity, KLAutoencoder, QuantiserParams, VQAutoencoder
from carrara.codecs.tiling import Tiled, spans, weights
from carrara.networks.autoencoder import AutoencoderParams
from tests.codecs.small import make
from tests.errors import refused


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Near:
    """A codec of reduction 2 that sees `reach` pixels far: a blur, then means over 2×2; and back."""

    kind, reduction, bounded = "near", 2, False

    def __init__(self, reach: int) -> None:
        self.kernel = noise(3, 1, 2 * reach + 1, 2 * reach + 1).softmax(0)
        self.reach = reach

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return shape[0], shape[1] // 2, shape[2] // 2

    def blur(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.kernel, padding=self.reach, groups=3)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        mean = nn.functional.avg_pool2d(self.blur(x), 2)
        return DiagonalGaussian(mean, 0.1 * mean)

    def decode(self, z: Tensor) -> Tensor:
        return self.blur(nn.functional.interpolate(z, scale_factor=2.0))


class Level:
    """A codec that decodes every tile to one value: its own mean. Nothing could show seams more."""

    kind, reduction, bounded = "level", 1, False

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape)

    def encode(self, x: Tensor) -> Exact:
        return Exact(x)

    def decode(self, z: Tensor) -> Tensor:
        return z.mean((2, 3), keepdim=True).expand_as(z)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 200), tile=st.integers(3, 40), data=st.data())
def test_tiles_cover_everything_and_their_weights_sum_to_one(length: int, tile: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, tile // 3))
    ramp = data.draw(st.integers(0, overlap))
    tiles = spans(length, tile, overlap)
    assert tiles[0][0] == 0
    assert tiles[-1][1] == length
    assert all(end - start == min(tile, length) for start, end in tiles)
    assert all(end - start >= overlap for (_, end), (start, _) in pairwise(tiles))
    shares = weights(tiles, length, 1, ramp)
    for (start, end), share in zip(tiles, shares, strict=True):
        assert (share >= 0).all()
        assert not share[:start].any()
        assert not share[end:].any()
    # Differences of float64 ramps, rounded to float32.
    torch.testing.assert_close(torch.stack(shares).sum(0), torch.ones(length), rtol=0, atol=3e-7)


@settings(max_examples=15, deadline=None)
@given(reach=st.integers(0, 4), height=st.integers(8, 40), width=st.integers(8, 40), ramp=st.integers(0, 4))
def test_a_codec_that_does_not_see_far_is_exact(reach: int, height: int, width: int, ramp: int) -> None:
    # One position is two pixels, so a cut edge is felt up to a pixel further.
    overlap = 2 * (reach + 1 + ramp)
    tiled = Tiled(Near(reach), tile=3 * overlap + 2, overlap=overlap, blend=2 * ramp)
    x, z = noise(2, 3, 2 * height, 2 * width), noise(2, 3, height, width, seed=1)
    whole, parts = tiled.codec.encode(x), tiled.encode(x)
    assert isinstance(whole, DiagonalGaussian)
    assert isinstance(parts, DiagonalGaussian)
    # float32 sums of up to 81 products, in another order, and the weights' rounding.
    torch.testing.assert_close(parts.mean, whole.mean, rtol=0, atol=5e-6)
    torch.testing.assert_close(parts.log_variance, whole.log_variance, rtol=0, atol=5e-6)
    torch.testing.assert_close(tiled.decode(z), tiled.codec.decode(z), rtol=0, atol=5e-6)


def test_an_overlap_too_small_for_the_codecs_sight_shows_where_it_is_cut() -> None:
    z = noise(1, 3, 32, 32)
    far = Near(6)
    gap = (Tiled(far, tile=24, overlap=4, blend=0).decode(z) - far.decode(z)).abs().amax((0, 1))
    assert gap.max() > 1e-2
    cuts = [start + end for (_, end), (start, _) in pairwise(spans(32, 12, 2))]  # in pixels, two a position
    clear = torch.tensor([all(abs(place + 0.5 - cut) > far.reach + 2 for cut in cuts) for place in range(64)])
    assert len(cuts) == 2
    assert 0 < clear.sum() < 48
    assert gap[clear][:, clear].max() < 5e-6


@settings(max_examples=60, deadline=None)
@given(length=st.integers(17, 80), overlap=st.integers(2, 5), blend=st.integers(1, 5))
def test_where_tiles_disagree_there_is_no_seam(length: int, overlap: int, blend: int) -> None:
    blend = min(blend, overlap)
    z = noise(1, 1, 4, length)
    tiled = Tiled(Level(), tile=16, overlap=overlap, blend=blend)
    image = tiled.decode(z)[0, 0, 0]
    tiles = [float(z[..., start:end].mean()) for start, end in spans(length, 16, overlap)]
    # The stated bound: neighbouring pixels differ by the tiles' disagreement over `blend`.
    disagreement = max((abs(a - b) for a, b in pairwise(tiles)), default=0.0)
    assert image.diff().abs().max() <= disagreement / blend + 1e-6
    assert min(tiles) - 1e-6 <= image.min()
    assert image.max() <= max(tiles) + 1e-6


def codec(kind: str) -> Any:
    torch.manual_seed(0)
    shape = AutoencoderParams(
        channels=8, channel_mult=(1, 2), blocks_per_level=1, latent_channels=2, norm_groups=4, middle_attention=False
    )
    made = KLAutoencoder(shape) if kind == "kl" else VQAutoencoder(shape, QuantiserParams(codes=16))
    return made.eval()


@pytest.mark.parametrize("kind", ["kl", "vq", "identity"])
def test_an_image_that_fits_one_tile_goes_through_whole(kind: str) -> None:
    inner: Codec = Identity() if kind == "identity" else codec(kind)
    tiled, x = Tiled(inner, tile=32, overlap=8), noise(1, 3, 32, 24)
    with torch.no_grad():
        whole, parts = inner.encode(x), tiled.encode(x)
        assert torch.equal(parts.mode(), whole.mode())
        assert torch.equal(tiled.decode(parts.mode()), inner.decode(whole.mode()))
    assert (tiled.kind, tiled.reduction, tiled.bounded) == (inner.kind, inner.reduction, inner.bounded)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_learned_codec_comes_close_and_closer_with_larger_tiles(kind: str) -> None:
    inner, x = codec(kind), noise(1, 3, 64, 64)
    with torch.no_grad():
        whole = inner.encode(x).mode()
        gaps = [float((Tiled(inner, tile=tile, overlap=8).encode(x).mode() - whole).std()) for tile in (32, 56)]
    # Group norms see a tile where they saw the image: of untrained features the statistics move by some per cent.
    assert gaps[1] < gaps[0] < 0.1 * float(whole.std())


def test_the_size_of_the_picture_is_not_the_size_of_the_work() -> None:
    class Watched(Near):
        largest = 0

        def decode(self, z: Tensor) -> Tensor:
            self.largest = max(self.largest, z.shape[2] * z.shape[3])
            return super().decode(z)

    inner = Watched(1)
    Tiled(inner, tile=16, overlap=4).decode(noise(1, 3, 100, 60))
    assert inner.largest == 8 * 8


@pytest.mark.parametrize(
    ("lengths", "key"),
    [
        ({"tile": 33, "overlap": 8}, "tile"),
        ({"tile": 32, "overlap": 7}, "overlap"),
        ({"tile": 32, "overlap": 12}, "overlap"),
        ({"tile": 0, "overlap": 0}, "tile"),
        ({"tile": 32, "overlap": 8, "blend": 9}, "blend"),
    ],
)
def test_impossible_tiles_are_refused(lengths: dict[str, int], key: str) -> None:
    with refused("invalid", key):
        Tiled(Near(1), **lengths)


def test_images_and_posteriors_that_do_not_fit_are_refused() -> None:
    with refused("shape", "data.resolution"):
        Tiled(codec("kl"), tile=12, overlap=4).encode(noise(1, 3, 33, 32))

    class Strange(Near):
        def encode(self, x: Tensor) -> Any:
            return object()

    with refused("unsupported", "codec"):
        Tiled(Strange(1), tile=12, overlap=4).encode(noise(1, 3, 32, 32))


def test_a_codec_in_tiles_is_known_and_saved_as_itself(tmp_path: Path) -> None:
    codec = make("kl").eval()
    tiled = Tiled(codec, tile=12, overlap=4)
    assert codecs.content_hash(tiled) == codecs.content_hash(codec)
    assert codecs.save(tiled, tmp_path) == codecs.content_hash(codec)
    assert codecs.content_hash(codecs.load(tmp_path)) == codecs.content_hash(codec)


def test_codes_are_decoded_in_tiles_as_the_codec_decodes_them() -> None:
    inner = codec("vq")
    indices = torch.randint(0, 16, (2, 20, 12), generator=torch.Generator().manual_seed(0))
    codes = inner.codes(indices)
    with torch.no_grad():
        assert torch.equal(Tiled(inner, tile=40, overlap=8).decode(codes), inner.decode(codes))  # one tile
        tiled = Tiled(inner, tile=24, overlap=8)
        # The entries' own latents are quantised to the same entries.
        assert torch.equal(tiled.decode(codes), tiled.decode(codes.latent))


@pytest.mark.parametrize("shape", [(3, 32, 32), (32, 32), (1, 1, 3, 32, 32)])
def test_what_is_no_batch_is_refused(shape: tuple[int, ...]) -> None:
    tiled = Tiled(codec("kl"), tile=12, overlap=4)
    with refused("shape", "x"):
        tiled.encode(noise(*shape))
    with refused("shape", "z"):
        tiled.decode(noise(*shape))
