"""Trees of files: a folder, a zip archive, or tar shards, all with the same two methods."""

from __future__ import annotations

import os
import posixpath
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from carrara.data.decode import UnreadablePicture
from carrara.data.source import printable
from carrara.errors import UserError

_NOISE = ("__MACOSX", "Thumbs.db", "desktop.ini")


def suffix_of(name: str) -> str:
    """The ending of a file's name in lower case, ".jpg"."""
    return posixpath.splitext(name)[1].lower()


def base_name(name: str) -> str:
    """A file's name without its folders."""
    return name.rpartition("/")[2]


class Tree(Protocol):
    """Files by their relative name, with forward slashes, sorted; hidden files are left out."""

    sizes: dict[str, int]
    """Bytes of each file, by name, sorted by name."""

    def read(self, name: str) -> bytes:
        """The whole file.

        Raises:
            UnreadablePicture: this file cannot be read.
            UserError: the archive around it is gone.
        """
        ...

    def where(self, name: str) -> str:
        """The file as a message calls it."""
        ...


class FolderTree:
    """The files below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sizes = dict(sorted(_walk(root, "", frozenset())))

    def read(self, name: str) -> bytes:
        path = self.root / name
        if not self.sizes.get(name) and path.exists() and not path.is_file():
            raise UnreadablePicture("it is a pipe, a socket or a device")  # reading a pipe would wait for ever
        try:
            return path.read_bytes()
        except OSError as error:
            raise UnreadablePicture(error.strerror or str(error)) from error

    def where(self, name: str) -> str:
        return printable(name)


def _walk(root: Path, below: str, above: frozenset[tuple[int, int]]) -> list[tuple[str, int]]:
    """Name and size of each file; `above` are the folders on the way here, so that no link leads in a circle."""
    found: list[tuple[str, int]] = []
    entries = list(os.scandir(root / below))
    here = (root / below).stat()
    if (here.st_dev, here.st_ino) in above:
        return []
    for entry in entries:
        name = f"{below}{entry.name}"
        if entry.name.startswith(".") or entry.name in _NOISE:
            continue
        if Path(entry.path).is_dir():  # unlike the entry's own test it answers for a link to itself, too
            found += _walk(root, name + "/", above | {(here.st_dev, here.st_ino)})
        elif Path(entry.path).is_file():
            found.append((name, entry.stat().st_size))
        else:
            found.append((name, 0))  # a link to nothing: named when it is read, like every unreadable file
    return found


class ZipTree:
    """The files inside a zip archive, read in place. Each process and thread opens its own handle."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()
        members = self._archive().infolist()
        if any(member.flag_bits & 1 for member in members):
            raise UserError(f"{path} is encrypted: unpack it into a folder first.", key=str(path), code="unsupported")
        files = [(m.filename, m.file_size) for m in members if not m.is_dir() and not _hidden(m.filename)]
        _refuse_equal_names([name for name, _ in files], path)
        self.sizes = dict(sorted(files))

    def _archive(self) -> zipfile.ZipFile:
        if getattr(self._local, "process", None) != os.getpid():  # a fork shares the file offset: open it again
            try:
                self._local.archive = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, OSError) as error:
                raise UserError(
                    f"{self.path} cannot be opened as a zip archive: {error}.", key=str(self.path), code="damaged"
                ) from error
            self._local.process = os.getpid()
        archive: zipfile.ZipFile = self._local.archive
        return archive

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "sizes": self.sizes}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

    def read(self, name: str) -> bytes:
        try:
            return self._archive().read(name)
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, ValueError) as error:
            raise UnreadablePicture(str(error)) from error
        except Exception as error:  # zlib.error and lzma's own: damaged bytes inside the archive
            raise UnreadablePicture(f"damaged inside the archive ({error})") from error

    def where(self, name: str) -> str:
        return f"{self.path.name}/{name}"


class ShardTree:
    """The files inside webdataset tar shards, read in place by their offset: nothing is unpacked.

    Names are "SHARD/MEMBER". Opening reads only the headers of the members, so sets far larger than memory
    start at once and every process reads just the samples of its own part.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = {shard.name: shard for shard in shards}
        if len(self.shards) < len(shards):
            double = next(name for name, count in Counter(shard.name for shard in shards).items() if count > 1)
            raise UserError(f"several shards are called '{double}': rename all but one.", key=double, code="conflict")
        self._at: dict[str, tuple[str, int]] = {}
        sizes: dict[str, int] = {}
        for shard in shards:
            for member, offset, size in _members(shard):
                name = f"{shard.name}/{member}"
                self._at[name] = (shard.name, offset)
                sizes[name] = size
        self.sizes = dict(sorted(sizes.items()))

    def read(self, name: str) -> bytes:
        shard, offset = self._at[name]
        try:
            with open(self.shards[shard], "rb") as file:
                file.seek(offset)
                return file.read(self.sizes[name])
        except FileNotFoundError as error:
            raise UserError(
                f"the shard {self.shards[shard]} is gone: put it back, then continue.", key=shard, code="missing"
            ) from error
        except OSError as error:
            raise UnreadablePicture(error.strerror or str(error)) from error

    def where(self, name: str) -> str:
        return printable(name)


def _members(shard: Path) -> list[tuple[str, int, int]]:
    """Name, offset and size of each plain file in a shard."""
    try:
        with tarfile.open(shard, "r:") as archive:
            files = [member for member in archive if member.isfile() and not _hidden(member.name)]
    except FileNotFoundError as error:
        raise UserError(
            f"the shard {shard} is missing: fetch it, or leave it out of the list.", key=str(shard), code="missing"
        ) from error
    except tarfile.TarError as error:
        raise UserError(
            f"{shard} is no whole, uncompressed tar file ({error}): fetch it again, or decompress it.",
            key=str(shard),
            code="damaged",
        ) from error
    if not files:
        raise UserError(
            f"the shard {shard} holds no files: fetch it again, or remove it.", key=str(shard), code="missing"
        )
    end = shard.stat().st_size
    if any(member.offset_data + member.size > end for member in files):
        raise UserError(f"the shard {shard} is cut off at {end} bytes: fetch it again.", key=str(shard), code="damaged")
    names = [member.name.removeprefix("./") for member in files]
    _refuse_equal_names(names, shard)
    return [(name, member.offset_data, member.size) for name, member in zip(names, files, strict=True)]


def _refuse_equal_names(names: Sequence[str], archive: Path) -> None:
    """Raises UserError unless all names in an archive differ; unpacked, one file would replace the other."""
    double = [name for name, count in Counter(names).items() if count > 1]
    if double:
        raise UserError(
            f"{archive} holds several files called '{printable(double[0])}': write it again with a name for each.",
            key=str(archive),
            code="conflict",
        )


def _hidden(name: str) -> bool:
    parts = name.removeprefix("./").split("/")
    return any(part.startswith(".") or part in _NOISE for part in parts)
