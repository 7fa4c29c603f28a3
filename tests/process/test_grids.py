"""Every spacing as a property, guided-diffusion's against its stored lists, and the refusal of nonsense."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carrara.errors import Code
from carrara.process import Grid, Schedule, grids, schedules
from tests.errors import refused
from tests.parity.reference import Reference

TABLE = schedules.linear(1000)
CONTINUOUS: list[Schedule] = [schedules.vp_sde(), schedules.edm(), schedules.rectified_flow(shift=3.0)]
ZERO_SNR = schedules.zero_terminal_snr(schedules.scaled_linear(1000))
OF_ANY: dict[str, Callable[[Schedule, int], Grid]] = {
    "trailing": grids.trailing,
    "linspace": grids.linspace,
    "log_snr": grids.log_snr,
    "log_snr bent": partial(grids.log_snr, bends=[0.8, 0.1, -0.5, 0.2]),
}
OF_TABLES: dict[str, Callable[[Schedule, int], Grid]] = {"leading": grids.leading, "quadratic": grids.quadratic}
WHOLE = ("trailing", "linspace", "leading", "quadratic")


@pytest.mark.parametrize("name", [*OF_ANY, *OF_TABLES, "karras"])
@given(steps=st.integers(1, 200), which=st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_every_spacing(name: str, steps: int, which: int) -> None:
    schedule = [TABLE, ZERO_SNR, *CONTINUOUS][which]
    every: dict[str, Callable[[Schedule, int], Grid]] = {
        **OF_ANY,
        **OF_TABLES,
        "karras": partial(grids.karras, sigma_max=20.0),
    }
    make = every[name]
    if name in OF_TABLES and not schedule.discrete:
        with refused("unsupported", "spacing"):
            make(schedule, steps)
        return
    grid = make(schedule, steps)
    times = grid.times
    assert len(grid) == steps == len(grid.pairs())
    assert times.dtype == torch.float64
    assert bool((times.diff() < 0).all()), "descends"
    assert float(times[-1]) == 0, "ends clean"
    assert float(times[0]) <= schedule.final_time
    assert float(times[-2]) >= min(schedule.first_time, float(times[0])) * (1 - 1e-9)
    if schedule.discrete and name in WHOLE:
        assert bool((times == times.round()).all()), "a table's own times"
    if name in OF_ANY:
        assert float(times[0]) == schedule.final_time, "starts where the noise is"
    assert grid.pairs() == list(itertools.pairwise(times.tolist()))
    back = grid.reversed()
    assert back.ascending
    assert torch.equal(back.times, times.flip(0))
    assert back.reversed() == grid
    assert hash(back.reversed()) == hash(grid)
    assert back != grid


@given(steps=st.integers(2, 300))
@settings(max_examples=50, deadline=None)
def test_log_snr_is_even(steps: int) -> None:
    for schedule in (TABLE, *CONTINUOUS):
        ends = schedule.log_snr(grids.log_snr(schedule, steps).times[1:-1])
        if len(ends) > 1:
            # Differences of numbers of size 10 that came back through time_at.
            torch.testing.assert_close(
                ends.diff(), torch.full_like(ends[1:], float(ends.diff().mean())), rtol=1e-6, atol=1e-9
            )


@given(bends=st.lists(st.floats(-2, 2), min_size=2, max_size=7), steps=st.integers(3, 40))
@settings(max_examples=50, deadline=None)
def test_bends_are_the_logarithms_of_step_lengths(bends: list[float], steps: int) -> None:
    lengths = TABLE.log_snr(grids.log_snr(TABLE, steps, bends).times[:-1]).diff().log().numpy()
    wanted = np.interp(np.linspace(0, len(bends) - 1, steps - 1), np.arange(len(bends)), bends)
    np.testing.assert_allclose(lengths - lengths.mean(), wanted - wanted.mean(), atol=1e-6)


def test_even_bends_bend_nothing() -> None:
    straight = grids.log_snr(TABLE, 12).times
    torch.testing.assert_close(grids.log_snr(TABLE, 12, [0.4, 0.4, 0.4]).times, straight, rtol=1e-9, atol=0)


@given(steps=st.integers(2, 100), rho=st.floats(1, 10))
@settings(max_examples=50, deadline=None)
def test_karras_is_even_in_the_root_of_the_noise_to_signal_ratio(steps: int, rho: float) -> None:
    for schedule in (TABLE, schedules.edm()):
        ratios = torch.exp(-schedule.log_snr(grids.karras(schedule, steps, rho).times[:-1]) / 2) ** (1 / rho)
        steps_taken = ratios.diff()
        torch.testing.assert_close(
            steps_taken, torch.full_like(steps_taken, float(steps_taken.mean())), rtol=1e-6, atol=1e-9
        )


def test_known_spacings() -> None:
    assert grids.leading(TABLE, 10).times.tolist() == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1, 0]
    assert grids.trailing(TABLE, 10).times.tolist() == [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert grids.linspace(TABLE, 4).times.tolist() == [1000, 667, 334, 1, 0]
    assert grids.given(TABLE, [1000, 12.5, 1]).times.tolist() == [1000, 12.5, 1]


def test_stable_diffusion_ends_at_the_first_level() -> None:
    """set_alpha_to_one = false with steps_offset = 1: … 102 → 2 → 1."""
    grid = grids.leading(TABLE, 10, offset=1, terminal="last")
    assert grid.times.tolist() == [902, 802, 702, 602, 502, 402, 302, 202, 102, 2, 1]
    assert grids.leading(TABLE, 10, terminal="last").times.tolist()[-2:] == [101, 1], "t = 1 does not occur twice"


def test_quadratic_is_ddims_table() -> None:
    """linspace(0, √(0.8 T), S)², as positions from 0 (Song et al. 2020, appendix D.2)."""
    positions = (np.linspace(0, math.sqrt(800), 20) ** 2).astype(int)
    assert grids.quadratic(TABLE, 20).times.tolist() == [*(positions[::-1] + 1.0), 0.0]


def test_stored_respacings_of_guided_diffusion() -> None:
    case = Reference("c7_schedules_and_helpers")
    for steps, counts in case.config["respacings"]:
        stored = case.output(f"timesteps.{steps}.{counts}").tolist()
        schedule = schedules.linear(steps)
        if stored == [-1]:
            with refused("invalid", "counts"):
                grids.sections(schedule, counts)
            continue
        grid = grids.sections(schedule, counts)
        assert [t - 1 for t in grid.times.tolist()[:-1]][::-1] == stored, counts


def test_stored_timesteps_of_latent_diffusion() -> None:
    """Its "uniform" is leading with one offset, its "quad" the quadratic spacing, both counted from 1 there too."""
    case = Reference("c7_schedules_and_helpers")
    uniform = case.output("ldm_ddim_timesteps.uniform.50.1000").tolist()
    assert grids.leading(TABLE, 50).times.tolist()[:-1][::-1] == uniform
    quad = case.output("ldm_ddim_timesteps.quad.20.1000").tolist()
    ours = grids.quadratic(TABLE, 20).times.tolist()[:-1][::-1]
    assert ours == quad


@given(parts=st.lists(st.integers(1, 12), min_size=1, max_size=6), final=st.integers(72, 300))
@settings(max_examples=60, deadline=None)
def test_sections_share_the_table_evenly(parts: list[int], final: int) -> None:
    grid = grids.sections(schedules.cosine(final), parts)
    assert len(grid) == sum(parts)
    assert grid == grids.sections(schedules.cosine(final), ",".join(map(str, parts)))
    share, extra = divmod(final, len(parts))
    ends = list(itertools.accumulate(share + (i < extra) for i in range(len(parts))))
    counts = [sum(low < t <= high for t in grid.times.tolist()) for low, high in itertools.pairwise([0, *ends])]
    assert counts == parts


@given(steps=st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_ddim_takes_one_whole_stride_or_names_the_counts_it_has(steps: int) -> None:
    schedule = schedules.linear(300)
    strides = {-(-300 // stride) for stride in range(1, 300)}
    if steps not in strides:
        with refused("invalid", "steps"):
            grids.ddim(schedule, steps)
        return
    times = grids.ddim(schedule, steps).times[:-1]
    assert float(times[-1]) == 1
    assert len(set(times.diff().tolist())) <= 1


def test_a_grid_prints_itself_readably() -> None:
    assert repr(grids.trailing(TABLE, 3)) == "Grid(trailing: 3 steps, 1000 → 667 → 333 → 0)"
    long = repr(grids.trailing(TABLE, 100))
    assert "…" in long
    assert len(long) < 100
    assert "reversed" in repr(grids.trailing(TABLE, 3).reversed())


@pytest.mark.parametrize(
    ("make", "code", "key"),
    [
        (lambda: grids.given(TABLE, [500, 600, 0]), "invalid", "times"),
        (lambda: grids.given(TABLE, [500, 500, 0]), "invalid", "times"),
        (lambda: grids.given(TABLE, [500]), "invalid", "times"),
        (lambda: grids.given(TABLE, [1001, 0]), "mismatch", "time"),
        (lambda: grids.given(TABLE, [500, -1]), "invalid", "times"),
        (lambda: grids.given(TABLE, [500, math.nan]), "invalid", "times"),
        (lambda: grids.given(TABLE, [500, 0.5]), "invalid", "time"),
        (lambda: grids.given(ZERO_SNR, [999.5, 0]), "invalid", "time"),
        (lambda: Grid(torch.tensor([0.0, 1.0])), "invalid", "times"),
        (lambda: grids.trailing(TABLE, 0), "invalid", "steps"),
        (lambda: grids.trailing(TABLE, 1001), "invalid", "steps"),
        (lambda: grids.leading(TABLE, 1000, offset=1), "invalid", "offset"),
        (lambda: grids.leading(schedules.edm(), 5), "unsupported", "spacing"),
        (lambda: grids.quadratic(schedules.edm(), 5), "unsupported", "spacing"),
        (lambda: grids.sections(TABLE, "10,x"), "invalid", "counts"),
        (lambda: grids.sections(TABLE, []), "invalid", "counts"),
        (lambda: grids.sections(TABLE, "501,2"), "invalid", "counts"),
        (lambda: grids.sections(TABLE, "0"), "invalid", "counts"),
        (lambda: grids.karras(ZERO_SNR, 5), "invalid", "sigma_max"),
        (lambda: grids.karras(TABLE, 5, sigma_min=3.0, sigma_max=2.0), "invalid", "sigma_max"),
    ],
)
def test_nonsense_is_refused(make: Callable[[], Grid], code: Code, key: str) -> None:
    with refused(code, key):
        make()


@pytest.mark.parametrize("steps", [2, 3, 4, 7, 10, 19, 20, 50])
def test_linspace_is_diffusers_but_for_exact_halves(steps: int) -> None:
    """Both round halves to the even number, ours counts the entries from 1 and diffusers from 0."""
    theirs = np.linspace(0, 999, steps).round()[::-1] + 1
    ours = grids.linspace(TABLE, steps).times[:-1].numpy()
    halves = np.linspace(0, 999, steps)[::-1] % 1 == 0.5
    assert halves.any() == (steps in (3, 7, 19))
    assert (ours == theirs)[~halves].all()
    assert (abs(ours - theirs) == 1)[halves].all()
