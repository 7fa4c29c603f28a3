"""VQGANs and patch discriminators of taming-transformers (Esser et al. 2021), in and out.

Arguments are those of the original constructors `VQModel`, `VQSegmentationModel` and `GumbelVQ`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from carrara.codecs.discrete import DiscreteAutoencoder, DiscreteParams
from carrara.codecs.vq import VQAutoencoder
from carrara.errors import UserError, nearest
from carrara.interop.compvis import StateDict, load, quantiser, shape, state_dict
from carrara.interop.layout import Place, leaf, strip_prefixes, to_ours, to_theirs
from carrara.networks.discriminator import Discriminator, DiscriminatorParams

__all__ = ["discriminator_state_dict", "gumbel", "load_discriminator", "load_vq", "state_dict"]

KNOWN = {"embed_dim", "n_embed", "remap", "sane_index_shape"}
GUMBEL = {"kl_weight", "temperature_scheduler_config"}
"""The arguments that only `GumbelVQ` has; they concern its training."""


def load_vq(state_dict: StateDict, **arguments: Any) -> VQAutoencoder | DiscreteAutoencoder:
    """A VQGAN with the checkpoint's weights, from the arguments of the original `VQModel` or `GumbelVQ`.

    Args:
        state_dict: the model's own, or that of a transformer over its codes, of which its part is taken. Loss
            networks are left out. A checkpoint with `quantize.proj` is the Gumbel variant: a `DiscreteAutoencoder`.
        arguments: the original constructor's; the entries of `ddconfig` may also stand among them.

    Raises:
        UserError: an argument is unknown or missing, or the checkpoint does not fit the arguments.
    """
    arguments.pop("n_labels", None)  # of a segmentation model: only its colour map, which is no part of the codec
    if any(key.endswith("quantize.proj.weight") for key in state_dict):
        return load(lambda: gumbel(**arguments), state_dict)
    params, rest = shape(arguments, KNOWN, double_z=False)
    return load(lambda: VQAutoencoder(params, quantiser(rest)), state_dict)


def gumbel(**arguments: Any) -> DiscreteAutoencoder:
    """A `GumbelVQ` with random weights from the original's arguments."""
    params, rest = shape(arguments, KNOWN | GUMBEL, double_z=False)
    quantiser(rest)  # refuses the same arguments
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
    known = {"input_nc": 3, "ndf": 64, "n_layers": 3, "use_actnorm": False}
    for name in arguments:
        if name not in known:
            raise UserError(f"NLayerDiscriminator has no argument '{name}': {nearest(name, known)}")
    a = known | arguments
    if a["use_actnorm"]:
        raise UserError("use_actnorm = True is not supported: no published discriminator has it.")
    network = Discriminator(DiscriminatorParams(in_channels=a["input_nc"], channels=a["ndf"], layers=a["n_layers"]))
    theirs = strip_prefixes(state_dict, "loss.discriminator.", "discriminator.")
    network.load_state_dict(to_ours(theirs, network, _discriminator_places(network)))
    return network


def discriminator_state_dict(network: Discriminator) -> dict[str, Tensor]:
    """The discriminator's weights under the original's keys.

    Raises:
        UserError: its norms are not batch norms.
    """
    if network.params.norm != "batch":
        raise UserError(f"the original knows no norm '{network.params.norm}', so this discriminator cannot be written.")
    return to_theirs(network, _discriminator_places(network))


def _discriminator_places(network: Discriminator) -> list[Place]:
    """Theirs is one sequence: convolution, activation, then convolution, norm, activation again and again."""
    found = [*leaf(network, "stem", "main.0"), *leaf(network, "out", f"main.{2 + 3 * len(network.blocks)}")]
    for index in range(len(network.blocks)):
        found += leaf(network, f"blocks.{index}.conv", f"main.{2 + 3 * index}")
        found += leaf(network, f"blocks.{index}.norm", f"main.{3 + 3 * index}")
    return found
