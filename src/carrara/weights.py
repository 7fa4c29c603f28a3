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

FORMAT = 2
"""The version of `config.json`; a newer one is refused, an older one is read."""

CONFIG = "config.json"


def find(path: str | Path, kind: str | None = None) -> Path:
    """The folder of something that Carrara saved: `path` itself or, of a run, its `model/`; of a codec also a model's
    `codec/`.

    Args:
        kind: "codec" prefers a model's codec; of any other kind, or None, the folder itself comes first. What it holds
            is checked by `read_config`.

    Raises:
        UserError: there is no such folder, or `path` is a file.
    """
    path = Path(path)
    if path.is_file():
        raise UserError(
            f"{path} is a file and no model folder: `carrara import {path}` makes one of a checkpoint.",
            key=str(path),
            code="unsupported",
        )
    if not path.is_dir():
        raise UserError(
            f"there is no folder {path}: name a run, or the folder of a model, codec or classifier.",
            key=str(path),
            code="missing",
        )
    found = next((place for place in _places(path, kind) if (place / CONFIG).is_file()), None)
    return path if found is None else found


def holds(path: str | Path, kind: str | None = None) -> bool:
    """Whether `find` would return a folder of this kind."""
    return any((place / CONFIG).is_file() and kind in (None, _kind(place)) for place in _places(Path(path), kind))


def _places(path: Path, kind: str | None) -> list[Path]:
    """Where something may be saved, in the order of preference."""
    places = [path, path / "model"]
    if kind == "codec":
        places = [nested for place in places for nested in (place / "codec", place)]
    return places


def _kind(folder: Path) -> str:
    try:
        return str(_config(folder).get("kind", "diffusion"))
    except UserError:
        return ""


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
    write_whole(folder / CONFIG, (text + "\n").encode())


def read_config(folder: Path, kind: str) -> dict[str, Any]:
    """What `save` wrote into `config.json`.

    Raises:
        UserError: it is missing, damaged, of a newer version, or of something of another kind.
    """
    config = _config(folder)
    if config.get("kind", "diffusion") != kind:
        raise UserError(
            f"{folder} holds a {config['kind']} model, where a {kind} model is needed.",
            key=str(folder),
            code="mismatch",
        )
    return config


def kind_of(path: str | Path) -> str:
    """What a folder contains: "diffusion", "classifier", "codec", …

    Raises:
        UserError: nothing that Carrara saved.
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
        raise UserError(
            f"the weights file {path} is missing: copy it again, or train again.", key=str(path), code="missing"
        )
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"the weights file {path} is cut short or damaged ({error}): copy it again.", key=str(path), code="damaged"
        ) from None
    own = module.state_dict()
    for key in own.keys() | state.keys():
        if key not in state:
            raise UserError(f"{path} lacks the weights '{key}'.", key=key, code="missing")
        if key not in own:
            raise UserError(f"{path} has the unexpected weights '{key}'.", key=key, code="unknown")
        if own[key].shape != state[key].shape:
            raise UserError(
                f"{path}: '{key}' has the shape {tuple(state[key].shape)}, {tuple(own[key].shape)} is needed.",
                key=key,
                code="shape",
            )
    module.load_state_dict(state)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    pipeline = f"{folder} is a folder of diffusers: `carrara import {folder}` makes a model folder of it."
    if (folder / "model_index.json").is_file():
        raise UserError(pipeline, key=str(folder), code="unsupported")
    if not path.is_file():
        raise UserError(
            f"{folder} has no {CONFIG}: it is not a model folder of Carrara.", key=str(folder), code="missing"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}.", key=str(path), code="damaged") from None
    if isinstance(config, dict) and "_class_name" in config:
        raise UserError(pipeline, key=str(folder), code="unsupported")
    if not isinstance(config, dict) or not isinstance(config.get("format"), int):
        raise UserError(f"{path} does not describe a model of Carrara.", key=str(path), code="damaged")
    if config["format"] > FORMAT:
        raise UserError(
            f"{path} was written by a newer Carrara (format {config['format']}): upgrade this one.",
            key=str(path),
            code="newer",
        )
    return config
