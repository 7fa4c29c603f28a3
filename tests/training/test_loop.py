"""The loop: it learns, it logs, it resumes to the same bits, and it stops loudly."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from carrara import DiffusionModel
from carrara.data import Batch, LatentBatch
from carrara.errors import UserError
from carrara.training import Trainer, checkpoint
from carrara.training.loop import BAD_STEPS
from tests.runs import tiny_recipe, train


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The log without its timings."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "timing"} for line in lines]


def final_state(folder: Path, step: int) -> dict[str, Any]:
    """Weights, mean and optimiser of a checkpoint, flat."""
    weights, rest = checkpoint.load(folder / "checkpoints", step)
    state: dict[str, Any] = {
        f"{name}.{key}": value for name in ("network", "ema") for key, value in weights[name].items()
    }
    optimiser = rest["optimisers"]["network"]["state"]
    for index, entries in optimiser.items():
        state.update({f"optimiser.{index}.{k}": v for k, v in entries.items()})
    return state


def assert_same_bits(one: Path, two: Path, step: int) -> None:
    first, second = final_state(one, step), final_state(two, step)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(second[key])), key
    assert log_of(one) == log_of(two)


def test_a_run_leaves_what_the_design_says(tiny_run: Path) -> None:
    assert (tiny_run / "recipe.yaml").exists()
    assert (tiny_run / "model" / "config.json").exists()
    assert sorted(p.name for p in (tiny_run / "checkpoints").iterdir()) == ["step-00000010", "step-00000012"]
    assert sorted(p.name for p in (tiny_run / "samples").iterdir()) == [
        "step-00000012-ema.png",
        "step-00000012-raw.png",
    ]
    assert any((tiny_run / "tensorboard").iterdir())
    assert [line["step"] for line in log_of(tiny_run)] == [4, 8, 12]


def test_the_loss_falls(tmp_path: Path) -> None:
    recipe = tiny_recipe("training.steps=150", "training.learning_rate=3e-3", "training.log_every=30")
    train(recipe, tmp_path)
    losses = [line["loss"] for line in log_of(tmp_path)]
    assert losses[-1] < 0.8 * losses[0]


def test_two_runs_of_one_seed_are_the_same_bits_and_another_seed_is_not(tiny_run: Path, tmp_path: Path) -> None:
    train(tiny_recipe(), tmp_path / "again")
    assert_same_bits(tiny_run, tmp_path / "again", 12)
    train(tiny_recipe("seed=1"), tmp_path / "other")
    assert log_of(tmp_path / "other")[0]["loss"] != log_of(tiny_run)[0]["loss"]


@pytest.mark.parametrize("stop_at", [1, 5, 7, 10, 11])
def test_interrupted_runs_end_in_the_same_bits(tiny_run: Path, tmp_path: Path, stop_at: int) -> None:
    """Killed without any warning after `stop_at` steps: what was not checkpointed is done again."""
    walk = Trainer(tiny_recipe(), tmp_path / "run")
    steps = walk.steps()
    for progress in steps:
        if progress.step == stop_at:
            break
    walk.save_checkpoint = lambda: Path()  # type: ignore[method-assign] # a kill saves nothing
    steps.close()  # type: ignore[attr-defined]
    resumed = Trainer(tiny_recipe(), tmp_path / "run")
    assert resumed.step == stop_at // 5 * 5
    list(resumed.steps())
    assert_same_bits(tiny_run, tmp_path / "run", 12)


def test_dropout_is_inside_exact_resume(tmp_path: Path) -> None:
    recipe = tiny_recipe("network.dropout=0.3", "training.checkpoint_every=3", "training.steps=6")
    train(recipe, tmp_path / "straight")
    broken = Trainer(recipe, tmp_path / "broken")
    for progress in (steps := broken.steps()):
        if progress.step == 4:
            break
    steps.close()  # type: ignore[attr-defined]
    torch.manual_seed(1234)  # another generator state must not matter
    train(recipe, tmp_path / "broken")
    assert_same_bits(tmp_path / "straight", tmp_path / "broken", 6)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_run_goes_on(tiny_run: Path, tmp_path: Path, number: signal.Signals) -> None:
    trainer = Trainer(tiny_recipe(), tmp_path)
    for progress in trainer.steps():
        if progress.step == 7:
            os.kill(os.getpid(), number)
    assert trainer.stopped
    assert trainer.step == 7
    again = Trainer(tiny_recipe(), tmp_path)
    assert again.step == 7
    list(again.steps())
    assert_same_bits(tiny_run, tmp_path, 12)


def test_running_a_finished_run_again_does_nothing(tiny_run: Path) -> None:
    before = (tiny_run / "model" / "network.safetensors").read_bytes()
    assert train(tiny_recipe(), tiny_run)[0].notice == "resuming from the checkpoint of step 12."
    assert (tiny_run / "model" / "network.safetensors").read_bytes() == before


def test_samples_come_from_the_mean_not_from_the_raw_weights(tiny_run: Path) -> None:
    model = DiffusionModel.load(tiny_run)
    mean = load_file(tiny_run / "checkpoints" / "step-00000012" / "ema.safetensors")
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, mean[name])
    assert model.origin == "EMA of step 12"


def test_another_recipe_in_the_folder_is_refused_with_what_differs(tiny_run: Path, tmp_path: Path) -> None:
    train(tiny_recipe("training.steps=2"), tmp_path)
    with pytest.raises(UserError, match=r"training\.learning_rate: 0\.002 → 0\.1") as error:
        Trainer(tiny_recipe("training.steps=2", "training.learning_rate=0.1"), tmp_path)
    assert "--accept-changes" in str(error.value)
    Trainer(tiny_recipe("training.steps=2", "training.log_every=1"), tmp_path).run.close()
    changed = Trainer(tiny_recipe("training.steps=3", "training.learning_rate=0.1"), tmp_path, accept_changes=True)
    assert [p.step for p in changed.steps() if p.notice is None] == [3]


def test_a_folder_with_other_files_or_a_second_process_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files and no run"):
        Trainer(tiny_recipe(), tmp_path)
    first = Trainer(tiny_recipe(), tmp_path / "run")
    with pytest.raises(UserError, match="another process is training"):
        Trainer(tiny_recipe(), tmp_path / "run")
    first.run.close()


def test_labels_are_needed_where_the_recipe_conditions_on_them(tmp_path: Path) -> None:
    from PIL import Image

    for i in range(4):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i}.png")
    with pytest.raises(UserError, match="conditions on labels"):
        Trainer(tiny_recipe(f"data.path={tmp_path}", "training.batch_size=2"), tmp_path / "run")


def poisoned(trainer: Trainer, bad: set[int]) -> Trainer:
    """The trainer with NaN images in some steps."""
    honest = trainer.one_step

    def one_step(batch: Batch | LatentBatch) -> Tensor:
        assert isinstance(batch, Batch)
        if trainer.step in bad:
            batch = replace(batch, pixels=batch.pixels * float("nan"))
        return honest(batch)

    trainer.one_step = one_step  # type: ignore[method-assign]
    return trainer


def test_a_step_without_a_finite_loss_is_skipped_and_written_down(tmp_path: Path) -> None:
    trainer = poisoned(Trainer(tiny_recipe(), tmp_path), {3})
    list(trainer.steps())
    entries = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [3]
    assert entries[0]["positions"] == list(range(48, 64))
    assert all(bool(torch.isfinite(p).all()) for p in trainer.network.parameters())


def test_a_step_that_is_not_taken_leaves_weights_moments_and_mean(tmp_path: Path) -> None:
    trainer = poisoned(Trainer(tiny_recipe(), tmp_path), {2})
    for step in range(2):
        trainer.one_step(trainer.batches.at(step))

    def state() -> list[Tensor]:
        entries = trainer.stepper.optimisers["network"].state.values()
        modules = (trainer.network, trainer.means["ema"].module)
        found = [*(t for module in modules for t in module.parameters()), *(t for e in entries for t in e.values())]
        return [t.detach().clone() for t in found]

    before = state()
    trainer.one_step(trainer.batches.at(2))
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    trainer.end_interval()
    assert (trainer.bad_steps, trainer.window.steps) == (1, 2)
    trainer.run.close()


def test_too_many_bad_steps_stop_the_run_and_name_the_last_good_checkpoint(tmp_path: Path) -> None:
    trainer = poisoned(Trainer(tiny_recipe("training.steps=40"), tmp_path), set(range(6, 40)))
    with pytest.raises(UserError, match="last good checkpoint is that of step 5") as error:
        list(trainer.steps())
    assert f"{BAD_STEPS} steps in a row" in str(error.value)
