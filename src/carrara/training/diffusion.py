"""Training a diffusion model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from carrara import codecs, weights
from carrara.codecs import Codec, Identity
from carrara.condition import Condition
from carrara.data import Batch, Batches, LatentBatch, LatentBatches, Source, open_latents
from carrara.distributed import Processes
from carrara.model import DiffusionModel
from carrara.networks import UNet
from carrara.objectives import DiffusionObjective, Examples, Weight
from carrara.process import Noise, Predicts, grids, schedules
from carrara.process.bound import Chain
from carrara.recipe import Recipe
from carrara.training.assembly import labels_of, make_times
from carrara.training.start import begun_from


class DiffusionTask:
    """A network that learns to denoise, and the model around it.

    Raises:
        UserError: choices of the recipe that do not go together, or with the data.
    """

    def __init__(self, recipe: Recipe, source: Source, processes: Processes) -> None:
        self.recipe, self.device = recipe, processes.device
        self.labels = labels_of(recipe, source)
        self.codec: Codec = codecs.load(weights.find(recipe.codec["path"])) if recipe.codec else Identity()
        if isinstance(self.codec, nn.Module):
            self.codec.to(self.device).requires_grad_(False)
        shape = (recipe.data.channels, *recipe.data.resolution)
        latent = self.codec.latent_shape(*shape)
        classes = len(self.labels.names) if self.labels else None
        schedule, predicts = schedules.build(recipe.schedule.spec()), cast(Predicts, recipe.objective.predicts)
        anew: list[str] = []
        if recipe.start is None:
            torch.manual_seed(recipe.seed)
            network = UNet(recipe.network_params(classes, latent))
        else:
            base = DiffusionModel.load(recipe.start)
            schedule, predicts = base.schedule, base.predicts
            network, anew = begun_from(cast(UNet, base.network), recipe, classes)
        self.modules: dict[str, nn.Module] = {"network": network.to(self.device)}
        self.model = DiffusionModel(
            network=network,
            schedule=schedule,
            shape=shape,
            predicts=predicts,
            labels=self.labels,
            levels=source.levels,
            codec=self.codec,
            sampling=recipe.sampling.model_dump(include={"solver", "steps", "spacing", "guidance"}),
        )
        self.model.grid(recipe.sampling.steps, recipe.sampling.spacing)
        self.objective(self.modules)
        self.pictures = recipe.sampling.count
        self.summary: dict[str, Any] = {
            "image": "×".join(map(str, self.model.shape)),
            "classes": classes or 0,
        }
        if not self.codec.pixels:
            self.summary["latent"] = (
                f"{'×'.join(map(str, latent))} of the {self.codec.kind} codec {recipe.codec['path']}"
            )
        if recipe.start is not None:
            self.summary["starts from"] = recipe.start + (f" ({', '.join(anew)} anew)" if anew else "")

    def walked(self, images: Batches) -> Batches | LatentBatches:
        """The images, or the latents of them that `codec.cache` holds.

        Raises:
            UserError: the cache is of another codec, other images or another preparation.
        """
        if "cache" not in self.recipe.codec:
            return images
        latents = open_latents(
            self.recipe.codec["cache"],
            codecs.content_hash(self.codec),
            prepare=images.prepare,
            source=images.source,
        )
        return LatentBatches(
            latents,
            images.seed,
            images.batch_size,
            images.rank,
            images.world,
            flip=self.recipe.data.flip,
            order=images.order,
        )

    def objective(self, modules: Mapping[str, nn.Module]) -> DiffusionObjective:
        """The recipe's loss."""
        choice, schedule, labels = self.recipe.objective, self.model.schedule, self.labels
        chain = None
        if choice.loss != "simple" and schedule.discrete:
            grid = grids.trailing(schedule, int(schedule.final_time))
            chain = Chain(schedule, grid, levels=self.model.levels)
        return DiffusionObjective(
            modules["network"],
            schedule,
            self.model.predicts,
            times=make_times(self.recipe, schedule),
            null=labels.null() if labels and labels.dropout else None,
            dropout=labels.dropout if labels else 0.0,
            loss=choice.loss,
            weight=Weight(**choice.weight.model_dump()),
            learned_variance=self.model.learned_variance,
            chain=chain,
            vlb_weight=choice.vlb_weight,
        )

    def examples(self, batch: Batch | LatentBatch, draw: Noise) -> Examples:
        """The latents of a batch, and what the network is told of them."""
        with torch.no_grad():
            if isinstance(batch, LatentBatch):
                posterior = batch.posterior
            else:
                posterior = self.codec.encode(batch.images.to(self.device))
            latents = posterior.sample(draw.at(draw.draw + 1)).to(self.device)
        return Examples(latents, (Condition(label=batch.label) if self.labels else Condition()).to(self.device))

    def blank(self) -> Examples:
        """The latent of nothing, of the first class."""
        latent = torch.zeros(1, *self.codec.latent_shape(*self.model.shape), device=self.device)
        return Examples(latent, (self.labels.condition([0]) if self.labels else Condition()).to(self.device))

    def ask(self, module: nn.Module, examples: Examples) -> Tensor:
        """What the network makes of latents at time 1."""
        time = torch.ones(len(examples.x0), device=self.device)
        answer: Tensor = module(examples.x0, time, examples.condition)
        return answer

    def preview(self, module: nn.Module, rows: range) -> tuple[Tensor, dict[str, Any]]:
        """Samples, the classes in turn."""
        labels = [row % len(self.labels.names) for row in rows] if self.labels else None
        model, seed = replace(self.model, network=module), self.recipe.sampling.seed
        samples = model.sample(labels, None if labels else len(rows), seed=seed, first=rows[0])
        return samples.images, samples.protocol

    def save(self, module: nn.Module, folder: Path, origin: str) -> None:
        """The model around the network."""
        replace(self.model, network=module, origin=origin).save(folder)
