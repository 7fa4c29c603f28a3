"""Codecs on disk, and what tells one from another.

A codec's folder holds `config.json` (its kind and the arguments that make it again) and `codec.safetensors`. Its hash
is over both, the latent scale included, so that a diffusion model knows the codec whose latents it learned.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carrara.codecs.autoencoder import Autoencoder
from carrara.codecs.base import Codec, Identity
from carrara.codecs.discrete import DiscreteAutoencoder, DiscreteParams
from carrara.codecs.hierarchical import HierarchicalVAE
from carrara.codecs.kl import KLAutoencoder
from carrara.codecs.learned import DECODER, LearnedCodec
from carrara.codecs.quantiser import QuantiserParams
from carrara.codecs.vq import VQAutoencoder
from carrara.errors import UserError, nearest
from carrara.files import write_whole
from carrara.networks.autoencoder import AutoencoderParams

FORMAT = 1
"""The version of a codec's `config.json`; a newer one is refused."""
CONFIG, WEIGHTS = "config.json", "codec.safetensors"
KINDS = ("identity", "autoencoder", "kl", "vq", "discrete", "hierarchical")
"""The words that `kind` may be."""


def build(config: dict[str, Any]) -> Codec:
    """A codec with random weights from what its `config()` gave.

    Raises:
        UserError: an unknown kind, or an unknown or missing entry; the nearest known word is named.
    """
    kind = config.get("kind", "")
    if kind not in KINDS:
        raise UserError(f"codec.kind is '{kind}': {nearest(str(kind), KINDS)}")
    rest = {key: value for key, value in config.items() if key not in ("kind", "format", "carrara")}
    try:
        return _made(kind, rest)
    except TypeError as error:
        raise UserError(f"the codec's config does not describe a codec of kind '{kind}': {error}.") from None


def _made(kind: str, rest: dict[str, Any]) -> Codec:
    if kind == "identity":
        return Identity(**rest)
    if kind == "hierarchical":
        levels = [AutoencoderParams(**level) for level in rest.pop("levels", ())]
        return HierarchicalVAE(levels, **rest)
    params = AutoencoderParams(**rest.pop("params", {}))
    if kind == "vq":
        return VQAutoencoder(params, QuantiserParams(**rest.pop("quantiser", {})), **rest)
    if kind == "discrete":
        return DiscreteAutoencoder(params, DiscreteParams(**rest.pop("choice", {})), **rest)
    return KLAutoencoder(params, **rest) if kind == "kl" else Autoencoder(params, **rest)


def save(codec: Codec, folder: str | Path) -> str:
    """Write a codec, each file whole or not at all.

    Returns:
        Its hash.
    """
    from safetensors.torch import save as packed

    folder = Path(folder)
    write_whole(folder / WEIGHTS, packed(_state(codec)))
    described = {"format": FORMAT, **_config(codec), "hash": content_hash(codec)}
    write_whole(folder / CONFIG, (json.dumps(described, indent=2) + "\n").encode())
    return str(described["hash"])


def load(folder: str | Path, device: torch.device | str = "cpu") -> Codec:
    """A codec from its folder, in eval mode.

    Raises:
        UserError: a missing, cut or changed file, or a config of a newer version.
    """
    folder = Path(folder)
    config = _read(folder / CONFIG)
    expected = config.pop("hash", None)
    codec = build(config)
    if isinstance(codec, torch.nn.Module):
        _fill(codec, folder / WEIGHTS)
        codec.eval().to(device)
    if content_hash(codec) != expected:
        raise UserError(
            f"the weights in {folder} are not those of its {CONFIG} (hash {content_hash(codec)} where {expected} is "
            "written): copy both files again."
        )
    return codec


def content_hash(codec: Codec) -> str:
    """What tells one codec from another: hexadecimal digits of the SHA-256 over its config and weights, in two parts,
    "latents-decoder": what the latents mean (encoder, codebook, latent scale), and what decodes them.

    Statistics of its training (how often each code was chosen) do not count: they change no picture.
    """
    latents = hashlib.sha256(json.dumps(_config(codec), sort_keys=True).encode())
    decoder = hashlib.sha256()
    for name, value in sorted(_state(codec).items()):
        if "usage." in name:
            continue
        digest = decoder if name.startswith(DECODER) else latents
        digest.update(name.encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return f"{latents.hexdigest()[:12]}-{decoder.hexdigest()[:8]}"


def same_latents(one: str, other: str) -> bool:
    """Whether the latents of two codecs, told by their hashes, mean the same: they may differ in their decoder, which
    can be trained further alone."""
    return one.partition("-")[0] == other.partition("-")[0]


def check_same(codec: Codec, kind: str, expected: str, owner: str) -> None:
    """Whether a codec is the one that a model, or a cache of latents, was made with (or one with its latents).

    Args:
        codec: the one at hand.
        kind, expected: the kind and hash that were stored.
        owner: what stored them, for the sentence ("the model runs/emoji").

    Raises:
        UserError: it is another one; both are named.
    """
    found = content_hash(codec)
    if not same_latents(found, expected):
        raise UserError(
            f"{owner} belongs to the codec {expected} ({kind}), not to {found} ({codec.kind}): its latents mean "
            "nothing to another codec, so name its own."
        )


def _config(codec: Codec) -> dict[str, Any]:
    return codec.config() if isinstance(codec, LearnedCodec | HierarchicalVAE) else {"kind": codec.kind}


def _state(codec: Codec) -> dict[str, Tensor]:
    if not isinstance(codec, torch.nn.Module):
        return {}
    return {name: value.detach().cpu().contiguous() for name, value in codec.state_dict().items()}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path.parent} holds no {CONFIG}: it is not a codec's folder.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    if not isinstance(config, dict) or not isinstance(config.get("format"), int) or "kind" not in config:
        raise UserError(f"{path} does not describe a codec of Carrara.")
    if config["format"] > FORMAT:
        raise UserError(f"{path} was written by a newer Carrara (format {config['format']}): upgrade this one.")
    return config


def _fill(codec: torch.nn.Module, path: Path) -> None:
    """Load weights, every key of the file and of the codec used."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"the weights file {path} is missing: copy it again.")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"the weights file {path} is cut short or damaged ({error}): copy it again.") from None
    own = codec.state_dict()
    for key in sorted(own.keys() | state.keys()):
        if key not in state or key not in own or own[key].shape != state[key].shape:
            shapes = [None if side is None else tuple(side.shape) for side in (state.get(key), own.get(key))]
            raise UserError(f"{path}: '{key}' is {shapes[0]} in the file and {shapes[1]} in the codec of its {CONFIG}.")
    codec.load_state_dict(state)
