"""The exact oracle against automatic differentiation, quadrature and Monte Carlo."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.errors import Code
from carrara.process import GaussianMixture, Noise, Schedule, diffuse, schedules
from carrara.process.schedules import level
from tests.errors import refused
from tests.process.strategies import SCHEDULES, place

SHAPE = (2, 3)


def mixture(*shape: int, labels: list[int] | None = None) -> GaussianMixture:
    means = Noise(1).normal((4, *(shape or SHAPE)), dtype=torch.float64)
    return GaussianMixture([1, 2, 3, 1], means, [0.04, 0.2, 0.1, 0.5], labels)


def noisy(schedule: Schedule, t: float, n: int = 6, *shape: int) -> Tensor:
    x0 = mixture(*shape).sample(n, Noise(2))
    return diffuse(schedule, x0, t, Noise(3).normal(x0.shape, dtype=torch.float64))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: str(s.spec["kind"]))
def test_eps_is_the_score_of_the_noisy_marginal(schedule: Schedule, share: float) -> None:
    t = place(schedule, share)
    oracle, (a, s) = mixture(), level(schedule, t)
    x = noisy(schedule, t).requires_grad_(True)
    (score,) = torch.autograd.grad(oracle.log_prob(x, a, s).sum(), x)
    prediction = oracle.denoiser(schedule)(x, t, Condition())
    torch.testing.assert_close(-prediction.eps / s, score, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(a * prediction.x0 + s * prediction.eps, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1,), (5,), (1, 4, 4), (2, 3, 2, 2)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    means = Noise(1).normal((3, *shape), dtype=torch.float64)
    oracle, schedule = GaussianMixture([1, 1, 1], means, [0.1, 0.1, 0.0]), schedules.cosine(100)
    x = oracle.sample(5)
    assert x.shape == (5, *shape)
    assert oracle.log_prob(x + 0.1, 0.8, 0.6).shape == (5,)
    prediction = oracle.denoiser(schedule)(x, 40, Condition())
    assert prediction.x0.shape == x.shape
    assert oracle.classifier(schedule)(x, 40).shape == (5, 3)


def test_likelihood_integrates_to_one_and_posterior_moments_by_quadrature() -> None:
    means = torch.tensor([[-1.0], [0.5], [2.0]], dtype=torch.float64)
    oracle = GaussianMixture([0.2, 0.5, 0.3], means, [0.01, 0.2, 0.05])
    grid = torch.linspace(-6, 8, 20_001, dtype=torch.float64)
    prior = oracle.log_prob(grid.unsqueeze(1)).exp()
    assert float(torch.trapezoid(prior, grid)) == pytest.approx(1, abs=1e-12)
    schedule = schedules.cosine(1000)
    for t, value in ((30, 0.3), (400, -0.7), (900, 1.0)):
        a, s = level(schedule, t)
        joint = prior * torch.exp(-((value - a * grid) ** 2) / (2 * s**2))
        joint = joint / torch.trapezoid(joint, grid)
        mean = float(torch.trapezoid(joint * grid, grid))
        variance = float(torch.trapezoid(joint * grid**2, grid)) - mean**2
        prediction = oracle.denoiser(schedule)(torch.tensor([[value]], dtype=torch.float64), t, Condition())
        assert float(prediction.x0) == pytest.approx(mean, rel=1e-9)
        assert prediction.x0_variance is not None
        assert float(prediction.x0_variance) == pytest.approx(variance, rel=1e-7)


def test_samples_have_the_mixture_s_moments() -> None:
    oracle, n = mixture(), 40_000
    x = oracle.sample(n, Noise(5))
    weights = oracle.weights.reshape(-1, 1, 1)
    mean = (weights * oracle.means).sum(0)
    second = (weights * (oracle.means**2 + oracle.variances.reshape(-1, 1, 1))).sum(0)
    spread = (second - mean**2).sqrt()
    # Six standard errors, for six figures.
    assert float(((x.mean(0) - mean) / spread * math.sqrt(n)).abs().max()) < 6
    fourth = ((x - mean) ** 4).mean(0)
    error = ((fourth - spread**4) / n).sqrt()
    assert float(((x.var(0) - spread**2) / error).abs().max()) < 6


def test_the_denoiser_is_the_mean_of_what_was_diffused() -> None:
    # E[(x_0 - E[x_0|x_t]) f(x_t)] = 0 for any f, and the mean squared error is the mean posterior variance.
    oracle, schedule, n = mixture(), schedules.linear(1000), 40_000
    x0 = oracle.sample(n, Noise(6))
    x = diffuse(schedule, x0, 200, Noise(7).normal(x0.shape, dtype=torch.float64))
    prediction = oracle.denoiser(schedule)(x, 200, Condition())
    assert prediction.x0_variance is not None
    rest = x0 - prediction.x0
    for test in (torch.ones_like(x), x, x.sin(), x**2):
        product = rest * test
        assert float((product.mean(0) / product.std(0) * math.sqrt(n)).abs().max()) < 6
    gap = rest**2 - prediction.x0_variance
    assert float((gap.mean(0) / gap.std(0) * math.sqrt(n)).abs().max()) < 6


class TestLabels:
    labels = (0, 1, 1, 0)
    schedule = schedules.cosine(1000)

    def test_several_components_share_a_class(self) -> None:
        oracle, x, t = mixture(labels=list(self.labels)), noisy(self.schedule, 300), 300
        a, s = level(self.schedule, t)
        logits = oracle.classifier(self.schedule)(x, t)
        torch.testing.assert_close(logits.exp().sum(1), torch.ones(len(x)).double())
        for y in (0, 1):
            condition = Condition(label=torch.full((len(x),), y))
            share = float(oracle.weights[torch.tensor(self.labels) == y].sum())
            # Bayes: ln p(y|x) = ln p(x|y) + ln p(y) - ln p(x).
            bayes = oracle.log_prob(x, a, s, condition) + math.log(share) - oracle.log_prob(x, a, s)
            torch.testing.assert_close(logits[:, y], bayes, rtol=1e-10, atol=1e-10)

    def test_conditional_score_is_unconditional_plus_classifier(self) -> None:
        oracle, t = mixture(labels=list(self.labels)), 300
        x = noisy(self.schedule, t).requires_grad_(True)
        denoiser, classifier = oracle.denoiser(self.schedule), oracle.classifier(self.schedule)
        (gradient,) = torch.autograd.grad(classifier(x, t)[:, 1].sum(), x)
        guided = denoiser(x, t, Condition()).with_score(gradient)
        cond = denoiser(x, t, Condition(label=torch.ones(len(x), dtype=torch.int64)))
        torch.testing.assert_close(guided.eps, cond.eps, rtol=1e-9, atol=1e-9)

    def test_one_row_of_labels_and_the_null_label(self) -> None:
        oracle, x = mixture(labels=list(self.labels)), noisy(self.schedule, 300)
        denoiser = oracle.denoiser(self.schedule)
        null = denoiser(x, 300, Condition(label=torch.tensor([2])))
        torch.testing.assert_close(null.x0, denoiser(x, 300, Condition()).x0)
        mixed = denoiser(x, 300, Condition(label=torch.tensor([0, 1, 2, 0, 1, 2])))
        alone = denoiser(x[1:2], 300, Condition(label=torch.tensor([1])))
        torch.testing.assert_close(mixed.x0[1:2], alone.x0)

    def test_conditional_samples_come_from_their_class(self) -> None:
        means = torch.tensor([[-9.0], [-5.0], [5.0], [9.0]], dtype=torch.float64)
        oracle = GaussianMixture([1, 1, 1, 1], means, [0.1] * 4, [0, 0, 1, 1])
        x = oracle.sample(200, Noise(1), Condition(label=torch.ones(1, dtype=torch.int64)))
        assert float(x.min()) > 0

    def test_unknown_labels_are_refused(self) -> None:
        with refused("invalid", "label"):
            mixture(labels=list(self.labels)).log_prob(
                noisy(self.schedule, 3), condition=Condition(label=torch.tensor([3]))
            )


def test_a_condition_vector_shifts_every_mean() -> None:
    oracle, schedule, t = mixture(), schedules.linear(1000), 400
    shift = Noise(8).normal((1, 6), dtype=torch.float64)
    moved = GaussianMixture(oracle.weights, oracle.means + shift.reshape(1, *SHAPE), oracle.variances)
    x, condition = noisy(schedule, t), Condition(vector=shift)
    a, s = level(schedule, t)
    torch.testing.assert_close(oracle.log_prob(x, a, s, condition), moved.log_prob(x, a, s))
    cond, plain = oracle.denoiser(schedule)(x, t, condition), moved.denoiser(schedule)(x, t, Condition())
    torch.testing.assert_close(cond.x0, plain.x0)
    torch.testing.assert_close(cond.x0_variance, plain.x0_variance)
    torch.testing.assert_close(oracle.sample(3, Noise(1), condition), moved.sample(3, Noise(1)))
    vector = shift.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(oracle.denoiser(schedule)(x, t, Condition(vector=vector)).eps.sum(), vector)
    assert bool((slope != 0).any())


def test_times_of_every_sample_and_float32() -> None:
    oracle, schedule = mixture(), schedules.linear(1000)
    x, times = noisy(schedule, 300, 3), torch.tensor([1.0, 300.0, 1000.0])
    together = oracle.denoiser(schedule)(x, times, Condition())
    narrow = oracle.denoiser(schedule)(x.float(), times, Condition())
    for i, t in enumerate(times.tolist()):
        alone = oracle.denoiser(schedule)(x[i : i + 1], t, Condition())
        torch.testing.assert_close(together.x0[i : i + 1], alone.x0, rtol=1e-10, atol=1e-10)
    assert narrow.x0.dtype == narrow.eps.dtype == torch.float32
    # At t = 1 the float32 image is given to 1e-7, in units of σ_1 = 0.01.
    torch.testing.assert_close(narrow.x0.double(), together.x0, rtol=1e-5, atol=1e-5)


def test_far_from_every_mode_it_is_finite() -> None:
    oracle, schedule = mixture(), schedules.edm()
    prediction = oracle.denoiser(schedule)(torch.full((1, *SHAPE), 1e4), 0.01, Condition())
    assert bool(torch.isfinite(prediction.x0).all())
    assert bool(torch.isfinite(prediction.eps).all())


@pytest.mark.parametrize(
    ("weights", "variances", "code"),
    [
        ([1, 1], [1, 1, 1], "shape"),
        ([1, 0, 1], [1, 1, 1], "invalid"),
        ([1, 1, 1], [1, -1, 1], "invalid"),
    ],
)
def test_nonsense_is_refused(weights: list[float], variances: list[float], code: Code) -> None:
    with refused(code, "weights"):
        GaussianMixture(weights, torch.zeros(3, 2), variances)


def test_means_without_dimensions_are_refused() -> None:
    with refused("shape", "means"):
        GaussianMixture([1, 1], torch.zeros(2), [1, 1])
