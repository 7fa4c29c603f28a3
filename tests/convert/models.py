"""Models small enough for every test, of widths that the other programs' group norms can take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from carrara.codecs import DiscreteAutoencoder, DiscreteParams, KLAutoencoder, LearnedCodec, VQAutoencoder
from carrara.codecs.quantiser import QuantiserParams
from carrara.conditioning import ClassLabels
from carrara.convert import Convertible
from carrara.model import DiffusionModel
from carrara.networks import UNet, UNetParams
from carrara.networks.autoencoder import AutoencoderParams
from carrara.process import schedules

CODECS = ("kl", "vq", "discrete")


def drawn(module: Any, seed: int = 0) -> Any:
    """The same module with every parameter drawn, so that nothing hides behind a zero."""
    torch.manual_seed(seed)
    assert isinstance(module, nn.Module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter) + ("norm" in name and name.endswith("weight")))
    return module.eval()


def codec(kind: str = "kl", scale: float = 0.25, **changes: Any) -> LearnedCodec:
    """16×16 pixels to 8×8 latents of 3 channels."""
    chosen: dict[str, Any] = {"channels": 32, "channel_mult": (1, 2), "blocks_per_level": 1, "latent_channels": 3}
    params = AutoencoderParams(**(chosen | changes))
    made: LearnedCodec
    if kind == "kl":
        made = KLAutoencoder(params)
    elif kind == "vq":
        made = VQAutoencoder(params, QuantiserParams(codes=16))
    else:
        made = DiscreteAutoencoder(params, DiscreteParams(codes=16))
    drawn(made).set_latent_scale(scale)
    return made


TOLD: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a class": {"num_classes": 4},
    "a class or none": {"num_classes": 4, "null_label": True},
    "a class as context": {
        "num_classes": 4,
        "null_label": True,
        "label_tokens": 1,
        "transformer_depth": 1,
        "context_channels": 16,
    },
}
NAMES = ("cat", "dog", "owl", "newt")


def model(told: str = "nothing", first: LearnedCodec | None = None, **changes: Any) -> DiffusionModel:
    """A diffusion model of 16×16 pictures, in latents where there is a codec."""
    chosen: dict[str, Any] = {
        "image_size": (8, 8) if first else (16, 16),
        "in_channels": 3,
        "channels": 32,
        "channel_mult": (1, 2),
        "blocks_per_level": 1,
        "attention": (2,),
    }
    network = drawn(UNet(UNetParams(**(chosen | TOLD[told] | changes))), seed=1)
    schedule = schedules.scaled_linear(1000, 0.0015, 0.0195)
    labels = None if told == "nothing" else ClassLabels(NAMES, 0.1 if "none" in told or "context" in told else 0.0)
    made = DiffusionModel(network, schedule, (3, 16, 16), conditioners=(labels,) if labels else ())
    if first is not None:
        made.codec = first
    return made


def pictures(made: Convertible) -> Tensor:
    """What a model makes of one seed (guided, where it can be), or a codec of one picture."""
    if isinstance(made, LearnedCodec):
        with torch.no_grad():
            return made.decode(made.encode(torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16)).mode())
    assert isinstance(made, DiffusionModel)
    classes = made.class_labels
    labels = None if classes is None else [1, 3]
    guidance = 1.5 if classes is not None and classes.dropout else 1.0
    return made.sample(labels, solver="ddim", steps=3, guidance=guidance, seed=5).images


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether all tensors of one module are those of another, bit for bit."""
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in one.state_dict().items() if "usage" not in key)


def nothing_left(folder: Path, *known: str) -> bool:
    """Whether a folder holds nothing but what is known."""
    return {path.name for path in folder.iterdir()} == set(known)
