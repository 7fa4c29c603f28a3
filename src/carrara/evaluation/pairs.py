"""How close pictures are to those that they should be, pair by pair: PSNR, SSIM and a learned distance."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from carrara.codecs.perceptual import Perceptual
from carrara.distributed import in_turn, run_on_rank0
from carrara.errors import UserError
from carrara.evaluation.bootstrap import mean_interval
from carrara.evaluation.pictures import Pictures, refuse_other_shape
from carrara.evaluation.stamp import Measurement, Measurements, Stamp
from carrara.evaluation.survey import stem
from carrara.images import to_uint8
from carrara.modes import eval_mode
from carrara.similarity import HIGHEST_PSNR, psnr, ssim

LPIPS_SIDE = 16
"""Pixels of the smallest side that VGG-16 can halve four times."""

MEANINGLESS = ("animated", "CMYK")
"""Conversions after which a picture is not comparable with its original: other frames, other colours."""


def likeness(images: Tensor, targets: Tensor, perceptual: Perceptual | None = None) -> dict[str, Tensor]:
    """Every metric of how close images [N, C, H, W] in [-1, 1] are to their targets, float64 [N] each.

    Args:
        perceptual: a learned distance (`carrara.interop.lpips.load(FILE)`), where its weights are at hand.
    """
    values = {"psnr": psnr(images, targets), "ssim": ssim(images, targets)}
    if perceptual is not None:
        with torch.no_grad(), eval_mode(*[part for part in [perceptual] if isinstance(part, nn.Module)]):
            values["lpips"] = perceptual(images, targets).double().cpu()
    return values


def reconstruction(
    pictures: Pictures,
    originals: Pictures,
    perceptual: Perceptual | None = None,
    checksum: str = "",
    progress: Callable[[int], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> Measurements:
    """PSNR, SSIM and, where it is given, a learned distance of pictures and what they should be, one by one.

    Pictures that are read are paired by their file names, or by the last number in these.

    Args:
        perceptual: LPIPS with its weights.
        checksum: the SHA-256 of these weights.
        progress: called after each batch with how many pictures it contains.
        warn: called with a sentence where no name fits another, so that pairs are taken in the sorted order.

    Raises:
        UserError: other numbers or sizes of pictures, names of which only some fit, or pictures that reading changes
            beyond comparison.
    """
    if pictures.count != originals.count:
        raise UserError(
            f"{pictures.name} contains {pictures.count:,} pictures and {originals.name} {originals.count:,}: "
            "give one original for each picture.",
            key="originals",
            code="mismatch",
        )
    for side in (pictures, originals):
        _refuse_meaningless(side)
    originals = paired(pictures, originals, warn)

    def work(rows: range) -> tuple[dict[str, Tensor], tuple[int, ...], bytes]:
        images, targets = pictures.make(rows).cpu(), originals.make(rows)
        refuse_other_shape(pictures.name, images.shape[1:], originals.name, targets.shape[1:])
        if perceptual is not None and min(images.shape[2:]) < LPIPS_SIDE:
            raise UserError(
                f"LPIPS's network halves images four times, and those of {originals.name} have fewer than "
                f"{LPIPS_SIDE} pixels a side: leave --lpips out.",
                key="lpips",
                code="unsupported",
            )
        content = hashlib.blake2b(to_uint8(targets).numpy().tobytes(), digest_size=16).digest()
        return likeness(images, targets, perceptual), tuple(images.shape[1:]), content

    parts = []
    for part in in_turn(originals.parts, work):
        parts.append(part)
        if progress is not None:
            progress(len(part[0]["psnr"]))
    values, shapes, digests = zip(*parts, strict=True)
    joined = {name: torch.cat([part[name] for part in values]) for name in values[0]}
    stamp = Stamp(
        n=pictures.count,
        shape=shapes[0],
        resize=originals.resize,
        reference=Path(originals.name).name,
        reference_split=originals.split,
        reference_hash=hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest(),
        sampling={"pictures": Path(pictures.name).name, **pictures.sampling},
    )
    return run_on_rank0(lambda: measure_reconstruction(joined, stamp, checksum))


def measure_reconstruction(
    values: Mapping[str, Tensor], stamp: Stamp, checksum: str = "", seed: int = 0
) -> Measurements:
    """The means of `likeness` over pictures, PSNR (dB) and SSIM among them."""
    metrics: Measurements = {}
    for name, each in values.items():
        equal = int((each >= HIGHEST_PSNR).sum()) if name == "psnr" else 0
        note = f"{equal:,} of {len(each):,} pictures count as equal to their originals, with {HIGHEST_PSNR:g} dB"
        own = stamp.with_settings(weights=checksum) if name == "lpips" else stamp
        metrics[name] = Measurement(float(each.mean()), mean_interval(each, seed=seed), own, note if equal else "")
    return metrics


def paired(pictures: Pictures, originals: Pictures, warn: Callable[[str], None] | None = None) -> Pictures:
    """The originals in the order of the pictures: by equal file names within the two sets, else by equal last numbers
    in these; where the names have nothing in common, or a side has none, in the order as it is.

    Raises:
        UserError: some names, or numbers, have a partner and others not.
    """
    if pictures.survey is None or originals.survey is None:
        return originals
    names = pictures.survey.names, originals.survey.names
    for key in (stem, _within, _file_stem, _last_number):
        ours, theirs = ([key(name) for name in side] for side in names)
        if None in (*ours, *theirs) or len(set(ours)) < len(ours) or len(set(theirs)) < len(theirs):
            continue
        place = {own: row for row, own in enumerate(theirs)}
        alone = next((name for name, own in zip(names[0], ours, strict=True) if own not in place), None)
        if alone is None:
            order = [place[own] for own in ours]
            return originals if order == list(range(len(order))) else originals.reordered(order)
        if set(ours) & set(theirs):
            raise UserError(
                f"{alone} has no partner in {originals.name}, though others have: give both the same file names.",
                key=pictures.name,
                code="mismatch",
            )
    if warn is not None:
        warn(f"the file names do not fit: pairs are taken in sorted order, first {names[0][0]} and {names[1][0]}.")
    return originals


def _within(name: str) -> str:
    """Without the archive or first folder that it lies in."""
    return stem(name).split("/", 1)[-1]


def _file_stem(name: str) -> str:
    return stem(name).rsplit("/", 1)[-1]


def _last_number(name: str) -> str | None:
    digits = re.findall(r"[0-9]+", _file_stem(name))
    return str(int(digits[-1])) if digits else None


def _refuse_meaningless(pictures: Pictures) -> None:
    """Raises UserError for pictures that reading changes so that no distance to an original has a meaning."""
    for what, names in ({} if pictures.survey is None else pictures.survey.conversions).items():
        if what.startswith(MEANINGLESS):
            raise UserError(
                f"{names[0]} cannot be compared with another picture, as it is converted ({what}): save "
                f"{len(names):,} of {pictures.name} as plain RGB pictures.",
                key=names[0],
                code="unsupported",
            )
