"""How well images and texts agree: a contrastive scorer trained in Carrara."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from carrara import weights
from carrara.condition import Condition
from carrara.errors import UserError
from carrara.interop import efficientnet
from carrara.modes import eval_mode
from carrara.networks.contrastive import Towers, TowersParams
from carrara.packages import locate
from carrara.text import ENCODERS, Span, TextEncoder

IMAGE_SIDE = 128
"""Images are resized to squares of this side for EfficientNet-Lite0's features."""


class FrozenImages:
    """Features of EfficientNet-Lite0, from its package: [N, 3, H, W] to [N, 1280]."""

    def __init__(self) -> None:
        path = locate("efficientnet-lite0")
        self.network = efficientnet.load(torch.load(path, weights_only=True))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
        sized = F.interpolate(images, (IMAGE_SIDE, IMAGE_SIDE), mode="bicubic", antialias=True)
        return self.network.features(sized.clamp(-1, 1))


class FrozenTexts:
    """A text's features: the mean of a frozen encoder's hidden states, without padding."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.cat([self._one(text) for text in texts])

    def _one(self, text: str) -> Tensor:
        condition = self.encoder.encode([Span(text)])
        assert condition.context is not None
        mask = torch.ones(condition.context.shape[:2]) if condition.context_mask is None else condition.context_mask
        kept = mask.to(condition.context).unsqueeze(2)
        return (condition.context * kept).sum(1) / kept.sum(1)


@dataclass
class Scorer:
    """A contrastive scorer of images and captions.

    Attributes:
        network: the towers.
        texts: the encoder of texts, or their vocabulary.
        about: what it was trained on, for cards and metrics.
        origin: where the weights come from.
    """

    kind: ClassVar[str] = "scorer"
    network: Towers
    texts: TextEncoder
    about: str = ""
    origin: str = ""
    _frozen: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """ "scorer CHECKSUM": metrics of different scorers are never compared."""
        digest = hashlib.sha256(json.dumps(self.texts.config(), sort_keys=True).encode())
        for key, value in sorted(self.network.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return f"scorer {digest.hexdigest()[:12]}"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    def to(self, device: torch.device | str) -> Scorer:
        """Move the weights; returns the scorer itself."""
        self.network.to(device)
        return self

    def image_features(self, images: Tensor) -> Tensor:
        """What the image tower reads: the images, or their frozen features."""
        if self.network.image is not None:
            return images
        if "images" not in self._frozen:
            self._frozen["images"] = FrozenImages()
        return self._frozen["images"](images.cpu())  # type: ignore[no-any-return]

    def text_features(self, texts: Sequence[str]) -> Condition:
        """What the text tower reads, of each text."""
        if self.network.text is not None:
            rows = [self.texts.encode([Span(text)]).tokens for text in texts]
            return Condition(tokens=torch.cat([row for row in rows if row is not None]))
        return Condition(vector=FrozenTexts(self.texts)(texts))

    @torch.no_grad()
    def embed_images(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """float [N, C, H, W] in [-1, 1] to unit vectors float32 [N, D]."""
        with eval_mode(self.network):
            parts = [self.image_features(part).to(self.device) for part in images.split(batch_size)]
            return torch.cat([self.network.embed_images(part).float().cpu() for part in parts])

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to unit vectors float32 [N, D]."""
        with eval_mode(self.network):
            return self.network.embed_texts(self.text_features(texts).to(self.device)).float().cpu()

    def save(self, folder: str | Path) -> None:
        """Write `config.json`, `network.safetensors` and the files of the text encoder."""
        self.texts.save(Path(folder))
        config = {
            "network": asdict(self.network.params),
            "texts": {"kind": self.texts.kind, **self.texts.config()},
            "about": self.about,
            "origin": self.origin,
        }
        weights.save(folder, "scorer", config, {"network": self.network})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Scorer:
        """A scorer from a run folder or its `model/` folder.

        Raises:
            UserError: a missing or cut file, or something that is no scorer.
        """
        folder = weights.find(path)
        config = weights.read_config(folder, "scorer")
        try:
            network = Towers(TowersParams(**config["network"]))
            own: Mapping[str, Any] = config["texts"]
            texts = ENCODERS[own["kind"]].load({k: v for k, v in own.items() if k != "kind"}, folder)
            scorer = cls(network, texts, config["about"], config["origin"])
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{folder / 'config.json'} does not describe a scorer: {error!r} is wrong or missing.",
                key=str(folder / "config.json"),
                code="damaged",
            ) from None
        weights.load_weights(network, folder / "network.safetensors")
        network.eval()
        return scorer.to(device)


def rank(scorer: Scorer, images: Tensor, texts: Sequence[str]) -> Tensor:
    """The cosine of each image with its own text, float32 [N]: by it candidates are put in order.

    Args:
        images: float [N, C, H, W] in [-1, 1].
        texts: N of them.

    Raises:
        UserError: their numbers differ.
    """
    if len(images) != len(texts):
        raise UserError(
            f"{len(images)} images and {len(texts)} texts are no pairs: give a text for each image.",
            key="texts",
            code="shape",
        )
    return (scorer.embed_images(images) * scorer.embed_texts(texts)).sum(1)
