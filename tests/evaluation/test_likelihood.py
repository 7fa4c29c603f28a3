"""The flow's likelihood: units, batches, probes, refusals. Its exactness is shown in tests/theory/test_bound.py."""

from __future__ import annotations

import json
import math

import pytest
import torch

from carrara.condition import Condition
from carrara.evaluation import Likelihood, flow_likelihood
from carrara.process import GaussianMixture, Noise, schedules
from tests.errors import refused

SCHEDULE = schedules.cosine(1000)
WIDE = GaussianMixture([1, 2], Noise(1).normal((2, 1, 2, 2), dtype=torch.float64) / 4, [0.05, 0.1], labels=[0, 1])
DENOISER = WIDE.denoiser(SCHEDULE)
X = WIDE.sample(6, Noise(2))


def test_bits_are_nats_of_dequantised_images_times_the_bin() -> None:
    levels, n = 256, 300
    pictures = ((WIDE.sample(n, Noise(3)).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    bits = flow_likelihood(DENOISER, pictures, steps=15, trace="exact", levels=levels, noise=Noise(4), batch_size=n)
    assert bits.unit == "bits/dim"
    # The exact density at the same dequantised places; 7 bits less the logarithm of 255/256 and such.
    shift = Noise(4).rows(range(n)).uniform(pictures.shape) - 0.5
    exact = -WIDE.log_prob(pictures + shift * 2 / 255) / 4 / math.log(2) - math.log2(2 / 255)
    # Fifteen steps are good to 0.02 nats, here on average.
    assert float((bits.value - exact).mean()) == pytest.approx(0, abs=0.02)


def test_does_not_depend_on_the_batch() -> None:
    whole = flow_likelihood(DENOISER, X, steps=5, probes=3, levels=None)
    assert whole.estimates.shape == (6, 3)
    for size in (1, 4):
        parts = flow_likelihood(DENOISER, X, steps=5, probes=3, levels=None, batch_size=size)
        torch.testing.assert_close(parts.estimates, whole.estimates)
    alone = flow_likelihood(DENOISER, X[4:5], steps=5, probes=3, levels=None, noise=Noise().rows([4]))
    torch.testing.assert_close(alone.estimates, whole.estimates[4:5])


def test_probes_of_random_signs_average_to_the_exact_trace() -> None:
    exact = flow_likelihood(DENOISER, X, steps=5, trace="exact", levels=None)
    guess = flow_likelihood(DENOISER, X, steps=5, probes=64, levels=None)
    low, high = guess.interval(1 - 1e-9)
    assert bool(((low <= exact.value) & (exact.value <= high)).all())
    assert torch.equal(exact.interval()[0], exact.value)


def test_conditions_are_told() -> None:
    label = torch.tensor([0, 1, 0, 1, 0, 1])
    told = flow_likelihood(DENOISER, X, steps=40, trace="exact", levels=None, condition=Condition(label=label))
    exact = -WIDE.log_prob(X, condition=Condition(label=label)) / 4
    torch.testing.assert_close(told.value, exact, rtol=0, atol=2e-3)


def test_float32_is_enough() -> None:
    wide = flow_likelihood(DENOISER, X, steps=20, trace="exact", levels=None)
    narrow = flow_likelihood(DENOISER, X.float(), steps=20, trace="exact", levels=None)
    assert narrow.estimates.dtype == torch.float32
    torch.testing.assert_close(narrow.value.double(), wide.value, rtol=0, atol=1e-4)


def test_works_under_no_grad_and_leaves_no_graph() -> None:
    with torch.no_grad():
        value = flow_likelihood(DENOISER, X, steps=2, levels=None).value
    assert not value.requires_grad


def test_summary() -> None:
    summary = json.loads(json.dumps(flow_likelihood(DENOISER, X, steps=2, levels=None).summary()))
    assert summary["unit"] == "nats/dim"
    assert summary["dequantisation"] is None
    assert summary["probes"] == 4


def test_refusals() -> None:
    with refused("unknown", "trace"):
        flow_likelihood(DENOISER, X, trace="exat", levels=None)  # type: ignore[arg-type]
    with refused("invalid"):
        flow_likelihood(DENOISER, X, steps=0, levels=None)
    with refused("mismatch", "levels"):
        flow_likelihood(DENOISER, X)
    with refused("missing", "probes"):
        Likelihood(torch.zeros(3, 1), "nats/dim", "hutchinson").interval()
