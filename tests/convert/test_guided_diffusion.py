"""Checkpoints of guided-diffusion as models of Carrara, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from carrara.classifier import Classifier
from carrara.convert import Hints, check_outputs, export_model, import_model
from carrara.interop import guided_diffusion
from carrara.model import DiffusionModel
from carrara.networks import UNet, UNetParams
from carrara.presets.published import PUBLISHED
from tests.errors import refused
from tests.shared import shared

CASES = {
    "a1_unet_classcond_learnsigma": "out",
    "a2_unet_uncond_legacyattn": "out",
    "a3_unet_newattn": "out",
    "a4_superres": "out",
    "b1_classifier_attnpool": "logits",
}


def original(case: str, folder: Path) -> tuple[Path, dict[str, Any], Path]:
    """A golden case as its owner would have it: the checkpoint, the arguments, and the original's answers."""
    tensors = load_file(shared("golden", f"{case}.safetensors"))
    spec = json.loads(shared("golden", f"{case}.json").read_text())["config"]["kwargs"]
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    torch.save(weights, folder / "model.pt")
    arrays: dict[str, Any] = {
        key.removeprefix("input."): value.numpy() for key, value in tensors.items() if key.startswith("input.")
    }
    np.savez(folder / "answers.npz", **arrays, out=tensors[f"output.{CASES[case]}"].numpy())
    return folder / "model.pt", spec, folder / "answers.npz"


def told(spec: dict[str, Any]) -> dict[str, Any]:
    """The arguments that shapes do not tell."""
    keys = ("image_size", "num_heads", "num_head_channels", "use_new_attention_order")
    return {"use_new_attention_order": False} | {key: spec[key] for key in keys if key in spec}


@pytest.mark.parametrize("case", CASES)
def test_an_imported_checkpoint_answers_as_the_original_did(case: str, tmp_path: Path) -> None:
    path, spec, answers = original(case, tmp_path)
    imported = import_model(path, Hints(arguments=told(spec)))
    assert imported.report["largest_difference_there_and_back"] == 0
    parity = check_outputs(imported.model, answers)
    assert parity["equal"]
    assert parity["largest_difference"] <= 2e-5  # four times the rounding that the original itself shows
    imported.save(tmp_path / "model")
    kind: type[Classifier | DiffusionModel] = Classifier if case.startswith("b") else DiffusionModel
    again = kind.load(tmp_path / "model")
    assert check_outputs(again, answers) == parity


def test_a_wrong_argument_shows_in_the_check(tmp_path: Path) -> None:
    path, spec, answers = original("a3_unet_newattn", tmp_path)
    wrong = {**told(spec), "use_new_attention_order": False}
    assert not check_outputs(import_model(path, Hints(arguments=wrong)).model, answers)["equal"]


def test_out_and_in_again_keeps_every_bit(tiny_run: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    params = UNetParams(
        image_size=(16, 16),
        channels=32,
        channel_mult=(1, 2),
        num_classes=4,
        qkv_order="legacy",
        attention=(2,),
        head_channels=32,
    )
    model = DiffusionModel.load(tiny_run)
    model.network = UNet(params)
    for ending in (".pt", ".safetensors"):
        report = export_model(model, tmp_path / f"out{ending}")
        arguments = json.loads((tmp_path / "out.json").read_text())["arguments"]
        read = load_file(tmp_path / "out.safetensors") if ending != ".pt" else torch.load(tmp_path / "out.pt")
        back = guided_diffusion.load_unet(read, **arguments)
        ours = model.network.state_dict()
        assert all(torch.equal(value, ours[key]) for key, value in back.state_dict().items())
        assert report["tensors"] == len(read)


def test_a_published_shape_is_recognised_by_itself(tmp_path: Path) -> None:
    # The smallest published network: 53 million random weights in float16, as some copies are stored.
    network = PUBLISHED["improved-cifar10"].network()
    torch.save({k: v.half() for k, v in guided_diffusion.state_dict(network).items()}, tmp_path / "cifar10.pt")
    imported = import_model(tmp_path / "cifar10.pt")
    assert imported.report["recognised"] == ["improved-cifar10"]
    assert isinstance(imported.model, DiffusionModel)
    assert imported.model.schedule.spec["steps"] == 4000
    assert float(imported.model.schedule.network_time(4000)) == pytest.approx(3999 / 4)
    with refused("unknown", key="--as"):
        import_model(tmp_path / "cifar10.pt", Hints("adm-imagnet-64"))
