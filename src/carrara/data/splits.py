"""Which part of a data set is meant by "train", "validation" or "test"."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from carrara.data.source import printable
from carrara.errors import UserError, nearest

SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev")
"""Folder names taken for splits."""

_SPLIT_OF_WORD = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""The words in names of files by which Hugging Face `datasets` finds splits."""
_WORD = re.compile(rf"(?<![a-z])({'|'.join(_SPLIT_OF_WORD)})(?![a-z])")
_PATTERN = re.compile(r"\*\*/?|\*|\?|\[[^]]*\]")


def choose_split(split: str, known: Sequence[str], where: object) -> str:
    """The known split that is meant by `split`, with the usual other spellings of "validation".

    Raises:
        UserError: there is no such split, or several.
    """
    meant = [name for name in known if _split_of_word(name) == _split_of_word(split)]
    if not meant:
        raise UserError(f"{where} has no split '{split}': {nearest(split, known)}", key="data.split", code="unknown")
    if len(meant) > 1 and split not in meant:
        raise UserError(
            f"{where} has several splits that may be '{split}', {' and '.join(meant)}: rename or move all but one.",
            key="data.split",
            code="conflict",
        )
    return split if split in meant else meant[0]


def _split_of_word(word: str) -> str:
    return _SPLIT_OF_WORD.get(word.lower(), word.lower())


def refuse_split(split: str, where: object) -> None:
    """Raises UserError unless `split` is "train", the only one of data that are not split."""
    if split != "train":
        raise UserError(
            f"{where} is not split by sub-folders or names, so it has no split '{split}'.",
            key="data.split",
            code="unknown",
        )


def split_of_name(name: str) -> str | None:
    """The split that a word in a file's own name specifies ("cifar-val-003.tar"), else its innermost such folder."""
    words = (_WORD.search(part) for part in reversed(name.lower().split("/")))
    return next((_SPLIT_OF_WORD[word[1]] for word in words if word), None)


@dataclass(frozen=True)
class FilesOfSplit:
    """The tables or shards of one split.

    Attributes:
        own: their names, sorted.
        others: those of the other splits.
        notices: which files belong to no split.
    """

    own: list[str]
    others: list[str]
    notices: list[str]


def files_of_split(files: Sequence[str], split: str, where: object, readme: str = "") -> FilesOfSplit:
    """The files of a split: by the configuration in a data set's README, else by words in their names.

    Raises:
        UserError: there is no such split, or the README cannot be read.
    """
    splits = _configured(readme, files, f"{where}/README.md")
    if not splits:
        names = {file: split_of_name(file) for file in files}
        splits = {name: [file for file in files if names[file] == name] for name in names.values() if name is not None}
    if not splits:
        refuse_split(split, where)
        return FilesOfSplit(list(files), [], [])
    wanted = choose_split(split, sorted(splits), where)
    own = splits[wanted]
    others = [file for name in splits if name != wanted for file in splits[name] if file not in own]
    rest = [file for file in files if file not in own and file not in others]
    notices = [f"of no split, and left out: {len(rest)} of {len(files)} files, the first is {rest[0]}."] if rest else []
    return FilesOfSplit(own, others, notices)


def _configured(readme: str, files: Sequence[str], where: str) -> dict[str, list[str]]:
    """The files of each split by the patterns in a README's YAML header; none where it has no such configuration.

    The form is Hugging Face's: `configs`, a list of `config_name`, `data_files` (a pattern, several, a mapping by
    split, or a list of `split` and `path`), `data_dir` and `default`.
    """
    header = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", readme.replace("\r\n", "\n"), re.DOTALL)
    if header is None:
        return {}
    try:
        data = yaml.safe_load(header[1]) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _unreadable(where, error) from error
    try:
        configs = data.get("configs") or []
        default = [c for c in configs if c.get("default") or c.get("config_name") == "default"] or configs
        patterns = [_patterns(config) for config in default]
    except (AttributeError, KeyError, TypeError) as error:
        raise _unreadable(where, error) from error
    if len(patterns) > 1:
        names = ", ".join(str(config.get("config_name")) for config in default)
        raise UserError(f"{where} describes several data sets ({names}): give the folder of one.", key=where)
    splits = {}
    for split, wanted in (patterns[0] if patterns else {}).items():
        splits[split] = list(dict.fromkeys(file for pattern in wanted for file in files if _fits(file, pattern)))
        if not splits[split]:
            raise UserError(f"no file here fits {wanted} of {where}: correct it.", key=where, code="missing")
    return splits


def _unreadable(where: str, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(
        f"the YAML header of {where} cannot be read ({reason}): correct it, or remove the file.",
        key=where,
        code="damaged",
    )


def _patterns(config: dict[str, Any]) -> dict[str, list[str]]:
    """The patterns of each split, relative to the README."""
    given = config.get("data_files")
    base = f"{config['data_dir'].strip('/')}/" if config.get("data_dir") else ""
    if given is None:
        return {"train": [f"{base}**"]} if base else {}
    if isinstance(given, list) and all(isinstance(entry, dict) for entry in given):
        given = {entry.get("split", "train"): entry["path"] for entry in given}
    if not isinstance(given, dict):
        given = {"train": given}
    lists = {str(split): [paths] if isinstance(paths, str) else list(paths) for split, paths in given.items()}
    return {split: [base + path.removeprefix("./") for path in paths] for split, paths in lists.items()}


def _fits(file: str, pattern: str) -> bool:
    """Whether a name fits a pattern, in which `*` stays within a folder and `**` does not; or is the pattern itself."""
    signs = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts, end = "", 0
    for sign in _PATTERN.finditer(pattern):
        parts += re.escape(pattern[end : sign.start()]) + signs.get(sign[0], sign[0].replace("[!", "[^"))
        end = sign.end()
    return file == pattern or re.fullmatch(parts + re.escape(pattern[end:]), file) is not None


@dataclass(frozen=True)
class Part:
    """The pictures of one split in a tree of files.

    Attributes:
        pictures: what is left of the name below the folder that holds them all, by name.
        folder: that folder, "" or ending in "/".
        class_folders: the folders right below it, of this split and of the others, sorted, so that classes are
            numbered alike in all splits.
        notices: which pictures lie in no split.
    """

    pictures: dict[str, str]
    folder: str
    class_folders: list[str]
    notices: list[str]


def part_of_tree(names: Mapping[str, str], split: str | None, where: object) -> Part:
    """The pictures of a split and the folder that holds them all, below folders of splits and lone folders.

    Folders are splits when all of them have names of splits, or several have, "train" among them.

    Args:
        names: the path of each picture within the tree, by name.
        split: None where the whole tree is of one split.

    Raises:
        UserError: there is no such split, or "train" lies among folders that are no splits.
    """
    left = dict(names)  # what is left of each name below the folders descended into
    own: set[str] | None = None if split is not None else set(names)
    notices: list[str] = []
    while True:
        tops = sorted({rest.split("/")[0] for rest in left.values() if "/" in rest})
        known = [top for top in tops if top.lower() in SPLIT_NAMES]
        if own is None and _are_splits(known, tops, where):
            wanted = choose_split(str(split), known, where)
            own = {name for name, rest in left.items() if rest.startswith(f"{wanted}/")}
            every = left
            left = {name: rest for name, rest in left.items() if "/" in rest and rest.split("/")[0] in known}
            notices += _left_out([name for name in every if name not in left])
        elif len(tops) != 1 or not all("/" in rest for rest in left.values()):
            break
        left = {name: rest.partition("/")[2] for name, rest in left.items()}
    if own is None:
        refuse_split(str(split), where)
        own = set(names)
    pictures = {name: left[name] for name in names if name in own}
    folders = {name.removesuffix(rest) for name, rest in pictures.items()}
    return Part(pictures, folders.pop() if len(folders) == 1 else "", tops, notices)


def _are_splits(known: Sequence[str], tops: Sequence[str], where: object) -> bool:
    """Whether the folders `tops` are splits, of which those in `known` have the name of one."""
    if not known or len(known) == len(tops):
        return bool(known)
    if "train" not in map(str.lower, known):
        return False
    if len(known) == 1:
        others = [printable(top) for top in tops if top not in known]
        raise UserError(
            f"{where} has a folder '{known[0]}' and others ({', '.join(others[:3])}): rename '{known[0]}' if it is a "
            "class, or move the others away if it is a split.",
            key=str(where),
            code="conflict",
        )
    return True


def _left_out(names: Sequence[str]) -> list[str]:
    return [f"images of no split, left out: {len(names)} (the first is {printable(names[0])})."] if names else []
