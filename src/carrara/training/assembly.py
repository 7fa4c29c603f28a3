"""What every kind of run is made of: its data, labels and noise levels, and its modules over the processes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from carrara import distributed
from carrara.data import Batch, Batches, ShuffledShards, Source, aspect_buckets, open_source
from carrara.data.order import Order
from carrara.distributed import Processes
from carrara.errors import UserError
from carrara.model import DiffusionModel
from carrara.networks import Network
from carrara.networks.layers import blocks
from carrara.objectives import CleanTimes, LogitNormalTimes, LogNormalTimes, LossAwareTimes, TimeSampler
from carrara.process import Schedule
from carrara.recipe import DiffusionRecipe, NetworkRecipe, Recipe, ScorerRecipe


def open_batches(recipe: Recipe, processes: Processes) -> tuple[Source, Batches]:
    """The recipe's data, and its batches."""
    data = recipe.data
    source = open_source(recipe.data_path(), data.split, data.unreadable_limit, data.caption_column)
    captioned = isinstance(recipe, ScorerRecipe) or (
        isinstance(recipe, DiffusionRecipe) and recipe.conditioning.kind not in ("none", "labels")
    )
    if source.captions is not None and not captioned:
        source.notices.append(f"the captions of {source.name} are not trained on: conditioning.kind=text does that.")
    size, order = recipe.training.batch_size, order_of(recipe, source)
    share, prepare = (processes.rank, processes.world), data.preprocess(augment=True)
    return source, Batches(source, prepare, recipe.seed, size, *share, data.workers, data.cache, order)


def order_of(recipe: Recipe, source: Source) -> Order | None:
    """The order that the recipe requests; None is the plain shuffle.

    Raises:
        UserError: the data do not allow it.
    """
    data = recipe.data
    if data.order == "shards":
        if source.shard_sizes is None:
            raise UserError(
                f"data.order=shards is for tar shards, {source.name} is {source.layout}: leave it out.",
                key="data.order",
                code="mismatch",
            )
        return ShuffledShards(source.shard_sizes)
    if data.buckets is None:
        return None
    base = DiffusionModel.load(recipe.start) if isinstance(recipe, DiffusionRecipe) and recipe.start else None
    if not isinstance(recipe, DiffusionRecipe) or recipe.codec.path or (base is not None and not base.codec.bounded):
        raise UserError(
            "data.buckets are for diffusion models of pixels: latents and other networks take one size.",
            key="data.buckets",
            code="unsupported",
        )
    params: Any = recipe.network_params(recipe.expected_slots()) if base is None else base.network.params
    upsampling = recipe.upsampling if base is None else base.low_res
    factor = math.lcm(params.factors[-1], (upsampling and upsampling.factor) or 1)
    sizes = None if data.buckets == "auto" else data.buckets
    buckets = aspect_buckets(source, data.resolution, recipe.training.batch_size, factor, sizes=sizes)
    source.notices.append(buckets.sentence)
    return buckets


def open_held_out(recipe: Recipe, processes: Processes) -> Batches | None:
    """The data of validation, without augmentation, or None where the recipe takes none.

    Raises:
        UserError: there is no such split, or too few images for one batch of all processes.
    """
    data, training = recipe.data, recipe.training
    if not training.validate_every:
        return None
    if training.validation_split == data.split:
        raise UserError(
            f"training.validation_split is '{data.split}', which is trained on: name another split.",
            key="training.validation_split",
            code="conflict",
        )
    source = open_source(recipe.data_path(), training.validation_split, data.unreadable_limit, data.caption_column)
    size = min(training.batch_size, training.validation_images, len(source)) // processes.world * processes.world
    if size == 0:
        raise UserError(
            f"validation on {min(training.validation_images, len(source))} images of {source.name} leaves nothing for "
            f"some of {processes.world} processes: raise training.validation_images or take fewer processes.",
            key="training.validation_images",
        )
    return Batches(source, data.preprocess(), recipe.seed, size, processes.rank, processes.world)


def shown_batch(recipe: Recipe, source: Source, rows: range) -> Batch:
    """The images that previews show, the same at every step: those that come first in an order of single images."""
    every = Batches(source, recipe.data.preprocess(), recipe.seed, 1, cache="none")  # a few images need no cache of all
    found = [every.at(row % len(source)) for row in rows]
    label = None if source.labels is None else torch.cat([batch.label for batch in found if batch.label is not None])
    return Batch(
        pixels=torch.cat([batch.pixels for batch in found]),
        num_values=source.levels,
        label=label,
        captions=None if source.captions is None else [text for batch in found for text in batch.captions or ()],
        positions=torch.cat([batch.positions for batch in found]),
        names=[name for batch in found for name in batch.names],
    )


def spread(networks: Iterable[nn.Module], processes: Processes) -> None:
    """Shard networks over the processes, one of their `shard_units` at a time.

    Raises:
        UserError: a weight is a single number (a VAE's learned scale), which cannot be distributed.
    """
    for network in networks:
        lone = next((name for name, weight in network.named_parameters() if weight.ndim == 0), None)
        if lone is not None:
            raise UserError(
                f"the weight {lone} is one number, which cannot be sharded: set training.parallel=ddp.",
                key="training.parallel",
                code="unsupported",
            )
        units = network.shard_units if isinstance(network, Network) else blocks(network)
        distributed.shard(network, units, processes.device)


def make_times(recipe: NetworkRecipe, schedule: Schedule) -> TimeSampler | None:
    """Which noise levels the recipe visits (None: all alike); what is learned from losses is learned from those of
    all processes."""
    settings = recipe.times.model_dump(exclude={"kind"})
    match recipe.times.kind:
        case "loss_aware":
            return LossAwareTimes(schedule, gather=distributed.gather, **settings)
        case "clean":
            return CleanTimes()
        case "logit_normal":
            return LogitNormalTimes(**settings)
        case "log_normal":
            return LogNormalTimes(**settings)
    return None
