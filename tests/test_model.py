"""The assembled model: sampling does not depend on company, and what is saved is what is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from carrara import DiffusionModel
from carrara.codecs import Autoencoder, Identity, KLAutoencoder, Tiled
from carrara.conditioning import ClassLabels, LowRes, build
from carrara.errors import UserError
from carrara.model import conditioner_configs
from carrara.networks import UNet, UNetParams
from carrara.networks.autoencoder import AutoencoderParams
from carrara.process import Noise, schedules
from carrara.solvers import DDIM
from tests.errors import refused


@pytest.mark.filterwarnings("ignore:what was decoded is not finite")
def test_a_picture_that_is_not_finite_is_refused_and_not_black() -> None:
    params = AutoencoderParams(in_channels=3, channels=8, channel_mult=(1,), latent_channels=2, norm_groups=4)
    codec = KLAutoencoder(params).eval()
    with torch.no_grad():
        codec.decoder.out.weight.fill_(torch.nan)
    model = replace(unconditional(), codec=codec, shape=(3, 8, 12))
    with refused("not_finite", "codec"):
        model.sample(count=2, steps=1)


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> DiffusionModel:
    return DiffusionModel.load(tiny_run)


def unconditional(predicts: str = "eps") -> DiffusionModel:
    torch.manual_seed(0)
    params = UNetParams(
        image_size=(8, 12), in_channels=2, channels=8, channel_mult=(1, 1), blocks_per_level=1, attention=()
    )
    network = UNet(params)
    for parameter in network.parameters():  # zero-initialised outputs would hide mistakes
        torch.nn.init.normal_(parameter, std=0.05)
    return DiffusionModel(network, schedules.linear(100), (2, 8, 12), predicts)  # type: ignore[arg-type]


def test_images_are_in_range_and_shaped(model: DiffusionModel) -> None:
    result = model.sample(labels=[3, 7], steps=4, guidance=2.0, seed=0)
    assert result.images.shape == (2, 1, 8, 8)
    assert result.images.dtype == torch.float32
    assert result.images.abs().max() <= 1
    assert result.labels == [3, 7]


def test_a_picture_does_not_depend_on_its_batch(model: DiffusionModel) -> None:
    together = model.sample(labels=[1, 2, 3, 4, 5], steps=3, guidance=1.5, seed=7)
    split = model.sample(labels=[1, 2, 3, 4, 5], steps=3, guidance=1.5, seed=7, batch_size=2)
    alone = model.sample(labels=[4], steps=3, guidance=1.5, seed=7, first=3)
    # The noise is the same to the bit; matrix products of another batch size round differently.
    torch.testing.assert_close(split.images, together.images, atol=2e-5, rtol=0)
    torch.testing.assert_close(alone.images[0], together.images[3], atol=2e-5, rtol=0)


def test_stochastic_solvers_are_reproducible_and_seeds_differ(model: DiffusionModel) -> None:
    one, two = (model.sample(labels=[1], steps=5, solver="ddpm", seed=1).images for _ in range(2))
    other = model.sample(labels=[1], steps=5, solver="ddpm", seed=2).images
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_start_takes_the_place_of_the_noise(model: DiffusionModel) -> None:
    scale = float(model.schedule.sigma(model.schedule.final_time))
    start = scale * Noise(5).normal((2, 1, 8, 8))
    given = model.sample(labels=[0, 1], steps=3, seed=9, start=start, solver="ddim")
    drawn = model.sample(labels=[0, 1], steps=3, seed=5, solver=DDIM())
    assert torch.equal(given.images, drawn.images)


def test_sampling_leaves_training_mode_and_gradients_as_they_were() -> None:
    model = unconditional()
    model.network.train()
    model.sample(count=1, steps=2)
    assert model.network.training
    assert all(p.grad is None and p.requires_grad for p in model.network.parameters())


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
def test_save_and_load_are_inverse(tmp_path: Path, predicts: str) -> None:
    model = unconditional(predicts)
    model.sampling = {"solver": "ddim", "steps": 3}
    model.save(tmp_path)
    loaded = DiffusionModel.load(tmp_path)
    assert loaded.config() == model.config()
    assert torch.equal(loaded.sample(count=3, seed=2).images, model.sample(count=3, seed=2).images)


def test_files_of_samples(model: DiffusionModel, tmp_path: Path) -> None:
    result = model.sample(labels=[5, 6], steps=2, seed=4, first=10)
    result.save(tmp_path)
    with Image.open(tmp_path / "seed4-00011.png") as picture:
        history = json.loads(picture.info["carrara"])
        pixels = np.asarray(picture)
    assert history["seed"] == 4
    assert history["row"] == 11
    assert history["label"] == 6
    assert history["weights"].startswith("EMA of step")
    with np.load(tmp_path / "samples.npz") as archive:
        assert np.array_equal(archive["arr_0"][1, :, :, 0], pixels)
        assert archive["arr_1"].tolist() == [5, 6]
    assert (tmp_path / "grid.png").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "key"),
    [
        ({"labels": [10]}, "invalid", "labels"),
        ({"labels": [-1]}, "invalid", "labels"),
        ({"labels": [2.7]}, "invalid", "labels"),
        ({"labels": "37"}, "invalid", "labels"),
        ({"labels": 3}, "invalid", "labels"),
        ({"labels": None}, "missing", "labels"),
        ({"labels": []}, "invalid", "count"),
        ({"labels": [1], "batch_size": 0}, "invalid", "batch_size"),
        ({"labels": [1], "batch_size": 2.5}, "invalid", "batch_size"),
        ({"labels": [1], "batch_size": "3"}, "invalid", "batch_size"),
        ({"labels": [1], "first": 1.5}, "invalid", "first"),
        ({"labels": [1], "grid": "trailling"}, "unknown", "grid"),
        ({"labels": [1], "spacing": "trailling"}, "unknown", "grid"),
        ({"labels": [1], "eta": 0.5, "solver": "unipc"}, "conflict", "eta"),
        ({"labels": [1], "guidance": float("nan")}, "invalid", "guidance"),
        ({"labels": [1], "guidance": 1, "rescale": 0.5}, "conflict", "rescale"),
        ({"labels": [1], "seed": 1.5}, "invalid", "seed"),
        ({"labels": [1], "guidence": 2.0}, "unsupported", "guidence"),
        ({"labels": [1, 2], "count": 3}, "shape", "labels"),
        ({"labels": [1], "start": torch.zeros(2, 1, 8, 8)}, "shape", "start"),
        ({"labels": [1], "start": torch.zeros(1, 3, 8, 8)}, "shape", "start"),
        ({"labels": [1], "start": torch.zeros(1, 1, 16, 8)}, "shape", "start"),
        ({"labels": [1], "start": torch.zeros(1, 8, 8)}, "shape", "start"),
        ({"labels": [1], "start": torch.tensor(0.0)}, "shape", "start"),
    ],
)
def test_mistakes_in_sampling_are_refused(
    model: DiffusionModel, arguments: dict[str, Any], code: Any, key: str
) -> None:
    with refused(code, key):
        model.sample(**arguments)


@pytest.mark.parametrize("arguments", [{"steps": 0}, {"steps": 1001}, {"solver": "dpm"}])
def test_what_the_solver_cannot_do_is_refused(model: DiffusionModel, arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        model.sample([1], **arguments)


@pytest.mark.parametrize("seed", [np.int64(3), torch.tensor(3), np.uint8(3)])
def test_any_whole_number_is_a_seed(model: DiffusionModel, seed: Any) -> None:
    assert torch.equal(model.sample([1], steps=1, seed=seed).images, model.sample([1], steps=1, seed=3).images)


def test_guidance_of_an_unconditional_model_is_refused() -> None:
    with refused("unsupported", "guidance"):
        unconditional().sample(count=1, guidance=2.0)
    with refused("unsupported", "labels"):
        unconditional().sample(labels=[1])


def test_model_folders_that_are_damaged(tiny_run: Path, tmp_path: Path) -> None:
    import shutil

    def copy(name: str) -> Path:
        return Path(shutil.copytree(tiny_run / "model", tmp_path / name))

    with refused("missing", str(tmp_path / "nowhere")):
        DiffusionModel.load(tmp_path / "nowhere")
    folder = copy("weights")
    (folder / "network.safetensors").unlink()
    with refused("missing", str(folder / "network.safetensors")):
        DiffusionModel.load(folder)
    folder = copy("cut")
    weights = folder / "network.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with refused("damaged", str(weights)):
        DiffusionModel.load(folder)
    folder = copy("config")
    (folder / "config.json").unlink()
    with refused("missing", str(folder)):
        DiffusionModel.load(folder)
    folder = copy("cut config")
    (folder / "config.json").write_text((folder / "config.json").read_text()[:40])
    with refused("damaged", str(folder / "config.json")):
        DiffusionModel.load(folder)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"format": 99}, "newer"),
        ({"network": None}, "invalid"),
        ({"sampling": None}, "invalid"),
        ({"conditioners": None}, "damaged"),
        ({"conditioners": [{"kind": "lables"}]}, "unknown"),
        ({"network": "one class"}, "shape"),
    ],
)
def test_configs_that_do_not_fit(tiny_run: Path, tmp_path: Path, change: dict[str, object], code: Any) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny_run / "model", tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    if change.get("network") == "one class":
        change = {**change, "network": {**config["network"], "num_classes": 1}}
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with refused(code):
        DiffusionModel.load(folder)


@pytest.mark.parametrize("labels", [None, {"names": [str(n) for n in range(10)], "dropout": 0.1}])
def test_configs_of_the_first_edition_are_read(tiny_run: Path, labels: dict[str, Any] | None) -> None:
    """They had an entry for labels and one for up-sampling."""
    config = json.loads((tiny_run / "model" / "config.json").read_text())
    del config["conditioners"]
    noise = {"schedule": {"kind": "cosine", "steps": 1000}, "highest": 250.0, "told": "vector"}
    network = {**config["network"]}
    if labels is None:
        network |= {"concat_channels": 1, "upsample_concat": True, "vector_channels": 1}
    old = {**config, "format": 1, "labels": labels, "network": network, "upsampling": {"factor": 2, "noise": noise}}
    model = tuple(build(entry) for entry in conditioner_configs(old))
    if labels is None:
        low_res = model[0]
        assert isinstance(low_res, LowRes)
        assert low_res.shape == (1, 8, 8)
        assert low_res.augmentation is not None
        assert (low_res.factor, low_res.augmentation.highest, low_res.augmentation.slot) == (2, 250.0, "vector")
    else:
        assert model == (ClassLabels(tuple(labels["names"]), 0.1),)


def test_a_start_has_the_shape_of_the_latents_not_of_the_images() -> None:
    model = unconditional()
    model.codec = Autoencoder(AutoencoderParams(in_channels=2, channels=8, channel_mult=(1, 2), latent_channels=2))
    with refused("shape", "start"):
        model.sample(count=1, steps=1, start=torch.zeros(1, 2, 8, 12))


def test_a_codec_that_works_in_tiles_moves_with_the_model() -> None:
    model = unconditional()
    codec = Autoencoder(AutoencoderParams(in_channels=2, channels=8, channel_mult=(1, 2), latent_channels=2))
    model.codec = Tiled(codec, tile=12, overlap=4)
    model.to("meta")
    assert {parameter.device.type for parameter in codec.parameters()} == {"meta"}


def test_a_latent_is_not_thresholded() -> None:
    """Clipping belongs to pixels: a codec of latents must see values beyond 1."""
    model = unconditional()
    big = 40 * torch.ones(1, 2, 8, 12)
    clipped = model.sample(count=1, steps=1, start=big).latents
    model.codec = Identity(bounded=False)
    free = model.sample(count=1, steps=1, start=big).latents
    assert clipped.abs().max() <= 1
    assert free.abs().max() > 1
