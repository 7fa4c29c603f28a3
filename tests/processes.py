"""Several processes that work together, as a launcher would start them, for tests."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# One server imports what is slow once; every test forks from it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "tests.runs",
        "sklearn.datasets",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.profiler",
        "torch.utils.tensorboard",
    ]
)

_SECONDS = 180


def together(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`work(*arguments)` on `world` processes of one gloo group; what each returned, by rank.

    Raises:
        AssertionError: one failed, or they did not end.
    """
    members, pipes = _started(world, work, arguments)
    try:
        results = [_received(pipe) for pipe in pipes]
    finally:
        for member in members:
            member.join(5)
            member.kill()
    for failure, _ in results:
        assert failure is None, failure
    return [value for _, value in results]


def killed_when(reached: Callable[[], bool], world: int, work: Callable[..., Any], *arguments: Any) -> None:
    """Start as `together`, and SIGKILL all processes at once as soon as `reached()`.

    Raises:
        AssertionError: that did not come.
    """
    members, _ = _started(world, work, arguments)
    until = time.monotonic() + _SECONDS
    while not reached() and time.monotonic() < until and all(member.is_alive() for member in members):
        time.sleep(0.005)
    for member in members:
        member.kill()
    for member in members:
        member.join()
    assert reached(), "the processes ended before they were to be killed"


def _started(world: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[list[Any], list[Connection]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, members = [], []
    for rank in range(world):
        here, there = CONTEXT.Pipe(duplex=False)
        member = CONTEXT.Process(target=_member, args=(rank, world, port, there, work, arguments))
        member.start()
        there.close()
        pipes.append(here)
        members.append(member)
    return members, pipes


def _received(pipe: Connection) -> tuple[str | None, Any]:
    assert pipe.poll(_SECONDS), f"the processes did not end within {_SECONDS} s"
    result: tuple[str | None, Any] = pickle.loads(pipe.recv_bytes())
    return result


def _member(
    rank: int, world: int, port: int, pipe: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch

    from carrara import distributed

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        value = work(*arguments)
        distributed.finish()
        pipe.send_bytes(pickle.dumps((None, value)))  # `send` would leave tensors in memory that ends with this process
    except BaseException:
        pipe.send_bytes(pickle.dumps((traceback.format_exc(), None)))
