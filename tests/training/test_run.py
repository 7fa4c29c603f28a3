"""A run folder belongs to one training at a time, and to nobody once that is gone."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from carrara.errors import UserError
from carrara.training.run import Run
from tests.runs import tiny_recipe


def test_a_forked_worker_that_lives_longer_does_not_hold_the_folder(tmp_path: Path) -> None:
    """As when a training is killed and started again at once: its data workers need a second to notice."""
    run = Run(tmp_path / "run", tiny_recipe())
    run.claim()
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    try:
        with pytest.raises(UserError, match="another process is training"):
            Run(tmp_path / "run", tiny_recipe()).claim()
        run.close()
        again = Run(tmp_path / "run", tiny_recipe())
        again.claim()
        again.close()
    finally:
        worker.kill()
        worker.join()
