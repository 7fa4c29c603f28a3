"""Processes that work together: the only importer of `torch.distributed`.

Training, sampling and evaluation share it. One process is the plain case and needs no launcher; `torchrun` and
`accelerate launch` set the same environment variables (RANK, WORLD_SIZE, LOCAL_RANK).
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from carrara.devices import resolve_device
from carrara.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """This process among its peers.

    Attributes:
        rank: 0..world-1; rank 0 writes.
        world: how many there are.
        device: where this one computes.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0


def start(device: str = "auto") -> Processes:
    """Join the group that a launcher made, or be alone: NCCL for what lies on GPUs, gloo for what lies on CPUs.

    Args:
        device: where this process computes; of "auto" and "cuda" each process of a machine takes its own GPU.

    Raises:
        UserError: there is no such device.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    place = resolve_device(device)
    cuda = place.type == "cuda"
    if cuda:
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if place.index is None else place.index)
        torch.cuda.set_device(place)
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", rank=rank, world_size=world)
    return Processes(rank, world, place)


def finish() -> None:
    """Leave the group, after everything went well."""
    if _together():
        torch.distributed.destroy_process_group()


def _together() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


# ---- exchanged between all: every process must call these alike ---------------------------------------


def gather(values: Tensor) -> Tensor:
    """The values of all processes one after the other, in rank order, [world·B, …]; the values themselves where
    there is one process. Every process must call it, with equal shapes."""
    if not _together():
        return values
    parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def gather_lists(items: Sequence[Any]) -> list[Any]:
    """The items of all processes in rank order; any plain data, so better rarely."""
    if not _together():
        return list(items)
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any process; exchanged by the hosts, which do not wait for their devices."""
    return bool(gather(torch.tensor([flag])).any()) if _together() else flag


def run_on_rank0(function: Callable[[], Result]) -> Result:
    """What the function gives on the first process, on all of them.

    Raises:
        UserError: on all of them, where it is raised on the first, so that none is left waiting.
    """
    if not _together():
        return function()
    answer: list[Any] = [None, None]
    failure: Exception | None = None
    if torch.distributed.get_rank() == 0:
        try:
            answer[0] = function()
        except Exception as error:
            failure, answer[1] = error, error if isinstance(error, UserError) else UserError(str(error))
    torch.distributed.broadcast_object_list(answer, src=0)
    if failure is not None:
        raise failure
    if answer[1] is not None:
        raise answer[1]
    result: Result = answer[0]
    return result


def in_turn(items: Sequence[Item], work: Callable[[Item], Result]) -> Iterator[Result]:
    """What `work` gives of every item, in their order and on every process; each is worked on by one of them.

    The results must be plain data. Every process must call it with equally many items, and draw all results.

    Raises:
        UserError: on all of them, where one raised it.
    """
    if not _together():
        yield from map(work, items)
        return
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for low in range(0, len(items), world):
        own: list[Result | UserError] = []
        if low + rank < len(items):
            try:
                own.append(work(items[low + rank]))
            except UserError as error:
                own.append(error)
        for result in gather_lists(own):
            if isinstance(result, UserError):
                raise result
            yield result


def fail_together(function: Callable[[], Result]) -> Result:
    """What the function gives on this process, where it gives something on every one.

    Raises:
        UserError: on all processes, where it is raised on any, so that none is left waiting for it.
    """
    failure: UserError | None = None
    result: list[Result] = []
    try:
        result.append(function())
    except UserError as error:
        failure = error
    if any_of(failure is not None):
        raise failure or UserError(
            "another process cannot go on: its own message has the reason.", key="processes", code="unsupported"
        )
    return result[0]


# ---- modules over processes --------------------------------------------------------------------------------


def replicated(module: nn.Module) -> nn.Module:
    """The module with gradients averaged over the processes, each of which holds it whole (DDP)."""
    # Without the search for unused parameters DDP lays out its buckets again after the first step: the sums of
    # three and more processes, whose order depends on that, would have other last bits after a resume.
    several = torch.distributed.get_world_size() > 2
    return nn.parallel.DistributedDataParallel(module, find_unused_parameters=several)


def shard(module: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Shard the module's parameters over the processes (FSDP2), in place.

    Args:
        blocks: submodules that are gathered on their own, each right before it is used.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for part in (*blocks, module):
        fully_shard(part, mesh=mesh)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` was applied."""
    if not _together():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


@contextmanager
def gradients_joined(module: nn.Module, join: bool) -> Iterator[None]:
    """Forward and backward passes whose gradients are averaged over the processes, or (`join` False) kept here
    for the micro-batches that follow."""
    if _together() and is_sharded(module):
        module.set_requires_gradient_sync(join)  # type: ignore[operator]
    if isinstance(module, nn.parallel.DistributedDataParallel) and not join:
        with module.no_sync():
            yield
    else:
        yield


def local(values: Tensor) -> Tensor:
    """This process's part of a sharded tensor, in the same memory; other tensors as they are."""
    if not _together():  # spares a process alone the import
        return values
    from torch.distributed.tensor import DTensor

    return values.to_local() if isinstance(values, DTensor) else values


def whole(values: Tensor) -> Tensor:
    """All of a sharded tensor; other tensors as they are. Every process must call it."""
    if not _together():
        return values
    from torch.distributed.tensor import DTensor

    return values.full_tensor() if isinstance(values, DTensor) else values


def shard_like(pattern: Tensor, values: Tensor) -> Tensor:
    """A whole tensor, known to every process, sharded as `pattern` is, on its device."""
    if not _together():
        return values.to(pattern.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(pattern, DTensor):
        return values.to(pattern.device)
    return distribute_tensor(values.to(pattern.device), pattern.device_mesh, pattern.placements, src_data_rank=None)


# ---- parts of sharded tensors on disk: each process writes and reads its own -------------------------------

_ALONE = "torch.distributed is disabled"  # a warning of its checkpoints, when a process needs no other: that is meant


def copy_parts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's parts of sharded tensors, copied to the CPU; of tensors that all hold whole, on the first."""
    from torch.distributed.checkpoint.staging import BlockingAsyncStager
    from torch.distributed.tensor import DTensor

    first = torch.distributed.get_rank() == 0
    own = {name: values for name, values in tensors.items() if first or isinstance(values, DTensor)}
    result: dict[str, Tensor] = BlockingAsyncStager().stage(own)
    return result


def write_parts(parts: Mapping[str, Tensor], folder: Path) -> bool:
    """Write what `copy_parts` gave as one safetensors file of this process, waiting for no other.

    Returns:
        Whether the files of all processes lie in the folder now.

    Raises:
        OSError: a full disk or the like.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    warnings.filterwarnings("ignore", _ALONE)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # Written outside of the folder, which another process may complete and rename as soon as the last file is in it.
    own = folder.parent.with_name(f"{folder.parent.stem}.process-{rank:05}.partial")
    shutil.rmtree(own, ignore_errors=True)
    try:
        writer = HuggingFaceStorageWriter(str(own), save_distributed=True)
        save(dict(parts), storage_writer=writer, no_dist=True)
    except CheckpointException as error:  # derives from BaseException
        raise OSError("; ".join(str(reason) for reason, _ in error.failures.values())) from None
    for file in own.iterdir():
        file.rename(folder / f"process-{rank:05}.safetensors")
    shutil.rmtree(own, ignore_errors=True)
    return len(list(folder.glob("*.safetensors"))) == world


def read_parts(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose parts lie in a folder, however many processes wrote them.

    Args:
        like: tensors by name; those of the same shape are placed and sharded as these, of which only this process's
            parts are read. Others are whole and on the CPU.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    warnings.filterwarnings("ignore", _ALONE)
    reader = HuggingFaceStorageReader(str(folder))
    tensors: dict[str, Any] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        alike = name in like and like[name].shape == entry.size  # type: ignore[union-attr]
        tensors[name] = (
            torch.empty_like(like[name]) if alike else torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]
        )
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors
