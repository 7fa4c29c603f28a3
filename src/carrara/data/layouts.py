"""From a path to a `Source`: which layout lies there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from carrara.data.arrays import open_npz
from carrara.data.captions import (
    METADATA,
    Described,
    find_metadata,
    from_metadata,
    from_side_files,
    misspelt_metadata,
)
from carrara.data.columns import class_numbers
from carrara.data.decode import IMAGE_SUFFIXES
from carrara.data.digits import open_digits
from carrara.data.source import Source, counted, printable
from carrara.data.splits import Part, files_of_split, part_of_tree, split_of_name
from carrara.data.tables import TablePictures, may_hold_pictures, open_arrow, open_parquet
from carrara.data.trees import FolderTree, ShardTree, Tree, ZipTree, base_name, suffix_of
from carrara.errors import UserError, nearest

_FOREIGN = (".heic", ".heif", ".dng", ".cr2", ".nef", ".arw", ".svg", ".psd", ".exr", ".jxl")
_CONTAINERS = (".tar", ".parquet", ".arrow", ".zip", ".npz", ".rar", ".7z")
_PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class TreePictures:
    """Some of the files of a tree, as pictures."""

    def __init__(self, tree: Tree, names: Sequence[str]) -> None:
        self.tree = tree
        self.names = names
        self.encoded_bytes = sum(tree.sizes[name] for name in names)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.tree.where(self.names[index])

    def read(self, index: int) -> bytes:
        return self.tree.read(self.names[index])


def open_source(
    path: str | Path, split: str = "train", unreadable_limit: float = 0.01, caption_column: str | None = None
) -> Source:
    """Open a data set, whatever its layout.

    Found by looking: a folder of images; class folders; images with .txt, .caption, .cls or .json files next to them;
    metadata.jsonl or .csv (also nested); parquet file(s) or a folder of them; a data set saved by Hugging Face
    `datasets`; webdataset tar shards (a folder, one file, or "name-{000..099}.tar"); a zip of any of the image
    layouts (also with EDM's dataset.json); an .npz of arrays; or the word "digits" (scikit-learn's scanned digits).
    Where folders, files or tables are split, `split` is taken.

    Args:
        path: where the data lies, or "digits".
        split: which part.
        unreadable_limit: fraction of unreadable images, or of captions and images without each other, that is
            left out with a notice; more is refused.
        caption_column: the column of captions where its name is not one of the usual.

    Raises:
        UserError: nothing is there, or it cannot be understood; the sentence names what was looked for.
    """
    if not 0 <= unreadable_limit <= 1:
        raise UserError(
            f"data.unreadable_limit is a fraction between 0 and 1, not {unreadable_limit}.", key="data.unreadable_limit"
        )
    if not str(path).strip():
        raise UserError("the path of the data is empty: give a folder, a file, or the word 'digits'.", key="data.path")
    try:
        source = _opened(path, split, unreadable_limit, caption_column)
    except PermissionError as error:
        where = printable(str(error.filename or path))
        raise UserError(
            f"{where} may not be read: give yourself the permission to.", key=where, code="resources"
        ) from None
    if caption_column is not None and source.captions is None:
        raise UserError(
            f"{source.name} has no captions, so no caption column '{caption_column}'.",
            key="data.caption_column",
            code="missing",
        )
    source.unreadable_limit = unreadable_limit
    return source


def _opened(path: str | Path, split: str, limit: float, caption_column: str | None) -> Source:
    if str(path) == "digits":
        return open_digits(split)
    name = printable(str(path))
    if _BRACES.search(name):
        listed = _expand(name)
        _refuse_named_split([shard.name for shard in listed], split, name)
        return _open_shards(listed, name, "train", limit, caption_column)
    path = Path(path).expanduser()
    _refuse_missing(path)
    if path.is_file():
        return _open_file(path, split, limit, caption_column)
    saved = {"dataset_dict.json"}, {"state.json", "dataset_info.json"}
    if any(all((path / file).exists() for file in files) for files in saved):
        return open_arrow(path, split, name, caption_column)
    tree = FolderTree(path)
    images = [file for file in tree.sizes if suffix_of(file) in IMAGE_SUFFIXES]
    shards = [file for file in tree.sizes if file.endswith(".tar") and not (images and not _holds_images(path / file))]
    tables = [file for file in tree.sizes if file.endswith(".parquet") and base_name(file) not in METADATA]
    tables = [file for file in tables if not (images and not may_hold_pictures(path / file))]
    _refuse_mixture(name, images, shards, tables)
    if tables:
        return _open_tables(tree, tables, len(images), name, split, caption_column)
    if shards:
        _refuse_packed(name, list(tree.sizes))
        of_split = files_of_split(shards, split, name)
        source = _open_shards([path / file for file in of_split.own], name, "train", limit, caption_column)
        source.notices += of_split.notices
        return source
    return _open_tree(tree, name, "a folder", split, limit, caption_column)


def _holds_images(shard: Path) -> bool:
    try:
        return any(suffix_of(name) in IMAGE_SUFFIXES for name in ShardTree([shard]).sizes)
    except UserError:
        return False


def _refuse_mixture(name: str, images: Sequence[str], shards: Sequence[str], tables: Sequence[str]) -> None:
    """Raises UserError where images lie in shards and also in files or tables: which are meant?"""
    kinds = {"image files": images, "tar shards": shards, "parquet files": tables}
    found = [f"{what} ({printable(files[0])})" for what, files in kinds.items() if files]
    if shards and len(found) > 1:
        raise UserError(
            f"{name} holds {' and '.join(found)}: move one of them away, or give its own folder or files.",
            key=name,
            code="conflict",
        )


def _open_tables(
    tree: FolderTree, tables: Sequence[str], images: int, name: str, split: str, caption_column: str | None
) -> Source:
    readme = tree.read("README.md").decode("utf-8", "replace") if "README.md" in tree.sizes else ""
    of_split = files_of_split(tables, split, name, readme)
    own, others = ([tree.root / file for file in part] for part in (of_split.own, of_split.others))
    source = open_parquet(own, name, caption_column, others)
    source.notices += of_split.notices
    if images and isinstance(source.pictures, TablePictures) and not source.pictures.reads_files:
        source.notices.append(f"not read, as the parquet holds the images: {counted(images, 'image file')}.")
    return source


def _open_shards(shards: Sequence[Path], name: str, split: str, limit: float, caption_column: str | None) -> Source:
    source = _open_tree(ShardTree(shards), name, "webdataset shards", split, limit, caption_column)
    source.notices += _gaps(shards)
    return source


def _refuse_packed(name: str, files: Sequence[str]) -> None:
    """Compressed shards cannot be read here and there, and unpacking them behind the user's back fills disks."""
    packed = [file for file in files if base_name(file).lower().endswith(_PACKED)]
    if packed:
        raise UserError(
            f"{name} holds compressed shards ({packed[0]}), which can only be read from start to end: decompress them "
            "to plain .tar (gunzip *.tar.gz); the images inside are compressed already.",
            key=name,
            code="unsupported",
        )


def _refuse_named_split(files: Sequence[str], split: str, where: object) -> None:
    """Raises UserError unless files that are named one by one are of the split: "train", or the one in their names."""
    if split != "train":
        files_of_split(files, split, where)


def _refuse_missing(path: Path) -> None:
    if path.exists():
        return
    here = path.parent
    siblings = [entry.name for entry in here.iterdir()] if here.is_dir() else []
    sentence = f"there is no data at {path}: give a folder, a file, or the word 'digits'."
    if path.is_symlink():
        sentence = f"{path} is a link to something that is not there."
    elif siblings:
        sentence = f"there is no data at {path}: {nearest(path.name, siblings)}"
    raise UserError(printable(sentence), key=printable(str(path)), code="missing")


def _open_file(path: Path, split: str, limit: float, caption_column: str | None) -> Source:
    suffix, name = path.suffix.lower(), printable(str(path))
    if suffix == ".zip":
        return _open_tree(ZipTree(path), name, "a zip", split, limit, caption_column)
    if suffix in IMAGE_SUFFIXES:
        raise UserError(f"{name} is one image: give the folder that holds it.", key=name)
    if suffix == ".tar" and split_of_name(path.name) is None:
        return _open_shards([path], name, split, limit, caption_column)
    _refuse_named_split([path.name], split, path)
    if suffix == ".parquet":
        return open_parquet([path], name, caption_column)
    if suffix == ".npz":
        return open_npz(path)
    if suffix == ".tar":
        return _open_shards([path], name, "train", limit, caption_column)
    _refuse_packed(name, [path.name])
    raise UserError(f"{name} is no data set: give a folder, or a .parquet, .npz, .zip or .tar file.", key=name)


def _open_tree(tree: Tree, name: str, kind: str, split: str, limit: float, caption_column: str | None) -> Source:
    """The image layouts, the same in a folder, a zip and in shards."""
    images = [file for file in tree.sizes if suffix_of(file) in IMAGE_SUFFIXES]
    if not images:
        _refuse_packed(name, list(tree.sizes))
        raise UserError(_no_pictures(tree, name), key=name, code="missing")
    several = isinstance(tree, ShardTree) and len(tree.shards) > 1  # below the shards lies one set of folders
    inside = {file: file.partition("/")[2] if several else file for file in images}
    part = part_of_tree(inside, None if several else split, name)
    described = _describe(tree, part, name, limit, caption_column)
    notices = part.notices + _unread(tree)
    if not described.found:
        notices += _mixed_depth(part) + _classes_in_names(described.names)
    labels, class_names = None, None
    if described.classes is not None:
        rows = [tree.where(file) for file in described.names]
        labels, class_names = class_numbers(described.classes, described.known_classes, name, rows)
    below = f" in {printable(part.folder)}" if part.folder and not isinstance(tree, ShardTree) else ""
    found = " and ".join(described.found) or "no captions or classes"
    classes = f", {len(class_names)} classes" if class_names else ""
    return Source(
        name=name,
        layout=f"{kind} of {counted(len(described.names), 'image')}{below}: {found}{classes}",
        pictures=TreePictures(tree, described.names),
        labels=labels,
        captions=described.captions,
        class_names=class_names,
        notices=[*notices, *described.notices],
        shard_sizes=_shard_sizes(described.names) if isinstance(tree, ShardTree) else None,
    )


def _shard_sizes(names: Sequence[str]) -> tuple[int, ...]:
    return tuple(Counter(name.split("/")[0] for name in names).values())


def _describe(tree: Tree, part: Part, name: str, limit: float, caption_column: str | None) -> Described:
    """What metadata files contain of the pictures, else the files next to them; classes from there, else by folder."""
    pictures = list(part.pictures)
    if files := find_metadata(tree):
        described = from_metadata(tree, pictures, part.folder, files, caption_column, limit)
        if described.captions is None:
            described = described.with_captions(from_side_files(tree, described.names, limit, None))
    else:
        described = from_side_files(tree, pictures, limit, caption_column)
    if caption_column is not None and described.captions is None:
        raise UserError(
            f"there is no caption column '{caption_column}' in {name}: looked for metadata.jsonl and metadata.csv at "
            "its root and in every sub-folder, and for .json files next to the images.",
            key="data.caption_column",
            code="missing",
        )
    return described if described.classes is not None else _with_class_folders(described, part)


def _with_class_folders(described: Described, part: Part) -> Described:
    """The first folder of each picture's path as its class; at least two, and no picture outside them."""
    if len(part.class_folders) < 2 or any("/" not in rest for rest in part.pictures.values()):
        return described
    classes = [part.pictures[name].split("/")[0] for name in described.names]
    found = (*described.found, "class folders")
    return replace(described, classes=classes, found=found, known_classes=part.class_folders)


def _mixed_depth(part: Part) -> list[str]:
    """A notice where images lie both in a folder and in its sub-folders, so that these are no classes."""
    loose = sum("/" not in rest for rest in part.pictures.values())
    if not 0 < loose < len(part.pictures):
        return []
    return [f"{counted(loose, 'image')} outside of the sub-folders: these are not taken for classes."]


def _unread(tree: Tree) -> list[str]:
    """Notices for files that a user may believe to be read."""
    notices = [
        f"{tree.where(file)} is not read: call it metadata.jsonl or metadata.csv if it holds captions."
        for file in misspelt_metadata(tree)
    ]
    endings = Counter(suffix_of(file) for file in tree.sizes if base_name(file) not in METADATA)
    for suffix, count in endings.items():
        if suffix in (*_FOREIGN, *_CONTAINERS):
            advice = "convert to .png or .jpg" if suffix in _FOREIGN else "give its path to read it"
            notices.append(f"not read: {counted(count, f'{suffix} file')}; {advice}.")
    return notices


def _classes_in_names(pictures: Sequence[str]) -> list[str]:
    """A notice where file names look like ADM's, CLASS_NUMBER.png: taking "IMG" for a class would be worse."""
    words = Counter(base_name(name).partition("_")[0] for name in pictures if "_" in name)
    if len(words) < 2 or words.total() < len(pictures) or min(words.values()) < 2 or not all(map(str.isalpha, words)):
        return []
    first = ", ".join(sorted(words)[:3])
    return [f"file names begin with {len(words)} words ({first}, …): for classes, sort them into sub-folders."]


def _no_pictures(tree: Tree, name: str) -> str:
    if not tree.sizes:
        return f"{name} is empty: put images into it, or give another folder."
    endings = sorted({suffix_of(file) or base_name(file) for file in tree.sizes})[:6]
    return f"{name} holds {len(tree.sizes)} files but no image (found {', '.join(endings)}): give a folder of images."


def _expand(name: str) -> list[Path]:
    """Webdataset's brace notation: "data-{000..099}.tar" names a hundred shards."""
    match = _BRACES.search(name)
    if match is None:
        return [Path(name)]
    low, high = match.groups()
    numbers = [str(i).zfill(len(low)) for i in range(int(low), int(high) + 1)]
    if not numbers:
        raise UserError(f"the braces of {name} count down: write the smaller number first.", key=name)
    return [shard for n in numbers for shard in _expand(name[: match.start()] + n + name[match.end() :])]


def _gaps(shards: Sequence[Path]) -> list[str]:
    """A notice for the shards that are missing from a running number."""
    numbered: dict[str, dict[int, str]] = {}
    for shard in shards:
        match = re.search(r"(\d+)(?=\D*$)", shard.name)
        if match:
            key = shard.name[: match.start()] + "{}" + shard.name[match.end() :]
            numbered.setdefault(key, {})[int(match[1])] = match[1]
    notices = []
    for pattern, found in numbered.items():
        width = len(next(iter(found.values())))
        missing = [n for n in range(min(found), max(found)) if n not in found]
        if missing:
            first = pattern.format(str(missing[0]).zfill(width))
            notices.append(f"shards missing from the running numbers: {len(missing)}, the first is {first}.")
    return notices
