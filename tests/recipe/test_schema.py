"""The JSON schema of recipes: complete, described, and of one mind with the validation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from carrara.cli.app import app
from carrara.errors import UserError
from carrara.recipe import json_schema, load, read, shipped, validate
from tests.extension import toys


def properties(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every key of every section, with where it is."""
    if isinstance(schema, list):
        for number, entry in enumerate(schema):
            yield from properties(entry, f"{path}/{number}")
    elif isinstance(schema, dict):
        for name, entry in schema.items():
            if name == "properties":
                yield from ((f"{path}/{key}", about) for key, about in entry.items())
            yield from properties(entry, f"{path}/{name}")


def wrong() -> list[dict[str, Any]]:
    """Recipes with one mistake each."""
    base = read("digits")
    changes: list[dict[str, Any]] = [
        {"kind": "gan"},
        {"name": "a b"},
        {"network": {"kind": "dit", "channels": 8}},
        {"network": {"num_classes": 3}},
        {"network": {"channels": "wide"}},
        {"schedule": {"kind": "edm", "steps": 10}},
        {"schedule": {"steps": 1}},
        {"objective": {"times": {"kind": "clean"}}},
        {"objective": {"times": {"std": 1}}},
        {"conditioning": {"kind": "low_res"}},
        {"conditioning": {"dropout": 1}},
        {"codec": {"channels": 3}},
        {"loss": {"distance": "l1"}},
        {"training": {"steps": 0}},
    ]
    codec = read("emoji-vq")
    of_codecs: list[dict[str, Any]] = [
        {"codec": {"codes": 16}},
        {"codec": {"kind": "kl", "codes": 16}},
        {"codec": {"kind": "vq", "preset": "ldm-kl-f4"}},
        {"loss": {"distance": "l3"}},
        {"sampling": {"steps": 3}},
    ]
    return [{**base, **change} for change in changes] + [{**codec, **change} for change in of_codecs]


def test_it_accepts_the_shipped_recipes_and_refuses_mistakes() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="the oracle of this test, among the dev extras")
    schema = json_schema()
    kind = jsonschema.validators.validator_for(schema)
    kind.check_schema(schema)
    validator = kind(schema)
    for name in shipped():
        validator.validate(read(name))
        validator.validate(yaml.safe_load(load(name).to_yaml()))
    for data in wrong():
        assert not validator.is_valid(data)


@pytest.mark.parametrize("data", wrong(), ids=lambda data: str(data)[-40:])
def test_validation_refuses_the_same(data: dict[str, Any]) -> None:
    with pytest.raises(UserError) as error:
        validate(data)
    assert error.value.key


def test_every_key_is_described() -> None:
    found = dict(properties(json_schema()))
    assert len(found) > 200
    assert [path for path, about in found.items() if not about.get("description")] == []
    assert any(about.get("minimum") == 1 and "optimiser steps" in about["description"] for about in found.values())


def test_every_section_of_several_kinds_has_a_discriminator() -> None:
    text = json.dumps(json_schema())
    # the run, network (twice), codec, schedule (twice), times (twice) and conditioning
    assert text.count('"discriminator": {"propertyName": "kind"}') == 9


def test_kinds_that_were_registered_are_in_it() -> None:
    text = json.dumps(json_schema())
    assert '"const": "pixelwise"' in text
    assert '"const": "brightness"' in text
    assert toys.Brightness.kind == "brightness"


def test_the_command_prints_it(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["recipes", "--schema"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["$schema"].endswith("2020-12/schema")
