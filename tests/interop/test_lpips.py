"""LPIPS' weights: layouts, checksums, and files without them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from carrara.codecs.perceptual import LPIPS
from carrara.errors import Code
from carrara.interop import lpips
from tests.errors import refused
from tests.interop.vgg import GROUP_ENDS, vgg_weights


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return vgg_weights()


def test_the_layout_within_a_checkpoint_is_read_too(weights: dict[str, Tensor]) -> None:
    theirs = {}
    for key, value in weights.items():
        number = int(key.split(".")[1]) if key.startswith("features.") else -1
        group = 1 + sum(number > end for end in GROUP_ENDS)
        theirs["loss.perceptual_loss." + key.replace("features.", f"net.slice{group}.")] = value
    theirs |= {"encoder.conv_in.bias": torch.zeros(1), "loss.perceptual_loss.scaling_layer.shift": torch.zeros(1)}
    own, other = lpips.from_state_dict(weights).state_dict(), lpips.from_state_dict(theirs).state_dict()
    assert all(torch.equal(value, other[key]) for key, value in own.items())


def test_files_are_checked_by_path_and_checksum(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "vgg16.safetensors"
    with refused("missing", str(path)):
        lpips.load(path)
    save_file(weights, path)
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert isinstance(lpips.load(path, right.upper()), LPIPS)
    with refused("mismatch", str(path)):
        lpips.load(path, "0" * 64)


@pytest.mark.parametrize("key", ["features.5.weight", "features.28.bias", "lin2.model.1.weight"])
def test_a_missing_layer_is_named(key: str, weights: dict[str, Tensor]) -> None:
    with refused("missing", key):
        lpips.from_state_dict({name: value for name, value in weights.items() if name != key})


def damaged(path: Path, content: object) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("vgg.safetensors", b"\xff" * 100, "damaged"),
        ("vgg.safetensors", b"", "damaged"),
        ("vgg.pt", b"no pickle", "damaged"),
        ("vgg.pt", [torch.zeros(1)], "invalid"),
        ("vgg.pt", torch.zeros(1), "invalid"),
        ("vgg.pt", {"state_dict": [1]}, "invalid"),
        ("vgg.pt", {0: torch.zeros(1)}, "invalid"),
    ],
    ids=["damaged", "empty", "no pickle", "a list", "a tensor", "a wrapped list", "numbered weights"],
)
def test_files_without_weights_are_refused(name: str, content: object, code: Code, tmp_path: Path) -> None:
    path = damaged(tmp_path / name, content)
    with refused(code, str(path)):
        lpips.load(path)
