"""Every number of every config that is read, replaced by what is no number: refused with its key, never a traceback."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import carrara
from carrara import codecs
from carrara.convert import Convertible, export_model, import_model
from carrara.errors import UserError
from tests.convert.models import codec, model
from tests.errors import refused
from tests.test_classifier import untrained

WRONG: tuple[Any, ...] = (None, "many", ["many"], float("nan"))
Keys = tuple[str | int, ...]


def leaves(config: Any, at: Keys = ()) -> Iterator[Keys]:
    """Where the numbers of a config are."""
    if isinstance(config, dict | list):
        for key, value in config.items() if isinstance(config, dict) else enumerate(config):
            yield from leaves(value, (*at, key))
    elif isinstance(config, int | float) and not isinstance(config, bool):
        yield at


def replaced(config: Any, at: Keys, value: Any) -> Any:
    """A config with one entry replaced."""
    if not at:
        return value
    changed = config.copy()
    changed[at[0]] = replaced(config[at[0]], at[1:], value)
    return changed


def make(kind: str, folder: Path) -> tuple[Path, Path, Callable[[Path], object]]:
    """What is read, its config, and how it is read."""
    latent = model("a class or none", codec("kl"))
    if kind == "own model":
        latent.save(folder / "m")
        return folder / "m", folder / "m" / "config.json", carrara.load
    if kind == "own codec":
        codecs.save(codec("vq"), folder / "m")
        return folder / "m", folder / "m" / "config.json", carrara.load
    if kind == "own classifier":
        untrained().save(folder / "m")
        return folder / "m", folder / "m" / "config.json", carrara.load
    if kind.startswith("diffusers"):
        out, part = folder / "m", kind.partition(" ")[2]
        export_model(codec("vq") if part == "codec" else latent, out, "diffusers")
        names = {
            "unet": "unet/config.json",
            "vae": "vqvae/config.json",
            "codec": "config.json",
            "scheduler": "scheduler/scheduler_config.json",
            "record": "carrara.json",
        }
        return out, out / names[part], import_model
    exports: dict[str, tuple[str, Convertible]] = {
        "compvis model": ("compvis", latent),
        "compvis classes as context": ("compvis", model("a class as context", codec("kl"))),
        "compvis codec": ("compvis", codec("kl")),
        "taming codec": ("taming", codec("vq")),
        "guided-diffusion": ("guided-diffusion", model("a class")),
    }
    layout, subject = exports[kind]
    out = folder / ("m.ckpt" if layout != "guided-diffusion" else "m.pt")
    export_model(subject, out, layout)
    return out, out.with_suffix(".json" if layout == "guided-diffusion" else ".yaml"), import_model


KINDS = {
    "own model": r"",
    "own codec": r"",
    "own classifier": r"",
    "diffusers unet": r"",
    "diffusers vae": r"",
    "diffusers codec": r"",
    "diffusers scheduler": r"",
    "diffusers record": r"network\..*|schedule\..*",
    "compvis model": r"carrara\.(network|schedule)\..*|model\.params\.channels",
    "compvis classes as context": r"carrara\.(network|schedule)\..*|model\.params\.(channels|cond_stage_config\..*)",
    "compvis codec": r"",
    "taming codec": r"",
    "guided-diffusion": r"arguments\..*|tensors|fingerprint\..*",
}
"""What is read, and its entries that are for the other program only."""
OPTIONAL = ("image_size", "out_ch", "scaling_factor", "vq_embed_dim", "attention_head_dim", "head_channels")
"""What may be null."""


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_number_is_refused_with_its_key(kind: str, tmp_path: Path) -> None:
    path, file, read = make(kind, tmp_path)
    load, dump = (yaml.safe_load, yaml.safe_dump) if file.suffix == ".yaml" else (json.loads, json.dumps)
    config = load(file.read_text(encoding="utf-8"))
    read(path)
    tried = 0
    for at in leaves(config):
        name = ".".join(map(str, at))
        if re.fullmatch(KINDS[kind], name):
            continue
        for value in WRONG:
            if value is None and at[-1] in OPTIONAL:
                continue
            file.write_text(dump(replaced(config, at, value)), encoding="utf-8")
            with pytest.raises(UserError) as caught:
                read(path)
            key, last = caught.value.key, [part for part in at if isinstance(part, str)][-1]
            # Where null means "none", the weights do not fit; they are what is named then.
            assert key if value is None else last in key or key == str(file), (name, value, str(caught.value))
            tried += 1
    assert tried >= len(WRONG)


@pytest.mark.parametrize("value", [None, "many", [1], 3])
@pytest.mark.parametrize("key", ["sampling", "network", "schedule", "codec"])
def test_tables_of_an_own_config(key: str, value: Any, tmp_path: Path) -> None:
    path, file, read = make("own model", tmp_path)
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), key: value}), encoding="utf-8")
    with refused("invalid", key=key):
        read(path)


@pytest.mark.parametrize("value", [0, -1, 2.5, True])
@pytest.mark.parametrize("key", ["channels", "norm_groups", "blocks_per_level"])
def test_numbers_that_no_network_can_have(key: str, value: Any, tmp_path: Path) -> None:
    path, file, read = make("own model", tmp_path)
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(replaced(config, ("network", key), value)), encoding="utf-8")
    with refused("invalid", key=f"network.{key}"):
        read(path)
