"""The one loader, and what a folder holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from carrara import Classifier, DiffusionModel, codecs, load, weights
from carrara.codecs import Autoencoder
from carrara.devices import resolve_device
from carrara.networks.autoencoder import AutoencoderParams
from tests.errors import refused
from tests.test_classifier import untrained


@pytest.fixture
def codec(tmp_path: Path) -> Path:
    params = AutoencoderParams(in_channels=1, channels=8, channel_mult=(1,), latent_channels=1, norm_groups=4)
    codecs.save(Autoencoder(params), tmp_path / "codec-run" / "model")
    return tmp_path / "codec-run"


def test_whatever_is_saved_is_loaded(tiny_run: Path, codec: Path, tmp_path: Path) -> None:
    untrained().save(tmp_path / "classifier")
    assert isinstance(load(tiny_run), DiffusionModel)
    assert isinstance(load(tiny_run / "model"), DiffusionModel)
    assert isinstance(load(tmp_path / "classifier"), Classifier)
    assert isinstance(load(codec), Autoencoder)
    assert isinstance(load(codec / "model"), Autoencoder)


def test_pictures_in_a_folder_called_model_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "0.png").touch()
    assert not weights.holds(tmp_path)
    with refused("missing", str(tmp_path)):
        load(tmp_path)


def test_kinds_are_told_apart(codec: Path, tiny_run: Path) -> None:
    assert weights.holds(codec, "codec")
    assert not weights.holds(codec, "diffusion")
    assert weights.holds(tiny_run, "diffusion")
    assert not weights.holds(tiny_run, "codec")
    with refused("mismatch", str(tiny_run / "model")):
        codecs.load(tiny_run)


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with refused("missing", str(tmp_path / "nowhere")):
        load(tmp_path / "nowhere")
    (tmp_path / "file.ckpt").touch()
    with refused("unsupported", str(tmp_path / "file.ckpt")):
        load(tmp_path / "file.ckpt")
    (tmp_path / "config.json").write_text(json.dumps({"format": 1, "kind": "diffussion"}))
    with refused("unknown", str(tmp_path)):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with refused("damaged", str(tmp_path / "config.json")):
        load(tmp_path)


def test_auto_is_a_device_and_others_are_refused(tiny_run: Path) -> None:
    model = load(tiny_run, "auto")
    assert isinstance(model, DiffusionModel)
    assert model.device == resolve_device()
    for word in ("moon", "cuda:99", "gpu"):
        with refused("unsupported", key="device"):
            load(tiny_run, word)
