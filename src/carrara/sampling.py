"""Sampling as a plan: everything decided, nothing computed; and what it gives."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from carrara import images as pictures
from carrara.condition import Condition
from carrara.errors import UserError, whole_number
from carrara.modes import eval_mode
from carrara.networks.packed import packed_weights
from carrara.process import Denoiser, Grid, Guide, Noise, Prediction, Schedule
from carrara.process.schedules import Time
from carrara.solvers import SOLVERS, Solver, Step, integrate, resolve
from carrara.version import __version__

METADATA = 1
"""The version of samples' metadata; newer ones are refused."""

UNSTAMPED = ("carrara", "format", "first", "arguments", "needs")
"""The metadata that do not tell one way of sampling from another."""


@dataclass(frozen=True)
class Samples:
    """What sampling returns.

    Attributes:
        images: float32 [N, C, H, W] in [-1, 1].
        latents: what the codec decoded, [N, C', H', W']; for pixel models the images before clamping.
        labels: the class of every image, or None.
        metadata: how they were made; `replay` gives the arguments that make them again.
        texts: the inputs that are texts, one for each image.
    """

    images: Tensor
    latents: Tensor
    labels: list[int] | None
    metadata: dict[str, Any]
    texts: Mapping[str, list[str]] = field(default_factory=dict)

    def save(self, folder: str | Path, columns: int | None = None) -> None:
        """Write one PNG per image (its metadata and row inside), `grid.png`, and `samples.npz`
        (`arr_0` uint8 [N, H, W, C], `arr_1` labels)."""
        folder = Path(folder)
        first = int(self.metadata["first"])
        for row, image in enumerate(self.images):
            own = {**self.metadata, "row": first + row}
            if self.labels is not None:
                own["label"] = self.labels[row]
            if self.texts:
                own["texts"] = {name: values[row] for name, values in self.texts.items()}
            pictures.save_png(image, folder / f"seed{self.metadata['seed']}-{first + row:05d}.png", own)
        sheet = pictures.grid(self.images, columns)
        pictures.save_png(sheet, folder / "grid.png", self.metadata, scale=max(1, 64 // self.images.shape[-1]))
        pictures.save_npz(folder / "samples.npz", self.images, self.labels)


@dataclass(frozen=True)
class Plan:
    """A sampling run, ready to start. `with plan.running(): for step in plan.steps(): …`; cancelling is `break`.

    Attributes:
        denoiser: the network with all guides around it.
        schedule, solver, grid: what is integrated, by which method, at which times.
        condition: of all samples, N rows.
        noise: bound to the N samples.
        shape: of one latent, [C', H', W'].
        start: the noise to start from, [N, C', H', W']; None draws it.
        device: where the network is.
        modules: every network that is evaluated.
        metadata, texts: plain data, see `Samples`.
    """

    denoiser: Denoiser
    schedule: Schedule
    solver: Solver
    grid: Grid
    condition: Condition
    noise: Noise
    shape: tuple[int, ...]
    start: Tensor | None
    device: torch.device
    modules: tuple[nn.Module, ...]
    metadata: dict[str, Any]
    texts: Mapping[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.noise.ids or ())

    def parts(self, batch_size: int) -> Iterator[Plan]:
        """The plan in batches; each sample is the same in any of them, up to the rounding of batched sums.

        Raises:
            UserError: a batch size below 1.
        """
        batch_size = whole_number(batch_size, "batch_size", least=1)
        ids = self.noise.ids or ()
        for low in range(0, len(ids), batch_size):
            rows = slice(low, low + batch_size)
            yield replace(
                self,
                condition=self.condition.rows(rows),
                noise=self.noise.rows(ids[rows]),
                start=None if self.start is None else self.start[rows],
                metadata={**self.metadata, "first": ids[low]},
            )

    def initial(self) -> Tensor:
        """x at the grid's first time, float32 [N, C', H', W']: `start`, or pure noise σ(t)·ε."""
        if self.start is not None:
            return self.start.to(self.device, torch.float32)
        scale = float(self.schedule.sigma(self.grid.times[0]))
        return (scale * self.noise.normal((len(self), *self.shape))).to(self.device)

    def steps(self) -> Iterator[Step]:
        """The steps of the solver, one by one, the last at the clean end."""
        condition = self.condition.to(self.device)
        return integrate(self.denoiser, self.schedule, self.solver, self.grid, self.initial(), condition, self.noise)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Without gradients, with every network in evaluation mode, and with packed weights."""
        with torch.no_grad(), eval_mode(*self.modules), packed_weights():
            yield


def describe(
    solver: Solver, grid: Grid, word: str | Grid, scale: float, rescale: float, noise: Noise, inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """The metadata of a plan: what made the picture, in words, `arguments` for `sample`, and what these need besides.

    Args:
        word: what the grid was given as.
        noise: bound to the samples.
        inputs: what was given for the samples. Single numbers and texts are recorded as they are, all else but the
            labels by its fingerprint; a `condition.SLOT` needs the `condition`.
    """
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    single = {name: value for name, value in inputs.items() if isinstance(value, int | float | str)}
    others = {name: fingerprint(value) for name, value in inputs.items() if name not in single}
    options = {"guidance": scale, **({"rescale": rescale} if rescale else {}), **single}
    named = solver_word(solver)
    known = {"solver": named, "grid": word if isinstance(word, str) else None}
    arguments: dict[str, Any] = {"steps": len(grid), **(named or {}), "grid": known["grid"], **options}
    return {
        "carrara": __version__,
        "format": METADATA,
        "solver": repr(solver),
        "steps": len(grid),
        "grid": grid.name,
        **options,
        **others,
        "seed": noise.seed,
        "first": (noise.ids or (0,))[0],
        "arguments": {name: value for name, value in arguments.items() if value is not None},
        "needs": [
            *(name for name, value in known.items() if value is None),
            *dict.fromkeys(name.split(".")[0] for name in others),
        ],
    }


def solver_word(solver: Solver) -> dict[str, Any] | None:
    """The arguments `solver` (and `eta`) of `sample` that name a solver; None where no words do."""
    known = {word: make() for word, make in SOLVERS.items()}
    if word := next((word for word, own in known.items() if own == solver), None):
        return {"solver": word}
    eta = getattr(solver, "eta", None)
    with_eta = {word: own for word, own in known.items() if eta is not None and type(own) is type(solver)}
    word = next((word for word, own in with_eta.items() if resolve(own, eta) == solver), None)
    return None if word is None else {"solver": word, "eta": eta}


def replay(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `DiffusionModel.sample` that make the picture of some metadata again.

    Args:
        metadata: of a saved picture, with its `row`, `label` and `texts`.

    Raises:
        UserError: metadata of a newer version, or of a picture that needs more than they hold (a start, a
            low-resolution image, a classifier, one's own guides or solver); `key` is the first such input.
    """
    if not isinstance(metadata.get("arguments"), Mapping) or not isinstance(metadata.get("format"), int):
        raise UserError(
            "this picture's metadata do not hold the arguments that made it.", key="arguments", code="missing"
        )
    if metadata["format"] > METADATA:
        raise UserError(
            f"this picture's metadata were written by a newer Carrara (format {metadata['format']}): upgrade this one.",
            key="format",
            code="newer",
        )
    needs = list(metadata.get("needs", ()))
    if needs:
        raise UserError(
            f"this picture was made with its own {' and '.join(needs)}, which its metadata do not hold: give "
            f"{'it' if len(needs) == 1 else 'them'} again.",
            key=str(needs[0]),
            code="missing",
        )
    label = {"labels": [metadata["label"]]} if "label" in metadata else {}
    texts = {name: [text] for name, text in metadata.get("texts", {}).items()}
    return {**metadata["arguments"], "seed": metadata["seed"], "first": metadata["row"], "count": 1, **label, **texts}


def texts_of(inputs: Mapping[str, Any], count: int) -> dict[str, list[str]]:
    """The inputs that are texts or lists of them, one for each of `count` samples: one alone is every sample's."""
    lists = {name: [value] if isinstance(value, str) else value for name, value in inputs.items() if name != "labels"}
    texts = {
        name: list(values)
        for name, values in lists.items()
        if isinstance(values, list | tuple) and all(isinstance(text, str) for text in values)
    }
    return {name: values * count if len(values) == 1 else values for name, values in texts.items()}


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits of an input's SHA-256: of the float32 numbers of a tensor or array, else of the `repr`."""
    if isinstance(value, Tensor | np.ndarray):
        numbers = torch.as_tensor(value).detach().cpu().float().contiguous()
        data = numbers.numpy().tobytes()
    else:
        data = repr(value).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def checked(guide: Guide) -> Guide:
    """A user's guide whose answers are looked at.

    Raises:
        UserError: (when it is evaluated) the guide returns something else than a `Prediction`.
    """

    def wrap(denoiser: Denoiser) -> Denoiser:
        guided = guide(denoiser)

        def predict(x: Tensor, t: Time, condition: Condition) -> Prediction:
            prediction = guided(x, t, condition)
            if not isinstance(prediction, Prediction):
                raise UserError(
                    f"a guide returned {type(prediction).__name__}: a denoiser returns a Prediction.", key="guides"
                )
            return prediction

        return predict

    return wrap
