"""Training a contrastive scorer of images and captions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from carrara.codecs import Codec
from carrara.condition import Condition
from carrara.data import Batch, Batches, LatentBatch, Source
from carrara.distributed import Processes
from carrara.errors import UserError
from carrara.networks.contrastive import Towers
from carrara.networks.efficientnet import FEATURES
from carrara.objectives import Examples
from carrara.objectives.contrastive import ContrastiveObjective
from carrara.process import Noise
from carrara.recipe import ScorerRecipe
from carrara.scorer import FrozenImages, FrozenTexts, Scorer
from carrara.text import Pretrained, TextEncoder, Vocabulary


class ScorerTask:
    """Two towers that learn which caption belongs to an image.

    Each process contrasts the pairs of its own part of the batch.

    Raises:
        UserError: data without captions, or a batch that is cut into micro-batches, which would leave pairs out.
    """

    pictures = 0
    codec: Codec | None = None

    def __init__(self, recipe: ScorerRecipe, source: Source, processes: Processes) -> None:
        if source.captions is None:
            raise UserError(
                f"a scorer learns from captions, but {source.name} has none: put a .txt file next to each image, or a "
                "column of texts into its table.",
                key="data.path",
                code="mismatch",
            )
        self.recipe, self.device = recipe, processes.device
        encoders = recipe.encoders
        self.texts: TextEncoder
        if encoders.text == Vocabulary.kind:
            self.texts = Vocabulary.train(source.captions, encoders.vocabulary, encoders.length)
        else:
            self.texts = Pretrained.open(encoders.text, length=encoders.length)
        self._texts = FrozenTexts(self.texts) if isinstance(self.texts, Pretrained) else None
        self._images = FrozenImages() if encoders.image != "trained" else None
        self._known: dict[str, Tensor] = {}  # features of images that no draw changes
        self._keep = self._images is not None and not recipe.data.flip and recipe.data.crop == "center"
        torch.manual_seed(recipe.seed)
        params = recipe.towers(
            image_features=0 if self._images is None else FEATURES,
            text_features=0 if self._texts is None else cast(Pretrained, self.texts).width,
            vocabulary=len(self.texts) if isinstance(self.texts, Vocabulary) else 0,
        )
        self.modules: dict[str, nn.Module] = {"network": Towers(params).to(self.device)}
        self.about = source.name
        self.summary: dict[str, Any] = {
            "image": f"{recipe.data.channels}×{'×'.join(map(str, recipe.data.resolution))}, {encoders.image}",
            "text": encoders.text,
            "width": params.width,
        }
        self.notices: list[str] = []

    def batches(self, images: Batches) -> Batches:
        """The images."""
        return images

    def objective(self, modules: Mapping[str, nn.Module]) -> ContrastiveObjective:
        """Which caption belongs to which image."""
        return ContrastiveObjective(modules["network"])

    @torch.no_grad()
    def examples(self, batch: Batch | LatentBatch, draw: Noise) -> Examples:
        """The images, or their frozen features, and their captions."""
        assert isinstance(batch, Batch)  # `batches` gives images
        images = self._features(batch) if self._images is not None else batch.to(self.device).images
        return Examples(images.to(self.device), self._condition(batch.captions or [""] * len(batch)))

    def _features(self, batch: Batch) -> Tensor:
        """Frozen features [B, F], each image's computed once where it is always the same."""
        assert self._images is not None
        new = [place for place, name in enumerate(batch.names) if name not in self._known]
        if new:
            rows = self._images(batch.images[new])
            self._known |= {batch.names[place]: row for place, row in zip(new, rows, strict=True)}
        found = torch.stack([self._known[name] for name in batch.names])
        if not self._keep:
            self._known.clear()
        return found

    def _condition(self, captions: list[str]) -> Condition:
        network = cast(Towers, self.modules["network"])
        return Scorer(network, self.texts).text_features(captions).to(self.device)

    def blank(self) -> Examples:
        """A gray image without a text."""
        shape = (FEATURES,) if self._images is not None else (self.recipe.data.channels, *self.recipe.data.resolution)
        return Examples(torch.zeros(1, *shape, device=self.device), self._condition([""]))

    def forward(self, module: nn.Module, examples: Examples) -> Tensor:
        """The logits of all pairs."""
        logits: Tensor = module(examples.x0, examples.condition)
        return logits

    def preview(self, module: nn.Module, rows: range) -> tuple[Tensor, dict[str, Any]]:
        """A scorer makes no pictures: `pictures` is 0, and these are none."""
        return torch.zeros(0, self.recipe.data.channels, *self.recipe.data.resolution), {}

    def save(self, module: nn.Module, folder: Path, origin: str) -> None:
        """The scorer with its text encoder."""
        Scorer(cast(Towers, module), self.texts, self.about, origin).save(folder)
