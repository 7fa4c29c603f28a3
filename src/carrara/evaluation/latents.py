"""The latents of a codec: how much of its codebook it uses, and how many bytes an image becomes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from carrara.codecs import LearnedCodec
from carrara.codecs.quantiser import Codes, perplexity
from carrara.distributed import in_turn
from carrara.evaluation.pictures import Pictures
from carrara.evaluation.stamp import Measurement, Measurements, Stamp
from carrara.modes import eval_mode

FLOAT_BYTES = 4
"""Of one number of a continuous latent, as it is decoded."""


def measure_latents(
    codec: LearnedCodec, originals: Pictures, stamp: Stamp, device: torch.device | str = "cpu"
) -> Measurements:
    """The size of the latents and, of a codec with a codebook, the use of its entries on these pictures.

    Args:
        originals: what is encoded.
        stamp: the protocol of the metrics.

    Returns:
        `latent_bytes` of one image: float32 numbers, or log2 K bits for the index at each position. With a codebook
        `codebook_use`, the fraction of its entries that any position of any picture chose, and `codebook_perplexity`,
        e^entropy of how often each was: K where all are chosen evenly.
    """
    usage = codec.code_usage
    if usage is None:
        size = math.prod(codec.latent_shape(stamp.shape)) * FLOAT_BYTES
        return {"latent_bytes": Measurement(float(size), None, stamp)}
    entries = len(usage.share)

    def count(rows: range) -> Tensor:
        with torch.no_grad(), eval_mode(codec):
            codes = codec.encode(originals.make(rows).to(device))
        assert isinstance(codes, Codes)  # what a codebook encodes to
        return torch.bincount(codes.indices.flatten().cpu(), minlength=entries)

    counts = torch.stack(list(in_turn(originals.parts, count))).sum(0)
    positions = int(counts.sum())
    note = f"of {entries:,} entries, on {positions:,} positions"
    return {
        "latent_bytes": Measurement(positions / stamp.n * math.log2(entries) / 8, None, stamp),
        "codebook_use": Measurement(float((counts > 0).double().mean()), None, stamp, note),
        "codebook_perplexity": Measurement(float(perplexity(counts.double())), None, stamp, note),
    }
