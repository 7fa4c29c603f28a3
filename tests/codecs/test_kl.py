"""The variational autoencoder: its posterior, its bound, and the latent scale."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carrara.codecs import Autoencoder, DiagonalGaussian, KLAutoencoder, LearnedCodec, measure_latent_scale
from carrara.codecs.kl import LOG_VARIANCE_RANGE
from carrara.process import Noise
from tests.codecs.small import make, params, pictures
from tests.errors import refused

numbers = st.floats(-3, 3, width=32)


@settings(max_examples=25, deadline=None)
@given(mean=numbers, log_variance=numbers)
def test_kl_to_the_standard_normal_is_the_closed_form(mean: float, log_variance: float) -> None:
    """½ Σ (μ² + σ² - 1 - ln σ²)."""
    q = DiagonalGaussian(torch.full((2, 3, 4, 4), mean), torch.full((2, 3, 4, 4), log_variance))
    each = 0.5 * (mean**2 + math.exp(log_variance) - 1 - log_variance)
    # 48 float32 terms of up to about 15.
    torch.testing.assert_close(q.kl_to_standard(), torch.full((2,), 48 * each), rtol=1e-5, atol=1e-4)


def test_log_variances_are_clamped_as_in_the_original() -> None:
    moments = torch.cat([torch.zeros(1, 2, 1, 1), torch.tensor([-100.0, 100.0]).reshape(1, 2, 1, 1)], dim=1)
    q = DiagonalGaussian.of(moments)
    assert (float(q.log_variance.min()), float(q.log_variance.max())) == LOG_VARIANCE_RANGE == (-30.0, 20.0)
    assert bool(q.kl_to_standard().isfinite().all())


def test_scaling_scales_the_samples() -> None:
    """Scaling the posterior and sampling is sampling and scaling."""
    codec = make("kl").eval()
    noise = Noise(5)
    x = pictures()
    with torch.no_grad():
        before = codec.encode(x).sample(noise)
        codec.set_latent_scale(torch.tensor([2.0, 0.25, 3.0]), torch.tensor([1.0, -1.0, 0.5]))
        after = codec.encode(x).sample(noise)
        # The deviation is taken from a scaled log-variance: a rounding of its exponent.
        torch.testing.assert_close(after, codec.scaled(before), rtol=1e-5, atol=1e-5)


def test_a_sample_is_addressed_by_its_noise() -> None:
    codec = make("kl").eval()
    x = pictures(3)
    with torch.no_grad():
        q = codec.encode(x)
        together = q.sample(Noise(1).rows([4, 5, 6]))
        alone = DiagonalGaussian(*(v[1:2] for v in (q.mode(), q.log_variance))).sample(Noise(1).rows([5]))  # type: ignore[attr-defined]
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_measured_scale_gives_unit_variance(per_channel: bool) -> None:
    codec = make("kl").eval()
    images = pictures(24)
    measure_latent_scale(codec, images.split(5), per_channel=per_channel, seed=3)
    with torch.no_grad():
        z = codec.encode(images).sample(Noise(3)).double()
    if per_channel:
        flat = z.transpose(0, 1).flatten(1)
        torch.testing.assert_close(flat.mean(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-5)
        torch.testing.assert_close(flat.std(1, correction=0), torch.ones(3, dtype=torch.float64), rtol=1e-5, atol=0)
    else:
        assert bool((codec.latent_shift == 0).all())
        assert len(set(codec.latent_scale.tolist())) == 1
        assert float(z.std(correction=0)) == pytest.approx(1, rel=1e-5)


def test_the_measured_scale_does_not_depend_on_the_batches() -> None:
    images = pictures(12)
    found = []
    for size in (1, 5, 12):
        codec = make("kl").train()
        mean, std = measure_latent_scale(codec, images.split(size))
        assert codec.training  # put back
        found.append(torch.cat([mean, std, codec.latent_scale.double()]))
    # Convolutions over other batch sizes round otherwise.
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-5)


def test_constant_latents_and_no_images_are_refused() -> None:
    codec: LearnedCodec = Autoencoder(params())
    with torch.no_grad():
        for parameter in codec.encoder.parameters():
            parameter.zero_()
    with refused("not_finite", "latent_scale"):
        measure_latent_scale(codec, [pictures()])
    with refused("missing", "batches"):
        measure_latent_scale(codec, [])


def test_the_learned_scale_is_part_of_the_codec_only_on_request() -> None:
    assert KLAutoencoder(params()).log_scale is None
    codec = KLAutoencoder(params(), learned_scale=True)
    assert "log_scale" in codec.state_dict()
    assert codec(pictures(), Noise(0)).log_scale is codec.log_scale
