"""VQGANs and patch discriminators of taming-transformers (Esser et al. 2021), in and out.

Arguments are those of the original constructors `VQModel`, `VQSegmentationModel` and `GumbelVQ`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from carrara.codecs.discrete import DiscreteAutoencoder, DiscreteParams
from carrara.codecs.vq import VQAutoencoder
from carrara.entries import IGNORED, Entry, fixed, read_entries
from carrara.interop import layout
from carrara.interop.compvis import VQ, StateDict, load, quantiser, shape, state_dict
from carrara.interop.layout import Place, check_expressible, strip_prefixes
from carrara.networks.discriminator import Discriminator, DiscriminatorParams

__all__ = ["discriminator_state_dict", "gumbel", "load_discriminator", "load_vq", "state_dict"]

GUMBEL = VQ | {"kl_weight": IGNORED, "temperature_scheduler_config": IGNORED}
"""The arguments of `GumbelVQ`, of which two more concern its training."""


def load_vq(state_dict: StateDict, **arguments: Any) -> VQAutoencoder | DiscreteAutoencoder:
    """A VQGAN with the checkpoint's weights, from the arguments of the original `VQModel` or `GumbelVQ`.

    Args:
        state_dict: the model's own, or that of a transformer over its codes, of which its part is taken. Loss
            networks are left out. A checkpoint with `quantize.proj` is the Gumbel variant: a `DiscreteAutoencoder`.
        arguments: the original constructor's; the entries of `ddconfig` may also stand among them.

    Raises:
        UserError: an argument is unknown or missing, or the checkpoint does not fit the arguments.
    """
    if any(key.endswith("quantize.proj.weight") for key in state_dict):
        return load(lambda: gumbel(**arguments), state_dict)
    params, rest = shape(arguments, VQ)
    return load(lambda: VQAutoencoder(params, quantiser(rest["n_embed"])), state_dict)


def gumbel(**arguments: Any) -> DiscreteAutoencoder:
    """A `GumbelVQ` with random weights from the original's arguments."""
    params, rest = shape(arguments, GUMBEL)
    return DiscreteAutoencoder(params, DiscreteParams(codes=rest["n_embed"]))


# The discriminator


def load_discriminator(state_dict: StateDict, **arguments: Any) -> Discriminator:
    """A patch discriminator from the arguments of the original `NLayerDiscriminator`.

    Args:
        state_dict: its own, or that of a whole model, of which `loss.discriminator.` is taken.
        arguments: `input_nc`, `ndf`, `n_layers`, `use_actnorm`.

    Raises:
        UserError: an unknown argument, activation normalisation, or a checkpoint that does not fit.
    """
    known = {
        "input_nc": Entry(int, 3),
        "ndf": Entry(int, 64),
        "n_layers": Entry(int, 3),
        "use_actnorm": fixed(False),
    }
    a = read_entries(arguments, known, "NLayerDiscriminator")
    params = DiscriminatorParams(in_channels=a["input_nc"], channels=a["ndf"], layers=a["n_layers"])
    theirs = strip_prefixes(state_dict, "loss.discriminator.", "discriminator.")
    return layout.filled(lambda: Discriminator(params), theirs, _places)


def discriminator_state_dict(network: Discriminator) -> dict[str, Tensor]:
    """The discriminator's weights under the original's keys.

    Raises:
        UserError: its norms are not batch norms.
    """
    norm = network.params.norm
    check_expressible("taming's discriminator", [("codec.norm", norm != "batch", f"norm '{norm}'")])
    return layout.to_theirs(network, _places(network))


def _places(network: Discriminator) -> Iterator[Place]:
    """Theirs is one sequence: convolution, activation, then convolution, norm, activation again and again."""
    count = len(network.blocks)
    parts = {"stem": "main.0", "out": f"main.{2 + 3 * count}"}
    for index in range(count):
        parts |= {f"blocks.{index}.conv": f"main.{2 + 3 * index}", f"blocks.{index}.norm": f"main.{3 + 3 * index}"}
    return layout.places(network, {Discriminator: parts})
