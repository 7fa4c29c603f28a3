"""The network of the perceptual term of a codec's loss: refused before there is a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from carrara.errors import Code
from carrara.training import Trainer
from tests.errors import refused
from tests.test_classifier import untrained
from tests.training.test_codec import recipe


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A folder with files that hold no weights, and classifiers."""
    (tmp_path / "corrupt.safetensors").write_bytes(b"\xff" * 64)
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    untrained().save(tmp_path / "fits")
    untrained(in_channels=3).save(tmp_path / "coloured")
    untrained(image_size=(16, 16)).save(tmp_path / "larger")
    return tmp_path


@pytest.mark.parametrize(
    ("loss", "code", "key"),
    [
        ({"perceptual_from": "corrupt.safetensors"}, "damaged", "corrupt.safetensors"),
        ({"perceptual_from": "list.pt"}, "invalid", "list.pt"),
        ({"perceptual_from": "coloured"}, "shape", "loss.perceptual_from"),
        ({"perceptual_from": "larger"}, "shape", "loss.perceptual_from"),
        ({"perceptual_checksum": "0" * 64}, "conflict", "loss.perceptual_checksum"),
        ({"perceptual_from": "fits", "perceptual_checksum": "0" * 64}, "conflict", "loss.perceptual_checksum"),
        ({"perceptual_from": "list.pt", "perceptual_checksum": "0" * 64}, "mismatch", "list.pt"),
        ({"perceptual_from": "list.pt", "perceptual_checksum": 12}, "invalid", "loss.perceptual_checksum"),
        ({"perceptual_from": 5}, "invalid", "loss.perceptual_from"),
    ],
)
@pytest.mark.parametrize("weight", [{}, {"perceptual": 1.0}])
def test_unfit_perceptual_networks_are_refused_before_the_run(
    loss: dict[str, Any], code: Code, key: str, weight: dict[str, float], there: Path
) -> None:
    if isinstance(loss.get("perceptual_from"), str):
        loss = {**loss, "perceptual_from": str(there / loss["perceptual_from"])}
    with refused(code, key if key.startswith("loss.") else str(there / key)):
        Trainer(recipe("vqgan", codec={"codes": 16}, loss={**loss, **weight}), there / "run")
    assert not (there / "run").exists()
