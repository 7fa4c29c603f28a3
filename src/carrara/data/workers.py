"""Work done ahead by other processes, in order, that survives the death of any of them.

PyTorch's `DataLoader` raises from a signal handler when a worker dies, at whatever line the training loop
happens to be; here the death is met where the next result is asked for, and the lost work is simply done again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from carrara.errors import UserError

Result = TypeVar("Result")

_AHEAD = 3
_WATCH_SECONDS = 1.0
_work: Callable[[int], Any]


def in_order(work: Callable[[int], Result], start: int, workers: int) -> Iterator[Result]:
    """`work(start)`, `work(start + 1)`, … without end, made ahead by `workers` processes.

    Dead workers are replaced, and what they were making is made again.

    Raises:
        UserError: the workers died twice over the same item.
    """
    died_at = -1
    while True:
        pool = _pool(work, workers)
        ahead: deque[Future[Result]] = deque()
        try:
            while True:
                while len(ahead) < _AHEAD * workers:
                    ahead.append(pool.submit(_do, start + len(ahead)))
                result = ahead[0].result()
                ahead.popleft()
                start += 1
                yield result
        except BrokenProcessPool as error:
            if died_at == start:
                raise UserError(
                    f"the data workers died twice over batch {start} (out of memory?): set data.workers lower."
                ) from error
            died_at = start
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _pool(work: Callable[[int], Any], workers: int) -> ProcessPoolExecutor:
    # A fork shares the data set's memory and needs no second import; other systems cannot fork safely.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    return ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(work, os.getpid()))


def _begin(work: Callable[[int], Any], parent: int) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the training loop's to answer: it saves first
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # the thread pool of the parent is not there after a fork
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    """End this worker when its parent was killed: nobody else would."""
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


def _do(item: int) -> Any:
    return _work(item)
