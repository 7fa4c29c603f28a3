"""A trained classifier with its schedule: what guides a diffusion model, or evaluates its samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carrara import networks, weights
from carrara.entries import Entry, read_entries
from carrara.errors import UserError
from carrara.modes import eval_mode
from carrara.networks import EncoderClassifier
from carrara.process import NoisyClassifier, Schedule, schedules


@dataclass
class Classifier:
    """A classifier of images, saved with the schedule that it was trained for (Dhariwal & Nichol 2021, §4.1).

    Attributes:
        network: gives the logits of a noisy image at a time.
        schedule: the noise levels that it was trained on.
        names: the classes, in label order.
        noisy: False for one that saw clean images only: it can evaluate samples, not guide.
        origin: where the weights come from, for protocols.
    """

    network: EncoderClassifier
    schedule: Schedule
    names: tuple[str, ...]
    noisy: bool = True
    origin: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """An image's [C, H, W]."""
        return (self.network.params.in_channels, *self.network.params.image_size)

    @property
    def clean_time(self) -> float:
        """The time of an image without noise: 0, or where only noisy ones were seen the least noisy level."""
        return self.schedule.first_time if self.noisy else 0.0

    @property
    def clean_network_time(self) -> float:
        """`clean_time` in the network's units."""
        return float(self.schedule.network_time(self.clean_time))

    def to(self, device: torch.device | str) -> Classifier:
        """Move the weights; returns the classifier itself."""
        self.network.to(device)
        return self

    def guide_of(self, schedule: Schedule, shape: tuple[int, ...], names: tuple[str, ...] | None) -> NoisyClassifier:
        """The classifier as `classifier_guidance` takes it, for a diffusion model.

        Args:
            schedule: the diffusion model's.
            shape: an image of it, [C, H, W].
            names: its classes; None for a model without classes.

        Raises:
            UserError: another schedule, size or set of classes than this classifier was trained for.
        """
        if not self.noisy:
            raise UserError("this classifier saw clean images only: it can evaluate samples, but cannot guide.")
        if self.schedule.spec != schedule.spec:
            raise UserError(
                f"the classifier was trained for the schedule {_words(self.schedule)}, the diffusion model for "
                f"{_words(schedule)}: train a classifier with the model's schedule."
            )
        if self.shape != tuple(shape):
            raise UserError(
                f"the classifier reads images of {'×'.join(map(str, self.shape))}, the diffusion model makes "
                f"{'×'.join(map(str, shape))}: train a classifier at that size."
            )
        if names is not None and len(names) != len(self.names):
            raise UserError(
                f"the classifier knows {len(self.names)} classes, the diffusion model {len(names)}: "
                "train both on the same classes."
            )
        if names is not None and names != self.names and not _numbers(names) and not _numbers(self.names):
            first = next(i for i, (own, other) in enumerate(zip(self.names, names, strict=True)) if own != other)
            raise UserError(
                f"class {first} is '{self.names[first]}' to the classifier and '{names[first]}' to the diffusion "
                "model: train both on the same classes."
            )
        return NoisyClassifier(self.network, self.schedule)

    @torch.no_grad()
    def read(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """The likeliest class of clean images, float32 [N, C, H, W] in [-1, 1]; int64 [N]."""
        logits, device = NoisyClassifier(self.network, self.schedule), next(self.network.parameters()).device
        with eval_mode(self.network):
            parts = [logits(part.to(device), self.clean_time).argmax(1).cpu() for part in images.split(batch_size)]
        return torch.cat(parts)

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `network.safetensors`, each whole or not at all."""
        config: dict[str, Any] = {
            "network": networks.config(self.network),
            "schedule": self.schedule.spec,
            "names": list(self.names),
            "noisy": self.noisy,
            "origin": self.origin,
        }
        weights.save(folder, "classifier", config, {"network": self.network})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Classifier:
        """A classifier from a run folder or its `model/` folder.

        Raises:
            UserError: a missing or cut file, something that is no classifier, weights that do not fit.
        """
        folder = weights.find(path)
        config = weights.read_config(folder, "classifier")
        own = read_entries(config, CONFIG, str(folder / weights.CONFIG), others=True)
        network = networks.build({"kind": "encoder_classifier", **own["network"]})
        if not isinstance(network, EncoderClassifier):
            raise UserError(
                f"{folder / weights.CONFIG} does not describe a classifier: its network is of kind {network.kind}.",
                key="network.kind",
                code="mismatch",
            )
        classifier = cls(network, schedules.build(own["schedule"]), own["names"], own["noisy"], own["origin"])
        weights.load_weights(network, folder / "network.safetensors")
        network.eval()
        return classifier.to(device)


CONFIG = {
    "network": Entry(dict),
    "schedule": Entry(dict),
    "names": Entry(tuple[str, ...]),
    "noisy": Entry(bool),
    "origin": Entry(str),
}
"""The entries of a classifier's `config.json`."""


def _words(schedule: Schedule) -> str:
    return ", ".join(f"{key} {value}" for key, value in schedule.spec.items())


def _numbers(names: tuple[str, ...]) -> bool:
    """Whether the classes have no names but their numbers."""
    return all(name == str(index) for index, name in enumerate(names))
