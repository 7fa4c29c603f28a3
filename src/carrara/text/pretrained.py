"""Frozen text encoders of `transformers`, from a local folder: CLIP and OpenCLIP, T5, BERT and MiniLM.

They run in float32 on the processor, each distinct prompt once, alone: a prompt's encoding depends on nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from carrara.condition import Condition
from carrara.errors import UserError, nearest
from carrara.packages import locate
from carrara.text.chunks import Chunk, Format, chunks
from carrara.text.prompts import Span

WORDS = ("minilm",)
"""Encoders that install as packages, see `carrara.packages`."""

FILES = "text_encoder"
"""The sub-folder of a model with the encoder and its tokenizer."""

_CACHED = 512 * 2**20
"""Bytes of encodings that are kept."""


@dataclass(frozen=True)
class Reading:
    """What of an encoder is read; the defaults are those of its family.

    Attributes:
        length: tokens of a chunk, those around it included; longer prompts take several chunks.
        layer: the hidden states of which layer, counted from the last, 1 (clip skip 2 is the layer 2).
        final_norm: apply the encoder's last norm to a layer that is not the last.
        mask: neither the encoder nor the network attends to padding. Stable Diffusion was trained without.
        pooled: fill `Condition.vector` with the first chunk's pooled output.
        keep_mean: emphasis restores the mean of a chunk's hidden states, as AUTOMATIC1111's does.
    """

    length: int
    layer: int = 1
    final_norm: bool = True
    mask: bool = True
    pooled: bool = False
    keep_mean: bool = False


FAMILIES: dict[str, dict[str, Any]] = {
    "clip": {"mask": False, "keep_mean": True},
    "clip_text_model": {"mask": False, "keep_mean": True},
    "t5": {"length": 128},
    "bert": {"length": 64},
}
"""What is read of the known families where nothing else is chosen."""


class Pretrained:
    """A frozen encoder with its tokenizer.

    Args:
        model: of `transformers`, for text.
        tokenizer: its own.
        family: a word of `FAMILIES`.
        reading: what is read of it.
        package: the word of `WORDS` that it came from, or None: then `save` copies it.

    Raises:
        UserError: a tokenizer with more words than the encoder has embeddings, or a layer that it does not have.
    """

    kind: ClassVar[str] = "pretrained"

    def __init__(
        self, model: nn.Module, tokenizer: Any, family: str, reading: Reading, package: str | None = None
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.family, self.reading, self.package = family, reading, package
        config: Any = model.config
        self.width = int(config.hidden_size if family != "t5" else config.d_model)
        layers = int(config.num_hidden_layers)
        if len(tokenizer) > config.vocab_size:
            raise UserError(
                f"the tokenizer knows {len(tokenizer)} words, the text encoder {config.vocab_size}: they do not belong "
                "together.",
                key="encoder",
                code="mismatch",
            )
        if not 1 <= reading.layer <= layers:
            raise UserError(
                f"the text encoder has {layers} layers: there is no layer {reading.layer} from the end.",
                key="encoder.layer",
            )
        self.form = _format(tokenizer, reading.length)
        self._cache: dict[tuple[Span, ...], Condition] = {}
        self._bytes = 0

    @property
    def slots(self) -> Mapping[str, int]:
        return {"context": self.width, **({"vector": self._pooled_width()} if self.reading.pooled else {})}

    @property
    def about(self) -> str:
        name = self.package or self.family
        return f"frozen {name}, {self.width} wide, chunks of {self.reading.length} tokens"

    def _pooled_width(self) -> int:
        projection = getattr(self.model, "text_projection", None)
        return self.width if projection is None else int(projection.out_features)

    def encode(self, spans: Sequence[Span]) -> Condition:
        key = tuple(spans)
        if key not in self._cache:
            found = self._encode(key)
            size = sum(value.nbytes for value in found.tensors().values())
            if self._bytes + size > _CACHED:
                self._cache.clear()
                self._bytes = 0
            self._cache[key], self._bytes = found, self._bytes + size
        return self._cache[key]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _encode(self, spans: Sequence[Span]) -> Condition:
        parts = chunks(spans, self._tokenize, self.form)
        ids = torch.tensor([chunk.ids for chunk in parts])  # [n, L]
        mask = _used(parts) if self.reading.mask else None
        answer = self.model(input_ids=ids, attention_mask=None if mask is None else mask.long(), **self._options())
        hidden = self._hidden(answer)  # [n, L, D]
        hidden = emphasise(hidden, torch.tensor([chunk.weights for chunk in parts]), self.reading.keep_mean)
        return Condition(
            context=hidden.flatten(0, 1).unsqueeze(0),
            context_mask=None if mask is None else mask.flatten().unsqueeze(0),
            vector=_pooled(answer)[:1] if self.reading.pooled else None,
        )

    def _options(self) -> dict[str, bool]:
        return {"output_hidden_states": True} if self.reading.layer > 1 else {}

    def _hidden(self, answer: Any) -> Tensor:
        """The hidden states that are read, [n, L, D]."""
        if self.reading.layer == 1:
            return answer.last_hidden_state  # type: ignore[no-any-return]
        hidden: Tensor = answer.hidden_states[-self.reading.layer]
        norm = _final_norm(self.model)
        return norm(hidden) if self.reading.final_norm and norm is not None else hidden

    def _tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)

    @cached_property
    def hash(self) -> str:
        """12 hexadecimal digits of the SHA-256 over the weights, which are frozen, and the tokenizer's words."""
        digest = hashlib.sha256(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode())
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(name.removeprefix("text_model.").encode())
            digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:12]

    def config(self) -> dict[str, Any]:
        return {"package": self.package, "hash": self.hash, **asdict(self.reading)}

    def save(self, folder: Path) -> None:
        if self.package is None and not (folder / FILES / "config.json").is_file():
            self.model.save_pretrained(folder / FILES)  # type: ignore[operator]
            self.tokenizer.save_pretrained(folder / FILES)

    @classmethod
    def load(cls, config: Mapping[str, Any], folder: Path) -> Self:
        package, expected = config["package"], config["hash"]
        reading = {key: value for key, value in config.items() if key not in ("package", "hash")}
        encoder = cls.open(package or folder / FILES, **reading)
        if encoder.hash != expected:
            raise UserError(
                f"the text encoder {package or folder / FILES} ({encoder.hash}) is not the one that the model was "
                f"trained with ({expected}): install that one again.",
                key="encoder",
                code="mismatch",
            )
        return encoder

    @classmethod
    def open(cls, source: str | Path, tokenizer: str | Path | None = None, **reading: Any) -> Self:
        """The encoder of a folder, or of an installed package.

        Args:
            source: a word of `WORDS`, or a folder as `transformers` writes it.
            tokenizer: its folder, where it is another.
            reading: fields of `Reading`, in place of the family's.

        Raises:
            UserError: no such folder, a family that is not known, a file that is missing or damaged.
        """
        transformers = _transformers()
        package = str(source) if str(source) in WORDS else None
        folder = locate(package) if package else Path(source)
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{folder} holds no text encoder: give the folder of one, with its config.json, or one of "
                f"{', '.join(WORDS)}.",
                key="encoder",
                code="missing",
            )
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            family = config.model_type
            if family not in FAMILIES:
                raise UserError(
                    f"{folder} is of the family '{family}', which is no known text encoder: "
                    f"{nearest(family, FAMILIES)}",
                    key="encoder",
                    code="unsupported",
                )
            words = transformers.AutoTokenizer.from_pretrained(tokenizer or folder, local_files_only=True)
            model = _model_class(transformers, config).from_pretrained(
                folder, local_files_only=True, dtype=torch.float32
            )
        except UserError:
            raise
        except Exception as error:  # whatever transformers raises for a file that is missing or damaged
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"the text encoder of {folder} cannot be read: {first}", key=str(folder), code="damaged"
            ) from error
        chosen = FAMILIES[family] | {name: value for name, value in reading.items() if value is not None}
        longest = min(int(words.model_max_length), int(getattr(config, "max_position_embeddings", 2**31)))
        return cls(model, words, family, Reading(**{"length": longest, **chosen}), package)


def emphasise(hidden: Tensor, weights: Tensor, keep_mean: bool) -> Tensor:
    """Hidden states scaled by the weights of their tokens.

    Args:
        hidden: [n, L, D], the chunks of one prompt.
        weights: [n, L].
        keep_mean: scale each chunk afterwards so that its mean is as before. AUTOMATIC1111's mean is the whole
            batch's, which makes a picture depend on its neighbours.
    """
    if bool((weights == 1).all()):
        return hidden
    scaled = hidden * weights.unsqueeze(2)
    if keep_mean:
        scaled = scaled * (hidden.mean((1, 2), keepdim=True) / scaled.mean((1, 2), keepdim=True))
    return scaled


def _used(parts: Sequence[Chunk]) -> Tensor:
    """bool [n, L], True before the padding."""
    return torch.tensor([[place < chunk.used for place in range(len(chunk.ids))] for chunk in parts])


def _pooled(answer: Any) -> Tensor:
    projected = getattr(answer, "text_embeds", None)
    return answer.pooler_output if projected is None else projected  # type: ignore[no-any-return]


def _final_norm(model: nn.Module) -> nn.Module | None:
    """The norm after the last layer, where there is one."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    names = ("final_layer_norm", "text_model.final_layer_norm", "encoder.final_layer_norm")
    return next((modules[name] for name in names if name in modules), None)


def _format(tokenizer: Any, length: int) -> Format:
    """How a tokenizer frames a chunk, read off from what it does with a text."""
    alone = list(tokenizer("a", add_special_tokens=False).input_ids)
    framed = list(tokenizer("a").input_ids)
    start = next((place for place in range(len(framed)) if framed[place : place + len(alone)] == alone), len(framed))
    comma = list(tokenizer(",", add_special_tokens=False).input_ids)
    form = Format(
        length=length,
        prefix=tuple(framed[:start]),
        suffix=tuple(framed[start + len(alone) :]),
        pad=int(tokenizer.pad_token_id or 0),
        comma=comma[-1] if comma else None,
    )
    if form.room < 1:
        raise UserError(
            f"chunks of {length} tokens have no room for any of the prompt's: give a greater length.",
            key="encoder.length",
        )
    return form


def _model_class(transformers: Any, config: Any) -> Any:
    """The class that reads the text half of a checkpoint."""
    if config.model_type == "t5":
        return transformers.T5EncoderModel
    if config.model_type == "bert":
        return transformers.BertModel
    projected = "CLIPTextModelWithProjection" in (config.architectures or ())
    return transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError(
            "pretrained text encoders need transformers: pip install 'carrara[text]'.", key="encoder", code="missing"
        ) from None
    transformers.utils.logging.disable_progress_bar()
    return transformers
