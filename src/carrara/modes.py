"""Networks in evaluation mode while they are sampled from, whoever else uses them at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

_lock = threading.Lock()
_users: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_modes: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Every module and submodule without dropout and the like; once its last user has left, each in its own mode again.

    Threads may share modules: the first user stores the modes, the last one restores them.
    """
    parts = list(dict.fromkeys(part for module in modules for part in module.modules()))
    with _lock:
        for part in parts:
            if not _users.get(part):
                _modes[part] = part.training
            _users[part] = _users.get(part, 0) + 1
            part.training = False
    try:
        yield
    finally:
        with _lock:
            for part in parts:
                _users[part] -= 1
                if not _users[part]:
                    part.training = _modes.pop(part)
                    del _users[part]
