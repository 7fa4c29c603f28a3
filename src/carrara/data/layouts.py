"""From a path to a `Source`: which layout lies there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from carrara.data.arrays import open_npz
from carrara.data.captions import (
    Described,
    find_metadata,
    from_metadata,
    from_shard_files,
    from_side_files,
    misspelt_metadata,
)
from carrara.data.decode import IMAGE_SUFFIXES
from carrara.data.digits import open_digits
from carrara.data.source import Source
from carrara.data.tables import choose_split, class_numbers, open_arrow, open_parquet
from carrara.data.trees import FolderTree, ShardTree, Tree, ZipTree
from carrara.errors import UserError, nearest

SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev")
"""Sub-folder names taken for splits."""

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

    Found by looking: a folder of images; class folders; images with .txt files beside them; metadata.jsonl or
    .csv (also nested); parquet file(s) or a folder of them; a data set saved by Hugging Face `datasets`;
    webdataset tar shards (a folder, one file, or "name-{000..099}.tar"); a zip of any of the image layouts
    (also with EDM's dataset.json); an .npz of arrays;
    or the word "digits" (scikit-learn's scanned digits). Folders and tables that name splits are asked for
    `split`.

    Args:
        path: where the data lies, or "digits".
        split: which part.
        unreadable_limit: share of unreadable images, or of captions and images without each other, that is
            left out with a notice; more is refused.
        caption_column: the column of captions where its name is not one of the usual.

    Raises:
        UserError: nothing is there, or it cannot be understood; the sentence says what was looked for.
    """
    if not 0 <= unreadable_limit <= 1:
        raise UserError(f"data.unreadable_limit is a share between 0 and 1, not {unreadable_limit}.")
    source = _opened(path, split, unreadable_limit, caption_column)
    source.unreadable_limit = unreadable_limit
    return source


def _opened(path: str | Path, split: str, limit: float, caption_column: str | None) -> Source:
    if str(path) == "digits":
        return open_digits(split)
    name = str(path)
    if _BRACES.search(name):
        return _open_tree(ShardTree(_expand(name)), name, "webdataset shards", limit, caption_column)
    path = Path(path).expanduser()
    _refuse_missing(path)
    if path.is_file():
        return _open_file(path, split, limit, caption_column)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return open_arrow(path, split, name, caption_column)
    if next(path.rglob("*.parquet"), None) is not None:
        return open_parquet(_parquet_of_split(path, split), name, caption_column)
    shards = _shards_of_split(path, split)
    if shards:
        source = _open_tree(ShardTree(shards), name, "webdataset shards", limit, caption_column)
        source.notices += _gaps(shards)
        return source
    folder = _folder_of_split(path, split)
    return _open_tree(FolderTree(folder), str(folder), "a folder", limit, caption_column)


def _refuse_missing(path: Path) -> None:
    if path.exists():
        return
    here = path.parent
    siblings = [entry.name for entry in here.iterdir()] if here.is_dir() else []
    if path.is_symlink():
        raise UserError(f"{path} is a link to something that is not there.")
    if not siblings:
        raise UserError(f"there is no data at {path}: give a folder, a file, or the word 'digits'.")
    raise UserError(f"there is no data at {path}: {nearest(path.name, siblings)}")


def _open_file(path: Path, split: str, limit: float, caption_column: str | None) -> Source:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return open_parquet([path], str(path), caption_column)
    if suffix == ".npz":
        return open_npz(path)
    if suffix == ".zip":
        return _open_tree(ZipTree(path), str(path), "a zip", limit, caption_column)
    if suffix == ".tar":
        return _open_tree(ShardTree([path]), str(path), "webdataset shards", limit, caption_column)
    if suffix in IMAGE_SUFFIXES:
        raise UserError(f"{path} is one image: give the folder that holds it.")
    raise UserError(f"{path} is no data set: give a folder, or a .parquet, .npz, .zip or .tar file.")


def _open_tree(tree: Tree, name: str, kind: str, limit: float, caption_column: str | None) -> Source:
    """The image layouts, the same in a folder, a zip and in shards."""
    pictures = [file for file in tree.sizes if PurePosixPath(file).suffix.lower() in IMAGE_SUFFIXES]
    if not pictures:
        raise UserError(_no_pictures(tree, name))
    notices = [
        f"{tree.where(file)} is not read: call it metadata.jsonl or metadata.csv if it holds captions."
        for file in misspelt_metadata(tree)
    ]
    described = _describe(tree, pictures, limit, caption_column)
    if described is None:
        if caption_column is not None:
            raise UserError(
                f"there is no caption column '{caption_column}' in {name}: looked for metadata.jsonl and "
                f"metadata.csv at its root and in every sub-folder, and found neither."
            )
        notices += _mixed_depth(pictures) + _classes_in_names(pictures)
        described = Described(pictures, None, None, "no captions or classes", [])
    labels, class_names = (None, None) if described.classes is None else class_numbers(described.classes)
    count = f"{len(described.names)} images"
    return Source(
        name=name,
        layout=f"{kind} of {count}: {described.sentence}" + (f", {len(class_names)} classes" if class_names else ""),
        pictures=TreePictures(tree, described.names),
        labels=labels,
        captions=described.captions,
        class_names=class_names,
        notices=[*notices, *described.notices],
        shard_sizes=_shard_sizes(described.names) if isinstance(tree, ShardTree) else None,
    )


def _shard_sizes(names: Sequence[str]) -> tuple[int, ...]:
    return tuple(Counter(name.split("/")[0] for name in names).values())


def _describe(tree: Tree, pictures: list[str], limit: float, caption_column: str | None) -> Described | None:
    files = find_metadata(tree)
    if files:
        return from_metadata(tree, pictures, files, caption_column, limit)
    if isinstance(tree, ShardTree):
        return from_shard_files(tree, pictures, limit, caption_column)
    return from_side_files(tree, pictures, limit) or _class_folders(pictures)


def _class_folders(pictures: list[str]) -> Described | None:
    """The first folder of each picture's path as its class; at least two, and no picture outside them."""
    if any("/" not in name for name in pictures):
        return None
    classes: list[object] = [name.split("/")[0] for name in pictures]
    if len(set(classes)) < 2:
        return None
    return Described(pictures, None, classes, "class folders", [])


def _mixed_depth(pictures: Sequence[str]) -> list[str]:
    """A notice where images lie both beside and inside sub-folders, so that these are no classes."""
    loose = sum("/" not in name for name in pictures)
    if not 0 < loose < len(pictures):
        return []
    return [f"{loose} images lie beside the sub-folders, so the sub-folders are not taken for classes."]


def _classes_in_names(pictures: Sequence[str]) -> list[str]:
    """A notice where file names look like ADM's, CLASS_NUMBER.png: taking "IMG" for a class would be worse."""
    words = Counter(PurePosixPath(name).name.partition("_")[0] for name in pictures if "_" in name)
    if len(words) < 2 or words.total() < len(pictures) or min(words.values()) < 2 or not all(map(str.isalpha, words)):
        return []
    first = ", ".join(sorted(words)[:3])
    return [f"file names begin with {len(words)} words ({first}, …): for classes, sort them into sub-folders."]


def _no_pictures(tree: Tree, name: str) -> str:
    if not tree.sizes:
        return f"{name} is empty: put images into it, or give another folder."
    endings = sorted({PurePosixPath(file).suffix or PurePosixPath(file).name for file in tree.sizes})[:6]
    return f"{name} holds {len(tree.sizes)} files but no image (found {', '.join(endings)}): give a folder of images."


def _expand(name: str) -> list[Path]:
    """Webdataset's brace notation: "data-{000..099}.tar" names a hundred shards."""
    match = _BRACES.search(name)
    if match is None:
        return [Path(name)]
    low, high = match.groups()
    numbers = [str(i).zfill(len(low)) for i in range(int(low), int(high) + 1)]
    if not numbers:
        raise UserError(f"the braces of {name} count down: write the smaller number first.")
    return [shard for n in numbers for shard in _expand(name[: match.start()] + n + name[match.end() :])]


def _shards_of_split(path: Path, split: str) -> list[Path]:
    """The tar files of a folder; where names or sub-folders tell splits, those of `split`."""
    shards = sorted(path.rglob("*.tar"))
    known = {name for shard in shards for name in SPLIT_NAMES if _of_split(shard.relative_to(path), name)}
    if not known:
        if shards and split != "train":
            raise UserError(f"the shards in {path} tell no splits, so there is no split '{split}'.")
        return shards
    wanted = choose_split(split, sorted(known), path)
    return [shard for shard in shards if _of_split(shard.relative_to(path), wanted)]


def _of_split(shard: Path, split: str) -> bool:
    return split in shard.parts[:-1] or re.match(rf"{split}(?![a-zA-Z])", shard.name) is not None


def _gaps(shards: Sequence[Path]) -> list[str]:
    """A notice for each shard that a running number says is missing."""
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
            notices.append(f"{len(missing)} shards are missing from the running numbers, the first is {first}.")
    return notices


def _parquet_of_split(path: Path, split: str) -> list[Path]:
    """The files of a split, found as Hugging Face `datasets` finds them (README configs, file names, folders)."""
    import tempfile

    import datasets

    with tempfile.TemporaryDirectory() as scratch:  # it wants a place for locks; nothing is kept
        try:
            files = datasets.load_dataset_builder(str(path), cache_dir=scratch).config.data_files
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"{path} cannot be understood as a data set of parquet files: {error}.") from error
    wanted = choose_split(split, [str(key) for key in files], path)
    return [Path(file) for file in files[wanted]]


def _folder_of_split(path: Path, split: str) -> Path:
    """The sub-folder of a split where sub-folders tell splits, else the folder itself."""
    folders = [entry.name for entry in sorted(path.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    known = [name for name in folders if name.lower() in SPLIT_NAMES]
    if "train" in (name.lower() for name in known) or (known and len(known) == len(folders)):
        by_lower = {name.lower(): name for name in known}
        return path / by_lower[choose_split(split, list(by_lower), path)]
    if split != "train":
        raise UserError(f"{path} has no sub-folder '{split}', so there is no such split.")
    return path
