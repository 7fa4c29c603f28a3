"""A saved network: one folder with `config.json` and safetensors files, each whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from carrara.errors import UserError
from carrara.files import write_whole
from carrara.version import __version__

FORMAT = 1
"""The version of `config.json`; a newer one is refused, an older one is read."""


def find(path: str | Path) -> Path:
    """The folder itself, or the `model/` folder of a run.

    Raises:
        UserError: there is no such folder.
    """
    folder = Path(path)
    if folder.is_file():
        raise UserError(f"{folder} is a file and no model folder: `carrara import {folder}` makes one of a checkpoint.")
    if not folder.is_dir():
        raise UserError(
            f"there is no model folder {folder}: name a run, or the folder of a model, codec or classifier."
        )
    return folder / "model" if (folder / "model").is_dir() else folder


def save(folder: str | Path, kind: str, config: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> None:
    """Write `config.json`, and `NAME.safetensors` for every module.

    Args:
        kind: "diffusion", "classifier", …: what the folder is loaded as.
        config: plain data, everything but the weights.
    """
    from safetensors.torch import save as to_bytes

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, module in modules.items():
        state = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
        write_whole(folder / f"{name}.safetensors", to_bytes(state))
    text = json.dumps({"format": FORMAT, "kind": kind, "carrara": __version__, **config}, indent=2)
    write_whole(folder / "config.json", (text + "\n").encode())


def read_config(folder: Path, kind: str) -> dict[str, Any]:
    """What `save` wrote into `config.json`.

    Raises:
        UserError: it is missing, damaged, of a newer version, or of something of another kind.
    """
    config = _config(folder)
    if config.get("kind", "diffusion") != kind:
        raise UserError(f"{folder} holds a {config['kind']} model, where a {kind} model is needed.")
    return config


def kind_of(path: str | Path) -> str:
    """What a folder holds: "diffusion", "classifier", …

    Raises:
        UserError: it holds nothing that Carrara saved.
    """
    return str(_config(find(path)).get("kind", "diffusion"))


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill a module from a safetensors file, every key of both used.

    Raises:
        UserError: a missing or cut file; the first missing, unexpected or misshapen key is named.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"the weights file {path} is missing: copy it again, or train again.")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"the weights file {path} is cut short or damaged ({error}): copy it again.") from None
    own = module.state_dict()
    for key in own.keys() | state.keys():
        if key not in state:
            raise UserError(f"{path} lacks the weights '{key}'.")
        if key not in own:
            raise UserError(f"{path} holds the unexpected weights '{key}'.")
        if own[key].shape != state[key].shape:
            raise UserError(
                f"{path}: '{key}' has the shape {tuple(state[key].shape)}, {tuple(own[key].shape)} is needed."
            )
    module.load_state_dict(state)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is a folder of diffusers: `carrara import {folder}` makes a model folder of it.")
    if not path.is_file():
        raise UserError(f"{folder} holds no config.json: it is not a model folder of Carrara.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    if isinstance(config, dict) and "_class_name" in config:
        raise UserError(f"{folder} is a folder of diffusers: `carrara import {folder}` makes a model folder of it.")
    if not isinstance(config, dict) or not isinstance(config.get("format"), int):
        raise UserError(f"{path} does not describe a model of Carrara.")
    if config["format"] > FORMAT:
        raise UserError(f"{path} was written by a newer Carrara (format {config['format']}): upgrade this one.")
    return config
