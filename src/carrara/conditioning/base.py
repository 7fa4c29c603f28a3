"""What a conditioner is: from a user's inputs (a class, a picture), or a data set's, to slots of a `Condition`."""

from __future__ import annotations

import math
import operator
import zlib
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, is_dataclass
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

from torch import Tensor

from carrara.condition import Condition
from carrara.errors import UserError, nearest, whole_number
from carrara.process.noise import Noise

DROPOUT = 2
"""The sub-draw of condition dropout; 0 and 1 are the objective's noise and time."""

_WHITE = 1.001
"""The largest value of an image, up to rounding."""
_STREAMS = 2**32
"""From this draw of a training position on, conditioners have streams of their own."""


@dataclass(frozen=True)
class Input:
    """One keyword of `sample` that a conditioner reads, described for whoever offers it to a user.

    Attributes:
        name: the keyword.
        type: of one value: a class by name or number, a text, an image float [C, H, W] in [-1, 1], or a number.
        about: one line of help.
        per_sample: one value for each sample; False: one for all.
        required: sampling needs it.
        choices: the names of the classes.
        low, high: the range of a number.
        shape: of an image, where it is fixed.
        flags: its spellings on the command line; default: the name, "--noise-level".
    """

    name: str
    type: Literal["class", "text", "image", "number"]
    about: str
    per_sample: bool = True
    required: bool = True
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    shape: tuple[int, ...] | None = None
    flags: tuple[str, ...] = ()

    def check(self, value: Any) -> None:
        """Raises UserError, whose key is the name, unless a value fits: one, or a list or tensor of one per sample."""
        if value is None:
            if self.required:
                raise UserError(f"this model needs {self.name}: {self.about}.", key=self.name, code="missing")
            return
        if self.type == "image":
            self._check_images(value)
            return
        single = isinstance(value, str) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0
        if single and self.per_sample and self.type != "text":
            raise UserError(f"{self.name} is {value!r}: give a list, one entry for each picture.", key=self.name)
        for entry in [value] if single else value.tolist() if isinstance(value, Tensor) else value:
            self._check_one(entry)

    def _check_one(self, value: Any) -> None:
        if self.type == "class":
            class_number(value, self.choices, self.name)
        elif self.type == "text":
            if not isinstance(value, str):
                raise UserError(f"{self.name} has {value!r}: it must be a text.", key=self.name)
        elif isinstance(value, bool | str) or not isinstance(value, Real | Tensor) or not math.isfinite(value):
            raise UserError(f"{self.name} is {value!r}: it must be a number.", key=self.name)
        else:
            low = -math.inf if self.low is None else self.low
            high = math.inf if self.high is None else self.high
            if not low <= float(value) <= high:
                raise UserError(f"{self.name} is {float(value):g}: it must be in {low:g}..{high:g}.", key=self.name)

    def _check_images(self, value: Any) -> None:
        if not isinstance(value, Tensor) or value.ndim != 4 or not value.is_floating_point():
            raise UserError(
                f"{self.name} must be a float tensor of images, [N, C, H, W] in [-1, 1].", key=self.name, code="shape"
            )
        if self.shape is not None and tuple(value.shape[1:]) != self.shape:
            expected, found = ("×".join(map(str, shape)) for shape in (self.shape, value.shape[1:]))
            raise UserError(f"{self.name} must be images of {expected}, not {found}.", key=self.name, code="shape")
        if not bool((value.abs() <= _WHITE).all()):
            raise UserError(
                f"{self.name} lies outside of [-1, 1]: carrara.images.from_uint8 makes such images, for example.",
                key=self.name,
            )


def class_number(label: int | str, names: Sequence[str], key: str = "labels") -> int:
    """The number of one class: a text is a class's name, or else its number; a number is its number.

    Raises:
        UserError: an unknown name, a number out of range, or anything else; `key` is the input's name.
    """
    if isinstance(label, str) and label in names:
        return list(names).index(label)
    if isinstance(label, str) and not (label.isascii() and label.removeprefix("-").isdigit()):
        raise UserError(f"the model knows no class '{label}': {nearest(label, names)}", key=key, code="unknown")
    try:
        number = int(label) if isinstance(label, str) else operator.index(label)
    except TypeError:
        raise UserError(f"the label {label!r} is neither a class's number nor its name.", key=key) from None
    if not 0 <= number < len(names):
        raise UserError(f"label {number} is out of range: the model knows the classes 0..{len(names) - 1}.", key=key)
    return number


@dataclass(frozen=True)
class TrainingInputs:
    """What a data set has for each sample of a batch.

    Attributes:
        images: float [B, C, H, W] in [-1, 1]; None where cached latents are read.
        labels: int64 [B], or None.
        captions: B texts, or None.
    """

    images: Tensor | None = None
    labels: Tensor | None = None
    captions: Sequence[str] | None = None


@dataclass(frozen=True)
class DataFacts:
    """What a conditioner can know of a data set before training.

    Attributes:
        name: of the data set, for sentences.
        shape: [C, H, W] of its images as they are trained on.
        class_names: its classes, or None.
        captions: a text for each image, or None.
    """

    name: str
    shape: tuple[int, ...]
    class_names: tuple[str, ...] | None = None
    captions: Sequence[str] | None = None


class Conditioner(Protocol):
    """One kind of input. Frozen data, or a module with weights of its own.

    Attributes:
        kind: the word that recipes and `config.json` name it by.
        dropout: the probability with which training replaces it by its null form, by its own draw; 0 means that it has
            none, and guidance does not move away from it.
        declared: what `encode` reads, as far as it is known without a model: the command line makes its options of it.
        inputs: the same, with a model's classes, ranges and sizes; `encode` gets values that fit them.
        slots: the slots of the condition that it fills, with their widths as the network has to be made for ("label":
            the number of classes).
    """

    kind: ClassVar[str]
    declared: ClassVar[tuple[Input, ...]]

    @property
    def dropout(self) -> float: ...

    @property
    def inputs(self) -> tuple[Input, ...]: ...

    @property
    def slots(self) -> Mapping[str, int]: ...

    def encode(self, inputs: Mapping[str, Any], noise: Noise) -> Condition:
        """The condition of B samples, for sampling.

        Args:
            inputs: values by name, those of other conditioners among them.
            noise: bound to the B samples; draw 0.

        Raises:
            UserError: inputs that do not go together; `key` is the name of one.
        """
        ...

    def examples(self, batch: TrainingInputs, noise: Noise) -> Condition:
        """The condition of a training batch, before any dropout.

        Args:
            noise: bound to the samples' positions in the run; see `stream`.
        """
        ...

    def null(self, condition: Condition) -> Condition:
        """The condition with this conditioner's slots in their null form, the others as they are."""
        ...

    def config(self) -> dict[str, Any]:
        """Plain data, without `kind`, that `from_config` makes it of again."""
        ...

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From what `config` gave.

        Raises:
            KeyError, TypeError, AttributeError: an entry is missing or wrong.
        """
        ...

    @classmethod
    def fit(cls, settings: Mapping[str, Any], data: DataFacts) -> Self:
        """For a data set, by a recipe's settings.

        Raises:
            UserError: a setting that is unknown, or data that lack what it needs.
        """
        ...


@runtime_checkable
class WithFiles(Protocol):
    """A conditioner that has more than plain data can hold: it is written to and read from a model's folder."""

    def save(self, folder: Path) -> None:
        """Write its files."""
        ...

    @classmethod
    def load(cls, config: Mapping[str, Any], folder: Path) -> Conditioner:
        """From what `config` gave and `save` wrote.

        Raises:
            UserError: a file is missing or damaged.
        """
        ...


KINDS: dict[str, type[Conditioner]] = {}
"""The conditioners that recipes and saved models may name."""
_SETTINGS: dict[type[Conditioner], type] = {}


def register(conditioner: type[Conditioner], settings: type | None = None) -> type[Conditioner]:
    """Add a kind of conditioner; returns it, so that it can be a decorator.

    Args:
        settings: a dataclass of what a recipe sets in addition to `dropout`; `fit` gets both. Its docstring describes
            the fields. Default: the conditioner itself, where it is a dataclass.

    Raises:
        UserError: its kind belongs to another class.
    """
    known = KINDS.setdefault(conditioner.kind, conditioner)
    if settings is not None:
        _SETTINGS[conditioner] = settings
    if known is not conditioner:
        raise UserError(
            f"a conditioner of kind '{conditioner.kind}' is registered already, {known.__module__}.{known.__name__}: "
            "choose another word.",
            key=conditioner.kind,
            code="conflict",
        )
    return conditioner


def settings_of(conditioner: type[Conditioner]) -> type | None:
    """The dataclass of what a recipe sets of a conditioner in addition to `dropout`, or None."""
    return _SETTINGS.get(conditioner, conditioner if is_dataclass(conditioner) else None)


def kind_of(kind: str) -> type[Conditioner]:
    """The class of a kind.

    Raises:
        UserError: there is none; the nearest kind is named.
    """
    if kind not in KINDS:
        raise UserError(f"there is no conditioner of kind '{kind}': {nearest(kind, KINDS)}", key=kind, code="unknown")
    return KINDS[kind]


def build(config: Mapping[str, Any], folder: Path = Path()) -> Conditioner:
    """A conditioner from `{"kind": …, **conditioner.config()}` and the folder that `save` wrote to.

    Raises:
        UserError: an unknown kind, or a file that is missing.
    """
    kind = kind_of(config["kind"])
    own = {key: value for key, value in config.items() if key != "kind"}
    if issubclass(kind, WithFiles):
        return kind.load(own, folder)
    return kind.from_config(own)


def stream(noise: Noise, kind: str) -> Noise:
    """The same samples' draws for one kind of conditioner, which no other draw shares."""
    return noise.at(noise.draw + _STREAMS + zlib.crc32(kind.encode()))


def count_samples(conditioners: Iterable[Conditioner], given: Mapping[str, Any], count: int | None) -> int:
    """How many samples some inputs are for.

    Args:
        given: values by name, with one row or entry for each sample unless an `Input` declares otherwise.
        count: the requested number, or None.

    Raises:
        UserError: their lengths differ; none at all.
    """
    single = {i.name for c in conditioners for i in c.inputs if not i.per_sample}
    rows = {name: _rows(value) for name, value in given.items() if name not in single}
    known = {name: length for name, length in rows.items() if length is not None}
    total = whole_number(next(iter(known.values()), 1) if count is None else count, "count")
    for name, length in known.items():
        if length != total:
            raise UserError(f"{name} has {length} rows for {total} samples: give one for each.", key=name, code="shape")
    if total < 1:
        raise UserError(f"{total} samples were requested: at least one is needed.", key="count")
    return total


def _rows(value: Any) -> int | None:
    """The number of rows or entries; None of a single value, which a conditioner refuses where it must."""
    if isinstance(value, Tensor):
        return len(value) if value.ndim else None
    return len(value) if isinstance(value, Sized) and not isinstance(value, str) else None


def encode(conditioners: Iterable[Conditioner], inputs: Mapping[str, Any], noise: Noise) -> Condition:
    """The condition of all conditioners together.

    Raises:
        UserError: an input that none of them reads, a missing one, or one that does not fit.
    """
    conditioners = tuple(conditioners)
    known = {i.name: i for c in conditioners for i in c.inputs}
    for name in inputs:
        if name not in known:
            takes = f"it takes {', '.join(sorted(known))}" if known else "it takes no inputs"
            raise UserError(
                f"this model is not conditioned on {name}: leave it out ({takes}).", key=name, code="unsupported"
            )
    for name, declared in known.items():
        declared.check(inputs.get(name))
    return _merged(c.encode(inputs, noise) for c in conditioners)


def examples(conditioners: Iterable[Conditioner], batch: TrainingInputs, noise: Noise) -> Condition:
    """The condition of a training batch, before any dropout."""
    return _merged(c.examples(batch, noise) for c in conditioners)


def drop(conditioners: Iterable[Conditioner], condition: Condition, noise: Noise, size: int) -> Condition:
    """A training batch's condition with each conditioner dropped for some samples, by its own draw (Ho & Salimans 2022,
    algorithm 1)."""
    for conditioner in conditioners:
        if conditioner.dropout > 0:
            keep = _dropout_draw(noise, conditioner.kind).uniform((size,), sub=DROPOUT) >= conditioner.dropout
            condition = condition.mix(keep, conditioner.null(condition))
    return condition


def _dropout_draw(noise: Noise, kind: str) -> Noise:
    """Labels are dropped by the step's first stream, as they were before there were others."""
    return noise if kind == "labels" else stream(noise, kind)


def check_dropout(dropout: float) -> None:
    """Raises UserError unless a dropout probability lies in 0..1, without 1."""
    if not 0 <= dropout < 1:
        raise UserError(f"the condition dropout lies in 0..1, {dropout:g} does not.", key="conditioning.dropout")


@dataclass(frozen=True)
class NullForm:
    """What classifier-free guidance moves away from: every conditioner that training dropped, in its null form.

    Raises:
        UserError: training dropped none.
    """

    conditioners: tuple[Conditioner, ...]

    def __post_init__(self) -> None:
        if not any(c.dropout > 0 for c in self.conditioners):
            raise UserError(
                "guidance moves away from a null condition, which this model was not trained with: sample with "
                "guidance 1, or train with conditioning.dropout=0.1.",
                key="guidance",
                code="unsupported",
            )

    def null(self, condition: Condition) -> Condition:
        """The null condition of these samples."""
        for conditioner in self.conditioners:
            if conditioner.dropout > 0:
                condition = conditioner.null(condition)
        return condition


def _merged(conditions: Iterable[Condition]) -> Condition:
    merged = Condition()
    for condition in conditions:
        merged = merged.merge(condition)
    return merged
