"""A training step never waits for its device: only the log, a checkpoint and a preview do.

The meta device computes nothing, so that whatever asks it for a number or copies from it is an error.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from carrara.training import Trainer
from tests.runs import tiny_recipe

KINDS = {
    "simple": (),
    "micro-batches": ("training.micro_batch=5",),
    "fp16": ("training.precision=fp16",),
    "bound": ("network.learned_variance=true", "objective.loss=hybrid", "objective.predicts=eps"),
    "dropout": ("network.dropout=0.1",),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr("carrara.training.step.autocast", lambda *_: nullcontext())  # it knows no meta device
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["meta"])
    trainer = Trainer(tiny_recipe("training.tracker=none", *KINDS[kind]), tmp_path / "run", device="meta")
    for step in range(3):
        loss = trainer.one_step(trainer.batches.at(step))
        assert loss.device.type == "meta"
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):  # this is where it waits
        trainer.end_interval()
    trainer.run.close()
