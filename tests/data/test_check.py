"""The data check on data sets whose contents are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from carrara.data.check import check_data
from tests.data.builders import Contents, encoded, files, folder, picture, png
from tests.errors import refused


def test_a_sound_folder(tmp_path: Path) -> None:
    contents: Contents = {f"{c}/{i}.png": png(10 * k + i, 33, 40) for k, c in enumerate("ab") for i in range(4)}
    report = check_data(folder(tmp_path, contents), batch_size=4, steps=10, images_per_second=20)
    assert report.ok
    assert report.images == report.looked_at == 8
    assert report.classes == {"a": 4, "b": 4}
    assert report.sizes["width"] == [40, 40, 40]
    assert report.sizes["shorter_side"] == [33, 33, 33]
    assert report.sizes["aspect"] == [1.212, 1.212]
    assert report.modes == {"RGB": 8}
    assert report.suggested == {"resolution": [32, 32], "channels": 3}
    # 10 steps of 4 over 8 images; 40 images at 20 a second are 2 s.
    assert report.plan == {"batch_size": 4, "steps": 10, "epochs": 5.0, "hours": round(2 / 3600, 3)}
    assert "32×32" in report.prepared
    assert report.exact_duplicates == report.near_duplicates == []


def test_captions_are_counted(tmp_path: Path) -> None:
    contents = files(4, "{}.png")
    for i, text in enumerate(["one", "one", "a b c d", ""]):
        contents[f"{i}.txt"] = text
    report = check_data(folder(tmp_path, contents), batch_size=1)
    assert report.captions == {"count": 4, "empty": 1, "distinct": 3, "words": [0, 1, 4]}
    assert "captions are empty: 1 of 4." in report.warnings


def test_too_few_images_is_a_problem(tmp_path: Path) -> None:
    report = check_data(folder(tmp_path, files(3)), batch_size=4)
    assert not report.ok
    assert "fewer than one batch of 4" in report.problems[0]


def test_unreadable_images_are_a_problem_above_the_limit(tmp_path: Path) -> None:
    path = folder(tmp_path, {**files(9), "bad.png": b"", "cut.png": png(1, 64, 64)[:500]})
    report = check_data(path, batch_size=1)
    assert not report.ok
    assert report.unreadable.keys() == {"bad.png", "cut.png"}
    assert "2 of 11 images" in report.problems[0]
    lenient = check_data(path, batch_size=1, unreadable_limit=0.5)
    assert lenient.ok
    assert "skipped" in lenient.warnings[0]


def test_nothing_readable_is_still_a_report(tmp_path: Path) -> None:
    report = check_data(folder(tmp_path, {f"{i}.png": b"" for i in range(3)}), batch_size=1, preview=tmp_path / "p.png")
    assert not report.ok
    assert not (tmp_path / "p.png").exists()


def test_duplicates_are_named(tmp_path: Path) -> None:
    smooth = picture(5, 8, 8).resize((64, 64), Image.Resampling.BICUBIC)
    contents: Contents = {
        "a.png": encoded(smooth),
        "b.bmp": encoded(smooth, "bmp"),
        "c.jpg": encoded(smooth, "jpeg"),
        "d.png": png(7, 64, 64),
    }
    report = check_data(folder(tmp_path, contents), batch_size=1)
    assert report.exact_duplicates == [["a.png", "b.bmp"]]
    assert report.near_duplicates == [["a.png", "c.jpg"]]
    assert "exact duplicates: 2 images in 1 group." in report.warnings


def test_warnings_of_what_training_would_do(tmp_path: Path) -> None:
    contents: Contents = {
        "a/small.png": png(1, 8, 8),
        "a/wide.png": png(2, 40, 120),
        "a/clear.png": encoded(picture(3, 40, 40).convert("RGBA")),
        "a/blank.png": encoded(Image.new("RGB", (40, 40), "white")),
        **{f"b/{i}.png": encoded(picture(10 + i, 40, 40).convert("CMYK"), "jpeg") for i in range(50)},
    }
    report = check_data(folder(tmp_path, contents), resolution=(32, 32), channels=1, batch_size=1)
    text = "\n".join(report.warnings)
    for sentence in (
        "50 images: CMYK to RGB.",
        "1 of 54 images would be enlarged to 32×32.",
        "67% at most",  # of 40×120 a square keeps a third
        "1 of 54 images would be laid on white, for their transparency.",
        " of 54 images would lose their colour.",
        "the classes are uneven: the rarest has 4 images, the most frequent 50.",
        "images look blank: 1, the first is a/blank.png.",
    ):
        assert sentence in text


def test_gray_pictures_suggest_one_channel(tmp_path: Path) -> None:
    contents: Contents = {
        "l.png": encoded(picture(1).convert("L")),
        "rgb.png": encoded(picture(2).convert("L").convert("RGB")),
    }
    report = check_data(folder(tmp_path, contents), batch_size=1)
    assert report.modes == {"L": 1, "RGB": 1, "gray in RGB": 1}
    assert report.suggested["channels"] == 1


@pytest.mark.parametrize(("side", "suggested"), [(5, 5), (8, 8), (31, 16), (300, 256), (900, 256)])
def test_the_suggested_resolution_enlarges_nothing(tmp_path: Path, side: int, suggested: int) -> None:
    Image.new("L", (side + 3, side)).save(tmp_path / "a.png")
    assert check_data(tmp_path, batch_size=1).suggested["resolution"] == [suggested, suggested]


def test_a_sample_looks_at_evenly_spaced_pictures(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = check_data(folder(tmp_path, files(50)), sample=5, progress=lambda done, total: calls.append((done, total)))
    assert (report.images, report.looked_at) == (50, 5)
    assert calls == [(5, 5)]


@pytest.mark.parametrize("data", ["digits", "folder"])
def test_the_preview_shows_before_and_after(tmp_path: Path, data: str) -> None:
    path = "digits" if data == "digits" else str(folder(tmp_path / "set", {"a.png": encoded(picture(1, 60, 90))}))
    target = tmp_path / "preview.png"
    check_data(path, batch_size=1, resolution=(16, 16), preview=target)
    sheet = Image.open(target)
    assert sheet.mode == "RGB"
    before, after = (sheet.crop((x, 24, x + 128, 80)).getextrema() for x in (24, 304))
    # Both halves show something: neither white paper alone nor, for 17 gray levels, near-black.
    assert all(low < 128 < high for low, high in (*before, *after))


def test_json_holds_everything(tmp_path: Path) -> None:
    report = check_data(folder(tmp_path, files(3)), batch_size=4)
    data = json.loads(report.to_json())
    assert data["ok"] is False
    assert data["problems"] == report.problems
    assert set(data) - {"ok"} == set(vars(report))


def test_the_report_is_the_same_each_time(tmp_path: Path) -> None:
    path = folder(tmp_path, files(9))
    first, second = (json.loads(check_data(path).to_json()) for _ in range(2))
    del first["timings"], second["timings"]
    assert first == second


@pytest.mark.parametrize("name", ["batch_size", "steps", "sample"])
def test_impossible_numbers_are_refused(tmp_path: Path, name: str) -> None:
    with refused("invalid", key=name):
        check_data(tmp_path, **{name: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan")])
def test_an_impossible_speed_is_refused(tmp_path: Path, speed: float) -> None:
    with refused("invalid", key="images_per_second"):
        check_data(tmp_path, images_per_second=speed)


def test_a_preview_that_cannot_be_written(tmp_path: Path) -> None:
    path = folder(tmp_path / "set", files(3))
    for target in (tmp_path / "no" / "p.png", tmp_path / "p.unknown"):
        with refused("resources", key=str(target)):
            check_data(path, batch_size=1, preview=target)
