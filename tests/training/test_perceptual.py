"""What the perceptual term of a codec's loss looks through: refused before there is a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from carrara.errors import UserError
from carrara.training import Trainer
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
    ("loss", "sentence"),
    [
        ({"perceptual_from": "corrupt.safetensors"}, r"corrupt\.safetensors' is cut short or no safetensors file"),
        ({"perceptual_from": "list.pt"}, r"list\.pt' holds no table of named weights"),
        ({"perceptual_from": "coloured"}, r"loss\.perceptual_from=.*coloured .* of 3 channels, not of 1"),
        ({"perceptual_from": "larger"}, r"loss\.perceptual_from=.*larger .* images of 16×16, not of 8×8"),
        ({"perceptual_checksum": "0" * 64}, r"loss\.perceptual_checksum is given, but loss\.perceptual_from names no"),
        ({"perceptual_from": "fits", "perceptual_checksum": "0" * 64}, r"loss\.perceptual_from names no file"),
        ({"perceptual_from": "list.pt", "perceptual_checksum": "0" * 64}, r"list\.pt' has the SHA-256"),
        ({"perceptual_from": "list.pt", "perceptual_checksum": 12}, r"loss\.perceptual_checksum' is 12, .* in quotes"),
        ({"perceptual_from": 5}, r"loss\.perceptual_from' is 5, .* in quotes"),
    ],
)
@pytest.mark.parametrize("weight", [{}, {"perceptual": 1.0}])
def test_what_it_cannot_look_through_is_refused_in_time(
    loss: dict[str, Any], sentence: str, weight: dict[str, float], there: Path
) -> None:
    if isinstance(loss.get("perceptual_from"), str):
        loss = {**loss, "perceptual_from": str(there / loss["perceptual_from"])}
    with pytest.raises(UserError, match=sentence):
        Trainer(recipe("vqgan", codec={"codes": 16}, loss={**loss, **weight}), there / "run")
    assert not (there / "run").exists()
