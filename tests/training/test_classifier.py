"""Runs that train a classifier: they learn, resume to the bit, and say what they cannot use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from carrara.classifier import Classifier
from carrara.errors import UserError
from carrara.recipe import Recipe, validate
from carrara.training import Trainer
from tests.data.builders import files, folder
from tests.errors import refused
from tests.runs import train


def recipe(**sections: dict[str, object]) -> Recipe:
    """A small classifier of the digits."""
    base: dict[str, object] = {
        "name": "clf",
        "kind": "classifier",
        "data": {"path": "digits", "resolution": 8, "channels": 1},
        "network": {"channels": 16, "channel_mult": [1, 2], "blocks_per_level": 1, "attention": [2], "dropout": 0.1},
        "schedule": {"kind": "cosine", "steps": 1000},
        "training": {"steps": 60, "batch_size": 64, "learning_rate": 3e-3, "warmup": 5, "ema": 0.9, "log_every": 20}
        | {"validate_every": 30, "checkpoint_every": 25, "tracker": "none"},
    }
    for key, value in sections.items():
        old = base.get(key, {})
        base[key] = {**old, **value} if isinstance(old, dict) else value
    return validate(base)


def test_it_learns_more_where_there_is_less_noise(tmp_path: Path) -> None:
    train(recipe(), tmp_path)
    *_, last = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    cleanest, *_, noisiest = last["validation"]["top1_by_quarter"]
    assert cleanest > 0.6 > noisiest + 0.2
    assert 0.1 < last["terms"]["top1"] < last["terms"]["top5"] <= 1
    assert last["terms_by_quarter"]["top1"][0] > 0.6
    classifier = Classifier.load(tmp_path)
    assert (classifier.noisy, classifier.names[3], classifier.clean_time) == (True, "3", 1.0)
    assert classifier.schedule.spec == {"kind": "cosine", "steps": 1000}


def test_a_judge_sees_clean_images_only(tmp_path: Path) -> None:
    train(recipe(objective={"times": {"kind": "clean"}}), tmp_path)
    *_, last = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert last["validation"]["top1"] > 0.75
    judge = Classifier.load(tmp_path)
    assert (judge.noisy, judge.clean_time, judge.clean_network_time) == (False, 0.0, -1.0)


def test_killed_and_resumed_it_ends_in_the_same_bits(tmp_path: Path) -> None:
    train(recipe(), tmp_path / "straight")
    trainer = Trainer(recipe(), tmp_path / "resumed")
    for progress in trainer.steps():
        if progress.step == 31:  # left unfinished, after the checkpoint of step 25
            break
    train(recipe(), tmp_path / "resumed")
    for part in ("model/network.safetensors", "checkpoints/step-00000060/network.safetensors"):
        assert (tmp_path / "straight" / part).read_bytes() == (tmp_path / "resumed" / part).read_bytes()
    logs = [
        [{k: v for k, v in json.loads(line).items() if k != "timing"} for line in (tmp_path / run / "log.jsonl").open()]
        for run in ("straight", "resumed")
    ]
    assert logs[0] == logs[1]


def test_what_a_classifier_does_not_take_is_refused(tmp_path: Path) -> None:
    for section, key in (
        ({"conditioning": {"kind": "labels"}}, "conditioning"),
        ({"sampling": {"steps": 5}}, "sampling"),
        ({"objective": {"predicts": "v"}}, "objective.predicts"),
        ({"objective": {"loss": "vlb"}}, "objective.loss"),
    ):
        with refused("unknown", key):
            recipe(**section)
    with pytest.raises(UserError, match=r"network\.learned_variance"):
        recipe(network={"learned_variance": True})
    with pytest.raises(UserError, match="9"):
        recipe(data={"resolution": 9})
    with pytest.raises(UserError, match="a classifier learns from classes"):
        Trainer(
            recipe(
                data={"path": str(folder(tmp_path / "flat", files(64))), "channels": 3}, training={"validate_every": 0}
            ),
            tmp_path / "run",
        )
    with refused("unknown", "objective.times.kind"):
        validate(
            {**recipe(objective={"times": {"kind": "clean"}}).model_dump(exclude={"network"}), "kind": "diffusion"}
        )
