"""Recipes: shipped ones, overrides, and a sentence for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from carrara.errors import Code, UserError
from carrara.recipe import DiffusionRecipe, load, override, shipped, validate
from tests.errors import refused


@pytest.mark.parametrize("name", ["digits", "cifar10", "emoji", "clothing"])
def test_shipped_recipes_are_valid_and_flip_nothing(name: str) -> None:
    recipe = load(name)
    assert isinstance(recipe, DiffusionRecipe)
    assert name in shipped()
    assert recipe.data.flip is False
    assert recipe.network_params({"label": 10}).image_size == recipe.data.resolution


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_names_data_that_everybody_has_or_asks_for_them(name: str, tmp_path: Path) -> None:
    recipe = load(name)
    if recipe.data.path is None:
        assert recipe.data.about
        with refused("missing", "data.path"):
            recipe.data_path()
    else:
        assert recipe.data_path() == "digits"  # scikit-learn's, a dependency
    assert load(name, [f"data.path={tmp_path}"]).data_path() == str(tmp_path)


def test_yaml_round_trip() -> None:
    recipe = load("digits", ["training.learning_rate=1e-4", "data.resolution=[8, 16]"])
    assert recipe.training.learning_rate == 1e-4, "YAML 1.1 reads 1e-4 as text"
    assert recipe.data.resolution == (8, 16)
    assert validate(yaml.safe_load(recipe.to_yaml())) == recipe


def test_override_leaves_the_original_alone() -> None:
    data = {"training": {"steps": 3}}
    assert override(data, ["training.steps=4", "name=x"]) == {"training": {"steps": 4}, "name": "x"}
    assert data == {"training": {"steps": 3}}


@pytest.mark.parametrize(
    ("assignment", "code", "key"),
    [
        ("training.stepz=4", "unknown", "training.stepz"),
        ("trainng.steps=4", "unknown", "trainng"),
        ("network.chanels=4", "unknown", "network.chanels"),
        ("network.num_classes=4", "conflict", "network.num_classes"),
        ("training.steps=four", "invalid", "training.steps"),
        ("training.steps=0", "invalid", "training.steps"),
        ("training.learning_rate=0", "invalid", "training.learning_rate"),
        ("training.learning_rate=-1", "invalid", "training.learning_rate"),
        ("training.learning_rate=.nan", "invalid", "training.learning_rate"),
        ("network.channels=wide", "invalid", "network.channels"),
        ("network.resampling=residul", "unknown", "network.resampling"),
        ("data.resolution=9", "shape", "network.image_size"),
        ("data.channels=2", "unknown", "data.channels"),
        ("data.order=shard", "unknown", "data.order"),
        ("data.path=3", "invalid", "data.path"),
        ("schedule.kind=cosin", "unknown", "schedule.kind"),
        ("schedule.steps=1", "invalid", "schedule.steps"),
        ("training.steps.more=4", "invalid", "training.steps.more"),
        ("training", "invalid", "set"),
        ("training.betas=[1", "invalid", "training.betas"),
        ("sampling.solver=dpm", "unknown", "sampling.solver"),
        ("conditioning.dropout=0", "conflict", "sampling.guidance"),
        ("conditioning.kind=none", "conflict", "sampling.guidance"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_key(assignment: str, code: Code, key: str) -> None:
    with refused(code, key):
        load("digits", [assignment])


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("training.stepz=4", "unknown key 'training.stepz': did you mean 'steps'"),
        ("network.chanels=4", "unknown key 'network.chanels': did you mean 'channels'"),
        ("network.resampling=residul", "did you mean 'residual'"),
        ("data.resolution=9", "nearest are 8×8 and 10×10"),
    ],
)
def test_the_nearest_is_named(assignment: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load("digits", [assignment])


def test_linear_schedule_too_short_is_refused() -> None:
    with refused("invalid"):
        load("digits", ["schedule.kind=linear", "schedule.steps=20"])


def test_recipe_files_that_are_none(tmp_path: Path) -> None:
    with refused("missing", "digit"):
        load("digit")
    path = tmp_path / "r.yaml"
    for content, code, key in (
        ("a: [", "damaged", str(path)),
        ("- 1", "damaged", str(path)),
        ("seed: 1", "missing", "name"),
    ):
        path.write_text(content)
        with refused(code, key):  # type: ignore[arg-type]
            load(path)


def test_nothing_in_a_recipe_names_code(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: !!python/object/apply:os.system ['true']\n")
    with refused("damaged", str(path)):
        load(path)


@pytest.mark.parametrize(
    "assignment",
    [
        "training.batch_size=yes",
        "training.steps=true",
        "training.learning_rate=yes",
        "seed=no",
        "data.resolution=yes",
        "seed=18446744073709551616",
        "seed=-1",
    ],
)
def test_what_is_no_number_in_range_is_refused(assignment: str) -> None:
    with refused("invalid", assignment.partition("=")[0]):
        load("digits", [assignment])


def test_switches_are_switches() -> None:
    assert load("digits", ["data.flip=yes"]).data.flip is True
