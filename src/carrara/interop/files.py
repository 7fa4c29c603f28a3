"""Weight files of others, read without running anything they hold."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from carrara.errors import UserError

WRAPPERS = ("state_dict", "model_state_dict", "model", "ema")
"""The keys under which training programs keep the weights beside counters and optimiser state."""


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` or a PyTorch file (`.pt`, `.pth`, `.ckpt`, `.bin`), on the CPU.

    PyTorch files are read with `weights_only=True`: a file that holds code is refused, never run.

    Raises:
        UserError: the file is missing, cut short, holds code, or holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint at '{path}'.")
    content = _safetensors(path) if path.suffix == ".safetensors" else _torch_file(path)
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"'{path}' holds no weights: a table of named tensors is expected.")
    return content


def _safetensors(path: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"'{path}' is cut short or no safetensors file ({error}): fetch it again.") from error


def _torch_file(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "global" in str(error).lower():
            raise UserError(
                f"'{path}' holds pickled code, which is never run: convert it to safetensors where you trust it."
            ) from error
        raise UserError(f"'{path}' is cut short or no PyTorch file: fetch it again.") from error
    except Exception as error:  # a cut pickle fails in whatever it was about to do
        raise UserError(f"'{path}' is cut short or no PyTorch file: fetch it again.") from error
