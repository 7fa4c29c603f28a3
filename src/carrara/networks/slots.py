"""How networks read the slots of a `Condition`: one place for every backbone.

label and vector are embedded and added to the embedding of the time; concat is concatenated with x along the channels;
context is what cross-attention attends to. A class can be the context instead (`label_tokens`), or a text that the
network encodes itself (`vocabulary`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara.condition import Condition
from carrara.errors import UserError
from carrara.networks.network import Network
from carrara.networks.params import Params
from carrara.networks.text import TextTransformer


@dataclass(frozen=True, kw_only=True)
class InputParams(Params):
    """What every network's params have.

    Attributes:
        image_size: (H, W) the network is trained for; (L,) and (D, H, W) make it one- and three-dimensional.
        in_channels: channels of x.
        context_channels: width of `Condition.context`, 0 for none.
    """

    image_size: tuple[int, ...] = (32, 32)
    in_channels: int = 3
    context_channels: int = 0

    def _check(self) -> None:
        super()._check()
        self._at_least(1, "in_channels")
        self._at_least(0, "context_channels")
        sentence = f"{self.image_size} must have one, two or three entries."
        self._require(1 <= self.dims <= 3, "image_size", sentence, "shape")

    def _only_images(self, name: str, what: str) -> None:
        """Raises UserError, with the field's name as its key, unless the network has two dimensions."""
        sentence = f"{what} images, but network.image_size is {self.image_size}."
        self._require(self.dims == 2, name, sentence, "unsupported")

    @property
    def dims(self) -> int:
        """Dimensions of the signal: 2 for images."""
        return len(self.image_size)


@dataclass(frozen=True, kw_only=True)
class ConditionedParams(InputParams):
    """What a backbone is conditioned on, and how many channels it predicts.

    Attributes:
        out_channels: channels of one prediction; None: as many as `in_channels`.
        learned_variance: the output holds `out_channels` twice: prediction, then raw variance fraction.
        num_classes: the network is conditioned on a class, by an embedding of that many rows.
        label_tokens: 0 adds the class to the embedding of the time; n makes it the context instead, n tokens of
            `context_channels` (latent diffusion's class-conditional models have one).
        null_label: one row more, for "no class": the label `num_classes` (classifier-free guidance).
        vocabulary: how many ids `Condition.tokens` may hold, which a text encoder of the network's own turns into the
            context; 0: none.
        text_layers: transformer blocks of that encoder, `context_channels` wide.
        vector_channels: width of `Condition.vector`, mapped onto the embedding.
        vector_layers: 1 is a linear map; 2 has a hidden layer with SiLU (Stable Diffusion's image embeddings).
        concat_channels: channels of `Condition.concat`, after those of x.
        upsample_concat: `Condition.concat` is smaller than x and is up-sampled bilinearly (super-resolution).
    """

    out_channels: int | None = None
    learned_variance: bool = False
    num_classes: int | None = None
    label_tokens: int = 0
    null_label: bool = False
    vocabulary: int = 0
    text_layers: int = 2
    vector_channels: int = 0
    vector_layers: int = 1
    concat_channels: int = 0
    upsample_concat: bool = False

    def _check(self) -> None:
        super()._check()
        self._at_least(1, "out_channels", "num_classes")
        self._at_least(0, "label_tokens", "vocabulary", "text_layers", "vector_channels", "concat_channels")
        layers = self.vector_layers
        self._require(layers in (1, 2), "vector_layers", f"is {layers}: 1 and 2 are possible.")
        self._needs("null_label", "num_classes")
        self._needs("label_tokens", "num_classes", "context_channels")
        self._needs("vocabulary", "context_channels")
        if self.vocabulary and self.label_tokens:
            raise UserError(
                "a class and a text cannot both be the context: leave out network.label_tokens.",
                key="network.label_tokens",
                code="conflict",
            )
        self._needs("upsample_concat", "concat_channels")
        if self.upsample_concat:
            self._only_images("upsample_concat", "is for")

    @property
    def prediction_channels(self) -> int:
        """Channels of one prediction."""
        return self.out_channels or self.in_channels

    @property
    def raw_channels(self) -> int:
        """Channels of the output."""
        return self.prediction_channels * (2 if self.learned_variance else 1)

    @property
    def labels(self) -> int:
        """Rows of the label embedding, the null label's included; 0 for a network without classes."""
        return 0 if self.num_classes is None else self.num_classes + self.null_label


class ConditionedNetwork(Network):
    """A network with `ConditionedParams`: a subclass calls `add_slots` once, and `read` in each forward pass.

    The maps are its own attributes `label`, `text` and `vector`, so that checkpoints hold `label.weight`.
    """

    params: ConditionedParams
    label: nn.Embedding | None
    text: TextTransformer | None
    vector: nn.Linear | nn.Sequential | None

    def add_slots(self, width: int) -> None:
        """Make the embeddings of label and vector, and the text encoder.

        Args:
            width: of the embedding that they are added to.
        """
        p = self.params
        self.label = nn.Embedding(p.labels, p.label_tokens * p.context_channels or width) if p.labels else None
        self.text = None
        if p.vocabulary:
            self.text = TextTransformer(p.vocabulary, p.context_channels, p.text_layers)
        self.vector = _vector_map(p.vector_channels, width, p.vector_layers) if p.vector_channels else None

    @property
    def takes(self) -> dict[str, int]:
        p = self.params
        context = 0 if p.label_tokens or p.vocabulary else p.context_channels
        slots = {"label": p.labels, "vector": p.vector_channels, "concat": p.concat_channels, "context": context}
        return slots | ({"tokens": p.vocabulary} if p.vocabulary else {})

    @property
    def learned_variance(self) -> bool:
        return self.params.learned_variance

    @property
    def null_label(self) -> int:
        """The label that means "no class".

        Raises:
            UserError: the network was made without one.
        """
        if self.params.num_classes is None or not self.params.null_label:
            raise UserError(
                "this network has no null label: train it with label dropout (network.null_label).",
                key="network.null_label",
                code="unsupported",
            )
        return self.params.num_classes

    def read(self, x: Tensor, condition: Condition | None) -> tuple[Tensor, Condition]:
        """The network's input with the condition's concat, and the condition for its batch.

        Args:
            x: [B, C, *S].
            condition: of one row or of B; None is the empty one.

        Returns:
            x, [B, C + concat_channels, *S]; the condition, whose context is the label's tokens where the params
            have `label_tokens`, and the encoded text where they have a `vocabulary`.

        Raises:
            UserError: a slot is missing, has no use, or does not fit.
        """
        p = self.params
        condition = (condition or Condition()).batch(len(x))
        takes = self.takes
        if p.vocabulary and condition.context is not None:  # a text that was encoded before
            takes = {**takes, "tokens": 0, "context": p.context_channels}
        check_slots(condition, takes)
        if p.num_classes is not None and condition.label is not None:
            check_labels(condition.label, p.num_classes, p.null_label)
        if p.label_tokens and self.label is not None:
            condition = replace(condition, context=self.label(condition.label).unflatten(1, (p.label_tokens, -1)))
        if self.text is not None and condition.tokens is not None:
            condition = replace(condition, context=self.text(condition.tokens, condition.token_weights))
        return self._concatenated(x, condition), condition

    def embed(self, time: Tensor, condition: Condition) -> Tensor:
        """The embedding of the time, [B, E], plus those of label and vector."""
        if self.label is not None and not self.params.label_tokens:
            time = time + self.label(condition.label)
        if self.vector is not None:
            time = time + self.vector(condition.vector)
        return time

    def _concatenated(self, x: Tensor, condition: Condition) -> Tensor:
        if condition.concat is None:
            return x
        concat = condition.concat.to(x.dtype)
        if self.params.upsample_concat:
            concat = F.interpolate(concat, x.shape[2:], mode="bilinear")
        elif concat.shape[2:] != x.shape[2:]:
            raise UserError(
                f"the condition's concat is of size {tuple(concat.shape[2:])}, x of {tuple(x.shape[2:])}.",
                key="concat",
                code="shape",
            )
        return torch.cat([x, concat], dim=1)


def _vector_map(channels: int, width: int, layers: int) -> nn.Linear | nn.Sequential:
    first = nn.Linear(channels, width)
    return first if layers == 1 else nn.Sequential(first, nn.SiLU(), nn.Linear(width, width))


def check_slots(condition: Condition, takes: Mapping[str, int]) -> None:
    """Raises UserError unless a condition fills just the slots that a network takes: nothing is silently ignored.

    Args:
        condition: what the network is about to read.
        takes: the network's slots and their widths; 0 and absent are "no".
    """
    filled = condition.tensors()
    mask = filled.pop("context_mask", None)
    if "tokens" in filled:
        filled.pop("token_weights", None)
    for slot in filled:
        if not takes.get(slot):
            raise UserError(
                f"this network takes no {slot}: leave that slot of the condition empty.", key=slot, code="unsupported"
            )
    for slot, width in takes.items():
        if width and slot not in filled:
            raise UserError(f"this network needs the condition's {slot}.", key=slot, code="missing")
        if slot in ("label", "tokens") or not width:
            continue
        shape = tuple(filled[slot].shape)
        if slot == "context" and len(shape) != 3:
            raise UserError(
                f"the condition's context is of shape {shape}: it must be [B, L, D].", key=slot, code="shape"
            )
        channels = shape[-1 if slot == "context" else 1]
        if channels != width:
            raise UserError(
                f"the condition's {slot} has {channels} channels: the network takes {width}.", key=slot, code="shape"
            )
    if mask is not None and ("context" not in filled or mask.shape != filled["context"].shape[:2]):
        raise UserError(
            f"the condition's context_mask of shape {tuple(mask.shape)} fits no context: it must be [B, L].",
            key="context_mask",
            code="shape",
        )
    if mask is not None and mask.dtype != torch.bool:
        raise UserError(
            f"the condition's context_mask holds {mask.dtype}: True and False are expected.", key="context_mask"
        )


def check_labels(label: Tensor, num_classes: int, null_label: bool = False) -> None:
    """Raises UserError unless every label is one of the classes, or `num_classes` where there is a null label.

    Reading values would stall an accelerator: there, and in compiled code, the lookup itself must fail.
    """
    if label.device.type != "cpu" or torch.compiler.is_compiling() or not label.numel():
        return
    wrong = label[(label < 0) | (label >= num_classes + null_label)]
    if wrong.numel():
        null = f", or {num_classes} for no class" if null_label else " (without a null label)"
        raise UserError(
            f"label {int(wrong[0])} is out of range: this network knows 0..{num_classes - 1}{null}.", key="label"
        )
