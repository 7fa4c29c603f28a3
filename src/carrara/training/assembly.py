"""What every kind of run is made of: its data, labels and noise levels, and its modules over the processes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from carrara import distributed
from carrara.data import Batch, Batches, Preprocess, ShuffledShards, Source, aspect_buckets, open_source
from carrara.data.order import Order
from carrara.distributed import Processes
from carrara.errors import UserError
from carrara.model import DiffusionModel
from carrara.networks import Network
from carrara.networks.layers import blocks
from carrara.objectives import CleanTimes, LogitNormalTimes, LogNormalTimes, LossAwareTimes, TimeSampler
from carrara.process import Schedule
from carrara.recipe import Recipe


def open_batches(recipe: Recipe, processes: Processes) -> tuple[Source, Batches]:
    """The recipe's data, ready to be walked."""
    data = recipe.data
    source = open_source(recipe.data_path(), data.split, data.unreadable_limit, data.caption_column)
    prepare = Preprocess(*data.resolution, data.channels, resize=data.resize, crop=data.crop, flip=data.flip)
    if source.captions is not None and recipe.conditioning.kind in ("none", "labels"):
        source.notices.append(f"the captions of {source.name} are not trained on: conditioning.kind=text does that.")
    size, order = recipe.training.batch_size, order_of(recipe, source)
    share = processes.rank, processes.world
    return source, Batches(source, prepare, recipe.seed, size, *share, data.workers, data.cache, order)


def order_of(recipe: Recipe, source: Source) -> Order | None:
    """The order that the recipe asks for; None is the plain shuffle.

    Raises:
        UserError: the data do not allow it.
    """
    data = recipe.data
    if data.order == "shards":
        if source.shard_sizes is None:
            raise UserError(f"data.order=shards is for tar shards, {source.name} is {source.layout}: leave it out.")
        return ShuffledShards(source.shard_sizes)
    if data.buckets is None:
        return None
    begun = DiffusionModel.load(recipe.start) if recipe.kind == "diffusion" and recipe.start else None
    if recipe.kind != "diffusion" or recipe.codec or (begun is not None and not begun.codec.bounded):
        raise UserError("data.buckets are for diffusion models of pixels: latents and other networks take one size.")
    params: Any = recipe.network_params(recipe.expected_slots()) if begun is None else begun.network.params
    upsampling = recipe.upsampling if begun is None else begun.low_res
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
        raise UserError(f"training.validation_split is '{data.split}', which is trained on: name another split.")
    source = open_source(recipe.data_path(), training.validation_split, data.unreadable_limit, data.caption_column)
    prepare = Preprocess(*data.resolution, data.channels, resize=data.resize)
    size = min(training.batch_size, training.validation_images, len(source)) // processes.world * processes.world
    if size == 0:
        raise UserError(
            f"validation on {min(training.validation_images, len(source))} images of {source.name} leaves nothing for "
            f"some of {processes.world} processes: raise training.validation_images or take fewer processes."
        )
    return Batches(source, prepare, recipe.seed, size, processes.rank, processes.world)


def shown_batch(recipe: Recipe, source: Source, rows: range) -> Batch:
    """The images that previews show, the same at every step: those that come first in an order of single images."""
    data = recipe.data
    prepare = Preprocess(*data.resolution, data.channels, resize=data.resize)
    every = Batches(source, prepare, recipe.seed, 1, cache="none")  # a few images need no cache of all
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
        UserError: a weight is a single number (a VAE's learned scale), which cannot be shared out.
    """
    for network in networks:
        lone = next((name for name, weight in network.named_parameters() if weight.ndim == 0), None)
        if lone is not None:
            raise UserError(f"the weight {lone} is one number, which cannot be sharded: set training.parallel=ddp.")
        units = network.shard_units if isinstance(network, Network) else blocks(network)
        distributed.shard(network, units, processes.device)


def make_times(recipe: Recipe, schedule: Schedule) -> TimeSampler | None:
    """Which noise levels the recipe visits (None: all alike); what is learned from losses is learned from those of
    all processes."""
    choice = recipe.objective.times
    if choice.kind == "loss_aware":
        return LossAwareTimes(schedule, gather=distributed.gather, **choice.arguments())
    if choice.kind == "uniform":
        return None
    if choice.kind == "clean":
        return CleanTimes()
    kind = LogitNormalTimes if choice.kind == "logit_normal" else LogNormalTimes
    return kind(**choice.arguments())
