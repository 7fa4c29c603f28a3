"""`carrara import` and `carrara export`: what they write, report and refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from carrara import codecs
from carrara.codecs import Autoencoder, LearnedCodec
from carrara.convert import export_model
from carrara.model import DiffusionModel
from carrara.networks.autoencoder import AutoencoderParams
from tests.cli.conftest import Command
from tests.convert.models import codec, model, nothing_left, pictures
from tests.convert.test_compvis import GOLDEN
from tests.convert.test_compvis import original as golden
from tests.convert.test_guided_diffusion import original, told
from tests.errors import refused
from tests.test_classifier import untrained


def test_the_commands(
    carrara: Command,
    refused: Callable[..., str],
    tmp_path: Path,
) -> None:
    path, spec, answers = original("a1_unet_classcond_learnsigma", tmp_path)
    sets = [word for key, value in told(spec).items() for word in ("--set", f"{key}={value}")]
    result = carrara("import", path, *sets, "--check", answers, "--out", tmp_path / "m", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["check"]["equal"]
    assert carrara("sample", tmp_path / "m", "--steps", "2", "--count", "2", "--out", tmp_path / "s").returncode == 0
    result = carrara("export", tmp_path / "m", "--out", tmp_path / "back.pt")
    assert result.returncode == 0, result.stderr
    assert "num head channels" in result.stdout or "num_head_channels" in result.stdout
    first, again = torch.load(path), torch.load(tmp_path / "back.pt")
    assert all(torch.equal(value, again[key]) for key, value in first.items())

    assert "name them" in refused("import", path, "--set", "image_size=16", "--out", tmp_path / "n")
    assert "fits no published model" in refused("import", path, "--out", tmp_path / "n")
    assert "is there already" in refused("import", path, *sets, "--out", tmp_path / "m")
    assert "there is no checkpoint" in refused("import", tmp_path / "none.pt")
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:5000])
    assert "cut short" in refused("import", tmp_path / "cut.pt")
    torch.save({"weights": torch.nn.Linear(1, 1)}, tmp_path / "code.pt")
    assert "pickled code" in refused("import", tmp_path / "code.pt")
    assert ".pth nor .safetensors" in refused("export", tmp_path / "m", "--out", tmp_path / "back.bin")
    np.savez(tmp_path / "half.npz", x=np.zeros((1, 3, 16, 16)))
    assert "lacks the array 't'" in refused("import", path, *sets, "--check", tmp_path / "half.npz", "--out", "n")


def test_codecs_and_latent_models_through_the_commands(
    carrara: Command, refused: Callable[..., str], tmp_path: Path
) -> None:
    """Out and in again in each layout: the pictures of the first model, bit for bit."""
    ours, first = model("a class", codec("kl")), codec("vq")
    ours.save(tmp_path / "model")
    codecs.save(first, tmp_path / "codec")

    def said(*words: object) -> Any:
        result = carrara(*words, "--json")
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    for kind, out, layout in (
        ("model", "a.ckpt", "compvis"),
        ("model", "b", "diffusers"),
        ("codec", "c.pt", "taming"),
        ("codec", "d", "diffusers"),
    ):
        assert said("export", tmp_path / kind, "--out", tmp_path / out)["layout"] == layout
        report = said("import", tmp_path / out, "--out", tmp_path / f"{kind}-{layout}")
        assert report["layout"] == layout
        assert report["largest_difference_there_and_back"] == 0
    for layout in ("compvis", "diffusers"):
        assert torch.equal(pictures(DiffusionModel.load(tmp_path / f"model-{layout}")), pictures(ours))
    for layout in ("taming", "diffusers"):
        again = codecs.load(tmp_path / f"codec-{layout}")
        assert isinstance(again, LearnedCodec)
        assert torch.equal(pictures(again), pictures(first))
    assert "makes a model folder of it" in refused("sample", tmp_path / "b", "--out", tmp_path / "s")


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_first_stages_through_the_command(case: str, carrara: Command, tmp_path: Path) -> None:
    path, arguments, answers = golden(case, tmp_path)
    sets = [f"--set={key}={json.dumps(value)}" for key, value in arguments.items()]
    words = ("import", path, *sets, "--check", answers, "--out", tmp_path / "codec", "--json")
    result = carrara(*words)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["check"]["equal"]


def test_nothing_is_left_behind_where_an_import_fails(refused: Callable[..., str], tmp_path: Path) -> None:
    export_model(model("a class", codec()), tmp_path / "p")
    export_model(codec("vq"), tmp_path / "v.ckpt")
    (tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "v.ckpt").read_bytes()[:3000])
    torch.save({"state_dict": {"conv.weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    there = {path.name for path in tmp_path.iterdir()}
    out = tmp_path / "out"
    assert "there is no checkpoint" in refused("import", tmp_path / "p", "--out", out)
    assert "cut short" in refused("import", tmp_path / "cut.ckpt", "--out", out)
    assert "fits no known layout" in refused("import", tmp_path / "other.ckpt", "--out", out)
    (tmp_path / "v.yaml").unlink()
    assert "fits no published first stage" in refused("import", tmp_path / "v.ckpt", "--out", out)
    wrong = ("import", tmp_path / "v.ckpt", "--as", "ldm-vq-f6", "--out", out)
    assert "did you mean 'ldm-vq-f" in refused(*wrong)
    assert nothing_left(tmp_path, *there - {"v.yaml"})


@pytest.mark.parametrize("out", ["a.ckpt", "a.safetensors", "folder"])
def test_what_no_layout_holds_is_not_sent_to_another(out: str, tmp_path: Path) -> None:
    plain = Autoencoder(AutoencoderParams(in_channels=1, channels=8, channel_mult=(1,), latent_channels=2))
    with refused("unsupported", key="layout"):
        export_model(plain, tmp_path / out)
    assert nothing_left(tmp_path)


def test_a_classifier_goes_into_a_file(tmp_path: Path) -> None:
    with refused("unsupported", key="out"):
        export_model(untrained(), tmp_path / "folder")
    assert nothing_left(tmp_path)
