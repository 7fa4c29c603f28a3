"""Weights as people have them: several tables in a file, wrapped names, shards, half precision, damaged values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from carrara.convert import Hints, check_outputs, export_model, import_model
from carrara.model import DiffusionModel
from tests.convert.models import codec, model, pictures, same_weights
from tests.errors import refused

STEM = "diffusion_pytorch_model"


def exported(made: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of an exported checkpoint."""
    export_model(made, path)
    content: dict[str, dict[str, Tensor]] = torch.load(path, weights_only=True)
    return content["state_dict"]


@pytest.mark.parametrize("mean", ["ema", "ema_state_dict", "state_dict_ema"])
@pytest.mark.parametrize("last", ["model", "state_dict"])
@pytest.mark.parametrize("mean_first", [True, False])
def test_the_running_mean_is_taken_in_either_order(mean: str, last: str, mean_first: bool, tmp_path: Path) -> None:
    first = codec("kl")
    weights = exported(first, tmp_path / "a.ckpt")
    tables = {mean: weights, last: {key: 2 * value for key, value in weights.items()}}
    torch.save(tables if mean_first else dict(reversed(tables.items())), tmp_path / "a.ckpt")
    imported = import_model(tmp_path / "a.ckpt")
    assert (imported.report["weights"], imported.report["not_taken"]) == (mean, (last,))
    assert same_weights(first, imported.model)  # type: ignore[arg-type]
    other = import_model(tmp_path / "a.ckpt", Hints(last_weights=True))
    assert (other.report["weights"], other.report["not_taken"]) == (last, (mean,))
    assert not same_weights(first, other.model)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_key(value: float, tmp_path: Path) -> None:
    weights = exported(codec("vq"), tmp_path / "a.ckpt")
    for key in ("encoder.conv_in.weight", "quantize.embedding.weight"):
        changed = weights[key].clone()
        changed.view(-1)[3] = value
        torch.save({"state_dict": {**weights, key: changed}}, tmp_path / "a.ckpt")
        with refused("damaged", key=key):
            import_model(tmp_path / "a.ckpt")
    made = codec("kl")
    with torch.no_grad():
        made.decoder.out.weight.fill_(value)
    with refused("damaged", key="decoder.out.weight"):
        export_model(made, tmp_path / "b.ckpt")
    assert not (tmp_path / "b.ckpt").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64])
def test_quantised_weights_are_refused_by_key(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = exported(codec("kl"), tmp_path / "a.ckpt")
    key = "decoder.conv_out.weight"
    torch.save({"state_dict": {**weights, key: weights[key].to(dtype)}}, tmp_path / "a.ckpt")
    with refused("unsupported", key=key):
        import_model(tmp_path / "a.ckpt")


def test_weights_of_a_folder_that_are_not_finite_are_refused_by_key(tmp_path: Path) -> None:
    export_model(codec("kl"), tmp_path / "f")
    path = tmp_path / "f" / f"{STEM}.safetensors"
    weights = load_file(path)
    weights["quant_conv.bias"][0] = float("nan")
    save_file(weights, path)
    with refused("damaged", key="quant_conv.bias"):
        import_model(tmp_path / "f")


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("variant", ["", ".fp16", ".bf16"])
def test_shards_and_variants_of_a_folder_are_read(ending: str, variant: str, tmp_path: Path) -> None:
    first = codec("kl")
    export_model(first, tmp_path / "f")
    path = tmp_path / "f" / f"{STEM}.safetensors"
    weights = load_file(path)
    path.unlink()

    def write(part: dict[str, Tensor], name: str) -> None:
        target = tmp_path / "f" / name
        save_file(part, target) if ending == "safetensors" else torch.save(part, target)

    write(weights, f"{STEM}{variant}.{ending}")
    assert same_weights(first, import_model(tmp_path / "f").model)  # type: ignore[arg-type]
    (tmp_path / "f" / f"{STEM}{variant}.{ending}").unlink()
    names, keys = [f"{STEM}{variant}-0000{n}-of-00002.{ending}" for n in (1, 2)], sorted(weights)
    parts = keys[:7], keys[7:]
    for name, part in zip(names, parts, strict=True):
        write({key: weights[key] for key in part}, name)
    index = {"weight_map": {key: name for name, part in zip(names, parts, strict=True) for key in part}}
    where = tmp_path / "f" / f"{STEM}.{ending}.index{variant}.json"
    where.write_text(json.dumps(index))
    assert same_weights(first, import_model(tmp_path / "f").model)  # type: ignore[arg-type]
    (tmp_path / "f" / names[1]).unlink()
    with refused("missing"):
        import_model(tmp_path / "f")
    bad: dict[str, Any]
    for bad in ({}, {"weight_map": []}, {"weight_map": {"a": "../b.bin"}}):
        where.write_text(json.dumps(bad))
        with refused("damaged", key=str(where)):
            import_model(tmp_path / "f")


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_names_of_wrappers_are_dropped_wherever_they_are(wrapper: str, tmp_path: Path) -> None:
    first = codec("kl")
    export_model(first, tmp_path / "f")
    path = tmp_path / "f" / f"{STEM}.safetensors"
    save_file({wrapper + key: value for key, value in load_file(path).items()}, path)
    assert same_weights(first, import_model(tmp_path / "f").model)  # type: ignore[arg-type]

    ours = model("a class", first)
    weights = exported(ours, tmp_path / "m.ckpt")
    for part in ("", "model.diffusion_model.", "first_stage_model."):
        wrapped = {k.replace(part, part + wrapper, 1) if k.startswith(part) else k: v for k, v in weights.items()}
        torch.save({"state_dict": wrapped}, tmp_path / "m.ckpt")
        again = import_model(tmp_path / "m.ckpt").model
        assert isinstance(again, DiffusionModel)
        assert torch.equal(pictures(again), pictures(ours))
    key = "model.diffusion_model.out.2.bias"
    torch.save({"state_dict": {**weights, wrapper + key: weights[key]}}, tmp_path / "m.ckpt")
    with refused("conflict"):
        import_model(tmp_path / "m.ckpt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_in_half_precision_is_read_beside_its_config(dtype: torch.dtype, tmp_path: Path) -> None:
    ours = model("a class", codec("kl", scale=0.18215))
    weights = exported(ours, tmp_path / "m.ckpt")
    torch.save({"state_dict": {key: value.to(dtype) for key, value in weights.items()}}, tmp_path / "m.ckpt")
    again = import_model(tmp_path / "m.ckpt").model
    assert isinstance(again, DiffusionModel)
    assert again.schedule.spec == ours.schedule.spec
    assert torch.equal(again.codec.latent_scale, ours.codec.latent_scale)  # type: ignore[attr-defined]


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".safetensors"])
def test_only_files_of_an_earlier_export_are_replaced(ending: str, tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("model: mine\n")
    with refused("exists", key=str(config)):
        export_model(codec("kl"), tmp_path / f"mine{ending}")
    assert config.read_text() == "model: mine\n"
    config.unlink()
    weights = tmp_path / f"mine{ending}"
    weights.write_bytes(b"mine")
    with refused("exists", key=str(weights)):
        export_model(codec("kl"), weights)
    assert weights.read_bytes() == b"mine"
    weights.unlink()
    export_model(codec("kl"), weights)
    export_model(codec("kl"), weights)

    settings = tmp_path / "mine.json"
    settings.write_text("{}")
    with refused("exists", key=str(settings)):
        export_model(model(), weights, "guided-diffusion")
    assert settings.read_text() == "{}"


def test_a_first_stage_of_diffusers_in_a_file_is_named_as_such(tmp_path: Path) -> None:
    export_model(codec("kl"), tmp_path / "f")
    with refused("unsupported", key=str(tmp_path / "f" / f"{STEM}.safetensors")):
        import_model(tmp_path / "f" / f"{STEM}.safetensors")


def test_answers_that_do_not_fit_the_model_are_refused_by_array(tmp_path: Path) -> None:
    made, path = model("a class"), tmp_path / "answers.npz"
    x = np.zeros((2, 3, 16, 16), np.float32)
    good: dict[str, Any] = {"x": x, "t": np.zeros(2), "y": np.zeros(2), "out": x}
    for key, changed in (
        ("x", x[:, :2]),
        ("x", x[0]),
        ("x", x[:, :, :15]),
        ("t", np.zeros(3)),
        ("y", np.zeros((2, 1))),
        ("out", x[:1]),
    ):
        np.savez(path, **(good | {key: changed}))
        with refused("shape", key=key):
            check_outputs(made, path)
    np.savez(path, **(good | {"y": np.array([0, 9])}))
    with refused("invalid", key="y"):
        check_outputs(made, path)
    np.savez(path, x=x, t=np.zeros(2), out=x)
    with refused("missing", key="y"):
        check_outputs(made, path)
    np.savez(path, x=x[:, :2], out=x)
    with refused("shape", key="x"):
        check_outputs(codec("kl"), path)
    for content in (b"", b"PK", b"\x93NUMPY"):
        path.write_bytes(content)
        with refused("damaged", key=str(path)):
            check_outputs(made, path)
