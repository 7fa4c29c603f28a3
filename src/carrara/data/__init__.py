"""Data sets of any layout, as batches in an order that depends on the seed and the position alone."""

from carrara.data.batches import Batch, Batches, one_ahead
from carrara.data.buckets import AspectBuckets, aspect_buckets
from carrara.data.encode import Encoded, encode_latents
from carrara.data.latents import LatentBatch, LatentBatches, LatentSource, open_latents
from carrara.data.layouts import open_source
from carrara.data.order import ShuffledShards, augmentation_draws, shuffled_index
from carrara.data.preprocess import Preprocess
from carrara.data.source import Example, Source

__all__ = [
    "AspectBuckets",
    "Batch",
    "Batches",
    "Encoded",
    "Example",
    "LatentBatch",
    "LatentBatches",
    "LatentSource",
    "Preprocess",
    "ShuffledShards",
    "Source",
    "aspect_buckets",
    "augmentation_draws",
    "encode_latents",
    "one_ahead",
    "open_latents",
    "open_source",
    "shuffled_index",
]
