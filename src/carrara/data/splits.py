"""Which part of a data set is meant by "train", "validation" or "test"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from carrara.errors import UserError, nearest

SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev")
"""Folder and file names taken for splits."""

_VALIDATION = {"validation", "valid", "val", "dev"}


def choose_split(split: str, known: Sequence[str], where: object) -> str:
    """The known split that is meant by `split`, with the usual other spellings of "validation".

    Raises:
        UserError: there is no such split.
    """
    wanted = _VALIDATION if split in _VALIDATION else {split}
    for name in known:
        if name.lower() in wanted:
            return name
    raise UserError(f"{where} has no split '{split}': {nearest(split, known)}")


def refuse_split(split: str, where: object) -> None:
    """Stop where a split other than "train" is asked of data that tell none.

    Raises:
        UserError: another split than "train".
    """
    if split != "train":
        raise UserError(f"{where} tells no splits by sub-folders or names, so it has no split '{split}'.")


def split_of_name(name: str) -> str | None:
    """The split that a file tells by its folders or by how its own name begins ("val-003.tar"), if any."""
    *folders, file = name.lower().split("/")
    for split in SPLIT_NAMES:
        if split in folders or re.match(rf"{split}(?![a-z])", file):
            return split
    return None


def files_of_split(files: Sequence[str], split: str, where: object) -> list[str]:
    """Those of some shards that belong to a split; all of them where none tells one.

    Raises:
        UserError: there is no such split.
    """
    told = {name: split_of_name(name) for name in files}
    known = sorted({name for name in told.values() if name is not None})
    if not known:
        refuse_split(split, where)
        return list(files)
    wanted = choose_split(split, known, where)
    return [name for name in files if told[name] == wanted]


@dataclass(frozen=True)
class Part:
    """The pictures of one split in a tree of files.

    Attributes:
        pictures: their names, by what is left of the name below the folder that holds them all.
        folder: that folder, "" or ending in "/".
        class_folders: the folders right below it, of this split and of the others, sorted, so that classes are
            numbered alike in all splits.
    """

    pictures: dict[str, str]
    folder: str
    class_folders: list[str]


def part_of_tree(names: Sequence[str], split: str, where: object) -> Part:
    """Walk down from the root: into the split's folder where the folders are splits, and into lone folders.

    Folders are splits when one of them is "train" or all of them bear names of splits.

    Raises:
        UserError: there is no such split.
    """
    left = {name: name for name in names}  # what is left of each name, below where the walk has come
    own: set[str] | None = None
    while True:
        tops = sorted({rest.split("/")[0] for rest in left.values() if "/" in rest})
        known = [top for top in tops if top.lower() in SPLIT_NAMES]
        if own is None and known and ("train" in map(str.lower, known) or len(known) == len(tops)):
            wanted = choose_split(split, known, where)
            own = {name for name, rest in left.items() if rest.startswith(f"{wanted}/")}
            left = {name: rest for name, rest in left.items() if rest.split("/")[0] in known}
        elif len(tops) != 1 or not all("/" in rest for rest in left.values()):
            break
        left = {name: rest.partition("/")[2] for name, rest in left.items()}
    if own is None:
        refuse_split(split, where)
        own = set(names)
    pictures = {rest: name for name, rest in left.items() if name in own}
    rest, name = next(iter(pictures.items()))
    return Part(pictures, name.removesuffix(rest), tops)
