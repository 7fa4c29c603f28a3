"""How likely real pictures are to a model: their bits per dimension, in parts, and their likelihood by the flow."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.conditioning import NullForm
from carrara.distributed import in_turn, run_on_rank0
from carrara.evaluation.bootstrap import mean_interval
from carrara.evaluation.bound import Bound, bits_per_dimension
from carrara.evaluation.likelihood import Likelihood, flow_likelihood
from carrara.evaluation.pictures import Pictures, refuse_other_shape
from carrara.evaluation.stamp import Measurement, Measurements, Stamp
from carrara.images import to_uint8
from carrara.model import DiffusionModel
from carrara.process import Noise
from carrara.process.transitions import ReverseVariance

PARTS = {
    "bits_per_dimension": lambda bound: bound.total,
    "bits_prior": lambda bound: bound.prior,
    "bits_matching": lambda bound: bound.terms[:, :-1].sum(1),
    "bits_reconstruction": lambda bound: bound.terms[:, -1],
}
"""The bound and what it is the sum of."""


def measure_held_out(
    model: DiffusionModel,
    pictures: Pictures,
    *,
    variance: ReverseVariance | None = None,
    steps: int = 50,
    probes: int = 4,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Measurements:
    """The variational bound over every level, its parts, and the flow's likelihood, in bits per dimension.

    Processes take the batches in turn; picture k has row k of the seed. The intervals are over the pictures. A model
    of classes is conditioned on each picture's own, or on its null form where the pictures have none.

    Args:
        pictures: ones the model never saw, with exactly the levels it was trained on (`data_pictures(rounded=False)`).
        variance: of the bound's reverse steps; by default the learned one, else "small".
        steps, probes: of the flow, see `flow_likelihood`.
        progress: called after each batch with how many pictures it contains.

    Raises:
        UserError: pictures of another shape or other levels, classes the model does not know, a latent model.
    """
    condition, source = _condition(model, pictures)

    def work(rows: range) -> tuple[Bound, Likelihood, bytes]:
        images = pictures.make(rows)
        refuse_other_shape(pictures.name, images.shape[1:], "the model", model.shape)
        own, x = condition.rows(slice(rows.start, rows.stop)).to(model.device), images.to(model.device)
        alike: dict[str, Any] = {"condition": own, "batch_size": len(rows)}
        bound = bits_per_dimension(model, x, variance=variance, noise=Noise(seed).rows(rows), **alike)
        flow = flow_likelihood(model, x, steps=steps, probes=probes, noise=Noise(seed + 1).rows(rows), **alike)
        return bound, flow, hashlib.blake2b(to_uint8(images).numpy().tobytes(), digest_size=16).digest()

    parts = []
    for part in in_turn(pictures.parts, work):
        parts.append(part)
        if progress is not None:
            progress(len(part[0].prior))
    bounds, flows, digests = zip(*parts, strict=True)
    bound = _together(bounds)
    estimates = torch.cat([flow.estimates for flow in flows])
    stamp = Stamp(
        n=pictures.count,
        shape=tuple(model.shape),
        dtype=f"{model.levels} levels",
        resize=pictures.resize,
        reference=Path(pictures.name).name,
        reference_split=pictures.split,
        reference_hash=hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest(),
        sampling={"weights": model.origin, "condition": source, "seed": seed},
    )
    kind = variance or ("learned" if model.learned_variance else "small")
    return run_on_rank0(
        lambda: {
            **_bound_metrics(bound, stamp.with_settings(levels=len(bound.times), variance=kind, cdf="erf")),
            **_flow_metric(estimates, stamp.with_settings(steps=steps, trace="hutchinson", probes=probes)),
        }
    )


def _condition(model: DiffusionModel, pictures: Pictures) -> tuple[Condition, str]:
    """The condition of each picture, and where it comes from."""
    classes = model.class_labels
    if classes is None:
        return Condition(), "none"
    if pictures.labels is None:
        label = torch.zeros(pictures.count, dtype=torch.int64)
        return NullForm((classes,)).null(Condition(label=label)), "dropped label"
    return Condition(label=classes.indices(pictures.labels)), "own class"


def _together(bounds: tuple[Bound, ...]) -> Bound:
    def joined(name: str) -> Tensor:
        return torch.cat([getattr(bound, name) for bound in bounds])

    first = bounds[0]
    names = ("prior", "terms", "x0_errors", "eps_errors")
    return Bound(times=first.times, unit=first.unit, **{name: joined(name) for name in names})


def _bound_metrics(bound: Bound, stamp: Stamp) -> Measurements:
    figures: Measurements = {}
    for name, part in PARTS.items():
        values = part(bound).double()
        details: dict[str, Any] = bound.summary() if name == "bits_per_dimension" else {}
        figures[name] = Measurement(float(values.mean()), mean_interval(values), stamp, details=details)
    return figures


def _flow_metric(estimates: Tensor, stamp: Stamp) -> Measurements:
    """The likelihood by the flow, over images, with a note on what the trace's estimate adds to its interval."""
    values = estimates.double().mean(1)
    note = ""
    if estimates.shape[1] > 1:
        error = float((estimates.double().var(1) / estimates.shape[1]).mean().div(len(values)).sqrt())
        note = f"of the interval, the trace's estimate makes a standard error of {error:.2g}"
    about = stamp.with_settings(dequantisation="uniform")
    return {"flow_bits_per_dimension": Measurement(float(values.mean()), mean_interval(values), about, note)}
