"""Training a diffusion model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara import codecs, weights
from carrara.codecs import Codec, Identity
from carrara.condition import Condition
from carrara.data import Batch, Batches, LatentBatch, LatentBatches, Source, open_latents
from carrara.distributed import Processes
from carrara.errors import UserError
from carrara.model import DiffusionModel
from carrara.networks import UNet
from carrara.objectives import (
    DiffusionObjective,
    Examples,
    NoiseAugmentation,
    SuperResolutionObjective,
    Upsampling,
    Weight,
    pairs,
    shrunk_size,
)
from carrara.process import Noise, Predicts, grids, schedules
from carrara.process.bound import Chain
from carrara.recipe import Recipe
from carrara.training.assembly import labels_of, make_times, shown_batch
from carrara.training.start import begun_from, begun_sentence


class DiffusionTask:
    """A network that learns to denoise, and the model around it.

    Raises:
        UserError: choices of the recipe that do not go together, or with the data.
    """

    def __init__(self, recipe: Recipe, source: Source, processes: Processes) -> None:
        self.recipe, self.source, self.device = recipe, source, processes.device
        self.notices: list[str] = []
        self.pictures = recipe.sampling.count
        labels = labels_of(recipe, source)
        classes = len(labels.names) if labels else None
        begun = DiffusionModel.load(recipe.start) if recipe.start else None
        codec = begun.codec if begun else _codec(recipe)
        if isinstance(codec, nn.Module):
            codec.to(self.device).requires_grad_(False)
        shape = (recipe.data.channels, *recipe.data.resolution)
        latent = codec.latent_shape(*shape)
        anew: list[str] = []
        if begun is None:
            torch.manual_seed(recipe.seed)
            network = UNet(recipe.network_params(classes, latent))
        else:
            if getattr(begun.network.params, "concat_channels", 0) and begun.upsampling is None:
                raise UserError(f"{recipe.start} is an up-sampler that does not say what it was trained for.")
            network, anew = begun_from(cast(UNet, begun.network), recipe, classes, latent)
        self.modules: dict[str, nn.Module] = {"network": network.to(self.device)}
        self.model = DiffusionModel(
            network=network,
            schedule=begun.schedule if begun else schedules.build(recipe.schedule.spec()),
            shape=shape,
            predicts=begun.predicts if begun else cast(Predicts, recipe.objective.predicts),
            labels=labels,
            levels=source.levels,
            codec=codec,
            upsampling=begun.upsampling if begun else _upsampling(recipe),
            sampling=recipe.sampling.model_dump(include={"solver", "steps", "spacing", "guidance"}),
        )
        self.codec = None if codec.pixels else codec
        self._check_upsampling()
        self.model.grid(recipe.sampling.steps, recipe.sampling.spacing)
        self.objective(self.modules)
        self.summary: dict[str, Any] = self._summary(anew)

    def _check_upsampling(self) -> None:
        """Whether small images can be made of the data, and say something at every position of the latents."""
        upsampling, codec = self.model.upsampling, self.model.codec
        if upsampling is None:
            return
        shrunk_size(upsampling.factor, *self.model.shape[1:])
        if "cache" in self.recipe.codec:
            raise UserError(
                "codec.cache holds no pixels, from which up-sampling makes its small images: leave it out, so that "
                "the images are read."
            )
        if upsampling.factor < codec.reduction:
            raise UserError(
                f"the codec makes images {codec.reduction} times smaller, the small image is only {upsampling.factor} "
                f"times smaller and would lose pixels beside the latents: set upsampling.factor to {codec.reduction} "
                "or more."
            )

    def _summary(self, anew: list[str]) -> dict[str, Any]:
        """What is said at the start.

        Args:
            anew: the weights that do not come from the model that the run starts from.
        """
        recipe, model = self.recipe, self.model
        told: dict[str, Any] = {
            "image": "×".join(map(str, model.shape)),
            "classes": len(model.labels.names) if model.labels else 0,
        }
        if model.upsampling is not None:
            height, width = shrunk_size(model.upsampling.factor, *model.shape[1:])
            noise = model.upsampling.augmentation.share
            told["enlarges"] = f"{height}×{width}, {model.upsampling.factor} times, with noise up to {noise:g}"
        if not model.codec.pixels:
            latent = "×".join(map(str, model.codec.latent_shape(*model.shape)))
            told["latent"] = f"{latent} of the {model.codec.kind} codec {recipe.codec.get('path', recipe.start)}"
        if recipe.start is not None:
            told["starts from"] = begun_sentence(recipe.start, anew)
        return told

    def walked(self, images: Batches) -> Batches | LatentBatches:
        """The images, or the latents of them that `codec.cache` holds.

        Raises:
            UserError: the cache is of another codec, other images or another preparation.
        """
        if "cache" not in self.recipe.codec:
            return images
        latents = open_latents(
            self.recipe.codec["cache"],
            codecs.content_hash(self.model.codec),
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
        choice, schedule, labels = self.recipe.objective, self.model.schedule, self.model.labels
        upsampling = self.model.upsampling
        chain = None
        if choice.loss != "simple" and schedule.discrete:
            grid = grids.trailing(schedule, int(schedule.final_time))
            chain = Chain(schedule, grid, levels=self.model.levels)
        settings: dict[str, Any] = {
            "predicts": self.model.predicts,
            "times": make_times(self.recipe, schedule),
            "null": labels.null() if labels and labels.dropout else None,
            "dropout": labels.dropout if labels else 0.0,
            "loss": choice.loss,
            "weight": Weight(**choice.weight.model_dump()),
            "learned_variance": self.model.learned_variance,
            "chain": chain,
            "vlb_weight": choice.vlb_weight,
        }
        if upsampling is not None:
            return SuperResolutionObjective(modules["network"], schedule, upsampling.augmentation, **settings)
        return DiffusionObjective(modules["network"], schedule, **settings)

    def examples(self, batch: Batch | LatentBatch, draw: Noise) -> Examples:
        """The latents of a batch, and what the network is told of them: the class, and the image made smaller."""
        condition = Condition(label=batch.label) if self.model.labels else Condition()
        with torch.no_grad():
            if isinstance(batch, LatentBatch):
                posterior = batch.posterior
            else:
                images = batch.images.to(self.device)
                if self.model.upsampling is not None:
                    condition = pairs(images, self.model.upsampling.factor, condition).condition
                posterior = self.model.codec.encode(images)
            latents = posterior.sample(draw.at(draw.draw + 1)).to(self.device)
        return Examples(latents, condition.to(self.device))

    def blank(self) -> Examples:
        """The latent of nothing, of the first class and from a gray small image."""
        latent = torch.zeros(1, *self.model.codec.latent_shape(*self.model.shape))
        condition = self.model.labels.condition([0]) if self.model.labels else Condition()
        if self.model.upsampling is not None:
            condition = pairs(torch.zeros(1, *self.model.shape), self.model.upsampling.factor, condition).condition
        return Examples(latent.to(self.device), condition.to(self.device))

    def ask(self, module: nn.Module, examples: Examples) -> Tensor:
        """What the network makes of latents at time 1."""
        time, condition = torch.ones(len(examples.x0), device=self.device), examples.condition
        if self.model.upsampling is not None and condition.concat is not None:
            condition = self.model.upsampling.augmentation.condition(condition.concat, 0.0, Noise(0), condition)
        answer: Tensor = module(examples.x0, time, condition)
        return answer

    def preview(self, module: nn.Module, rows: range) -> tuple[Tensor, dict[str, Any]]:
        """Samples, the classes in turn; of an up-sampler the small image, the sample and the image side by side."""
        model, seed = replace(self.model, network=module), self.recipe.sampling.seed
        if model.upsampling is not None:
            return self._enlarged(model, rows)
        labels = [row % len(model.labels.names) for row in rows] if model.labels else None
        samples = model.sample(labels, None if labels else len(rows), seed=seed, first=rows[0])
        return samples.images, samples.protocol

    def _enlarged(self, model: DiffusionModel, rows: range) -> tuple[Tensor, dict[str, Any]]:
        """Small image, sample and image side by side, [len(rows), C, H, 3·W]."""
        assert model.upsampling is not None
        shown = shown_batch(self.recipe, self.source, rows)
        small = pairs(shown.images, model.upsampling.factor).condition.concat
        assert small is not None
        labels = shown.label if model.labels else None
        samples = model.sample(labels, small=small, seed=self.recipe.sampling.seed, first=rows[0])
        blocks = F.interpolate(small, shown.images.shape[2:], mode="nearest")
        told = {"left": "small image", "middle": "sample", "right": "image", **samples.protocol}
        return torch.cat([blocks, samples.images, shown.images], dim=3), told

    def save(self, module: nn.Module, folder: Path, origin: str) -> None:
        """The model around the network."""
        replace(self.model, network=module, origin=origin).save(folder)


def _codec(recipe: Recipe) -> Codec:
    """The codec that the recipe names."""
    return codecs.load(weights.find(recipe.codec["path"])) if recipe.codec else Identity()


def _upsampling(recipe: Recipe) -> Upsampling | None:
    """What the recipe says of small images."""
    choice = recipe.upsampling
    return None if choice is None else Upsampling(choice.factor, NoiseAugmentation.up_to(choice.noise))
