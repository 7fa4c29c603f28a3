"""The one loop: what it yields, what it refuses, and how it stops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from carrara.errors import Code
from carrara.guidance import dynamic_threshold, static_threshold
from carrara.process import (
    Condition,
    Denoiser,
    GaussianMixture,
    Grid,
    NetworkDenoiser,
    Noise,
    Prediction,
    grids,
    schedules,
)
from carrara.process.schedules import Time
from carrara.solvers import (
    DDIM,
    LMS,
    SOLVERS,
    Adaptive,
    Ancestral,
    DPMSolver,
    DPMSolver2S,
    Euler,
    EulerAncestral,
    Heun,
    NonFinite,
    Picard,
    Solver,
    Step,
    UniPC,
    integrate,
    named,
    optimised_grid,
    solve,
    solve_parallel,
)
from tests.errors import refused

SCHEDULE = schedules.linear(1000)
MIXTURE = GaussianMixture([0.5, 0.5], torch.tensor([[0.5, -0.5], [-0.5, 0.2]]), [0.05, 0.02])
GRID = grids.trailing(SCHEDULE, 8)
START = Noise(1).normal((3, 2), dtype=torch.float64)


def broken_at(time: float, value: float) -> Denoiser:
    """The oracle, but for one wrong number at one time (or below it, for solvers that ask in between)."""
    exact = MIXTURE.denoiser(SCHEDULE)

    def call(x: Tensor, t: Time, condition: Condition) -> Prediction:
        prediction = exact(x, t, condition)
        reached = torch.as_tensor(t).min() <= time
        wrong = torch.zeros_like(x)
        wrong[1, 0] = value
        return prediction.with_x0(prediction.x0 + wrong) if bool(reached) else prediction

    return call


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_broken_prediction_stops_the_run_at_its_step(name: str, value: float) -> None:
    """At t = 625, the fourth time of eight. Methods that ask at the end of a step meet it one step earlier."""
    early = isinstance(SOLVERS[name](), Heun | Adaptive)
    place = "step 3 of 8, from t = 750 to 625" if early else "step 4 of 8, from t = 625 to 500"
    with pytest.raises(NonFinite, match=place):
        solve(broken_at(630.0, value), SCHEDULE, SOLVERS[name](), GRID, START)


def test_a_broken_prediction_stops_parallel_sampling() -> None:
    with pytest.raises(NonFinite, match="of 8 is not finite"):
        solve_parallel(broken_at(630.0, float("nan")), SCHEDULE, Picard(), GRID, START)


def test_steps_have_their_index_and_time() -> None:
    steps = list(integrate(MIXTURE.denoiser(SCHEDULE), SCHEDULE, DDIM(), GRID, START))
    assert [step.index for step in steps] == list(range(8))
    assert {step.total for step in steps} == {8}
    assert [step.time for step in steps] == GRID.times[1:].tolist()


def test_integration_is_lazy_so_that_it_can_be_cancelled() -> None:
    evaluated: list[float] = []
    exact = MIXTURE.denoiser(SCHEDULE)

    def listening(x: Tensor, t: Time, condition: Condition) -> Prediction:
        evaluated.append(float(t))
        return exact(x, t, condition)

    for step in integrate(listening, SCHEDULE, DDIM(), GRID, START):
        if step.index == 2:
            break
    assert evaluated == [1000, 875, 750]


def test_after_step_replaces_what_is_yielded() -> None:
    def held(step: Step) -> Tensor:
        return torch.full_like(step.x, float(step.index))

    steps = list(integrate(MIXTURE.denoiser(SCHEDULE), SCHEDULE, DDIM(), GRID, START, after_step=held))
    assert all(bool((step.x == step.index).all()) for step in steps)
    assert float(solve(MIXTURE.denoiser(SCHEDULE), SCHEDULE, DDIM(), GRID, START, after_step=held)[0, 0]) == 7


def test_a_grid_of_another_schedule_is_refused() -> None:
    with refused("mismatch", "time"):
        solve(MIXTURE.denoiser(SCHEDULE), SCHEDULE, DDIM(), grids.karras(schedules.edm(1.0, 2000.0), 4), START)


@pytest.mark.parametrize("name", SOLVERS)
def test_state_does_not_grow(name: str) -> None:
    """After 60 steps no state holds more than a few values of x's size."""

    def numbers(state: object) -> int:
        if isinstance(state, Tensor):
            return state.numel()
        return sum(numbers(part) for part in state) if isinstance(state, tuple) else 1

    grid = grids.linspace(SCHEDULE, 60)
    *_, last = integrate(MIXTURE.denoiser(SCHEDULE), SCHEDULE, SOLVERS[name](), grid, START)
    assert numbers(last.state) <= 4 * (START.numel() + 1)


@pytest.mark.parametrize(
    ("word", "solver"),
    [
        ("ddim", DDIM()),
        ("DDPM", Ancestral()),
        ("DPM++ 2M SDE", DPMSolver(eta=1.0)),
        ("dpmpp_2m", DPMSolver()),
        ("dpmpp_2s", DPMSolver2S()),
        ("euler_a", EulerAncestral()),
        ("Euler a", EulerAncestral()),
        ("UniPC", UniPC()),
        ("unipc-3", UniPC(order=3)),
    ],
)
def test_words_people_type(word: str, solver: Solver) -> None:
    assert named(word) == solver


def test_an_unknown_word_names_the_nearest() -> None:
    with refused("unknown", "solver"):
        named("huen")


@pytest.mark.parametrize(
    ("make", "code", "key"),
    [
        (lambda: DDIM(eta=1.5), "invalid", "eta"),
        (lambda: DDIM(noise="huge"), "unknown", "noise"),  # type: ignore[arg-type]
        (lambda: Ancestral(variance="tiny"), "unknown", "variance"),  # type: ignore[arg-type]
        (lambda: DPMSolver(order=4), "invalid", "order"),
        (lambda: DPMSolver(eta=-0.1), "invalid", "eta"),
        (lambda: DPMSolver(solver_type="euler"), "unknown", "solver_type"),  # type: ignore[arg-type]
        (lambda: DPMSolver2S(eta=2), "invalid", "eta"),
        (lambda: UniPC(order=0), "invalid", "order"),
        (lambda: UniPC(variant="B3"), "unknown", "variant"),  # type: ignore[arg-type]
        (lambda: LMS(order=5), "invalid", "order"),
        (lambda: Euler(churn=-1), "invalid", "churn"),
        (lambda: Heun(s_min=2, s_max=1), "invalid", "churn"),
        (lambda: Adaptive(rtol=0, atol=0), "invalid", "rtol"),
        (lambda: Picard(window=0), "invalid", "window"),
    ],
)
def test_nonsense_options_are_refused(make: object, code: Code, key: str) -> None:
    assert callable(make)
    with refused(code, key):
        make()


def test_an_optimised_grid_beats_the_even_one_on_data_it_never_saw() -> None:
    grid = optimised_grid(SCHEDULE, UniPC(), 10, evaluations=150)
    assert (len(grid), float(grid.times[0]), float(grid.times[-2])) == (10, 1000, 1)
    other = GaussianMixture(torch.ones(5), 0.7 * Noise(9).normal((5, 32), dtype=torch.float64), [0.03] * 5)
    x = Noise(3).normal((64, 32), dtype=torch.float64)
    denoiser = other.denoiser(SCHEDULE)
    fine = solve(denoiser, SCHEDULE, UniPC(order=3), grids.log_snr(SCHEDULE, 300), x)

    def error(grid: Grid) -> float:
        found = solve(denoiser, SCHEDULE, UniPC(), grid, x)
        return float((found - fine).pow(2).mean(1).sqrt().median())

    assert error(grid) < 0.6 * error(grids.log_snr(SCHEDULE, 10))


def test_adaptive_leaves_a_zero_snr_end_by_one_level() -> None:
    schedule = schedules.zero_terminal_snr(schedules.scaled_linear(100))
    denoiser = MIXTURE.denoiser(schedule)
    for times in ([100.0, 99.0, 0.0], [100.0, 0.0]):
        found = solve(denoiser, schedule, Adaptive(rtol=1e-4, atol=1e-4), grids.given(schedule, times), START)
        fine = solve(denoiser, schedule, UniPC(order=3), grids.log_snr(schedule, 99), START)
        torch.testing.assert_close(found, fine, rtol=0, atol=2e-2)  # what is left is Euler's first step


def half_precision_network(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """A smooth v-prediction, rounded to half precision as a network's output is."""
    return (0.3 * x / (1 + x.float() ** 2).sqrt()).to(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("word", ["deis", "lms", "plms", "heun", "ddim", "dpm++2m", "unipc"])
def test_half_precision_is_rounded_once(word: str, dtype: torch.dtype) -> None:
    """α_s/α_t is a thousand at the noisy end of the cosine table: rounded terms there would differ by whole units."""
    schedule = schedules.cosine(1000)
    denoiser = NetworkDenoiser(half_precision_network, schedule, "v")
    x = Noise(1).normal((4, 1, 4, 4)).to(dtype)
    grid = grids.trailing(schedule, 10)
    half = solve(denoiser, schedule, SOLVERS[word](), grid, x)
    assert half.dtype == dtype
    full = solve(denoiser, schedule, SOLVERS[word](), grid, x.float())
    # one rounding of values of order 1: half of 2^-7 for bfloat16's 8 bits
    torch.testing.assert_close(half.float(), full, atol=2**-7, rtol=2**-7)


@pytest.mark.parametrize(
    ("solver", "grid", "seed", "key"),
    [
        (Heun(), grids.trailing(schedules.linear(100), 8), 1, "resume.solver"),
        (DDIM(eta=0.5), grids.trailing(schedules.linear(100), 8), 1, "resume.solver"),
        (DDIM(), grids.trailing(schedules.linear(100), 9), 1, "resume.times"),
        (DDIM(), grids.trailing(schedules.linear(100), 2), 1, "resume.times"),
        (DDIM(), grids.leading(schedules.linear(100), 8), 1, "resume.times"),
        (DDIM(), grids.trailing(schedules.linear(100), 8), 2, "resume.seed"),
    ],
)
def test_a_checkpoint_of_another_integration_is_refused(solver: Solver, grid: Grid, seed: int, key: str) -> None:
    schedule = schedules.linear(100)
    denoiser = GaussianMixture([1.0], torch.zeros(1, 2), [0.5]).denoiser(schedule)
    x = Noise(1).normal((3, 2), dtype=torch.float64)
    steps = integrate(denoiser, schedule, DDIM(), grids.trailing(schedule, 8), x, noise=Noise(1))
    checkpoint = next(steps).checkpoint()
    with refused("mismatch", key):
        next(integrate(denoiser, schedule, solver, grid, x, noise=Noise(seed), resume=checkpoint))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_found_behind_a_clamp(value: float) -> None:
    schedule = schedules.linear(100)

    def network(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return torch.full_like(x, value)

    for guide in (static_threshold(), dynamic_threshold()):
        denoiser = guide(NetworkDenoiser(network, schedule, "v"))
        with refused("not_finite", "prediction"):
            solve(denoiser, schedule, DDIM(), grids.trailing(schedule, 4), torch.randn(2, 1, 4, 4))
