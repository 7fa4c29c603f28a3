"""What a recipe may choose: precision, objective, validation, trackers, micro-batches; each trains and resumes."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from carrara import DiffusionModel
from carrara.condition import Condition
from carrara.distributed import Processes
from carrara.errors import UserError
from carrara.objectives import Examples
from carrara.training import Trainer
from carrara.training.micro_batch import largest_micro_batch
from carrara.training.selftest import overfit_one_batch, profile_steps
from carrara.training.step import LossScale
from tests.runs import tiny_recipe, train
from tests.training.test_loop import assert_same_bits, final_state, log_of

FEW = (
    "training.steps=4",
    "training.checkpoint_every=2",
    "training.log_every=2",
    "training.sample_every=4",
    "training.tracker=none",
    "sampling.count=2",
)

CHOICES: dict[str, tuple[str, ...]] = {
    "bf16": ("training.precision=bf16",),
    "fp16": ("training.precision=fp16",),
    "checkpointing": ("network.checkpointing=true", "network.dropout=0.2"),
    "min_snr": ("objective.weight.kind=min_snr", "objective.times.kind=logit_normal", "objective.times.mean=-0.5"),
    "hybrid": ("objective.loss=hybrid", "objective.predicts=eps", "network.learned_variance=true"),
    "vlb": ("objective.loss=vlb", "objective.times.kind=log_normal"),
    "loss_aware": (
        "objective.times.kind=loss_aware",
        "objective.times.history=1",
        "schedule.steps=8",
        "sampling.steps=2",
    ),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_trains_and_resumes_to_the_same_bits(choice: str, tmp_path: Path) -> None:
    recipe = tiny_recipe(*FEW, *CHOICES[choice])
    train(recipe, tmp_path / "straight")
    steps = Trainer(recipe, tmp_path / "broken").steps()
    while next(steps).step < 3:
        pass
    steps.close()  # type: ignore[attr-defined]
    train(recipe, tmp_path / "broken")
    assert_same_bits(tmp_path / "straight", tmp_path / "broken", 4)
    entry = log_of(tmp_path / "straight")[-1]
    assert abs(entry["loss"]) < 1e4
    assert ("vb" in entry["terms"]) == (choice in ("hybrid", "vlb"))
    assert ("loss_scale" in entry) == (choice == "fp16")
    assert DiffusionModel.load(tmp_path / "straight").sample([1], steps=2).images.shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("assignments", "sentence"),
    [
        (("objective.loss=hybrid",), "learned variance"),
        (("network.learned_variance=true",), "never trains a learned variance"),
        (("objective.times.kind=uniform", "objective.times.mean=1"), "objective.times.mean"),
        (("objective.weight.kind=snr",), "objective.weight.kind"),
        (("training.micro_batch=0",), "training.micro_batch"),
        (("training.learning_rate=0",), "training.learning_rate"),
        (("training.learning_rate=-1e-4",), "training.learning_rate"),
        (("training.power_ema=[0.5]",), "training.power_ema"),
        (("training.validate_every=2", "training.validation_split=train"), "trained on"),
        (("training.validate_every=2", "training.validation_split=held"), "no split 'held'"),
    ],
)
def test_choices_that_cannot_be_are_refused_before_anything_is_written(
    assignments: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        Trainer(tiny_recipe(*assignments), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_loss_scale_halves_on_overflow_and_grows_again() -> None:
    scale, yes, no = LossScale(), torch.tensor(True), torch.tensor(False)
    scale.update(no, counted=yes)
    assert scale.state_dict() == {"value": 2.0**15, "good_steps": 0}
    for _ in range(LossScale.PATIENCE):
        scale.update(yes, counted=yes)
    assert scale.value == 2.0**16
    scale.update(no, counted=no)  # the loss itself was no number: no fault of the scale
    assert scale.state_dict() == {"value": 2.0**16, "good_steps": LossScale.PATIENCE}


def test_an_overflow_of_fp16_is_skipped_without_counting_as_a_fault(tmp_path: Path) -> None:
    trainer = Trainer(tiny_recipe(*FEW, "training.precision=fp16"), tmp_path)
    assert trainer.stepper.scale is not None
    trainer.stepper.scale.value = torch.tensor(2.0**120)  # beyond what float32 holds once it is multiplied with
    before = [p.clone() for p in trainer.network.parameters()]
    trainer.one_step(trainer.batches.at(0))
    trainer.end_interval()
    assert trainer.stepper.scale.value == 2.0**119
    assert trainer.bad_steps == 0
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.network.parameters(), strict=True))
    trainer.run.close()


def test_validation_is_of_the_mean_on_held_out_images_and_always_the_same(tmp_path: Path) -> None:
    choices = ("training.validate_every=2", "training.validation_images=64", "training.decay=constant")
    train(tiny_recipe(*FEW, *choices), tmp_path)
    entries = [line["validation"] for line in log_of(tmp_path)]
    assert [entry["step"] for entry in entries] == [2, 4]
    assert entries[0]["images"] == 64
    assert entries[0]["loss"] != entries[1]["loss"]
    trainer = Trainer(tiny_recipe(*FEW, *choices), tmp_path)
    trainer._validate()
    assert trainer.window.validation == entries[1]
    trainer.run.close()


def test_looking_at_a_run_leaves_no_trace_in_it(tmp_path: Path) -> None:
    """Previews and validation after every step: dropout is off in them, on again afterwards, and no draw is theirs."""
    plain = tiny_recipe(*FEW, "network.dropout=0.3", "training.sample_every=4")
    watched = tiny_recipe(*FEW, "network.dropout=0.3", "training.sample_every=1", "training.validate_every=1")
    train(plain, tmp_path / "plain")
    train(watched, tmp_path / "watched")
    mine, theirs = (final_state(tmp_path / name, 4) for name in ("plain", "watched"))
    assert all(torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(theirs[key])) for key in mine)


def test_the_log_tells_speed_and_where_the_time_went(tmp_path: Path) -> None:
    train(tiny_recipe(*FEW), tmp_path)
    timing = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["timing"]
    assert timing["images_per_s"] > 0
    assert timing["flops_per_s"] > timing["images_per_s"]
    assert 0 < timing["data_wait"] < 1
    assert 0 < sum(timing["shares"].values()) <= 1.001  # four decimals each


def test_a_missing_tracker_is_told_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "wandb":
            raise ImportError(name)
        return honest(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="needs the package wandb"):
        train(tiny_recipe(*FEW, "training.tracker=wandb"), tmp_path)


class Hungry(nn.Module):
    """A network that has memory for so many images."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, time: torch.Tensor, condition: Condition) -> torch.Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert condition.label is not None
        assert len(condition.label) == len(x) == len(time)
        return x * self.weight


def ask(network: nn.Module, examples: Examples) -> torch.Tensor:
    answer: torch.Tensor = network(examples.x0, torch.ones(len(examples.x0)), examples.condition)
    return answer


def test_the_micro_batch_is_halved_until_it_fits() -> None:
    alone = Processes(0, 1, torch.device("cpu"))
    examples = Examples(torch.zeros(16, 1, 2, 2), Condition(label=torch.zeros(16, dtype=torch.int64)))
    network = Hungry(5)
    assert largest_micro_batch(network, ask, examples, 64, alone) == (
        4,
        [f"a micro-batch of {size} images does not fit into memory." for size in (64, 32, 16, 8)],
    )
    assert network.weight.grad is None
    with pytest.raises(UserError, match="not even one image fits"):
        largest_micro_batch(Hungry(0), ask, examples, 64, alone)


def test_auto_takes_the_whole_share_where_there_is_room_and_changes_no_bit(tiny_run: Path, tmp_path: Path) -> None:
    train(tiny_recipe("training.micro_batch=auto"), tmp_path)
    assert_same_bits(tiny_run, tmp_path, 12)


def test_one_batch_is_learned_by_heart_and_a_hopeless_recipe_is_told(tmp_path: Path) -> None:
    able = ("training.learning_rate=1e-2", "training.decay=constant", "network.channels=16", "training.batch_size=4")
    *_, (steps, share) = overfit_one_batch(Trainer(tiny_recipe(*FEW, *able), tmp_path / "able"))
    assert share <= 0.1
    assert steps < 500
    hopeless = Trainer(tiny_recipe(*FEW, "training.learning_rate=1e-9"), tmp_path / "hopeless")
    walk = list(overfit_one_batch(hopeless, 5))
    assert len(walk) == 5
    assert walk[-1][1] > 0.9


def test_a_profile_tells_where_the_time_goes(tmp_path: Path) -> None:
    told = profile_steps(Trainer(tiny_recipe(*FEW), tmp_path), steps=3, warm_up=1)
    assert {"reading data", "forward/backward", "optimiser"} <= told["shares"].keys()
    assert 0.5 < sum(told["shares"].values()) <= 1.001  # a tiny step has much between its phases; four decimals
    assert len(told["operations"]) == 10
    assert told["peak_memory_mb"] > 50
