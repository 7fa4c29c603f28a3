"""A model that goes out in another program's layout and comes in again is the same: nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from carrara.classifier import Classifier
from carrara.conditioning import ClassLabels
from carrara.convert import export_model, import_model
from carrara.model import DiffusionModel
from carrara.networks import EncoderClassifier, EncoderClassifierParams
from carrara.process import schedules
from tests.convert.models import NAMES, codec, model, pictures
from tests.errors import refused

LAYOUTS = {"guided-diffusion": "m.pt", "compvis": "m.ckpt", "diffusers": "m"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("given", ["nothing", "a class", "a class or none"])
@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
def test_nothing_is_lost(layout: str, given: str, predicts: Any, tmp_path: Path) -> None:
    ours = model(given)
    ours.schedule, ours.predicts = schedules.cosine(100), predicts
    ours.sampling = {"steps": 3, "guidance": 2.5}
    if given == "a class or none":
        ours.conditioners = (ClassLabels(NAMES, 0.25),)
    export_model(ours, tmp_path / LAYOUTS[layout], layout)
    again = import_model(tmp_path / LAYOUTS[layout]).model
    assert isinstance(again, DiffusionModel)
    assert (again.predicts, again.schedule.spec, again.shape) == (predicts, ours.schedule.spec, ours.shape)
    assert (again.class_labels, again.sampling, again.levels) == (ours.class_labels, ours.sampling, ours.levels)
    assert torch.equal(pictures(again), pictures(ours))


def test_the_deviation_of_the_data_is_kept(tmp_path: Path) -> None:
    ours = model()
    ours.predicts, ours.sigma_data = "edm", 0.7
    export_model(ours, tmp_path / "m.pt")
    again = import_model(tmp_path / "m.pt").model
    assert isinstance(again, DiffusionModel)
    assert (again.predicts, again.sigma_data) == ("edm", 0.7)
    assert torch.equal(pictures(again), pictures(ours))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conditioning_that_no_layout_holds_is_refused(layout: str, tmp_path: Path) -> None:
    class Text(ClassLabels):
        kind = "text"

    ours = model("a class")
    ours.conditioners = (Text(NAMES),)
    with refused("unsupported", key="conditioners"):
        export_model(ours, tmp_path / LAYOUTS[layout], layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_of_wide_images_keeps_both_sides(layout: str, tmp_path: Path) -> None:
    ours = model(image_size=(8, 16))
    ours.shape = (3, 8, 16)
    export_model(ours, tmp_path / LAYOUTS[layout], layout)
    again = import_model(tmp_path / LAYOUTS[layout]).model
    assert isinstance(again, DiffusionModel)
    assert torch.equal(pictures(again), pictures(ours))


def test_a_latent_model_keeps_its_label_dropout_and_sampling(tmp_path: Path) -> None:
    ours = model("a class or none", codec("kl"))
    ours.conditioners, ours.sampling = (ClassLabels(NAMES, 0.3),), {"steps": 7}
    for path in ("m.ckpt", "m"):
        export_model(ours, tmp_path / path)
        again = import_model(tmp_path / path).model
        assert isinstance(again, DiffusionModel)
        assert (again.class_labels, again.sampling) == (ours.class_labels, ours.sampling)


def test_a_classifier_keeps_its_names_and_schedule(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"image_size": (8, 8), "channels": 32, "channel_mult": (1,), "head_channels": 32}
    network = EncoderClassifier(EncoderClassifierParams(**shape, attention=(1,), num_classes=4)).eval()
    ours = Classifier(network, schedules.cosine(50), NAMES, noisy=False)
    export_model(ours, tmp_path / "c.pt")
    again = import_model(tmp_path / "c.pt").model
    assert isinstance(again, Classifier)
    assert (again.names, again.noisy, again.schedule.spec) == (ours.names, ours.noisy, ours.schedule.spec)


def test_what_the_original_program_does_not_know_is_reported(tmp_path: Path) -> None:
    ours = model("a class or none")
    ours.predicts = "v"
    report = export_model(ours, tmp_path / "m.pt")
    assert "m.json" in report["note"]
    ours = model()
    ours.schedule = schedules.linear(100)
    assert "note" not in export_model(ours, tmp_path / "n.pt")


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    export_model(model("a class"), tmp_path / "m.pt")
    config = tmp_path / "m.json"
    content = json.loads(config.read_text())
    changes: dict[str, Any]
    for changes in ({"network": {}}, {"schedule": {"kind": "x"}}, {"shape": None}, {"conditioners": 3}):
        config.write_text(json.dumps({**content, "carrara": {**content["carrara"], **changes}}))
        with refused("damaged", key=str(config)):
            import_model(tmp_path / "m.pt")


@pytest.mark.parametrize("path", ["m.ckpt", "m"])
def test_what_was_changed_in_the_layouts_own_config_counts(path: str, tmp_path: Path) -> None:
    export_model(model("a class", codec("kl")), tmp_path / path)
    if path == "m":
        index, scheduler = tmp_path / "m" / "model_index.json", tmp_path / "m" / "scheduler" / "scheduler_config.json"
        index.write_text(index.read_text().replace("owl", "eagle"))
        scheduler.write_text(scheduler.read_text().replace('"epsilon"', '"v_prediction"'))
    else:
        config = tmp_path / "m.yaml"
        config.write_text(
            config.read_text().replace("- owl", "- eagle", 1).replace("parameterization: eps", "parameterization: v")
        )
    again = import_model(tmp_path / path).model
    assert isinstance(again, DiffusionModel)
    assert again.class_labels is not None
    assert (again.class_labels.names, again.predicts) == (("cat", "dog", "eagle", "newt"), "v")
