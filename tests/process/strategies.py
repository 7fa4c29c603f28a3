"""Schedules and pairs of times, drawn at random."""

from __future__ import annotations

from hypothesis import strategies as st

from carrara.process import Schedule, schedules

SCHEDULES: list[Schedule] = [
    schedules.linear(1000),
    schedules.scaled_linear(1000),
    schedules.cosine(1000),
    schedules.sigmoid(1000),
    schedules.zero_terminal_snr(schedules.linear(1000)),
    schedules.edm(),
    schedules.rectified_flow(shift=2.0),
    schedules.vp_sde(),
    schedules.trigonometric(),
]


def place(schedule: Schedule, share: float) -> float:
    """A time of the schedule, whole on a table: 0..1 is the least noisy to the noisiest."""
    t = schedule.first_time + share * (schedule.final_time - schedule.first_time)
    return float(round(t)) if schedule.discrete else t


@st.composite
def schedules_and_times(draw: st.DrawFn, length: int = 2, clean: bool = True) -> tuple[Schedule, list[float]]:
    """A schedule and `length` of its times, strictly descending; the last may be the clean point."""
    schedule = draw(st.sampled_from(SCHEDULES))
    shares = draw(st.lists(st.floats(0.01, 1.0), min_size=length, max_size=length, unique_by=lambda u: round(u, 2)))
    times = sorted({place(schedule, u) for u in shares}, reverse=True)
    if clean and draw(st.booleans()):
        times[-1] = 0.0
    return schedule, times
