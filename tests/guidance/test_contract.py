"""What guidance promises on every solver, proven with the exact oracle (no model error)."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.guidance import classifier_free, classifier_guidance
from carrara.process import Denoiser, Noise, Prediction, Transition, grids
from carrara.process.schedules import Time
from carrara.solvers import SOLVERS, Ancestral, named, solve
from carrara.solvers.base import bound
from tests.guidance.oracle import MIXTURE, NULL, SCHEDULE, labelled, points

ORACLE = MIXTURE.denoiser(SCHEDULE)
CLASSIFIER = MIXTURE.classifier(SCHEDULE)
GRID = grids.trailing(SCHEDULE, 20)


def sample(denoiser: Denoiser, solver: str, condition: Condition, count: int = 16) -> Tensor:
    return solve(denoiser, SCHEDULE, named(solver), GRID, points(count), condition, Noise(seed=1))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("label", [0, 1])
def test_exact_classifier_at_scale_1_follows_the_conditional_path(solver: str, label: int) -> None:
    # ∇ log p(x_t) + ∇ log p(y|x_t) = ∇ log p(x_t|y), so both evaluate the same numbers; 1e-8 is float64
    # rounding, multiplied by at most 1/a_T = 158 a step and damped afterwards.
    guided = classifier_guidance(CLASSIFIER, scale=1.0, label=label)(ORACLE)
    torch.testing.assert_close(
        sample(guided, solver, Condition()), sample(ORACLE, solver, labelled(label)), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_classifier_free_with_exact_scores_equals_the_classifier(solver: str, scale: float) -> None:
    free = classifier_free(scale, NULL)(ORACLE)
    guided = classifier_guidance(CLASSIFIER, scale, label=1)(ORACLE)
    torch.testing.assert_close(
        sample(free, solver, labelled(1)), sample(guided, solver, Condition()), rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_solver_drops_a_guide(solver: str) -> None:
    plain = sample(ORACLE, solver, Condition())
    for form in ("score", "mean"):
        guided = classifier_guidance(CLASSIFIER, 2.0, label=0, form=form)(ORACLE)
        assert (sample(guided, solver, Condition()) - plain).abs().mean() > 0.05


@pytest.mark.parametrize("solver", [name for name in SOLVERS if not isinstance(named(name), Ancestral)])
def test_every_other_solver_folds_what_pends_for_the_ancestral_one(solver: str) -> None:
    score = classifier_guidance(CLASSIFIER, 2.0, label=0, form="score")(ORACLE)
    mean = classifier_guidance(CLASSIFIER, 2.0, label=0, form="mean")(ORACLE)
    assert torch.equal(sample(score, solver, Condition()), sample(mean, solver, Condition()))


@pytest.mark.parametrize("solver", SOLVERS)
def test_guided_samples_have_the_class_conditional_weights_and_moments(solver: str) -> None:
    count, steps = 3000, 100
    grid = grids.log_snr(SCHEDULE, steps)
    guided = classifier_guidance(CLASSIFIER, 1.0, label=0)(ORACLE)
    samples = solve(guided, SCHEDULE, named(solver), grid, points(count), Condition(), Noise(seed=2))
    nearest = torch.cdist(samples, MIXTURE.means).argmin(1)
    # Class 0 holds components 0 and 1 with weights 1/4 and 3/4. Four standard errors of a fraction are 0.032; the
    # first-order solvers are off by up to 0.02 more at 100 steps.
    assert abs((nearest == 0).double().mean() - 0.25) < 0.052
    assert ((nearest == 0) | (nearest == 1)).double().mean() > 0.999
    exact = MIXTURE.sample(100_000, Noise(seed=3), labelled(0))
    # Four standard errors of a mean are 0.07, and the fraction's error moves it by 2·0.02.
    torch.testing.assert_close(samples.mean(0), exact.mean(0), rtol=0, atol=0.11)
    torch.testing.assert_close(samples.var(0), exact.var(0), rtol=0.15, atol=0)


def test_the_two_forms_differ_by_the_step_factor() -> None:
    # docs/math.md §6: the ε-shift moves the mean by (σ²/a_{t|s})·g, the mean form by Σ·g, Σ = σ² with "large".
    t, s = 600.0, 560.0
    pair = Transition.of(SCHEDULE, t, s)
    x = points(8)
    solver = Ancestral(variance="large")
    results = []
    for guide in (None, "score", "mean"):
        denoiser: Denoiser = ORACLE
        if guide is not None:
            denoiser = classifier_guidance(CLASSIFIER, 1.0, label=0, form=guide)(ORACLE)
        step = solver.step(bound(denoiser, Condition()), Transition.of(SCHEDULE, t, s), x, None, Noise(seed=0))
        results.append(step.x)
    plain, score, mean = results
    torch.testing.assert_close((score - plain) * pair.alpha_ts, mean - plain, rtol=1e-9, atol=1e-12)


def test_the_two_forms_converge_as_steps_grow() -> None:
    solver = Ancestral(variance="large")
    gaps = []
    for steps in (50, 100, 200, 400):
        grid = grids.trailing(SCHEDULE, steps)
        ends = [
            solve(
                classifier_guidance(CLASSIFIER, 1.0, label=0, form=form)(ORACLE),
                SCHEDULE,
                solver,
                grid,
                points(256),
                Condition(),
                Noise(seed=1),
            )
            for form in ("score", "mean")
        ]
        gaps.append(float((ends[0] - ends[1]).norm(dim=1).median()))
    # A step's relative gap is 1/a_{t|s} - 1 ≈ β_jump/2, which halves when the steps double: first order. The
    # median of noisy paths follows within a third.
    rates = [a / b for a, b in itertools.pairwise(gaps)]
    assert all(1.33 < rate < 3 for rate in rates), gaps


def test_appendix_h_the_conditional_kernel_is_the_kernel_times_the_classifier() -> None:
    # ADM, appendix H: p(x_s|x_t, y) ∝ p(x_s|x_t)·p(y|x_s), here for mixtures in two dimensions, along a line.
    t, s = 500.0, 450.0
    pair = Transition.of(SCHEDULE, t, s)
    x_t = points(1, seed=5)
    line = torch.linspace(-1.5, 1.5, 61, dtype=torch.float64)[:, None] * torch.tensor([[1.0, 0.4]])

    def log_kernel(label: int) -> Tensor:
        """ln p(x_s|x_t, label) up to a constant: ln p(x_t|x_s) + ln p(x_s|label)."""
        forward = -((x_t - pair.alpha_ts * line) ** 2).sum(1) / (2 * pair.variance)
        return forward + MIXTURE.log_prob(line, pair.alpha_s, pair.sigma_s, labelled(label))

    product = log_kernel(MIXTURE.classes) + CLASSIFIER(line, s)[:, 0]
    gap = log_kernel(0) - product
    torch.testing.assert_close(gap, gap[:1].expand_as(gap), rtol=0, atol=1e-9)  # one constant along the line


@pytest.mark.parametrize("form", ["score", "mean"])
def test_guidance_at_the_mean_evaluates_at_the_next_time(form: str) -> None:
    times: list[float] = []

    def spy(x: Tensor, t: Time) -> Tensor:
        times.append(float(t))
        return CLASSIFIER(x, t)

    guide = classifier_guidance(spy, 1.0, label=0, form=form, at="mean", schedule=SCHEDULE, grid=GRID)  # type: ignore[arg-type]
    result = solve(guide(ORACLE), SCHEDULE, Ancestral(), GRID, points(4), Condition(), Noise(seed=0))
    assert torch.isfinite(result).all()
    # The end of each pair; never the clean point, but the first time instead.
    assert times == [max(s, 1.0) for _, s in GRID.pairs()]


def test_guidance_at_the_mean_takes_the_gradient_at_the_posterior_mean() -> None:
    t, s = GRID.pairs()[5]
    x = points(4)
    plain = ORACLE(x, t, Condition())
    guide = classifier_guidance(CLASSIFIER, 1.5, label=1, form="mean", at="mean", schedule=SCHEDULE, grid=GRID)
    pending = guide(ORACLE)(x, t, Condition()).pending
    mean = Transition.of(SCHEDULE, t, s).posterior_mean(x, plain.x0).requires_grad_()
    (gradient,) = torch.autograd.grad(CLASSIFIER(mean, s)[:, 1].sum(), mean)
    assert pending is not None
    torch.testing.assert_close(pending, 1.5 * gradient, rtol=1e-10, atol=1e-12)


def test_pending_guidance_survives_the_rules_around_it() -> None:
    x = points(4)
    first = classifier_guidance(CLASSIFIER, 1.0, label=0, form="mean")(ORACLE)
    twice = classifier_guidance(CLASSIFIER, 1.0, label=0, form="mean")(first)
    once, both = first(x, 300.0, Condition()).pending, twice(x, 300.0, Condition()).pending
    assert once is not None
    assert both is not None
    torch.testing.assert_close(both, 2 * once)


def test_a_learned_variance_and_other_knowledge_is_handed_on() -> None:
    def knowing(x: Tensor, t: Time, condition: Condition) -> Prediction:
        return replace(ORACLE(x, t, condition), variance_fraction=torch.full_like(x, 0.3))

    guided = classifier_guidance(CLASSIFIER, 1.0, label=0)(knowing)(points(4), 300.0, Condition())
    assert guided.variance_fraction is not None
    assert bool((guided.variance_fraction == 0.3).all())
