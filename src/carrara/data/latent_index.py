"""The index of a cache of latents: whose latents they are, of which images, and where each one lies.

A finished cache has it in one file. While images are encoded, each new shard is a line in a journal next to it, so that
a shard costs what it holds, however many images there are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from carrara.codecs import Codes, DiagonalGaussian, Exact, Posterior, same_latents
from carrara.data.preprocess import Preprocess
from carrara.errors import UserError
from carrara.files import append_line, json_bytes, write_whole

FORMAT = 1
"""The version of the cache's layout; another one is refused."""
INDEX = "index.json"
JOURNAL = "index.jsonl"
"""Its first line has the digest of the index that the others continue; of another index it is worth nothing."""


@dataclass(frozen=True)
class Shard:
    """One file of latents.

    Attributes:
        file: its name in the cache's folder.
        images: how many it holds.
        size: in bytes, by which a cut file is found out.
        checksum: of its content (BLAKE2b, 32 hexadecimal digits), by which a changed one is.
    """

    file: str
    images: int
    size: int
    checksum: str = ""


@dataclass
class Index:
    """The contents of a cache, in the order of the data set.

    Attributes:
        codec: `kind` and `hash` of the codec whose latents these are.
        prepare: the fields of `Preprocess`.
        levels: see `Source.levels`.
        posterior: "gaussian" (mean and log-variance), "codes" (indices, and the latent before it was quantised) or
            "exact" (one latent).
        shape: a latent's [C', h, w].
        names: what messages call the images.
        hashes: of each image's file, or None where it cannot be read.
        unreadable: why a file is no picture, by its hash.
        labels, captions, class_names: see `Source`.
        shards: the files.
        places: shard number and row of every image's latents, by the hash of the image's file.
    """

    codec: dict[str, str]
    prepare: dict[str, Any]
    levels: int
    posterior: str
    shape: tuple[int, ...]
    names: list[str] = field(default_factory=list)
    hashes: list[str | None] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    labels: list[int] | None = None
    captions: list[str] | None = None
    class_names: list[str] | None = None
    shards: list[Shard] = field(default_factory=list)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def flips(self) -> bool:
        """Whether every image has a second entry, mirrored."""
        return bool(self.prepare["flip"])

    @property
    def missing(self) -> list[int]:
        """The images that have no latents yet, though nothing is known against them."""
        return [
            number
            for number, key in enumerate(self.hashes)
            if key is not None and key not in self.places and key not in self.unreadable
        ]

    def add(self, shard: Shard | None, keys: Sequence[str], unreadable: Mapping[str, str], posterior: str) -> None:
        """One more shard.

        Args:
            shard: None where no image could be read.
            keys: the hash of the image's file, for each row.
            unreadable: why files are no pictures, by their hashes.
            posterior: as the attribute.
        """
        self.unreadable |= unreadable
        if shard is not None:
            self.posterior = posterior
            self.places |= {key: (len(self.shards), row) for row, key in enumerate(keys)}
            self.shards.append(shard)

    def text(self) -> str:
        """The index as JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, ensure_ascii=False, sort_keys=True) + "\n"

    def check(self, codec_hash: str | None, prepare: Preprocess | None, where: Path, advice: str) -> None:
        """Raises UserError unless these are the latents of a codec, of images prepared in one way.

        Args:
            codec_hash: the codec's `content_hash`; None takes any.
            prepare: what is done to the images; None takes any.
            where: the cache's folder, for the sentence.
            advice: what to do, for the sentence.
        """
        if codec_hash is not None and not same_latents(codec_hash, self.codec["hash"]):
            raise UserError(
                f"the latents in {where} are those of the codec {self.codec['hash']} ({self.codec['kind']}), not of "
                f"{codec_hash}: {advice}.",
                key=str(where),
                code="mismatch",
            )
        before = _recipe_keys(self.prepare)
        for name, now in ({} if prepare is None else _recipe_keys(asdict(prepare))).items():
            if now != before[name]:
                raise UserError(
                    f"the latents in {where} were made with data.{name} = {before[name]}, not {now}: {advice}.",
                    key=f"data.{name}",
                    code="mismatch",
                )


def _recipe_keys(prepare: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Preprocess` by their keys in a recipe."""
    rest = {name: value for name, value in prepare.items() if name not in ("height", "width")}
    return {"resolution": f"{prepare['height']}×{prepare['width']}", **rest}


def read_index(folder: Path) -> Index | None:
    """The index of a cache with what its journal adds, or None where there is no cache.

    Raises:
        UserError: it is damaged, or of another version.
    """
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        version = content.pop("format")
        if version != FORMAT:
            raise UserError(
                f"{path} is of the format {version}, this Carrara writes {FORMAT}: remove {folder}.",
                key=str(path),
                code="newer",
            )
        content["shards"] = [Shard(**shard) for shard in content["shards"]]
        content["places"] = {key: (int(shard), int(row)) for key, (shard, row) in content["places"].items()}
        content["shape"] = tuple(content["shape"])
        index = Index(**content)
        _replay(folder / JOURNAL, text, index)
        return index
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is damaged ({error}): remove {folder} and encode again.", key=str(path), code="damaged"
        ) from None


def _replay(journal: Path, text: str, index: Index) -> None:
    """Add what a journal holds to the index whose text it continues; a line that was cut short counts for nothing."""
    if not journal.is_file():
        return
    first, *lines = journal.read_text(encoding="utf-8").split("\n")[:-1]
    if first != digest(json_bytes(text)).hexdigest():
        return
    for line in lines:
        entry = json.loads(line)
        index.add(entry["shard"] and Shard(**entry.pop("shard")), **entry)


def write_index(folder: Path, index: Index) -> None:
    """Write the index whole, unless that text is there already; it has no journal then."""
    path, content = folder / INDEX, json_bytes(index.text())
    if not path.is_file() or path.read_bytes() != content:
        write_whole(path, content)
    (folder / JOURNAL).unlink(missing_ok=True)


def start_journal(folder: Path, index: Index) -> None:
    """Write the index whole, and the beginning of its journal."""
    write_index(folder, index)
    write_whole(folder / JOURNAL, f"{digest(json_bytes(index.text())).hexdigest()}\n".encode())


def append_shard(
    folder: Path, index: Index, shard: Shard | None, keys: Sequence[str], unreadable: Mapping[str, str], posterior: str
) -> None:
    """Add a shard, whose file is there, to the index and to its journal; see `Index.add`."""
    index.add(shard, keys, unreadable, posterior)
    entry = {"shard": shard and asdict(shard), "keys": keys, "unreadable": unreadable, "posterior": posterior}
    append_line(folder / JOURNAL, json.dumps(entry, ensure_ascii=False))


def digest(content: bytes = b"") -> hashlib.blake2b:
    """By which files are known: BLAKE2b of 32 hexadecimal digits, of some content so far."""
    return hashlib.blake2b(content, digest_size=16)


def damaged_shard(folder: Path, shard: Shard, whole: bool = True) -> str | None:
    """Why a shard cannot be used, or None.

    Args:
        whole: read it and compare its checksum (a second for each GB), beyond its size.
    """
    path = folder / shard.file
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != shard.size:
        return f"{path} is cut short ({size:,} of {shard.size:,} bytes)"
    if not whole:
        return None
    if not shard.checksum:
        return f"{path} was written by an older Carrara, without a checksum"
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, digest).hexdigest()
    except OSError as error:
        return f"{path} cannot be read ({error.strerror or error})"
    return None if found == shard.checksum else f"{path} is damaged (its checksum is not the one in {INDEX})"


def pack(posterior: Posterior) -> tuple[str, dict[str, Tensor]]:
    """A posterior as its kind and tensors [B, …] on the CPU.

    Raises:
        UserError: it is of a kind that cannot be stored and drawn from again.
    """
    kind: str
    tensors: Mapping[str, Tensor]
    if isinstance(posterior, DiagonalGaussian):
        kind, tensors = "gaussian", {"mean": posterior.mean, "log_variance": posterior.log_variance}
    elif isinstance(posterior, Codes):
        kind, tensors = "codes", {"indices": posterior.indices.int(), "latent": posterior.latent}
    elif isinstance(posterior, Exact):
        kind, tensors = "exact", {"latent": posterior.latent}
    else:
        raise UserError(
            f"a codec whose posterior is of the type {type(posterior).__name__} cannot be cached: DiagonalGaussian, "
            "Codes and Exact can be stored and drawn from again.",
            key="codec",
            code="unsupported",
        )
    return kind, {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def unpack(kind: str, tensors: Mapping[str, Tensor]) -> Posterior:
    """The posterior that `pack` took apart; of codes, their latent."""
    if kind == "gaussian":
        return DiagonalGaussian(tensors["mean"], tensors["log_variance"])
    return Exact(tensors["latent"])
