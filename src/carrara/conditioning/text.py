"""Texts as a condition: prompts in sampling, captions in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from carrara.condition import Condition
from carrara.conditioning.base import DataFacts, Input, TrainingInputs, check_dropout
from carrara.errors import UserError
from carrara.process.noise import Noise
from carrara.text import ENCODERS, Pretrained, Span, TextEncoder, Vocabulary, parse

LONGEST = 64
"""Ids of a prompt that are trained on at most, where the recipe does not say how many."""


@dataclass(frozen=True)
class TextSettings:
    """What a recipe chooses.

    Attributes:
        encoder: "trained" with the network, "minilm" (a package), or the folder of a frozen encoder.
        length: tokens of a prompt, those around it included; null: of a trained one as the captions need, at most 64.
        vocabulary: the trained encoder's number of words.
        layer: the frozen encoder's hidden states of which layer, counted from the last, 1; null: as of its family.
        final_norm: apply the encoder's last norm to a layer that is not the last; null: as of its family.
        mask: nothing attends to padding; null: as of its family.
        pooled: the pooled output is a part of the condition, too; null: as of its family.
    """

    encoder: str = Vocabulary.kind
    length: int | None = None
    vocabulary: int = 4096
    layer: int | None = None
    final_norm: bool | None = None
    mask: bool | None = None
    pooled: bool | None = None


@dataclass(frozen=True)
class Text:
    """The texts of a model.

    Attributes:
        encoder: from texts to slots of the condition.
        dropout: the probability with which training replaces a caption by the empty text.
        emphasis: prompts are read with the syntax of `carrara.text.prompts`; captions never are.
    """

    kind: ClassVar[str] = "text"
    declared: ClassVar[tuple[Input, ...]] = (
        Input("prompts", "text", "what every picture shows; an empty text is the null condition", flags=("--prompt",)),
        Input(
            "negative",
            "text",
            "what guidance moves away from, in place of the empty text; one, or one for each picture",
            per_sample=False,
            required=False,
        ),
    )
    encoder: TextEncoder
    dropout: float = 0.0
    emphasis: bool = True

    def __post_init__(self) -> None:
        check_dropout(self.dropout)

    @property
    def inputs(self) -> tuple[Input, ...]:
        return self.declared

    @property
    def slots(self) -> Mapping[str, int]:
        return self.encoder.slots

    def encode(self, inputs: Mapping[str, Any], noise: Noise) -> Condition:
        prompts = _texts(inputs["prompts"])
        prompts = prompts * len(noise.ids or (0,)) if len(prompts) == 1 else prompts
        negative = inputs.get("negative")
        if negative is None:
            return self._stack([self._spans(text) for text in prompts])
        others = _texts(negative)
        if len(others) not in (1, len(prompts)):
            raise UserError(
                f"negative has {len(others)} texts for {len(prompts)} prompts: give one, or one for each.",
                key="negative",
                code="shape",
            )
        both = self._stack([self._spans(text) for text in [*prompts, *others]])
        own = both.rows(slice(len(prompts)))
        return replaced(own, negative=both.rows(slice(len(prompts), None)).batch(len(prompts)))

    def examples(self, batch: TrainingInputs, noise: Noise) -> Condition:
        if batch.captions is None:
            raise UserError(
                "this model is trained on captions, which the data do not have.", key="data.path", code="missing"
            )
        return self._stack([[Span(caption)] for caption in batch.captions])

    def null(self, condition: Condition) -> Condition:
        own = self.encoder.encode([Span("")]) if condition.negative is None else condition.negative
        filled = condition.tensors()
        size = len(next(filled[slot] for slot in self.slots))
        like = {slot: filled[slot] for slot in ("context", "context_mask", "tokens", "token_weights") if slot in filled}
        slots: dict[str, Any] = {
            **{slot: _widened(own, slot, like[slot]) for slot in like},
            **({"vector": own.vector} if own.vector is not None else {}),
        }
        device = next(iter(filled.values())).device
        moved = {slot: value.to(device).expand(size, *value.shape[1:]) for slot, value in slots.items()}
        return replaced(condition, **moved)

    def config(self) -> dict[str, Any]:
        encoder = {"kind": self.encoder.kind, **self.encoder.config()}
        return {"encoder": encoder, "dropout": self.dropout, "emphasis": self.emphasis}

    def save(self, folder: Path) -> None:
        """Write the encoder's files."""
        self.encoder.save(folder)

    @classmethod
    def load(cls, config: Mapping[str, Any], folder: Path) -> Self:
        """From what `config` gave and `save` wrote."""
        own = dict(config["encoder"])
        return cls(ENCODERS[own.pop("kind")].load(own, folder), config["dropout"], config["emphasis"])

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        raise TypeError("a text conditioner is read from a folder: use load")

    @classmethod
    def fit(cls, settings: Mapping[str, Any], data: DataFacts) -> Self:
        if not data.captions:
            raise UserError(
                f"the recipe conditions on text, but {data.name} has no captions: put a .txt file next to each image, "
                "or a column of texts into its table.",
                key="conditioning.kind",
                code="mismatch",
            )
        chosen = TextSettings(**{key: value for key, value in settings.items() if key != "dropout"})
        encoder: TextEncoder
        if chosen.encoder == Vocabulary.kind:
            vocabulary = Vocabulary.train(data.captions, chosen.vocabulary, chosen.length or LONGEST)
            longest = max(len(vocabulary.tokenize(caption)) for caption in data.captions) + 2
            encoder = vocabulary.within(chosen.length or min(longest, LONGEST))
        else:
            reading = {name: getattr(chosen, name) for name in ("length", "layer", "final_norm", "mask", "pooled")}
            encoder = Pretrained.open(chosen.encoder, **reading)
        return cls(encoder, settings["dropout"])

    def _spans(self, text: str) -> list[Span]:
        return parse(text) if self.emphasis else [Span(text)]

    def _stack(self, prompts: Sequence[Sequence[Span]]) -> Condition:
        """The encoded prompts as rows of one condition; a shorter context is padded, and masked there."""
        rows = [self.encoder.encode(spans) for spans in prompts]
        slots: dict[str, Tensor] = {}
        contexts = [row.context for row in rows if row.context is not None]
        if contexts:
            longest = max(value.shape[1] for value in contexts)
            slots["context"] = torch.cat([F.pad(v, (0, 0, 0, longest - v.shape[1])) for v in contexts])
            if any(row.context_mask is not None for row in rows) or any(v.shape[1] < longest for v in contexts):
                slots["context_mask"] = torch.cat([_mask(row, longest) for row in rows])
        for slot in ("tokens", "vector"):
            values = [row.tensors()[slot] for row in rows if slot in row.tensors()]
            if values:
                slots[slot] = torch.cat(values)
        if any(row.token_weights is not None for row in rows):
            one = torch.ones(1, slots["tokens"].shape[1])
            slots["token_weights"] = torch.cat([one if r.token_weights is None else r.token_weights for r in rows])
        return Condition(**cast(dict[str, Any], slots))


def _mask(row: Condition, length: int) -> Tensor:
    """bool [1, length], False where a context is only padded."""
    assert row.context is not None
    own = torch.ones(row.context.shape[:2], dtype=torch.bool) if row.context_mask is None else row.context_mask
    return F.pad(own, (0, length - own.shape[1]))


def _widened(own: Condition, slot: str, like: Tensor) -> Tensor:
    """A slot of a null form, as long as that of the condition it replaces."""
    length = like.shape[1]
    if slot == "context_mask":
        return _mask(own, length)
    value = own.tensors().get(slot)
    if value is None:  # weights of tokens without emphasis
        return torch.ones(1, length)
    return F.pad(value, (0, 0, 0, length - value.shape[1])) if slot == "context" else value


def _texts(value: str | Sequence[str]) -> list[str]:
    """A list of texts; one text alone is a list of one."""
    return [value] if isinstance(value, str) else list(value)
