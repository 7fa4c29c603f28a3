"""Reading the Inception network's weights: a local file, known by its checksum, in either published form."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.evaluation.features.checksum import file_checksum
from carrara.evaluation.features.inception_network import InceptionNetwork

PYTORCH_FID = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
TORCHSCRIPT = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
OFFICIAL = {
    PYTORCH_FID: "pt_inception-2015-12-05-6726825d.pth (pytorch-fid; torch-fidelity ships the same bytes)",
    TORCHSCRIPT: "inception-2015-12-05.pt (TorchScript; StyleGAN2-ADA, clean-fid)",
}
"""SHA-256 of the published files that contain the weights of 5 December 2015."""


def read_weights(path: str | Path, checksum: str | None = None) -> tuple[dict[str, Tensor], str]:
    """The weights under pytorch-fid's keys, and the file's SHA-256, which is checked before it is read.

    Args:
        checksum: the SHA-256 it must have (or its first 8 digits and more); None: one of `OFFICIAL`.

    Raises:
        UserError: no such file, another checksum, keys or shapes that are not the network's.
    """
    path = Path(path)
    if not path.is_file():
        names = " or ".join(OFFICIAL.values())
        raise UserError(
            f"no Inception weights at '{path}': put {names} there; nothing is downloaded silently.",
            key=str(path),
            code="missing",
        )
    found = file_checksum(path)
    expected = [checksum] if checksum else list(OFFICIAL)
    if not any(found.startswith(digest.lower()) for digest in expected):
        wanted = " or ".join(digest[:16] + "…" for digest in expected)
        raise UserError(
            f"'{path}' has SHA-256 {found[:16]}…, not {wanted}: "
            "it is cut short or another file; download it again, or give its own --checksum to use it on purpose.",
            key=str(path),
            code="mismatch",
        )
    raw = _torchscript(path) if _is_torchscript(path) else _pickle(path)
    weights = from_torchscript(raw) if "layers.conv.weight" in raw else raw
    _check(path, weights)
    return weights, found


def _is_torchscript(path: Path) -> bool:
    return zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist())


def _torchscript(path: Path) -> dict[str, Tensor]:
    return dict(torch.jit.load(path, map_location="cpu").state_dict())


def _pickle(path: Path) -> dict[str, Tensor]:
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(
            f"'{path}' is not a plain state dict of tensors: give the weights as published.",
            key=str(path),
            code="damaged",
        )
    return loaded


def _check(path: Path, weights: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        wanted = {key: value.shape for key, value in InceptionNetwork().state_dict().items()}
    for key in wanted:
        if key.endswith("num_batches_tracked"):  # a counter of training; older files lack it
            weights.setdefault(key, torch.tensor(0))
    given = {key: value.shape for key, value in weights.items()}
    if given != wanted:
        odd = sorted(key for key in given.keys() | wanted.keys() if given.get(key) != wanted.get(key))
        raise UserError(
            f"'{path}' does not contain the 2015 Inception network: {len(odd)} keys are missing, too many or of "
            f"another shape, first '{odd[0]}'; torchvision's Inception is another network.",
            key=str(path),
            code="mismatch",
        )


# ---- TorchScript's names: those of the TensorFlow graph -----------------------------------------------------

STEM = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"]
MIXED = ["5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"]
TOWERS = {
    "5": {"branch1x1": "", "branch5x5": "tower.", "branch3x3dbl": "tower_1.", "branch_pool": "tower_2."},
    "6a": {"branch3x3": "", "branch3x3dbl": "tower."},
    "6": {"branch1x1": "", "branch7x7": "tower.", "branch7x7dbl": "tower_1.", "branch_pool": "tower_2."},
    "7a": {"branch3x3": "tower.", "branch7x7x3": "tower_1."},
    "7": {"branch1x1": "", "branch3x3": "tower_", "branch3x3dbl": "tower_1_", "branch_pool": "tower_2_"},
}
"""For each block, or group of blocks, where the graph keeps each branch."""
FORKS = {"a": "mixed_conv", "b": "mixed_conv_1"}
PARTS = {"conv.weight": "weight", "bn.bias": "beta", "bn.running_mean": "mean", "bn.running_var": "var"}


def _numbered(name: str, position: int) -> str:
    return name if position == 0 else f"{name}_{position}"


def torchscript_name(convolution: str) -> str:
    """The graph's name of one of our convolutions: 'Mixed_5b.branch5x5_2' -> 'layers.mixed.tower.conv_1'."""
    if convolution in STEM:
        return "layers." + _numbered("conv", STEM.index(convolution))
    block, branch = convolution.removeprefix("Mixed_").split(".")
    match = re.fullmatch(r"(branch\w+?)(?:_(\d)([ab]?))?", branch)
    assert match is not None, branch
    towers = TOWERS.get(block) or TOWERS[block[0]]
    leaf = FORKS[match[3]] if match[3] else _numbered("conv", int(match[2] or 1) - 1)
    return f"layers.{_numbered('mixed', MIXED.index(block))}.{towers[match[1]]}{leaf}"


def from_torchscript(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """The TorchScript file's tensors under pytorch-fid's keys. Its batch norms have no scale: ones."""
    rest = dict(raw)
    weights = {"fc.weight": rest.pop("output.weight"), "fc.bias": rest.pop("output.bias")}
    with torch.device("meta"):
        keys = InceptionNetwork().state_dict().keys()
    for convolution in dict.fromkeys(key.rsplit(".", 2)[0] for key in keys if key.startswith(("Conv", "Mixed"))):
        name = torchscript_name(convolution)
        for part, theirs in PARTS.items():
            if f"{name}.{theirs}" in rest:
                weights[f"{convolution}.{part}"] = rest.pop(f"{name}.{theirs}")
        if f"{convolution}.bn.bias" in weights:
            weights[f"{convolution}.bn.weight"] = torch.ones_like(weights[f"{convolution}.bn.bias"])
    return weights | rest
