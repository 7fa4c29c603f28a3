"""What conversions are about: what lies at a path, what the user adds, and what came of it."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carrara import codecs
from carrara.classifier import Classifier
from carrara.codecs import Codec, Identity, LearnedCodec
from carrara.conditioning import ClassLabels
from carrara.errors import UserError
from carrara.files import write_whole
from carrara.interop.diffusers_folder import CONFIG, read_json
from carrara.interop.files import read_checkpoint
from carrara.interop.layout import strip_prefixes
from carrara.model import DiffusionModel
from carrara.networks import UNet
from carrara.process import Predicts, Schedule

Convertible = DiffusionModel | Classifier | LearnedCodec
"""What can be converted."""

INDEX = "model_index.json"
"""What a pipeline's folder of diffusers has in place of `config.json`."""
FILES = (".ckpt", ".pt", ".pth", ".safetensors")
"""The endings of the weight files that are written."""
DROPOUT = 0.1
"""The fraction of labels or captions that training dropped, in the published models: others record only that some
were."""


@dataclass(frozen=True)
class Contents:
    """What lies at a path: the tensors of a file, or a folder's config.

    Attributes:
        path: where it lies.
        tensors: of a file, by their keys there; none of a folder.
        config: of a folder, its `model_index.json` or `config.json`; none of a file.
        taken: of a file with several tables of weights, the key of the one in `tensors`.
        others: the keys of the other tables.
        mean: `tensors` are a running mean that has its own key.
    """

    path: Path
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    taken: str = ""
    others: tuple[str, ...] = ()
    mean: bool = False

    @classmethod
    def of(cls, path: str | Path, *, last: bool = False) -> Contents:
        """Read a weight file, or a folder's config.

        Args:
            path: the file or folder.
            last: of a file with several tables of weights take the last ones, not their running mean.

        Raises:
            UserError: there is nothing, or nothing that can be read.
        """
        path = Path(path)
        if not path.is_dir():
            read = read_checkpoint(path, last=last)
            tensors = strip_prefixes(read.tensors)
            return cls(path, tensors=tensors, taken=read.key, others=read.others, mean=read.mean)
        return cls(path, config=read_json(path / (INDEX if (path / INDEX).is_file() else CONFIG), "model"))


@dataclass(frozen=True)
class Hints:
    """What the user adds to a path, where its contents do not specify it.

    Attributes:
        name: a published model's.
        arguments: of the original's constructor.
        config: a YAML file of CompVis' programs, which contains such arguments.
        schedule, diffusion_steps, rescaled_time: the process that a model of guided-diffusion was trained for.
        last_weights: the last weights in place of their running mean.
    """

    name: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    config: Path | None = None
    schedule: str | None = None
    diffusion_steps: int | None = None
    rescaled_time: bool = False
    last_weights: bool = False


@dataclass(frozen=True)
class Imported:
    """A converted checkpoint.

    Attributes:
        model: a diffusion model, a classifier or a codec.
        report: plain data: what it was recognised as, the tensors that were mapped, the largest difference of the
            weights after going there and back (0), and a `fingerprint`.
    """

    model: Convertible
    report: dict[str, Any]

    def save(self, folder: str | Path) -> None:
        """Write the model's or codec's folder, whole or not at all."""
        with whole_folder(Path(folder)) as new:
            if isinstance(self.model, LearnedCodec):
                codecs.save(self.model, new)
            else:
                self.model.save(new)


def assembled(
    network: UNet,
    schedule: Schedule,
    predicts: Predicts,
    labels: ClassLabels | None,
    codec: LearnedCodec | None,
    size: tuple[int, ...],
    path: Path,
) -> DiffusionModel:
    """A diffusion model of the parts that were read.

    Args:
        network, schedule, predicts, labels: see `DiffusionModel`.
        codec: the first stage; None for a model of pixels.
        size: (H', W') of what the network works on.
        path: where the parts were read, for its origin and for sentences.

    Raises:
        UserError: the first stage's latents are of another number of channels.
    """
    channels, factor = network.params.in_channels, 1
    if codec is not None:
        if codec.params.latent_channels != channels:
            raise UserError(
                f"the U-Net in {path} works on {channels} channels, its first stage makes "
                f"{codec.params.latent_channels}: the two do not belong together.",
                key=str(path),
                code="mismatch",
            )
        channels, factor = codec.params.in_channels, codec.reduction
    shape = (channels, size[0] * factor, size[1] * factor)
    origin = f"{path.name}, imported"
    conditioners = () if labels is None else (labels,)
    inner: Codec = Identity() if codec is None else codec
    return DiffusionModel(
        network, schedule, shape, predicts=predicts, conditioners=conditioners, codec=inner, origin=origin
    )


def refuse_taken(folder: Path) -> None:
    """Raises UserError unless a folder is free to be written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: name another folder with --out.", key=str(folder), code="exists")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when everything is in it, and is gone where that fails.

    Raises:
        UserError: the name is taken, or cannot be.
    """
    refuse_taken(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    try:
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, folder)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{folder} could not be written ({reason}).", key=str(folder), code="resources") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


MARK = "written by carrara"
"""Stands in every config that is written with weights, so that a later export recognises its own files."""


def refuse_foreign(path: Path, config: Path) -> None:
    """Raises UserError unless weights and their config are free to be written, or from an earlier export.

    Args:
        path: the weight file.
        config: the file of the same stem that describes it; only what is written here has the mark.
    """
    if path.suffix not in FILES:
        raise UserError(
            f"{path} ends in neither {', '.join(FILES[:-1])} nor {FILES[-1]}: name the file that way.",
            key=str(path),
            code="unsupported",
        )
    ours = config.is_file() and MARK.encode() in config.read_bytes()[:200]
    for there in (config, path):
        if os.path.lexists(there) and not (ours and there.is_file()):
            raise UserError(
                f"{there} exists and was not written by `carrara export`: move it, or name another file with --out.",
                key=str(there),
                code="exists",
            )


def write_weights(path: Path, weights: Mapping[str, Tensor], *, nested: bool = False) -> None:
    """Write a weight file, whole or not at all.

    Args:
        path: `.safetensors`, or an ending of PyTorch's.
        weights: by key.
        nested: a PyTorch file has them under `state_dict`, as Lightning writes them.

    Raises:
        UserError: a full disk.
    """
    from safetensors.torch import save as to_bytes

    state = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    if path.suffix == ".safetensors":
        write_whole(path, to_bytes(state))
        return
    buffer = io.BytesIO()
    torch.save({"state_dict": state} if nested else state, buffer)
    write_whole(path, buffer.getvalue())


def latent_scale(codec: LearnedCodec) -> float | list[float]:
    """A codec's latent scale for a report, to the digits that float32 keeps: one number, or one for each channel."""
    scales = [float(f"{scale:.7g}") for scale in codec.latent_scale.tolist()]
    return scales if len(set(scales)) > 1 else scales[0]


def there_and_back(theirs: Mapping[str, Tensor], back: Mapping[str, Tensor]) -> dict[str, Any]:
    """The report on the weights: their number, and the largest difference after coming in and going out again.

    Args:
        theirs: every tensor that was read.
        back: at least those, written again.
    """
    return {
        "tensors": len(theirs),
        "parameters": sum(value.numel() for value in theirs.values()),
        "largest_difference_there_and_back": max(
            float((back[key] - value.float()).abs().max()) for key, value in theirs.items()
        ),
    }
