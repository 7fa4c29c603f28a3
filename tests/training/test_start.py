"""Fine-tuning: a run that begins from a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from carrara import codecs
from carrara.classifier import Classifier
from carrara.errors import UserError
from carrara.model import DiffusionModel
from carrara.recipe import DiffusionRecipe, validate
from carrara.training import Trainer
from tests.data.builders import files, folder
from tests.runs import tiny_recipe, train
from tests.test_classifier import untrained
from tests.training.test_codec import recipe as codec_recipe


def fine_tuning(start: Path, **sections: dict[str, Any]) -> DiffusionRecipe:
    """A few steps on the digits from a model's weights."""
    base: dict[str, Any] = {
        "name": "fine",
        "start": str(start),
        "data": {"path": "digits", "resolution": 8, "channels": 1},
        "conditioning": {"kind": "labels"},
        "training": {"steps": 3, "batch_size": 32, "learning_rate": 1e-4, "warmup": 0, "tracker": "none", "ema": 0.0},
        "sampling": {"steps": 2, "count": 2},
    }
    made = validate({**base, **{key: {**base.get(key, {}), **value} for key, value in sections.items()}})
    assert isinstance(made, DiffusionRecipe)
    return made


def test_it_begins_where_the_model_ended_and_is_the_same_kind_of_model(tiny_run: Path, tmp_path: Path) -> None:
    base = DiffusionModel.load(tiny_run)
    trainer = Trainer(fine_tuning(tiny_run), tmp_path / "run")
    assert all(torch.equal(v, base.network.state_dict()[k]) for k, v in trainer.network.state_dict().items())
    list(trainer.steps())
    tuned = DiffusionModel.load(tmp_path / "run")
    assert (tuned.predicts, tuned.schedule.spec) == (base.predicts, base.schedule.spec)
    change = max(float((v - base.network.state_dict()[k]).abs().max()) for k, v in tuned.network.state_dict().items())
    assert 0 < change <= 3.1e-4  # three steps of AdamW at 1e-4, each at most about the learning rate


def test_resumed_it_does_not_begin_again(tiny_run: Path, tmp_path: Path) -> None:
    train(fine_tuning(tiny_run), tmp_path / "run")
    trained = DiffusionModel.load(tmp_path / "run").network.state_dict()
    again = Trainer(fine_tuning(tiny_run), tmp_path / "run")
    assert again.step == 3
    assert all(torch.equal(v, trained[k]) for k, v in again.network.state_dict().items())
    again.run.close()


def test_a_null_label_is_added_behind_the_classes_and_other_classes_begin_anew(tiny_run: Path, tmp_path: Path) -> None:
    base = DiffusionModel.load(tiny_run).network.state_dict()["label.weight"]
    without = Trainer(fine_tuning(tiny_run, conditioning={"dropout": 0.0}), tmp_path / "a")
    assert torch.equal(without.network.state_dict()["label.weight"], base[:10])
    list(without.steps())
    back = Trainer(fine_tuning(tmp_path / "a"), tmp_path / "b")
    grown = back.network.state_dict()["label.weight"]
    assert torch.equal(grown[:10], DiffusionModel.load(tmp_path / "a").network.state_dict()["label.weight"])
    assert len(grown) == 11
    back.run.close()
    pictures = folder(tmp_path / "two", {**files(20, "a/{}.png"), **files(20, "b/{}.png")})
    other = Trainer(fine_tuning(tiny_run, data={"path": str(pictures)}, sampling={"guidance": 1.0}), tmp_path / "c")
    assert len(other.network.state_dict()["label.weight"]) == 3
    assert "label.weight[0]" in other.summary()["starts from"]
    other.run.close()


def test_a_classifier_goes_on_from_a_classifier(tmp_path: Path) -> None:
    classifier = untrained()
    classifier.save(tmp_path / "clf")
    base = fine_tuning(tmp_path / "clf").model_dump() | {"kind": "classifier"}
    recipe = validate({key: base[key] for key in ("name", "kind", "start", "data", "training")})
    train(recipe, tmp_path / "run")
    tuned = Classifier.load(tmp_path / "run")
    assert tuned.schedule.spec == classifier.schedule.spec
    changes = [(v - classifier.network.state_dict()[k]).abs().max() for k, v in tuned.network.state_dict().items()]
    assert 0 < float(max(changes)) < 1e-3


def test_a_classifier_says_what_starts_anew(tmp_path: Path) -> None:
    untrained().save(tmp_path / "clf")
    pictures = folder(tmp_path / "two", {**files(20, "a/{}.png"), **files(20, "b/{}.png")})
    base = fine_tuning(tmp_path / "clf", data={"path": str(pictures)}).model_dump() | {"kind": "classifier"}
    recipe = validate({key: base[key] for key in ("name", "kind", "start", "data", "training")})
    trainer = Trainer(recipe, tmp_path / "run")
    assert trainer.summary()["starts from"].endswith(" random)")  # two classes, where ten were
    assert trainer.task.preview(trainer.network, range(0))[0].shape == (0, 1, 8, 8)
    trainer.run.close()


def test_a_latent_model_learns_on_in_its_own_codec(tmp_path: Path) -> None:
    train(codec_recipe(), tmp_path / "codec")
    latent = (f"codec.path={tmp_path / 'codec'}", "network.channel_mult=[1]", "network.attention=[1]")
    train(tiny_recipe(*latent), tmp_path / "base")
    train(fine_tuning(tmp_path / "base"), tmp_path / "run")
    base, tuned = (DiffusionModel.load(tmp_path / name) for name in ("base", "run"))
    assert codecs.content_hash(tuned.codec) == codecs.content_hash(base.codec)
    change = max(float((v - base.network.state_dict()[k]).abs().max()) for k, v in tuned.network.state_dict().items())
    assert 0 < change <= 3.1e-4  # three steps of AdamW at 1e-4
    with pytest.raises(UserError, match=r"codec\.path follows from the model"):
        fine_tuning(tmp_path / "base", codec={"path": str(tmp_path / "codec")})
    with pytest.raises(UserError, match="there is no cache of latents"):
        Trainer(fine_tuning(tmp_path / "base", codec={"cache": str(tmp_path / "none")}), tmp_path / "a")


def test_what_the_start_decides_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    for section in ({"network": {"channels": 64}}, {"schedule": {"kind": "linear"}}, {"objective": {"predicts": "v"}}):
        with pytest.raises(UserError, match="follows from the model that the run starts from"):
            fine_tuning(tiny_run, **section)
    assert fine_tuning(tiny_run, network={"dropout": 0.3}).network.given() == {"dropout": 0.3}
    with pytest.raises(UserError, match="makes images of 1 channels"):
        Trainer(fine_tuning(tiny_run, data={"channels": 3}), tmp_path / "a")
    with pytest.raises(UserError, match="no folder"):
        Trainer(fine_tuning(tmp_path / "nowhere"), tmp_path / "b")
