"""How well a model knows real pictures: their bits per dimension, in parts, and their likelihood by the flow."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.conditioning import NullForm
from carrara.distributed import first_tells, in_turn
from carrara.errors import UserError
from carrara.evaluation.bootstrap import mean_interval
from carrara.evaluation.bound import Bound, bits_per_dimension
from carrara.evaluation.likelihood import Likelihood, flow_likelihood
from carrara.evaluation.pictures import Pictures
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

    Batches go over the processes in turn; picture k has row k of the seed. The intervals are over the pictures. A
    model that is told classes is told each picture's own, or nothing where the pictures have none.

    Args:
        pictures: ones the model never saw, with exactly the levels it was trained on (`data_pictures(rounded=False)`).
        variance: of the bound's reverse steps; by default the learned one, else "small".
        steps, probes: of the flow, see `flow_likelihood`.
        progress: is told after each batch how many pictures it held.

    Raises:
        UserError: pictures of another shape or other levels, classes the model does not know, a latent model.
    """
    condition, told = _condition(model, pictures)

    def work(rows: range) -> tuple[Bound, Likelihood, bytes]:
        images = pictures.make(rows)
        _refuse_other_shape(pictures.name, tuple(images.shape[1:]), tuple(model.shape))
        own, x = condition.rows(slice(rows.start, rows.stop)).to(model.device), images.to(model.device)
        alike: dict[str, Any] = {"condition": own, "batch_size": len(rows)}
        bound = bits_per_dimension(model, x, variance=variance, noise=Noise(seed).rows(rows), **alike)
        flow = flow_likelihood(model, x, steps=steps, probes=probes, noise=Noise(seed + 1).rows(rows), **alike)
        return bound, flow, hashlib.blake2b(to_uint8(images).numpy().tobytes(), digest_size=16).digest()

    found = []
    for part in in_turn(pictures.parts, work):
        found.append(part)
        if progress is not None:
            progress(len(part[0].prior))
    bounds, flows, digests = zip(*found, strict=True)
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
        sampling={"weights": model.origin, "condition": told, "seed": seed},
    )
    kind = variance or ("learned" if model.learned_variance else "small")
    return first_tells(
        lambda: {
            **_bound_figures(bound, stamp.with_settings(levels=len(bound.times), variance=kind, cdf="erf")),
            **_flow_figure(estimates, stamp.with_settings(steps=steps, trace="hutchinson", probes=probes)),
        }
    )


def _refuse_other_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        ours, theirs = ("×".join(map(str, sides)) for sides in (shape, wanted))
        raise UserError(
            f"the held-out images {name} are {ours} (channels, height, width) and the model makes {theirs}: "
            "bring them to it with --resolution and --channels."
        )


def _condition(model: DiffusionModel, pictures: Pictures) -> tuple[Condition, str]:
    """What the model is told of each picture, and that in words."""
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


def _bound_figures(bound: Bound, stamp: Stamp) -> Measurements:
    figures: Measurements = {}
    for name, part in PARTS.items():
        values = part(bound).double()
        details: dict[str, Any] = bound.summary() if name == "bits_per_dimension" else {}
        figures[name] = Measurement(float(values.mean()), mean_interval(values), stamp, details=details)
    return figures


def _flow_figure(estimates: Tensor, stamp: Stamp) -> Measurements:
    """The likelihood by the flow, over images; what the trace's estimate adds is said."""
    values = estimates.double().mean(1)
    note = ""
    if estimates.shape[1] > 1:
        error = float((estimates.double().var(1) / estimates.shape[1]).mean().div(len(values)).sqrt())
        note = f"of the interval, the trace's estimate makes a standard error of {error:.2g}"
    about = stamp.with_settings(dequantisation="uniform")
    return {"flow_bits_per_dimension": Measurement(float(values.mean()), mean_interval(values), about, note)}
