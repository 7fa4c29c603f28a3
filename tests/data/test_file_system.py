"""The file system's refusals and odd names: one sentence with the name, and no work lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from carrara import cli, codecs
from carrara.codecs import Identity
from carrara.data import Batches, Preprocess, encode_latents, open_latents, open_source
from tests.data.builders import files, folder, jsonl
from tests.data.test_latents import learned
from tests.errors import refused

NOBODY = 65534


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody may enter, unlike pytest's own."""
    made = Path(tempfile.mkdtemp())
    made.chmod(0o755)
    yield made
    for path in (made, *made.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(made)


@contextmanager
def without_rights() -> Iterator[None]:
    """As a user who is not root, whom nothing is refused."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("closed", ["set", "set/a", "set/b"])
@pytest.mark.parametrize("opened", ["set", "set/a"])
def test_folders_without_permission_are_named(closed: str, opened: str, place: Path) -> None:
    folder(place / "set", files(3, "a/{}.png") | files(3, "b/{}.png"))
    (place / closed).chmod(0)
    with without_rights():
        if opened == "set/a" and closed == "set/b":
            assert len(open_source(place / opened)) == 3
            return
        with pytest.raises(ValueError, match="may not be read") as caught:
            open_source(place / opened)
    assert str(place / closed) in str(caught.value)


def test_files_without_permission_are_unreadable_images(place: Path) -> None:
    folder(place / "set", files(4))
    (place / "set" / "001.png").chmod(0)
    with without_rights():
        source = open_source(place / "set", unreadable_limit=0.5)
        batch = Batches(source, Preprocess(8, 8), batch_size=4).at(0)
    assert "001.png" not in batch.names
    assert source.unreadable == {1: "Permission denied"}


@pytest.mark.parametrize("what", ["new", "its own cache"])
def test_a_read_only_cache_is_refused_before_anything_is_encoded(what: str, place: Path) -> None:
    source, cache = open_source(folder(place / "set", files(4))), place / "cache"
    cache.mkdir()
    if what == "its own cache":
        encode_latents(source, Preprocess(8, 8), Identity(), cache)
    cache.chmod(0o555)
    with without_rights():
        with refused("resources", key=str(cache)):
            encode_latents(source, Preprocess(8, 8), Identity(), cache)
        if what == "its own cache":
            assert len(open_latents(cache, source=source)) == 4  # reading needs no right to write


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ELOOP, errno.ENAMETOOLONG])
def test_what_no_command_expects_of_the_file_system_is_a_sentence(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr("carrara.cli.app.app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"carrara: some/file: {os.strerror(number)}.\n"


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "some/file")

    monkeypatch.setattr("carrara.cli.app.app", fail)
    with pytest.raises(FileNotFoundError):
        cli.main()


def command(*words: str | Path, terminal: str = "utf-8:strict") -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONIOENCODING": terminal}
    return subprocess.run(
        [sys.executable, "-m", "carrara", "data", *words], capture_output=True, timeout=120, env=environment
    )


def odd(root: Path) -> Path:
    """File, class and folder names that are not UTF-8, or look like markup; one picture cannot be read."""
    base = root / os.fsdecode(b"s\xe9t [/INST]")
    folder(base, files(6, "[/b] {}.png"))
    classes = folder(root / "classes", {**files(6, "[red]/{}.png"), **files(6, "other/{}.png")})
    (classes / "other").rename(classes / os.fsdecode(b"caf\xe9"))
    (classes / "[red]" / "0.png").rename(classes / "[red]" / os.fsdecode(b"\xff.png"))
    (classes / "[red]" / os.fsdecode(b"\xfe.png")).write_bytes(b"no picture")
    return base


@pytest.mark.parametrize("terminal", ["utf-8:strict", "ascii:strict"])
def test_names_that_are_not_utf8_are_shown_escaped_and_no_work_is_lost(terminal: str, tmp_path: Path) -> None:
    base, classes = odd(tmp_path), tmp_path / "classes"
    codecs.save(learned("kl"), tmp_path / "codec")
    for path in (base, classes):
        checked = command("check", path, "--batch-size", "4", "--unreadable-limit", "0.1", terminal=terminal)
        assert checked.returncode == 0, checked.stderr.decode()
        report = command("check", path, "--batch-size", "4", "--unreadable-limit", "0.1", "--json", terminal=terminal)
        content = json.loads(report.stdout)
        assert content["images"] == (6 if path == base else 13)
    assert b"[red]" in checked.stdout
    assert b"caf\\udce9" in checked.stdout
    assert content["unreadable"] == {"[red]/\\udcfe.png": "no image that Pillow can read"}
    words = ("--codec", tmp_path / "codec", "--resolution", "8", "--unreadable-limit", "0.1", "--json")
    for path in (base, classes):
        cache = tmp_path / f"{path.name} latents"
        for left in (True, False):
            made = command("encode", path, "--out", cache, *words, terminal=terminal)
            assert made.returncode == 0, made.stderr.decode()
            assert bool(json.loads(made.stdout)["encoded"]) is left
        assert len(open_latents(cache, source=open_source(path, unreadable_limit=0.1))) == (6 if path == base else 13)


def test_half_surrogates_in_captions_survive_a_cache(tmp_path: Path) -> None:
    rows = [{"file_name": f"{i:03d}.png", "text": text} for i, text in enumerate(["\ud83d", "a\udce9", "猫"])]
    source = open_source(folder(tmp_path / "set", files(3) | {"metadata.jsonl": jsonl(*rows)}))
    encode_latents(source, Preprocess(8, 8), Identity(), tmp_path / "cache")
    assert open_latents(tmp_path / "cache", source=source).captions == ["\ufffd", "a\ufffd", "猫"]
