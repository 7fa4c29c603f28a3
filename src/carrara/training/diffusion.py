"""Training a diffusion model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara import codecs, conditioning, distributed, networks
from carrara.codecs import Codec, Identity
from carrara.condition import Condition
from carrara.conditioning import Conditioner, DataFacts, LowRes, Text, TrainingInputs, shrink, shrunk_size
from carrara.data import Batch, Batches, LatentBatch, LatentBatches, Source, open_latents
from carrara.distributed import Processes
from carrara.errors import UserError
from carrara.model import DiffusionModel
from carrara.objectives import DiffusionObjective, Examples, Weight
from carrara.process import Noise, grids, schedules
from carrara.process.bound import Chain
from carrara.recipe import DiffusionRecipe
from carrara.training.assembly import make_times, shown_batch
from carrara.training.start import network_from, start_sentence


class DiffusionTask:
    """A network trained to denoise, and the model around it.

    Raises:
        UserError: choices of the recipe that do not go together, or with the data.
    """

    def __init__(self, recipe: DiffusionRecipe, source: Source, processes: Processes) -> None:
        self.recipe, self.source, self.device = recipe, source, processes.device
        self.notices: list[str] = []
        self.pictures = recipe.sampling.count
        base = DiffusionModel.load(recipe.start) if recipe.start else None
        codec = base.codec if base else _codec(recipe)
        if isinstance(codec, nn.Module):
            codec.to(self.device).requires_grad_(False)
        shape = (recipe.data.channels, *recipe.data.resolution)
        latent = codec.latent_shape(shape)
        conditioners = _conditioners(recipe, source, shape, base)
        slots = {slot: width for conditioner in conditioners for slot, width in conditioner.slots.items()}
        classes = slots.get("label")
        new_weights: list[str] = []
        if base is None:
            torch.manual_seed(recipe.seed)
            network = networks.create(recipe.network_params(slots, latent))
        else:
            names = base.class_names() or (), source.class_names or ()
            network, new_weights = network_from(base.network, recipe, classes, latent, names)
        self.modules: dict[str, nn.Module] = {"network": network.to(self.device)}
        self.model = DiffusionModel(
            network=network,
            schedule=base.schedule if base else schedules.build(recipe.schedule.spec()),
            shape=shape,
            predicts=base.predicts if base else recipe.objective.predicts,
            conditioners=conditioners,
            levels=source.levels,
            codec=codec,
            sigma_data=base.sigma_data if base else recipe.objective.sigma_data,
            sampling=recipe.sampling.model_dump(include={"solver", "steps", "spacing", "guidance"}),
        )
        self.codec = None if codec.bounded else codec
        self._check_upsampling()
        self.model.grid(recipe.sampling.steps, recipe.sampling.spacing)
        self.objective(self.modules)
        self.summary: dict[str, Any] = self._summary(new_weights)

    def _check_upsampling(self) -> None:
        """Raises UserError unless low-resolution images can be made of the data, with a pixel for every latent."""
        low_res, codec = self.model.low_res, self.model.codec
        if low_res is None:
            return
        if low_res.factor is None or low_res.augmentation is None:
            raise UserError(
                f"{self.recipe.start} is an up-sampler that does not say what it was trained for.",
                key="start",
                code="unsupported",
            )
        shrunk_size(low_res.factor, *self.model.shape[1:])
        if self.recipe.codec.cache is not None:
            raise UserError(
                "codec.cache holds no pixels, from which up-sampling makes its low-resolution images: leave it out, so "
                "that the images are read.",
                key="codec.cache",
                code="conflict",
            )
        if low_res.factor < codec.reduction:
            raise UserError(
                f"the codec makes images {codec.reduction} times smaller, the low-resolution image is only "
                f"{low_res.factor} times smaller and would lose pixels when it is concatenated with the latents: set "
                f"upsampling.factor to {codec.reduction} or more.",
                key="upsampling.factor",
                code="conflict",
            )

    def _summary(self, new_weights: list[str]) -> dict[str, Any]:
        """What is printed at the start.

        Args:
            new_weights: those that do not come from the model that the run starts from.
        """
        recipe, model, low_res = self.recipe, self.model, self.model.low_res
        summary: dict[str, Any] = {
            "image": "×".join(map(str, model.shape)),
            "classes": len(model.class_labels.names) if model.class_labels else 0,
        }
        for text in (conditioner for conditioner in model.conditioners if isinstance(conditioner, Text)):
            summary["texts"] = text.encoder.about
        if low_res is not None and low_res.factor is not None and low_res.augmentation is not None:
            height, width = shrunk_size(low_res.factor, *model.shape[1:])
            noise = low_res.augmentation.fraction
            summary["enlarges"] = f"{height}×{width}, {low_res.factor} times, with noise up to {noise:g}"
        if not model.codec.bounded:
            latent = "×".join(map(str, model.codec.latent_shape(model.shape)))
            summary["latent"] = f"{latent} of the {model.codec.kind} codec {recipe.codec.path or recipe.start}"
        if recipe.start is not None:
            summary["starts from"] = start_sentence(recipe.start, new_weights)
        return summary

    def batches(self, images: Batches) -> Batches | LatentBatches:
        """The images, or the latents of them that `codec.cache` holds.

        Raises:
            UserError: the cache is of another codec, other images or another preparation.
        """
        if self.recipe.codec.cache is None:
            return images
        opened = partial(
            open_latents,
            self.recipe.codec.cache,
            codecs.content_hash(self.model.codec),
            prepare=images.prepare,
            source=images.source,
        )
        distributed.run_on_rank0(lambda: len(opened()))  # it hashes everything, for all processes
        latents = opened(verify=False)
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
        choice, schedule = self.recipe.objective, self.model.schedule
        chain = None
        if choice.loss != "simple" and schedule.discrete:
            grid = grids.trailing(schedule, int(schedule.final_time))
            chain = Chain(schedule, grid, levels=self.model.levels)
        return DiffusionObjective(
            modules["network"],
            schedule,
            self.model.predicts,
            make_times(self.recipe, schedule),
            self.model.conditioners,
            loss=choice.loss,
            weight=Weight(**choice.weight.model_dump()),
            learned_variance=self.model.learned_variance,
            chain=chain,
            vlb_weight=choice.vlb_weight,
            sigma_data=self.model.sigma_data,
        )

    def examples(self, batch: Batch | LatentBatch, draw: Noise) -> Examples:
        """The latents of a batch, and their condition."""
        with torch.no_grad():
            if isinstance(batch, LatentBatch):
                images, posterior = None, batch.to(self.device).posterior
            else:
                images = batch.to(self.device).images
                posterior = self.model.codec.encode(images)
            condition = self._condition(TrainingInputs(images, batch.label, batch.captions), draw)
            latents = posterior.sample(draw.at(draw.draw + 1)).to(self.device)
        return Examples(latents, condition)

    def blank(self) -> Examples:
        """The latent of zeros, with the condition of a gray image of the first class."""
        latent = torch.zeros(1, *self.model.codec.latent_shape(self.model.shape), device=self.device)
        inputs = TrainingInputs(torch.zeros(1, *self.model.shape), torch.zeros(1, dtype=torch.int64), [""])
        return Examples(latent, self._condition(inputs, Noise().rows([0])))

    def _condition(self, inputs: TrainingInputs, noise: Noise) -> Condition:
        return conditioning.examples(self.model.conditioners, inputs, noise).to(self.device)

    def forward(self, module: nn.Module, examples: Examples) -> Tensor:
        """The network's output for latents at time 1."""
        time = torch.ones(len(examples.x0), device=self.device)
        output: Tensor = module(examples.x0, time, examples.condition)
        return output

    def preview(self, module: nn.Module, rows: range) -> tuple[Tensor, dict[str, Any]]:
        """Samples, the classes in turn; of an up-sampler the low-resolution image, the sample and the image side by
        side, [len(rows), C, H, 3·W]."""
        model, seed = replace(self.model, network=module), self.recipe.sampling.seed
        if model.low_res is not None and model.low_res.factor is not None:
            return self._enlarged(model, rows, model.low_res.factor)
        classes = model.class_labels
        if len(model.conditioners) > (1 if classes else 0):  # inputs as the first images have them
            shown = shown_batch(self.recipe, self.source, rows)
            inputs = TrainingInputs(shown.images, shown.label, shown.captions)
            condition = self._condition(inputs, Noise(seed).rows(rows))
            samples = model.sample(condition=condition, seed=seed, first=rows[0])
        else:
            labels = [row % len(classes.names) for row in rows] if classes else None
            samples = model.sample(labels, len(rows), seed=seed, first=rows[0])
        return samples.images, samples.metadata

    def _enlarged(self, model: DiffusionModel, rows: range, factor: int) -> tuple[Tensor, dict[str, Any]]:
        shown = shown_batch(self.recipe, self.source, rows)
        low_res = shrink(shown.images, factor)
        labels = shown.label if model.class_labels else None
        samples = model.sample(labels, low_res=low_res, seed=self.recipe.sampling.seed, first=rows[0])
        blocks = F.interpolate(low_res, shown.images.shape[2:], mode="nearest")
        metadata = {"left": "low-resolution image", "middle": "sample", "right": "image", **samples.metadata}
        return torch.cat([blocks, samples.images, shown.images], dim=3), metadata

    def save(self, module: nn.Module, folder: Path, origin: str) -> None:
        """The model around the network."""
        replace(self.model, network=module, origin=origin).save(folder)


def _codec(recipe: DiffusionRecipe) -> Codec:
    """The codec that the recipe names."""
    return codecs.load(recipe.codec.path) if recipe.codec.path else Identity()


def _conditioners(
    recipe: DiffusionRecipe, source: Source, shape: tuple[int, ...], base: DiffusionModel | None
) -> tuple[Conditioner, ...]:
    """What the recipe conditions on, for its data; the up-sampling of a model that the run starts from is kept.

    Raises:
        UserError: the data lack what a conditioner needs.
    """
    names = None if source.class_names is None else tuple(source.class_names)
    data = DataFacts(source.name, shape, names, source.captions)
    found: list[Conditioner] = []
    if recipe.conditioning.kind != "none":
        settings = recipe.conditioning.model_dump(exclude={"kind"})
        found.append(conditioning.kind_of(recipe.conditioning.kind).fit(settings, data))
    if base is not None and base.low_res is not None:
        found.append(replace(base.low_res, shape=shape))
    elif recipe.upsampling is not None:
        found.append(LowRes.fit(recipe.upsampling.model_dump(), data))
    return tuple(found)
