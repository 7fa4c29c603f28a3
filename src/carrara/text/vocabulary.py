"""A tokenizer trained on captions, for a text encoder that is trained together with the network.

Byte-pair encoding over lower-case words (Sennrich et al. 2016); bytes are the smallest pieces, so that every text can
be written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from carrara.condition import Condition
from carrara.errors import UserError
from carrara.text.chunks import Format, chunks
from carrara.text.prompts import Span

FILE = "tokenizer.json"
"""In a model's folder."""

PAD, START, END = 0, 1, 2
"""The ids around a prompt's own."""

_SPECIAL = ("<pad>", "<start>", "<end>")


class Vocabulary:
    """The words of a jointly trained text encoder: it fills the slot `tokens`, which the network embeds.

    Args:
        tokenizer: the JSON of a `tokenizers.Tokenizer`.
        length: ids of a prompt, those around it included. What is longer is cut.
    """

    kind: ClassVar[str] = "trained"

    def __init__(self, tokenizer: str, length: int) -> None:
        self._json = tokenizer
        self._tokenizer = _tokenizers().Tokenizer.from_str(tokenizer)
        self.length = length
        self.form = Format(length, (START,), (END,), PAD)
        if self.form.room < 1:
            raise UserError(f"{length} ids have no room for a prompt: give 3 or more.", key="conditioning.length")

    @property
    def slots(self) -> Mapping[str, int]:
        return {"tokens": len(self)}

    @property
    def about(self) -> str:
        return f"an encoder trained with the network, {len(self):,} words, prompts of {self.length} tokens"

    def __len__(self) -> int:
        """How many ids there are."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, spans: Sequence[Span]) -> Condition:
        first = chunks(spans, self.tokenize, self.form)[0]
        weights = torch.tensor([first.weights])
        return Condition(
            tokens=torch.tensor([first.ids]), token_weights=None if bool((weights == 1).all()) else weights
        )

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, none around them."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def within(self, length: int) -> Self:
        """The same vocabulary for prompts of this many ids."""
        return type(self)(self._json, length)

    def config(self) -> dict[str, Any]:
        return {"length": self.length, "hash": hashlib.sha256(self._json.encode()).hexdigest()[:12]}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(self._json, encoding="utf-8")

    @classmethod
    def load(cls, config: Mapping[str, Any], folder: Path) -> Self:
        path = folder / FILE
        try:
            text = path.read_text(encoding="utf-8")
            _tokenizers().Tokenizer.from_str(text)
        except FileNotFoundError:
            raise UserError(f"{path} is missing: copy the model again.", key=str(path), code="missing") from None
        except Exception as error:  # tokenizers raises Exception itself
            raise UserError(f"{path} cannot be read: {error}.", key=str(path), code="damaged") from None
        return cls(text, config["length"])

    @classmethod
    def train(cls, captions: Iterable[str], size: int, length: int) -> Self:
        """Words and pieces that are frequent in some captions; the same captions give the same vocabulary.

        Args:
            size: of the vocabulary, at most; at least 259: the bytes and the ids around a prompt.
            length: as in the class.

        Raises:
            UserError: a size below 259.
        """
        if size < 256 + len(_SPECIAL):
            raise UserError(f"a vocabulary has {256 + len(_SPECIAL)} entries at least.", key="conditioning.vocabulary")
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(_SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(captions, trainer)
        return cls(tokenizer.to_str(), length)


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            "text conditions need the package tokenizers: pip install 'carrara[text]'.", key="encoder", code="missing"
        ) from None
    return tokenizers
