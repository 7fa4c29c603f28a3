"""Recipes: shipped ones, overrides, and a sentence for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from carrara.errors import UserError
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
    ("assignment", "sentence"),
    [
        ("training.stepz=4", "unknown key 'training.stepz': did you mean 'steps'"),
        ("trainng.steps=4", "unknown key 'trainng': did you mean 'training'"),
        ("network.chanels=4", "unknown key 'network.chanels': did you mean 'channels'"),
        ("network.num_classes=4", "network.num_classes follows from the data"),
        ("training.steps=four", "'training.steps' is 'four'"),
        ("training.steps=0", "'training.steps' is 0"),
        ("training.learning_rate=0", "'training.learning_rate' is 0"),
        ("training.learning_rate=-1", "'training.learning_rate' is -1"),
        ("training.learning_rate=.nan", "'training.learning_rate' is nan"),
        ("network.channels=wide", "'network.channels' is 'wide'"),
        ("data.resolution=9", "nearest are 8×8 and 10×10"),
        ("data.channels=2", "'data.channels' is 2"),
        ("schedule.kind=cosin", "'schedule.kind' is 'cosin'"),
        ("schedule.steps=1", "'schedule.steps' is 1"),
        ("training.steps.more=4", "'steps' is a value, not a section"),
        ("training", "not of the form section.key=value"),
        ("training.betas=[1", "cannot be read as a YAML value"),
        ("sampling.solver=dpm", "there is no solver 'dpm'"),
        ("conditioning.dropout=0", "sampling.guidance=1.5 needs a condition that training drops"),
        ("conditioning.kind=none", "sampling.guidance=1.5 needs a condition that training drops"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_key(assignment: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        load("digits", [assignment])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_linear_schedule_too_short_is_refused() -> None:
    with pytest.raises(UserError, match="at least 21 steps"):
        load("digits", ["schedule.kind=linear", "schedule.steps=20"])


def test_recipe_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'digits'"):
        load("digit")
    for content, sentence in (
        ("a: [", "not valid YAML"),
        ("- 1", "must be a YAML mapping"),
        ("seed: 1", "lacks the key"),
    ):
        path = tmp_path / "r.yaml"
        path.write_text(content)
        with pytest.raises(UserError, match=sentence):
            load(path)


def test_nothing_in_a_recipe_names_code(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(UserError, match="not valid YAML"):
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
