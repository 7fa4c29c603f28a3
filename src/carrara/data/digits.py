"""The 1,797 scanned digits that come with scikit-learn: real handwriting without a download."""

from __future__ import annotations

import numpy as np

from carrara.data.arrays import ArrayPictures
from carrara.data.source import Source
from carrara.errors import UserError, nearest

SPLITS = ("train", "test")


def open_digits(split: str) -> Source:
    """The digits, 8×8 with 17 gray levels stored as 0..16, labels 0..9.

    The split is scikit-learn's `train_test_split(test_size=360, random_state=0, stratify=labels)`: 1,437 to
    train on, 360 held out.

    Raises:
        UserError: an unknown split.
    """
    if split not in SPLITS:
        raise UserError(
            f"the digits have no split '{split}': {nearest(split, SPLITS)}", key="data.split", code="unknown"
        )
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans, labels = load_digits(return_X_y=True)
    parts = train_test_split(scans, labels, test_size=360, random_state=0, stratify=labels)
    held_out = split == "test"
    pictures = parts[held_out].reshape(-1, 8, 8).astype(np.uint8)
    return Source(
        name="digits",
        layout=f"scikit-learn's scanned digits, split '{split}': {len(pictures)} images of 8×8, 17 gray levels",
        pictures=ArrayPictures(pictures[..., None], f"digits/{split}"),
        labels=parts[2 + held_out].astype(np.int64),
        class_names=tuple(str(digit) for digit in range(10)),
        levels=17,
    )
