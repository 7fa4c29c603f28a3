"""Training a classifier of noisy images, for guidance, or of clean ones, for evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from carrara.classifier import Classifier
from carrara.codecs import Codec
from carrara.condition import Condition
from carrara.data import Batch, Batches, LatentBatch, Source
from carrara.distributed import Processes
from carrara.errors import UserError
from carrara.networks import EncoderClassifier, Network
from carrara.objectives import ClassifierObjective, Examples
from carrara.process import Noise, schedules
from carrara.recipe import ClassifierRecipe
from carrara.training.assembly import make_times
from carrara.training.start import network_from, start_sentence


class ClassifierTask:
    """A network that learns to tell the class of an image at every noise level of a schedule.

    Raises:
        UserError: data without classes, or a network that does not fit the images.
    """

    pictures = 0
    codec: Codec | None = None

    def __init__(self, recipe: ClassifierRecipe, source: Source, processes: Processes) -> None:
        if source.class_names is None:
            raise UserError(
                f"a classifier learns from classes, but {source.name} has none: sort the images into one folder per "
                "class.",
                key="data.path",
                code="missing",
            )
        self.recipe, self.device = recipe, processes.device
        self.names = tuple(source.class_names)
        self.schedule = schedules.build(recipe.schedule.spec())
        new_weights: list[str] = []
        if recipe.start is None:
            torch.manual_seed(recipe.seed)
            network: Network = EncoderClassifier(recipe.network_params(len(self.names)))
        else:
            base = Classifier.load(recipe.start)
            self.schedule = base.schedule
            size = (recipe.data.channels, *recipe.data.resolution)
            network, new_weights = network_from(base.network, recipe, len(self.names), size, (base.names, self.names))
        self.params = network.params
        self.modules: dict[str, nn.Module] = {"network": network.to(self.device)}
        self.summary: dict[str, Any] = {
            "image": "×".join(map(str, (recipe.data.channels, *recipe.data.resolution))),
            "classes": len(self.names),
            "noise levels": recipe.times.kind,
        } | ({"starts from": start_sentence(recipe.start, new_weights)} if recipe.start else {})
        self.notices: list[str] = []

    def batches(self, images: Batches) -> Batches:
        """The images."""
        return images

    def objective(self, modules: Mapping[str, nn.Module]) -> ClassifierObjective:
        """Cross-entropy at random noise levels."""
        return ClassifierObjective(modules["network"], self.schedule, make_times(self.recipe, self.schedule))

    def examples(self, batch: Batch | LatentBatch, draw: Noise) -> Examples:
        """The images and their classes."""
        assert isinstance(batch, Batch)  # `batches` gives images
        return Examples(batch.to(self.device).images, Condition(label=batch.label).to(self.device))

    def blank(self) -> Examples:
        """A gray image of the first class."""
        image = torch.zeros(1, self.params.in_channels, *self.params.image_size, device=self.device)
        return Examples(image, Condition(label=torch.zeros(1, dtype=torch.int64, device=self.device)))

    def forward(self, module: nn.Module, examples: Examples) -> Tensor:
        """The logits at time 1."""
        logits: Tensor = module(examples.x0, torch.ones(len(examples.x0), device=self.device))
        return logits

    def preview(self, module: nn.Module, rows: range) -> tuple[Tensor, dict[str, Any]]:
        """A classifier makes no pictures: `pictures` is 0, and these are none, [0, C, H, W]."""
        return torch.zeros(0, self.params.in_channels, *self.params.image_size), {}

    def save(self, module: nn.Module, folder: Path, origin: str) -> None:
        """The classifier with its schedule and classes."""
        noisy = self.recipe.times.kind != "clean"
        Classifier(cast(EncoderClassifier, module), self.schedule, self.names, noisy, origin).save(folder)
