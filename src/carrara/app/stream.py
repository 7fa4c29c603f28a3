"""Work that reports through callbacks, as a generator of events."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from carrara.app.events import Event

Report = Callable[[Event], None]


class Cancelled(BaseException):
    """Raised inside the work when its generator has been closed."""


def streamed(work: Callable[[Report], None]) -> Iterator[Event]:
    """The events that `work` reports, as they come.

    The work runs in a thread of its own, which waits until each event has been taken. Closing the generator cancels
    it at its next event.

    Args:
        work: called with a function that takes events.

    Raises:
        whatever the work raises.
    """
    events: queue.Queue[Any] = queue.Queue(maxsize=1)
    taken = threading.Semaphore(0)
    closed = threading.Event()
    done = object()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    failure: list[BaseException] = []

    def report(event: Event) -> None:
        if not closed.is_set():
            events.put(event)
            taken.acquire()
        if closed.is_set():
            raise Cancelled

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)  # each thread has its own
            work(report)
        except Cancelled:
            pass
        except BaseException as error:
            failure.append(error)
        finally:
            events.put(done)

    thread = threading.Thread(target=run, name="work", daemon=True)
    thread.start()
    try:
        while (event := events.get()) is not done:
            yield event
            taken.release()
    finally:
        closed.set()
        taken.release()
        while thread.is_alive():
            thread.join(0.05)
            if not events.empty():
                events.get_nowait()
    if failure:
        raise failure[0]
