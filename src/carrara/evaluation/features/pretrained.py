"""CLIP and DINOv2 features through transformers, from a local folder or, where there is a network, a hub name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.evaluation.features.checksum import file_checksum, tensors_checksum
from carrara.evaluation.features.preparation import standardised

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


class Clip:
    """CLIP embeddings (Radford et al. 2021): of images [N, C, H, W] in [-1, 1] and of texts, float32 [N, D].

    Attributes:
        name: "clip" and the model's name.
        checksum: SHA-256 over its weight files.
        preparation: how images enter.
        longest: tokens of a text, its end among them; longer texts are cut before the end token.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        transformers = _transformers()
        self.device = torch.device(device)
        self._model = _load(transformers.CLIPModel, path, self.device)
        self._tokenizer = _load_plain(transformers.AutoTokenizer, path)
        self.name = f"clip {Path(str(path)).name}"
        self.checksum = _checksum(path, self._model)
        self.longest = int(self._model.config.text_config.max_position_embeddings)
        size = int(self._model.config.vision_config.image_size)
        self._size, self._mean, self._std = _preprocessor(path, size, CLIP_MEAN, CLIP_STD)
        self.preparation = _described(self._size)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Image embeddings before normalising."""
        pixels = standardised(images.to(self.device), self._size, self._mean, self._std)
        pooled = self._model.vision_model(pixel_values=pixels).pooler_output
        embeddings: Tensor = self._model.visual_projection(pooled)
        return embeddings

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """Text embeddings before normalising. Cutting keeps the end-of-text token, where CLIP reads the text."""
        tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=self.longest, return_tensors="pt").to(
            self.device
        )
        pooled = self._model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        embeddings: Tensor = self._model.text_projection(pooled)
        return embeddings


class Dino:
    """DINOv2's class token after the last norm (Oquab et al. 2023; as a measure, Stein et al. 2023).

    Attributes: as for `Clip`, without texts.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._model = _load(_transformers().AutoModel, path, self.device)
        self.name = f"dinov2 {Path(str(path)).name}"
        self.checksum = _checksum(path, self._model)
        self._size, self._mean, self._std = _preprocessor(path, 224, IMAGENET_MEAN, IMAGENET_STD)
        self.preparation = _described(self._size)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features of one batch of images [N, C, H, W] in [-1, 1], float32 [N, D]."""
        pixels = standardised(images.to(self.device), self._size, self._mean, self._std)
        features: Tensor = self._model(pixel_values=pixels).last_hidden_state[:, 0]
        return features


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError(
            "CLIP and DINOv2 need transformers: pip install 'carrara[evaluation]'.", key="features", code="unsupported"
        ) from None
    return transformers


def _load_plain(kind: Any, path: str | Path) -> Any:
    try:
        return kind.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"'{path}' cannot be loaded as {kind.__name__}: {first} Give a local model folder.",
            key=str(path),
            code="missing",
        ) from None


def _load(kind: Any, path: str | Path, device: torch.device) -> Any:
    return _load_plain(kind, path).eval().requires_grad_(False).to(device)


def _checksum(path: str | Path, model: Any) -> str:
    """SHA-256 of the weights file of a folder (over all where there are several), else over the tensors."""
    files = sorted(Path(path).glob("*.safetensors")) + sorted(Path(path).glob("*.bin"))
    sums = [file_checksum(file) for file in files] or [tensors_checksum(model.state_dict())]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


def _preprocessor(
    path: str | Path, size: int, mean: list[float], std: list[float]
) -> tuple[int, list[float], list[float]]:
    """Input size, mean and deviation from the folder's preprocessor_config.json, else the published ones."""
    file = Path(path) / "preprocessor_config.json"
    if not file.is_file():
        return size, mean, std
    config = json.loads(file.read_text(encoding="utf-8"))
    crop = config.get("crop_size", size)
    crop = crop.get("height", size) if isinstance(crop, dict) else crop
    return int(crop), config.get("image_mean", mean), config.get("image_std", std)


def _described(size: int) -> str:
    return f"shorter side to {size} (bicubic, antialiased), centre crop, standardised"
