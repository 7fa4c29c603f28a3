"""What a recipe is made of: its data, labels, network and objective."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from carrara import distributed
from carrara.codecs import Codec
from carrara.condition import Condition
from carrara.conditioning import Labels
from carrara.data import Batch, Batches, Preprocess, Source, open_source
from carrara.distributed import Processes
from carrara.errors import UserError
from carrara.networks import UNet
from carrara.networks.layers import ResidualBlock, SelfAttention
from carrara.objectives import (
    DiffusionObjective,
    Examples,
    LogitNormalTimes,
    LogNormalTimes,
    LossAwareTimes,
    TimeSampler,
    Weight,
)
from carrara.process import Noise, Schedule, grids
from carrara.process.bound import Chain
from carrara.recipe import Recipe


def open_batches(recipe: Recipe, processes: Processes) -> tuple[Source, Batches]:
    """The recipe's data, ready to be walked."""
    data = recipe.data
    source = open_source(data.path, data.split, data.unreadable_limit, data.caption_column)
    prepare = Preprocess(*data.resolution, data.channels, resize=data.resize, crop=data.crop, flip=data.flip)
    size = recipe.training.batch_size
    return source, Batches(source, prepare, recipe.seed, size, processes.rank, processes.world, data.workers)


def open_held_out(recipe: Recipe, processes: Processes) -> Batches | None:
    """The data of validation, without augmentation, or None where the recipe takes none.

    Raises:
        UserError: there is no such split, or too few images for one batch of all processes.
    """
    data, training = recipe.data, recipe.training
    if not training.validate_every:
        return None
    if training.validation_split == data.split:
        raise UserError(f"training.validation_split is '{data.split}', which is trained on: name another split.")
    source = open_source(data.path, training.validation_split, data.unreadable_limit, data.caption_column)
    prepare = Preprocess(*data.resolution, data.channels, resize=data.resize)
    size = min(training.batch_size, training.validation_images, len(source)) // processes.world * processes.world
    if size == 0:
        raise UserError(
            f"validation on {min(training.validation_images, len(source))} images of {source.name} leaves nothing for "
            f"some of {processes.world} processes: raise training.validation_images or take fewer processes."
        )
    return Batches(source, prepare, recipe.seed, size, processes.rank, processes.world)


def labels_of(recipe: Recipe, source: Source) -> Labels | None:
    """The classes that the model is told, or None.

    Raises:
        UserError: the recipe conditions on labels and the data have none.
    """
    if recipe.conditioning.kind == "none":
        return None
    if source.class_names is None:
        raise UserError(
            f"the recipe conditions on labels, but {source.name} has none: sort the images into one folder per class, "
            "or set conditioning.kind=none."
        )
    return Labels(source.class_names, recipe.conditioning.dropout)


def examples_of(batch: Batch, codec: Codec, labels: Labels | None, draw: Noise, device: torch.device) -> Examples:
    """What an objective learns from: the latents of a batch, and what the network is told of them.

    Args:
        draw: the samples' randomness; the latents take the draw after it.
    """
    with torch.no_grad():
        latents = codec.encode(batch.images.to(device)).sample(draw.at(draw.draw + 1))
    return Examples(latents, (Condition(label=batch.label) if labels else Condition()).to(device))


def make_network(recipe: Recipe, labels: Labels | None, processes: Processes) -> UNet:
    """The network with its initial weights, the same on every process."""
    torch.manual_seed(recipe.seed)
    params = recipe.network_params(len(labels.names) if labels else None)
    return UNet(params).to(processes.device)


def spread(networks: Iterable[nn.Module], processes: Processes) -> None:
    """Shard networks over the processes, one attention or residual block at a time."""
    for network in networks:
        blocks = [m for m in network.modules() if isinstance(m, (ResidualBlock, SelfAttention))]
        distributed.shard(network, blocks, processes.device)


def make_objective(
    recipe: Recipe, network: nn.Module, schedule: Schedule, labels: Labels | None, levels: int
) -> DiffusionObjective:
    """The recipe's objective for a network (plain, or over several processes).

    Args:
        levels: distinct values of a channel of the images, for the bound.

    Raises:
        UserError: choices that do not go together.
    """
    choice = recipe.objective
    learned = bool(recipe.network.get("learned_variance", False))
    chain = None
    if choice.loss != "simple" and schedule.discrete:
        chain = Chain(schedule, grids.trailing(schedule, int(schedule.final_time)), levels=levels)
    return DiffusionObjective(
        network,
        schedule,
        choice.predicts,
        times=make_times(recipe, schedule),
        null=labels.null() if labels and labels.dropout else None,
        dropout=labels.dropout if labels else 0.0,
        loss=choice.loss,
        weight=Weight(**choice.weight.model_dump()),
        learned_variance=learned,
        chain=chain,
        vlb_weight=choice.vlb_weight,
    )


def make_times(recipe: Recipe, schedule: Schedule) -> TimeSampler | None:
    """Which noise levels the recipe visits (None: all alike); what is learned from losses is learned from those of
    all processes."""
    choice = recipe.objective.times
    if choice.kind == "loss_aware":
        return LossAwareTimes(schedule, gather=distributed.gather, **choice.arguments())
    if choice.kind == "uniform":
        return None
    kind = LogitNormalTimes if choice.kind == "logit_normal" else LogNormalTimes
    return kind(**choice.arguments())
