"""What turns prompts into slots of a condition: frozen encoders of `transformers`, or token ids for a trained one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from carrara.condition import Condition
from carrara.text.prompts import Span


class TextEncoder(Protocol):
    """An encoder of prompts.

    Attributes:
        kind: the word that recipes and `config.json` name it by.
        slots: the slots of the condition that it fills, with their widths.
        about: what it is, in words.
    """

    kind: ClassVar[str]

    @property
    def slots(self) -> Mapping[str, int]: ...

    @property
    def about(self) -> str: ...

    def encode(self, spans: Sequence[Span]) -> Condition:
        """One prompt, as slots of one row. It does not depend on other prompts."""
        ...

    def config(self) -> dict[str, Any]:
        """Plain data, without `kind`, that `load` makes it of again together with the files of `save`."""
        ...

    def save(self, folder: Path) -> None:
        """Write the files that `config` does not hold."""
        ...

    @classmethod
    def load(cls, config: Mapping[str, Any], folder: Path) -> Self:
        """From what `config` gave and `save` wrote.

        Raises:
            UserError: a file is missing, or is another than the model was trained with.
        """
        ...
