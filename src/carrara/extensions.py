"""Files of a user's own that add networks, conditioners and solvers to the registries."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from carrara.errors import UserError


def load_extension(path: Path) -> None:
    """Run a Python file once, as a module of its file's name. Only the user names it: no config or checkpoint does.

    Raises:
        UserError: no Python file, or one whose code fails.
    """
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"there is no Python file {path}.", key="extension", code="missing")
    name = f"carrara_extension_{path.stem}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except UserError:
        del sys.modules[name]
        raise
    except Exception as error:
        del sys.modules[name]
        raise UserError(
            f"the extension {path} fails with {type(error).__name__}: {error}.", key="extension", code="invalid"
        ) from error
