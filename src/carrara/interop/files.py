"""Weight files of other programs, read without running any code in them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from carrara.errors import UserError

MEANS = ("ema_state_dict", "state_dict_ema", "model_ema_state_dict", "ema_model", "model_ema", "params_ema", "ema")
"""The keys under which training programs keep the running mean of the weights."""
LAST = ("state_dict", "model_state_dict", "model", "network", "params")
"""The keys under which they keep the last weights."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a weight file.

    Attributes:
        tensors: by their keys, on the CPU.
        key: under which key of the file they are, such as "ema" or "checkpoint.state_dict"; "" for a plain table.
        others: the keys of other weights in the file, which were not taken.
    """

    tensors: dict[str, Tensor]
    key: str = ""
    others: tuple[str, ...] = ()

    @property
    def mean(self) -> bool:
        """Whether a running mean was chosen by its key."""
        return self.key.rsplit(".", 1)[-1] in MEANS


def read_checkpoint(path: str | Path, *, last: bool = False) -> Checkpoint:
    """The tensors of a `.safetensors` or a PyTorch file (`.pt`, `.pth`, `.ckpt`, `.bin`).

    PyTorch files are read with `weights_only=True`: a file that contains code is refused, never run.

    Args:
        path: the file.
        last: of a file with several tables of weights take the last ones; default: their running mean.

    Raises:
        UserError: the file is missing, cut short, or contains code or no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint at '{path}'.", key=str(path), code="missing")
    content = _safetensors(path) if path.suffix == ".safetensors" else _torch_file(path)
    checkpoint = _choose(content, last)
    if checkpoint is None:
        raise UserError(
            f"'{path}' contains no weights: a table of named tensors is expected.", key=str(path), code="invalid"
        )
    return checkpoint


def _choose(content: object, last: bool) -> Checkpoint | None:
    """The table of weights in a file's content, which may be nested; None where there is none."""
    if not isinstance(content, Mapping) or not content:
        return None
    if all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        return Checkpoint(dict(content))
    known = [*LAST, *MEANS] if last else [*MEANS, *LAST]
    tables = {key: _choose(content[key], last) for key in known if key in content}
    readable = {key: table for key, table in tables.items() if table is not None}
    if not readable:
        return None
    key, table = next(iter(readable.items()))
    others = tuple(other for other in readable if other != key)
    return Checkpoint(table.tensors, f"{key}.{table.key}".rstrip("."), (*others, *table.others))


def _safetensors(path: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"'{path}' is cut short or no safetensors file ({error}): download it again.",
            key=str(path),
            code="damaged",
        ) from error


def _torch_file(path: Path) -> object:
    damaged = UserError(f"'{path}' is cut short or no PyTorch file: download it again.", key=str(path), code="damaged")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "global" in str(error).lower():
            raise UserError(
                f"'{path}' contains pickled code, which is never run: convert it to safetensors where you trust it.",
                key=str(path),
                code="unsupported",
            ) from error
        raise damaged from error
    except Exception as error:  # a cut pickle fails wherever it ends
        raise damaged from error
