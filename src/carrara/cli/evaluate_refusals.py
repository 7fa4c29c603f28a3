"""What `carrara evaluate` refuses before anything is read: words that contradict each other or would change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from carrara import weights
from carrara.errors import UserError, nearest

if TYPE_CHECKING:
    from carrara.cli.evaluate import Options
    from carrara.evaluation.pictures import Pictures

SAMPLING = {"classes", "steps", "solver", "guidance", "classifier", "eta", "spacing"}
MODEL = SAMPLING | {"classifier_scale", "seed", "batch_size"}
COMPARING = {"comparison", "varied", "json_output"}
CODEC = {
    "originals",
    "originals_split",
    "lpips",
    "lpips_checksum",
    "reference",
    "reference_split",
    "features",
    "checksum",
}
READING = {"resolution", "channels"}
ALWAYS = {"n", "out", "json_output", "device", "resize", *READING}
NEEDS = {
    "reference_split": {"reference"},
    "train": {"reference"},
    "train_split": {"train"},
    "judge": {"reference"},
    "per_class": {"reference"},
    "captions": {"reference"},
    "features": {"reference"},
    "checksum": {"features"},
    "classifier_scale": {"classifier"},
    "table": {"reference", "out"},
    "report": {"reference"},
    "tables": {"report"},
    "held_out_split": {"held_out"},
    "held_out_n": {"held_out"},
    "variance": {"held_out"},
    "originals_split": {"originals"},
    "lpips": {"originals"},
    "lpips_checksum": {"lpips"},
    "resize": {"resolution"},
    "varied": {"comparison"},
    **{word: {"reference"} for word in SAMPLING},
}
"""Words that mean nothing without others."""


def refuse(options: Options, given: set[str]) -> None:
    """Raises UserError for words that cannot be followed, or that would change nothing."""
    if options.comparison is not None:
        if given - COMPARING:
            raise UserError(f"--compare reads two finished results: leave {spelt(given - COMPARING)} out.")
        return
    if options.subject is None or not given & {"reference", "held_out", "originals"}:
        raise UserError(
            "give MODEL or SAMPLES and --reference DATA (or --held-out DATA, --originals DATA), "
            "or --compare A.json B.json."
        )
    for word in sorted(given & NEEDS.keys()):
        if missing := NEEDS[word] - given:
            raise UserError(f"{spelt({word})} belongs to {spelt(missing)}: give both, or leave it out.")
    _refuse_words(options)
    _refuse_subject(options, given)
    _refuse_statistics(options, given)
    if options.table is not None:
        _refuse_table(options, given)
    _refuse_device(options.device)


def spelt(names: set[str]) -> str:
    """The words as they are typed."""
    words = {"subject": "MODEL|SAMPLES", "json_output": "--json", "comparison": "--compare"}
    return ", ".join(sorted(words.get(name, f"--{name.replace('_', '-')}") for name in names))


def is_model(subject: str) -> bool:
    """Whether a path is a run folder or a model folder."""
    return weights.holds(subject)


def codec_folder(subject: str) -> Path | None:
    """The folder of a codec alone, which makes no pictures by itself; None for anything else."""
    folders = (Path(subject), Path(subject) / "model", Path(subject) / "codec")
    return next((folder for folder in folders if _holds_codec_only(folder)), None)


def _holds_codec_only(folder: Path) -> bool:
    return (folder / "codec.safetensors").is_file() and not (folder / "network.safetensors").is_file()


def lines_for(pictures: Pictures, path: Path) -> list[str]:
    """The captions in a file, one line for each picture.

    Raises:
        UserError: no such file, or another number of lines than of pictures.
    """
    if not path.is_file():
        raise UserError(f"there is no file '{path}' of captions.")
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) != pictures.count:
        raise UserError(
            f"'{path}' holds {len(lines):,} captions for {pictures.count:,} pictures of {pictures.name}: "
            "write one line for each, in their order."
        )
    return lines


def _refuse_words(options: Options) -> None:
    from typing import get_args

    from carrara.process.bound import ReverseVariance

    if options.judge not in (None, "svc") and not is_model(options.judge):
        raise UserError(f"there is no judge '{options.judge}': give svc, or the run folder of a trained classifier.")
    if options.classes not in (None, "turn", "reference"):
        raise UserError(f"there are no classes '{options.classes}': {nearest(options.classes, ('turn', 'reference'))}")
    kinds = get_args(ReverseVariance)
    if options.variance is not None and options.variance not in kinds:
        raise UserError(f"there is no variance '{options.variance}': {nearest(options.variance, kinds)}")
    if options.captions is not None and not options.features.startswith("clip="):
        raise UserError("--captions are compared by CLIP: give --features clip=FOLDER.")


def _refuse_subject(options: Options, given: set[str]) -> None:
    assert options.subject is not None
    if codec_folder(options.subject) is not None:
        if "originals" not in given or given - {"subject", *CODEC, *ALWAYS}:
            raise UserError(
                f"{options.subject} is a codec, which draws nothing by itself: give --originals DATA to take apart, "
                "and --reference DATA for the distance of what is left of them."
            )
        return
    if is_model(options.subject):
        if "split" in given:
            raise UserError(f"--split: only for finished samples, and {options.subject} is a model.")
        return
    if given & MODEL:
        raise UserError(f"{spelt(given & MODEL)}: only for models, and {options.subject} is no run or model folder.")
    if "held_out" in given:
        raise UserError(f"--held-out asks a model for bits, and {options.subject} is no run or model folder.")


def _refuse_statistics(options: Options, given: set[str]) -> None:
    from carrara.evaluation.protocol import holds_images, holds_statistics

    reference = options.reference
    if reference is None or not holds_statistics(reference) or holds_images(reference):
        return
    assert options.subject is not None
    nothing_read = is_model(options.subject) and not given & {"train", "held_out", "originals"}
    unused = given & ({"reference_split", *READING} if nothing_read else {"reference_split"})
    if unused:
        raise UserError(f"{spelt(unused)}: only for images, and {reference} holds their statistics.")


def _refuse_table(options: Options, given: set[str]) -> None:
    """Raises UserError for a table that cannot be made, or an option that it sets itself."""
    from carrara.evaluation.tables import TABLES

    assert options.subject is not None
    assert options.table is not None
    if options.table not in TABLES:
        raise UserError(f"there is no table '{options.table}': {nearest(options.table, TABLES)}")
    if not is_model(options.subject):
        raise UserError(f"a table samples a model in many ways, and {options.subject} is no run or model folder.")
    taken = given & (TABLES[options.table] | {"json_output", "held_out", "originals", "report", "captions"})
    if taken:
        raise UserError(f"--table {options.table} takes no {spelt(taken)}: leave it out.")


def _refuse_device(device: str) -> None:
    """Raises UserError where nothing can be computed there."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):  # torch built without CUDA asserts
        raise UserError(f"there is no device '{device}' here: use cpu.") from None
