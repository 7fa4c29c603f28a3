"""Every use case: its request has a schema, takes nothing unknown, and its generator refuses before it works."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
from pathlib import Path

import pytest

from carrara import app
from carrara.app.request import Request
from tests.errors import refused

MODULES = [importlib.import_module(f"carrara.app.{module.name}") for module in pkgutil.iter_modules(app.__path__)]
REQUESTS = sorted(
    {
        kind
        for module in MODULES
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, Request) and kind is not Request
    },
    key=lambda kind: kind.__name__,
)


def test_there_is_one_for_each_use_case() -> None:
    names = {kind.__name__.removesuffix("Request") for kind in REQUESTS}
    assert names >= {"Sample", "Upscale", "Train", "Evaluate", "Compare", "Sweep", "Check", "Encode", "Ema", "Demo"}
    assert names >= {"Import", "Export"}


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.__name__)
def test_a_request_has_a_schema_and_takes_nothing_unknown(kind: type[Request]) -> None:
    schema = kind.model_json_schema()
    assert schema["additionalProperties"] is False
    assert json.dumps(schema)
    assert kind.__doc__
    required = {name: ("64",) if name == "pictures" else "64" for name in schema.get("required", ())}
    with refused("unknown", key="nonsense"):
        kind(**required, nonsense=1)


def test_use_cases_neither_print_nor_exit() -> None:
    for path in Path(app.__path__[0]).glob("*.py"):
        text = path.read_text(encoding="utf-8")
        found = re.findall(r"\bprint\(|sys\.exit|import typer|from rich|import rich", text)
        assert found == [], path.name
