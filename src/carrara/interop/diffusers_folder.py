"""The model folders of diffusers: `config.json` and the weights, in and out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from carrara.errors import UserError
from carrara.files import write_whole
from carrara.interop.files import read_checkpoint
from carrara.interop.layout import strip_prefixes

CONFIG = "config.json"
STEM = "diffusion_pytorch_model"
WEIGHTS = (f"{STEM}.safetensors", f"{STEM}.bin")
"""Today's name of the weights, and that of older folders."""
VARIANTS = ("", ".fp32", ".ema", ".bf16", ".fp16", ".non_ema")
"""What diffusers may insert into the names of weight files, in order of preference."""
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What attention layers were called before diffusers 0.18, whose folders are still in use."""


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A config file of diffusers.

    Args:
        path: the file.
        what: whose folder to name where there is none.

    Raises:
        UserError: it is missing, or no JSON object.
    """
    if not path.is_file():
        raise UserError(
            f"there is no {path.name} in '{path.parent}': name the folder of the {what} itself.",
            key=str(path),
            code="missing",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is no JSON ({error}): download it again.", key=str(path), code="damaged") from None
    if not isinstance(config, dict):
        raise UserError(
            f"'{path}' does not describe anything of diffusers: download it again.", key=str(path), code="damaged"
        )
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """A model folder's weights, under today's names.

    Raises:
        UserError: they are missing or damaged.
    """
    tensors = {key: value for path in weight_files(folder) for key, value in read_checkpoint(path).tensors.items()}
    return {_renamed(key): value for key, value in strip_prefixes(tensors).items()}


def weight_files(folder: Path) -> list[Path]:
    """A model folder's weight files: one, or the shards of an index; full precision first, safetensors first.

    Raises:
        UserError: the index is damaged or names a file outside the folder.
    """
    for variant in VARIANTS:
        for ending in ("safetensors", "bin"):
            one = folder / f"{STEM}{variant}.{ending}"
            if one.is_file():
                return [one]
            for name in (f"{STEM}.{ending}.index{variant}.json", f"{STEM}{variant}.{ending}.index.json"):
                if (folder / name).is_file():
                    return _shards(folder / name)
    return [folder / WEIGHTS[0]]  # which is then named as missing


def _shards(index: Path) -> list[Path]:
    files = read_json(index, "model").get("weight_map")
    names = set(files.values()) if isinstance(files, dict) else set()
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise UserError(
            f"'{index}' has no weight_map of the files in its folder: download it again.",
            key=str(index),
            code="damaged",
        )
    return [index.parent / name for name in sorted(names)]


def write_model(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write a model folder, each file whole or not at all."""
    from safetensors.torch import save

    state = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    write_whole(folder / WEIGHTS[0], save(state, {"format": "pt"}))
    write_json(folder / CONFIG, config)


def write_json(path: Path, config: Mapping[str, Any]) -> None:
    """Write a config file, whole or not at all."""
    write_whole(path, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def _renamed(key: str) -> str:
    """Today's name of an attention layer that has another in older folders."""
    if ".attentions." not in key:
        return key
    before, name, part = key.rsplit(".", 2)
    return f"{before}.{OLD_ATTENTION.get(name, name)}.{part}"
