"""What a model is conditioned on, besides the noisy image and the time, in named slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from carrara.devices import to_device
from carrara.errors import UserError


class Site(NamedTuple):
    """Where in a network an attention takes place.

    Attributes:
        name: of the layer, "down.1.0.cross".
        kind: what the queries attend to: the positions of their own map, the context, or the same position at other
            times.
        size: of the map that the queries come from, (H, W) for images.
        branches: how many conditions share the batch, see `Condition.branches`.
    """

    name: str
    kind: Literal["self", "cross", "temporal"]
    size: tuple[int, ...]
    branches: int


Attend = Callable[[Site, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""The attention seam, `attend(site, q, k, v, mask) -> out`: called by every attention layer instead of fused attention.

q is [B, heads, L, d], k and v are [B, heads, M, d], the mask is bool [B, M], True where k and v may be attended to
(None: everywhere), and the result is [B, heads, L, d]: softmax(QKᵀ/√d)·V with -∞ where the mask is False."""


@dataclass(frozen=True)
class Condition:
    """What the model is conditioned on. Every slot is optional; nothing is guessed from a tensor's rank.

    Attributes:
        label: int64 [B], class indices in 0..classes-1; `classes` itself is the null label of a model that
            was trained with label dropout.
        vector: float [B, D], one vector for each sample (an image embedding, a style).
        context: float [B, L, D], tokens for cross-attention.
        context_mask: bool [B, L], True where a token may be attended to; None means everywhere.
        tokens: int64 [B, L], ids of a prompt's tokens for a network with a text encoder of its own.
        token_weights: float [B, L], the emphasis of each token's hidden state; None means 1 everywhere.
        concat: float [B, C', H, W], concatenated with x along the channels (low-resolution image, mask).
        negative: the slots that take the place of a text's null form: what guidance moves away from, of as many rows.
        target: int64 [B], the class that classifier guidance moves toward; no network reads it.
        attend: the attention seam (see `Attend`); None lets every layer use fused attention.
        branches: how many conditions of equally many rows lie one after the other along the batch (set by `join`): with
            classifier-free guidance 2, of which the unconditional one is the last.
    """

    label: Tensor | None = None
    vector: Tensor | None = None
    context: Tensor | None = None
    context_mask: Tensor | None = None
    tokens: Tensor | None = None
    token_weights: Tensor | None = None
    concat: Tensor | None = None
    negative: Condition | None = None
    target: Tensor | None = None
    attend: Attend | None = None
    branches: int = 1

    def tensors(self) -> dict[str, Tensor]:
        """The tensor slots that are filled, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """The same condition with `function` applied to every filled tensor slot."""
        changed: dict[str, Any] = {name: function(value) for name, value in self.tensors().items()}
        if self.negative is not None:
            changed["negative"] = self.negative.map(function)
        return self._filled(changed)

    def _filled(self, slots: dict[str, Any]) -> Condition:
        return replace(self, **slots)

    def to(self, device: torch.device | str) -> Condition:
        """The same condition on another device."""
        return self.map(lambda value: to_device(value, device))

    def rows(self, index: Tensor | slice) -> Condition:
        """The condition of some of the samples (as a batch of one branch)."""
        return replace(self.map(lambda value: value[index]), branches=1)

    def batch(self, size: int) -> Condition:
        """The condition for a batch of `size`; slots of one row are repeated, others must fit.

        Raises:
            UserError: a slot holds neither one row nor `size` rows.
        """
        for name, value in self.tensors().items():
            if value.shape[0] not in (1, size):
                raise UserError(
                    f"the condition's {name} has {value.shape[0]} rows for a batch of {size}: "
                    "give one row or one for each sample.",
                    key=name,
                    code="shape",
                )
        if self.negative is not None:
            self.negative.batch(size)
        return self.map(lambda v: v if v.shape[0] == size else v.expand(size, *v.shape[1:]))

    def merge(self, other: Condition) -> Condition:
        """This condition with the filled slots of another added.

        Raises:
            UserError: both fill a slot.
        """
        both = sorted(self.tensors().keys() & other.tensors().keys())
        if both:
            raise UserError(
                f"two conditions fill the slot {both[0]}: each needs a slot of its own.", key=both[0], code="conflict"
            )
        others = {"attend": other.attend, "negative": other.negative}
        return self._filled({**other.tensors(), **{name: value for name, value in others.items() if value is not None}})

    def mix(self, keep: Tensor, null: Condition) -> Condition:
        """Per sample: this condition where `keep` (bool [B]) is True, `null` elsewhere.

        This is the condition dropout of classifier-free guidance (Ho & Salimans 2022): each sample is
        dropped on its own, never a whole batch.
        """
        size = keep.shape[0]
        other = null.batch(size).tensors()
        own = self.batch(size).tensors()
        if own.keys() != other.keys():
            raise UserError(
                f"the null condition fills {sorted(other)} where the condition fills {sorted(own)}.",
                key="null",
                code="mismatch",
            )

        def choose(name: str, value: Tensor) -> Tensor:
            if other[name] is value:
                return value
            mask = to_device(keep, value.device).reshape(-1, *[1] * (value.ndim - 1))
            return torch.where(mask, value, other[name].to(value))

        return self._filled({name: choose(name, value) for name, value in own.items()})

    @staticmethod
    def join(conditions: Sequence[Condition]) -> Condition:
        """Several conditions one after the other along the batch (they must fill the same slots).

        The attention seam is kept where all share one; a batch cannot have two.

        Raises:
            UserError: the conditions fill different slots, or hold different attention seams.
        """
        first = conditions[0]
        slots = first.tensors().keys()
        for other in conditions[1:]:
            if other.tensors().keys() != slots:
                raise UserError(
                    f"conditions that fill {sorted(slots)} and {sorted(other.tensors())} cannot share a batch.",
                    key="condition",
                    code="mismatch",
                )
            if other.attend is not first.attend:
                raise UserError(
                    "conditions with different attention seams cannot share a batch.", key="attend", code="mismatch"
                )
        joined: dict[str, Any] = {name: torch.cat([c.tensors()[name] for c in conditions]) for name in slots}
        return replace(first, **joined, negative=None, branches=first.branches * len(conditions))
