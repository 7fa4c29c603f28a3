"""Work done ahead by other processes, in order, that survives the death of any of them.

PyTorch's `DataLoader` raises from a signal handler when a worker dies, at whatever line the training loop
happens to be, and the one pipe of `ProcessPoolExecutor` hangs when a worker dies while writing to it. Here each
worker has a pipe of its own, its death is found where its next result is needed, and a new one does its work.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from carrara.errors import UserError

Result = TypeVar("Result")

_AHEAD = 3
_LIVES = 5
_WATCH_SECONDS = 1.0


class WorkerDied(Exception):
    """A worker's process ended before it gave its result."""


def in_order(work: Callable[[int], Result], start: int, workers: int) -> Generator[Result]:
    """`work(start)`, `work(start + 1)`, … without end, made ahead by `workers` processes.

    Worker w makes every `workers`-th item. One that dies is replaced, and what it was making is made again.

    Raises:
        UserError: one item has cost five workers their lives.
        RuntimeError: `work` raised something; with the worker's traceback.
    """
    reach = _AHEAD * workers
    crew = [_Worker(work, range(item, start + reach, workers)) for item in range(start, start + workers)]
    first, deaths = start, 0
    try:
        while True:
            number = (start - first) % workers
            try:
                result = crew[number].result()
            except WorkerDied:
                deaths += 1
                if deaths == _LIVES:
                    raise UserError(
                        f"{_LIVES} data workers died over batch {start} (out of memory?): set data.workers lower.",
                        key="data.workers",
                        code="resources",
                    ) from None
                crew[number].stop()
                crew[number] = _Worker(work, range(start, start + reach, workers))
                continue
            deaths = 0
            crew[number].request(start + reach)
            start += 1
            yield result
    finally:
        for worker in crew:
            worker.stop()


class _Worker:
    """One process, and the thread that takes its results off its hands."""

    def __init__(self, work: Callable[[int], Any], items: Iterable[int]) -> None:
        # A fork shares the data set's memory and needs no second import; other systems cannot fork safely.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self._pipe, far_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(work, far_end, os.getpid()), daemon=True)  # type: ignore[attr-defined]
        self._process.start()
        far_end.close()  # so that the worker holds the only one, and its death ends the pipe
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._stopped = False
        _living.add(self)
        for item in items:
            self.request(item)

    def request(self, item: int) -> None:
        with contextlib.suppress(OSError):  # a dead one cannot be reached, which waiting for its result will show
            self._pipe.send(item)

    def result(self) -> Any:
        outcome = self._results.get()
        if isinstance(outcome, WorkerDied):
            raise outcome
        value, trace = outcome
        if trace is not None:
            raise RuntimeError(f"a data worker failed:\n{trace}")
        return value

    def stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        _living.discard(self)
        self._process.terminate()
        self._process.join()
        self._reader.join()
        self._pipe.close()

    def _read(self) -> None:
        try:
            while True:
                self._results.put(self._pipe.recv())
        except (EOFError, OSError):
            self._results.put(WorkerDied())


_living: set[_Worker] = set()


@atexit.register
def _stop_all() -> None:
    """End the workers of iterators that are still open: at a later time Python is too far gone to do it."""
    for worker in list(_living):
        worker.stop()


def _serve(work: Callable[[int], Any], pipe: Connection, parent: int) -> None:
    """What a worker does: take an item, give its result or the traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the training loop's to answer: it saves first
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # the thread pool of the parent is not there after a fork
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    while True:
        item = pipe.recv()
        outcome: tuple[Any, str | None]
        try:
            outcome = (work(item), None)
        except Exception:
            outcome = (None, traceback.format_exc())
        pipe.send(outcome)


def _leave_with(parent: int) -> None:
    """End this worker when its parent was killed: nobody else would."""
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)
