"""Callbacks as a generator: order, failures, cancelling."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from carrara.app.events import Event, Notice
from carrara.app.request import Request, check_file, check_folder
from carrara.app.stream import streamed
from tests.errors import refused


def counting(upto: int, done: list[int]) -> Callable[[Callable[[Event], None]], None]:
    def work(report: Callable[[Event], None]) -> None:
        for k in range(upto):
            report(Notice(str(k)))
            done.append(k)

    return work


def test_events_come_in_order_and_the_work_waits_for_each() -> None:
    done: list[int] = []
    for k, event in enumerate(streamed(counting(5, done))):
        assert event == Notice(str(k))
        assert len(done) == k
    assert done == list(range(5))


def test_closing_cancels_at_the_next_event_and_leaves_no_thread() -> None:
    before, done = threading.active_count(), list[int]()
    stream = streamed(counting(1000, done))
    for _ in range(3):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert done == [0, 1]
    assert threading.active_count() == before


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_a_failure_is_raised_where_the_events_are_read(error: BaseException) -> None:
    def work(report: Callable[[Event], None]) -> None:
        report(Notice("a"))
        raise error

    stream = streamed(work)
    assert next(stream) == Notice("a")
    with pytest.raises(type(error)):
        next(stream)


class Example(Request):
    """A request."""

    count: int
    name: str = ""


def test_a_request_is_typed_closed_and_frozen() -> None:
    with refused("missing", key="count"):
        Example(name="a")  # type: ignore[call-arg]
    with refused("invalid", key="count"):
        Example(count="many")
    with refused("unknown", key="nam"):
        Example(count=1, nam="a")  # type: ignore[call-arg, unused-ignore]
    with pytest.raises(ValueError, match="frozen"):
        Example(count=1).count = 2  # type: ignore[misc]


def test_places_that_cannot_be_written_are_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "file"
    file.write_text("x")
    check_file(file, "out")
    check_file(tmp_path / "new" / "x.json", "out")
    check_folder(tmp_path / "new" / "deep", "out")
    with refused("exists", key="out"):
        check_file(tmp_path, "out")
    with refused("exists", key="out"):
        check_file(file / "x.json", "out")
    for folder in (file, file / "deep"):
        with refused("exists", key="out"):
            check_folder(folder, "out")
