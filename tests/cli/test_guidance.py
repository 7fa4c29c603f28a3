"""`carrara sample` with a classifier, and with an up-sampler behind it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from carrara.conditioning import LowRes
from carrara.model import DiffusionModel
from carrara.networks import UNet, UNetParams
from carrara.process import schedules
from tests.cli.conftest import Command
from tests.test_classifier import untrained


def test_a_classifier_leads_from_the_command_line(
    carrara: Command,
    refused: Callable[..., str],
    tiny_run: Path,
    tmp_path: Path,
) -> None:
    untrained().save(tmp_path / "clf")
    words = ("--classifier", tmp_path / "clf", "--steps", "3", "--json")
    result = carrara(
        "sample",
        tiny_run,
        *words,
        "--classifier-scale",
        "4",
        "--guidance",
        "1.5",
        "--label",
        "3",
        "--out",
        tmp_path / "s",
    )
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert (printed["classifier_scale"], printed["guidance"], printed["labels"]) == (4, 1.5, [3])
    assert "--classifier-scale" in refused("sample", tiny_run, "--classifier-scale", "4")
    assert "holds a diffusion model" in refused("sample", tiny_run, "--classifier", tiny_run)
    assert "holds a classifier model" in refused("sample", tmp_path / "clf")
    assert "finite" in refused("sample", tiny_run, *words, "--classifier-scale", "nan")
    (tmp_path / "clf" / "network.safetensors").write_bytes(b"short")
    assert "cut short" in refused("sample", tiny_run, *words)


@pytest.fixture
def upsampler(tmp_path: Path) -> Path:
    """An untrained up-sampler from 8x8 to 16x16 gray images conditioned on a class."""
    torch.manual_seed(0)
    params = UNetParams(
        image_size=(16, 16),
        in_channels=1,
        channels=8,
        channel_mult=(1, 1),
        blocks_per_level=1,
        attention=(),
        concat_channels=1,
        upsample_concat=True,
        head_channels=8,
    )
    network = UNet(params)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    DiffusionModel(network, schedules.linear(100), (1, 16, 16), conditioners=(LowRes((1, 16, 16)),)).save(
        tmp_path / "up"
    )
    return tmp_path / "up"


def test_a_cascade_is_one_command(
    carrara: Command, refused: Callable[..., str], tiny_run: Path, upsampler: Path, tmp_path: Path
) -> None:
    words = ("sample", tiny_run, "--steps", "3", "--label", "1", "--label", "2", "--out", tmp_path / "s")
    result = carrara(*words, "--upsampler", upsampler, "--upsampler-steps", "2", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["steps"] == 2
    with (
        Image.open(tmp_path / "s" / "seed0-00001.png") as large,
        Image.open(tmp_path / "s" / "base" / "seed0-00001.png") as base,
    ):
        assert (large.size, base.size) == ((16, 16), (8, 8))
    small = DiffusionModel.load(tiny_run).sample([1, 2], steps=3).images
    enlarged = DiffusionModel.load(upsampler).sample(count=2, steps=2, low_res=small)
    with Image.open(tmp_path / "s" / "seed0-00000.png") as large:
        pixels = torch.tensor(list(large.getdata())).reshape(16, 16)
    assert torch.equal(((enlarged.images[0, 0] + 1) * 127.5).round(), pixels.float())
    assert "--upsampler" in refused(*words, "--upsampler-steps", "2")
    assert "low-resolution images" in refused("sample", upsampler)
    assert "low_res" in refused(*words, "--upsampler", tiny_run)


def test_the_table_compares_guidance_with_and_without_a_classifier(
    carrara: Command, refused: Callable[..., str], tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("carrara.evaluation.tables.SCALES", (0.0, 2.0))
    untrained().save(tmp_path / "clf")
    words = ("evaluate", tiny_run, "--reference", "digits", "-n", "20", "--steps", "2")
    guide = ("--classifier", tmp_path / "clf")
    result = carrara(*words, *guide, "--table", "guidance", "--evaluator", "svc", "--out", tmp_path / "t")
    assert result.returncode == 0, result.stderr
    rows = [line.split(",") for line in (tmp_path / "t" / "table.csv").read_text().splitlines()[1:]]
    value = {(line, scale, figure): number for line, scale, figure, number, *_ in rows}
    assert {line for line, *_ in value} == {"classifier", "classifier-free", "both"}
    figures = {figure for *_, figure in value}
    assert {"precision", "recall", "class_accuracy"} <= figures
    for figure in figures:  # at scale 0 all three are the unconditional model
        assert len({value[line, "0", figure] for line in ("classifier", "classifier-free", "both")}) == 1
    distance = next(figure for figure in figures if "distance" in figure)
    assert len({value[line, "2", distance] for line in ("classifier", "classifier-free", "both")}) == 3
    protocol = json.loads((tmp_path / "t" / "both,_2.json").read_text())
    assert "classifier_scale" in json.dumps(protocol)

    assert "--classifier-scale" in refused(
        *words, *guide, "--classifier-scale", "2", "--table", "guidance", "--out", "t"
    )
    assert "--classifier-scale" in refused(*words, "--classifier-scale", "2")
    alone = carrara(*words, *guide, "--classifier-scale", "2", "--guidance", "0", "--json")
    assert alone.returncode == 0, alone.stderr
    stamped = next(iter(json.loads(alone.stdout).values()))["stamp"]["sampling"]
    assert (stamped["classifier_scale"], stamped["guidance"]) == (2, 0)
