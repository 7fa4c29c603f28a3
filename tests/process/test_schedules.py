"""Every schedule's identities, inverses, limits and refusals."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carrara.errors import Code
from carrara.process import Schedule, schedules
from carrara.process.schedules import Discrete, level
from tests.errors import refused

DISCRETE: list[Discrete] = [
    schedules.linear(1000),
    schedules.linear(21),
    schedules.scaled_linear(1000),
    schedules.cosine(1000),
    schedules.cosine(4),
    schedules.sigmoid(1000),
    schedules.sigmoid(50, tau=0.5),
    schedules.from_betas([0.1, 0.2, 0.5]),
    schedules.from_alphas_cumprod([0.9, 0.5, 0.1]),
    schedules.zero_terminal_snr(schedules.linear(1000)),
    schedules.zero_terminal_snr(schedules.scaled_linear(1000)),
]
CONTINUOUS: list[Schedule] = [
    schedules.edm(),
    schedules.rectified_flow(),
    schedules.rectified_flow(shift=3.0),
    schedules.vp_sde(),
    schedules.trigonometric(),
]
ALL = [*DISCRETE, *CONTINUOUS]
PRESERVING = [s for s in ALL if s.spec["kind"] not in ("edm", "rectified_flow")]
shares = st.floats(0.0, 1.0)


def name(schedule: Schedule) -> str:
    return repr(schedule)[:40]


def time_of(schedule: Schedule, share: float) -> float:
    return schedule.first_time + share * (schedule.final_time - schedule.first_time)


@pytest.mark.parametrize("schedule", ALL, ids=name)
def test_time_zero_is_the_clean_point(schedule: Schedule) -> None:
    assert float(schedule.alpha(0.0)) == 1
    assert float(schedule.sigma(0.0)) == 0
    assert float(schedule.log_snr(0.0)) == math.inf
    assert float(schedule.time_at(math.inf)) == 0


@pytest.mark.parametrize("schedule", ALL, ids=name)
def test_log_snr_falls_and_fits_alpha_and_sigma(schedule: Schedule) -> None:
    times = torch.linspace(schedule.first_time, schedule.final_time, 200, dtype=torch.float64)
    times = times.floor().unique() if schedule.discrete else times
    log_snr = schedule.log_snr(times)
    assert bool((log_snr.diff() < 0).all())
    direct = 2 * (schedule.alpha(times).log() - schedule.sigma(times).log())
    torch.testing.assert_close(log_snr, direct, rtol=1e-12, atol=1e-12)
    assert schedule.alpha(times).dtype == schedule.sigma(times).dtype == torch.float64


@pytest.mark.parametrize("schedule", PRESERVING, ids=name)
@given(share=shares)
def test_variance_is_preserved(schedule: Schedule, share: float) -> None:
    t = time_of(schedule, share)
    t = math.floor(t) if float(schedule.alpha(schedule.final_time)) == 0 and schedule.discrete else t
    assert float(schedule.alpha(t)) ** 2 + float(schedule.sigma(t)) ** 2 == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("schedule", [s for s in ALL if s.spec["kind"] != "zero_terminal_snr"], ids=name)
@given(share=shares)
def test_log_snr_has_an_inverse(schedule: Schedule, share: float) -> None:
    t = time_of(schedule, share)
    log_snr = float(schedule.log_snr(t))
    back = float(schedule.time_at(log_snr))
    assert schedule.first_time * (1 - 1e-12) <= back <= schedule.final_time
    # A time near one holds 1 - t to an ulp of one only, which the signal's logarithm there magnifies.
    if not math.isinf(log_snr):
        assert back == pytest.approx(t, rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("schedule", CONTINUOUS, ids=name)
@given(log_snr=st.floats(-30, 30))
def test_time_at_has_an_inverse_near_both_ends(schedule: Schedule, log_snr: float) -> None:
    t = float(schedule.time_at(log_snr))
    if 0 < t < schedule.final_time:
        # The time's own rounding next to 1 moves ln a by 1e-16/a.
        signal = float(schedule.alpha(t))
        assert float(schedule.log_snr(t)) == pytest.approx(log_snr, rel=1e-11, abs=1e-11 + 1e-15 / signal)


@given(index=st.integers(1, 998), fraction=st.floats(0.01, 0.99))
def test_a_table_interpolates_linearly_in_log_snr(index: int, fraction: float) -> None:
    schedule = schedules.linear(1000)
    low, high = float(schedule.log_snr(index)), float(schedule.log_snr(index + 1))
    between = float(schedule.log_snr(index + fraction))
    assert between == pytest.approx(low + fraction * (high - low), rel=1e-13, abs=1e-13)
    a, s = level(schedule, index + fraction)
    assert 2 * math.log(a / s) == pytest.approx(between, rel=1e-12, abs=1e-12)


class TestTables:
    @pytest.mark.parametrize("steps", [21, 100, 1000, 4000])
    def test_linear_betas(self, steps: int) -> None:
        betas = schedules.linear(steps).betas
        assert float(betas[0]) == pytest.approx(1e-4 * 1000 / steps, rel=1e-11)
        assert float(betas[-1]) == pytest.approx(0.02 * 1000 / steps, rel=1e-11)
        torch.testing.assert_close(betas.diff(), betas.diff().mean().expand(steps - 1), rtol=1e-8, atol=1e-14)

    def test_scaled_linear_is_linear_in_the_root_and_not_linear(self) -> None:
        schedule = schedules.scaled_linear(1000)
        root = schedule.betas.sqrt()
        torch.testing.assert_close(root.diff(), root.diff().mean().expand(999), rtol=1e-7, atol=1e-13)
        assert float(schedule.betas[500]) != pytest.approx((0.00085 + 0.012) / 2, rel=0.05)

    @pytest.mark.parametrize("steps", [4, 50, 1000, 4000])
    def test_cosine_follows_its_formula_up_to_the_cap(self, steps: int) -> None:
        schedule = schedules.cosine(steps)
        t = torch.arange(1, steps, dtype=torch.float64)
        f = torch.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        torch.testing.assert_close(schedule.alphas_cumprod[:-1], f, rtol=1e-11, atol=0)
        assert float(schedule.betas.max()) <= 0.999 + 1e-12

    def test_sigmoid_starts_slowly_and_ends_slowly(self) -> None:
        betas = schedules.sigmoid(1000).alphas_cumprod.diff().neg()
        assert float(betas[0]) < float(betas[500]) > float(betas[-1])

    @given(st.lists(st.floats(1e-4, 0.999), min_size=2, max_size=40))
    def test_betas_and_alphas_cumprod_are_each_other(self, betas: list[float]) -> None:
        values = torch.tensor(betas, dtype=torch.float64)
        schedule = schedules.from_betas(values)
        torch.testing.assert_close(schedule.betas, values, rtol=1e-10, atol=1e-14)
        same = schedules.from_alphas_cumprod(schedule.alphas_cumprod)
        assert torch.equal(same.alphas_cumprod, schedule.alphas_cumprod)


class TestZeroTerminalSnr:
    def test_ends_in_pure_noise_and_keeps_its_start(self) -> None:
        base = schedules.scaled_linear(1000)
        schedule = schedules.zero_terminal_snr(base)
        assert float(schedule.alpha(1000)) == 0
        assert float(schedule.sigma(1000)) == 1
        assert float(schedule.log_snr(1000)) == -math.inf
        assert float(schedule.alpha(1)) == pytest.approx(float(base.alpha(1)), rel=1e-14)
        root, ours = base.alphas_cumprod.sqrt(), schedule.alphas_cumprod.sqrt()
        # Shift and scale of √ᾱ: its steps keep their proportions.
        torch.testing.assert_close(ours.diff() / ours.diff()[0], root.diff() / root.diff()[0], rtol=1e-9, atol=0)

    def test_twice_is_once(self) -> None:
        once = schedules.zero_terminal_snr(schedules.cosine(100))
        torch.testing.assert_close(
            schedules.zero_terminal_snr(once).alphas_cumprod, once.alphas_cumprod, rtol=1e-12, atol=0
        )

    def test_the_network_gets_the_times_it_was_trained_on(self) -> None:
        schedule = schedules.zero_terminal_snr(schedules.linear(100, network_scale=10.0))
        assert float(schedule.network_time(100)) == 990
        assert float(schedules.build(schedule.spec).network_time(100)) == 990

    def test_time_at_reaches_both_of_the_last_levels(self) -> None:
        schedule = schedules.zero_terminal_snr(schedules.linear(1000))
        assert float(schedule.time_at(-math.inf)) == 1000
        assert float(schedule.time_at(float(schedule.log_snr(999)) - 1)) == 999
        assert float(schedule.time_at(float(schedule.log_snr(500)))) == pytest.approx(500, abs=1e-9)

    def test_no_level_lies_next_to_the_end(self) -> None:
        with refused("invalid", "time"):
            schedules.zero_terminal_snr(schedules.linear(1000)).alpha(999.5)


class TestNetworkTime:
    @pytest.mark.parametrize(
        ("schedule", "time", "network_time"),
        [
            (schedules.linear(1000), 1, 0),
            (schedules.linear(1000), 1000, 999),
            (schedules.linear(1000), 250.5, 249.5),
            (schedules.cosine(250, network_scale=4.0), 250, 996),
            (schedules.scaled_linear(1000), 1, 0),
            (schedules.edm(), 1.0, 0.0),
            (schedules.edm(), 80.0, math.log(80) / 4),
            (schedules.rectified_flow(), 0.25, 250),
            (schedules.rectified_flow(shift=3.0), 0.25, 500),
            (schedules.vp_sde(), 1.0, 999),
            (schedules.trigonometric(), 0.3, 0.3),
        ],
    )
    def test_network_times(self, schedule: Schedule, time: float, network_time: float) -> None:
        assert float(schedule.network_time(time)) == pytest.approx(network_time, rel=1e-14)

    @pytest.mark.parametrize("schedule", ALL, ids=name)
    def test_shapes_are_kept(self, schedule: Schedule) -> None:
        times = torch.full((2, 3), schedule.final_time)
        for method in (schedule.alpha, schedule.sigma, schedule.log_snr, schedule.network_time):
            assert method(times).shape == (2, 3)


class TestClosedForms:
    def test_vp_sde_integrates_its_betas(self) -> None:
        # ln a² = -∫ β(u) du with β linear from 0.1 to 20: trapezoids are exact for it.
        schedule = schedules.vp_sde()
        u = torch.linspace(0, 0.7, 1001, dtype=torch.float64)
        integral = float(torch.trapezoid(0.1 + u * 19.9, u))
        assert float(schedule.alpha(0.7)) ** 2 == pytest.approx(math.exp(-integral), rel=1e-12)

    @given(st.floats(0.1, 10), st.floats(0.001, 1))
    def test_the_flow_s_shift_multiplies_the_noise_to_signal_ratio(self, shift: float, t: float) -> None:
        plain, shifted = schedules.rectified_flow(), schedules.rectified_flow(shift=shift)
        assert float(shifted.alpha(t) + shifted.sigma(t)) == pytest.approx(1, abs=1e-14)
        if t < 1:
            ratio = float(plain.sigma(t) / plain.alpha(t))
            assert float(shifted.sigma(t) / shifted.alpha(t)) == pytest.approx(shift * ratio, rel=1e-12)

    def test_the_flow_keeps_its_digits_where_the_signal_vanishes(self) -> None:
        schedule = schedules.rectified_flow(shift=3.0)
        assert float(schedule.alpha(1.0)) == 0
        tiny = 1 - 2.0**-40
        assert float(schedule.alpha(tiny)) == pytest.approx(2.0**-40 / (1 + 2 * tiny), rel=1e-15)

    def test_trigonometric_is_the_uncapped_cosine(self) -> None:
        schedule = schedules.trigonometric()
        assert float(schedule.alpha(1.0)) == 0
        assert float(schedule.sigma(1 / 3)) == pytest.approx(0.5, abs=1e-15)


@pytest.mark.parametrize("schedule", ALL, ids=name)
def test_a_schedule_is_built_again_from_plain_data(schedule: Schedule) -> None:
    again = schedules.build(json.loads(json.dumps(schedule.spec)))
    times = torch.tensor([0.0, schedule.first_time, schedule.final_time], dtype=torch.float64)
    assert torch.equal(again.alpha(times), schedule.alpha(times))
    assert torch.equal(again.network_time(times), schedule.network_time(times))
    assert again.spec == schedule.spec


@pytest.mark.parametrize("schedule", ALL, ids=name)
@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_times_outside_the_schedule_are_refused(schedule: Schedule, wrong: float) -> None:
    for method in (schedule.alpha, schedule.sigma, schedule.log_snr):
        with refused("mismatch", "time"):
            method(wrong)
    with refused("mismatch", "time"):
        schedule.alpha(torch.tensor([0.0, schedule.final_time * 1.001]))


@pytest.mark.parametrize(
    ("make", "code", "key"),
    [
        (lambda: schedules.linear(20), "invalid", "schedule.steps"),
        (lambda: schedules.cosine(1), "invalid", "schedule.steps"),
        (lambda: schedules.cosine(-3), "invalid", "schedule.steps"),
        (lambda: schedules.sigmoid(2.5), "invalid", "schedule.steps"),  # type: ignore[arg-type]
        (lambda: schedules.scaled_linear(10, 0.5, 0.1), "invalid", "schedule.beta_end"),
        (lambda: schedules.sigmoid(10, start=3, end=-3), "invalid", "schedule.tau"),
        (lambda: schedules.from_betas([0.1]), "invalid", "schedule.betas"),
        (lambda: schedules.from_betas([0.1, 1.5]), "invalid", "schedule.betas"),
        (lambda: schedules.from_betas([0.1, math.nan]), "invalid", "schedule.betas"),
        (lambda: schedules.from_alphas_cumprod([0.5, 0.9]), "invalid", "schedule.alphas_cumprod"),
        (lambda: schedules.from_alphas_cumprod([0.5]), "invalid", "schedule.alphas_cumprod"),
        (lambda: schedules.from_alphas_cumprod([1.0, 0.5]), "invalid", "schedule.alphas_cumprod"),
        (lambda: schedules.edm(1.0, 0.5), "invalid", "schedule.sigma_max"),
        (lambda: schedules.rectified_flow(shift=0), "invalid", "schedule.shift"),
        (lambda: schedules.vp_sde(20, 0.1), "invalid", "schedule.beta_max"),
        (lambda: schedules.trigonometric(1.0), "invalid", "schedule.first_time"),
        (lambda: schedules.zero_terminal_snr(schedules.edm()), "unsupported", "schedule"),  # type: ignore[arg-type]
        (lambda: schedules.build({"kind": "cosin"}), "unknown", "schedule.kind"),
        (lambda: schedules.build({"kind": "cosine", "stesp": 10}), "unknown", "schedule.stesp"),
        (lambda: schedules.build({"kind": "zero_terminal_snr"}), "invalid", "schedule"),
    ],
)
def test_nonsense_is_refused(make: object, code: Code, key: str) -> None:
    assert callable(make)
    with refused(code, key):
        make()


def test_a_table_has_no_level_between_the_clean_point_and_one() -> None:
    with refused("invalid", "time"):
        schedules.linear(1000).alpha(0.5)
