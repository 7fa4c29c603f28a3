"""Codecs on disk, and the hash that identifies one.

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

from carrara import weights
from carrara.codecs.autoencoder import Autoencoder
from carrara.codecs.base import Codec, Identity
from carrara.codecs.discrete import DiscreteAutoencoder, DiscreteParams
from carrara.codecs.hierarchical import HierarchicalVAE
from carrara.codecs.kl import KLAutoencoder
from carrara.codecs.learned import DECODER, STATISTICS, LearnedCodec
from carrara.codecs.quantiser import QuantiserParams
from carrara.codecs.tiling import whole
from carrara.codecs.vq import VQAutoencoder
from carrara.errors import UserError, nearest
from carrara.networks.autoencoder import AutoencoderParams

WEIGHTS = "codec.safetensors"
KINDS = ("identity", "autoencoder", "kl", "vq", "discrete", "hierarchical")
"""The words that `kind` may be."""


def build(config: dict[str, Any]) -> Codec:
    """A codec with random weights from what `config()` returned.

    Raises:
        UserError: an unknown kind, or an unknown or missing entry; the nearest known word is named.
    """
    kind = config.get("kind", "")
    if kind not in KINDS:
        raise UserError(f"codec.kind is '{kind}': {nearest(str(kind), KINDS)}", key="codec.kind", code="unknown")
    rest = {key: value for key, value in config.items() if key != "kind"}
    try:
        return _build(kind, rest)
    except TypeError as error:
        raise UserError(
            f"the codec's config does not describe a codec of kind '{kind}': {error}.", key="codec", code="damaged"
        ) from None


def _build(kind: str, rest: dict[str, Any]) -> Codec:
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
    codec = whole(codec)
    identity = content_hash(codec)
    modules = {"codec": codec} if isinstance(codec, torch.nn.Module) else {}
    weights.save(folder, "codec", {"codec": _config(codec), "hash": identity}, modules)
    return identity


def load(path: str | Path, device: torch.device | str = "cpu") -> Codec:
    """A codec from its folder, from a run, or from a model that works in its latents; in eval mode.

    Raises:
        UserError: a missing, cut or changed file, or a config of a newer version.
    """
    folder = weights.find(path, "codec")
    config = weights.read_config(folder, "codec")
    if not isinstance(config.get("codec"), dict) or "hash" not in config:
        raise UserError(
            f"{folder / 'config.json'} does not describe a codec: copy it again.", key=str(folder), code="damaged"
        )
    codec, expected = build(config["codec"]), config["hash"]
    if isinstance(codec, torch.nn.Module):
        weights.load_weights(codec, folder / WEIGHTS)
        codec.eval().to(device)
    if content_hash(codec) != expected:
        raise UserError(
            f"the weights in {folder} are not those of its config.json (hash {content_hash(codec)} where {expected} is "
            "stored): copy both files again.",
            key=str(folder),
            code="mismatch",
        )
    return codec


def content_hash(codec: Codec) -> str:
    """The identity of a codec: hexadecimal digits of the SHA-256 over its config and weights, in two parts,
    "latents-decoder": what the latents mean (encoder, codebook, latent scale), and what decodes them.

    Statistics of its training (how often each code was chosen) do not count: they change no picture. A codec that works
    in tiles is the codec itself.
    """
    codec = whole(codec)
    latents = hashlib.sha256(json.dumps(_config(codec), sort_keys=True).encode())
    decoder = hashlib.sha256()
    for name, value in sorted(_state(codec).items()):
        if name.startswith(STATISTICS):
            continue
        digest = decoder if name.startswith(DECODER) else latents
        digest.update(name.encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return f"{latents.hexdigest()[:12]}-{decoder.hexdigest()[:8]}"


def same_latents(one: str, other: str) -> bool:
    """Whether two hashes are of codecs with the same latents; a decoder that was fine-tuned alone may differ."""
    return one.partition("-")[0] == other.partition("-")[0]


def check_same(codec: Codec, kind: str, expected: str, owner: str) -> str:
    """The hash of a codec that has the latents which a model, or a cache, was made with.

    Args:
        codec: the one at hand.
        kind, expected: the kind and hash that were stored.
        owner: what stored them, for the message ("the model runs/emoji").

    Returns:
        The hash of the codec at hand.

    Raises:
        UserError: it is another one; both are named.
    """
    found = content_hash(codec)
    if not same_latents(found, expected):
        raise UserError(
            f"{owner} belongs to the codec {expected} ({kind}), not to {found} ({codec.kind}): its latents mean "
            "nothing to another codec, so give its own.",
            key="codec",
            code="mismatch",
        )
    return found


def _config(codec: Codec) -> dict[str, Any]:
    return codec.config() if isinstance(codec, LearnedCodec | HierarchicalVAE) else {"kind": codec.kind}


def _state(codec: Codec) -> dict[str, Tensor]:
    if not isinstance(codec, torch.nn.Module):
        return {}
    return {name: value.detach().cpu().contiguous() for name, value in codec.state_dict().items()}
