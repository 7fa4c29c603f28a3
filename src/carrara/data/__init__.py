"""Data sets of any layout, as batches in an order that depends on the seed and the position alone."""

from carrara.data.batches import Batch, Batches
from carrara.data.layouts import open_source
from carrara.data.order import augmentation_draws, shuffled_index
from carrara.data.preprocess import Preprocess
from carrara.data.source import Example, Source

__all__ = [
    "Batch",
    "Batches",
    "Example",
    "Preprocess",
    "Source",
    "augmentation_draws",
    "open_source",
    "shuffled_index",
]
