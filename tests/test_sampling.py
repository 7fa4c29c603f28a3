"""A plan computes nothing, is sampled in parts, and its metadata make the same picture again."""

from __future__ import annotations

import inspect
import json
import sys
import threading
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from carrara.condition import Condition
from carrara.model import DiffusionModel
from carrara.modes import eval_mode
from carrara.process import Denoiser, Prediction, grids
from carrara.process.schedules import Time
from carrara.sampling import METADATA, fingerprint, replay
from carrara.solvers import DDIM, DPMSolver
from tests.errors import refused
from tests.test_model import unconditional


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> DiffusionModel:
    return DiffusionModel.load(tiny_run)


def never(*_: object) -> torch.Tensor:
    raise AssertionError("a plan computes nothing")


def test_a_plan_computes_nothing(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.network, "forward", never)
    plan = model.plan([1, 2, 3], steps=4, guidance=2.0)
    assert (len(plan), len(plan.grid), [len(part) for part in plan.parts(2)]) == (3, 4, [2, 1])


def test_steps_of_a_plan_are_what_sample_returns(model: DiffusionModel) -> None:
    plan = model.plan([1, 2], steps=3, seed=5)
    with plan.running():
        steps = list(plan.steps())
    assert torch.equal(steps[-1].x, model.sample([1, 2], steps=3, seed=5).latents)


def test_a_grid_may_be_given_as_it_is(model: DiffusionModel) -> None:
    own = grids.quadratic(model.schedule, 5)
    given = model.sample([1], grid=own, seed=2).images
    assert torch.equal(given, model.sample([1], steps=5, grid="quadratic", seed=2).images)
    assert torch.equal(given, model.sample([1], steps=5, spacing="quadratic", seed=2).images)


def test_own_guides_come_before_the_threshold_and_after_guidance(model: DiffusionModel) -> None:
    inputs: list[Prediction] = []

    def guide(denoiser: Denoiser) -> Denoiser:
        def predict(x: torch.Tensor, t: Time, condition: Condition) -> Prediction:
            inputs.append(denoiser(x, t, condition))
            return inputs[-1].with_x0(40 * torch.ones_like(x))

        return predict

    made = model.sample([1], steps=1, guidance=3.0, guides=[guide])
    assert len(inputs) == 1
    assert torch.equal(made.latents, torch.ones_like(made.latents))
    assert made.metadata["needs"] == ["guides"]


def test_a_guide_that_returns_no_prediction_is_refused(model: DiffusionModel) -> None:
    def guide(denoiser: Denoiser) -> Denoiser:
        return lambda x, t, condition: denoiser(x, t, condition).x0  # type: ignore[return-value]

    with refused("invalid", "guides"):
        model.sample([1], steps=1, guides=[guide])


@pytest.mark.parametrize(
    "choices",
    [
        {"solver": "ddim", "eta": 0.3, "guidance": 2.0},
        {"solver": "dpm++3m", "grid": "karras", "steps": 4},
        {"solver": DPMSolver(order=3), "guidance": 1.5, "rescale": 0.7},
        {},
    ],
)
def test_metadata_make_the_same_picture(model: DiffusionModel, tmp_path: Path, choices: dict[str, Any]) -> None:
    made = model.sample([5, 6], seed=4, first=10, **choices)
    made.save(tmp_path)
    with Image.open(tmp_path / "seed4-00011.png") as picture:
        metadata = json.loads(picture.info["carrara"])
    again = model.sample(**replay(metadata))
    # float32 sums of a batch of two and of one are rounded differently
    torch.testing.assert_close(again.images[0], made.images[1], atol=2e-5, rtol=0)


def test_what_metadata_do_not_hold_is_named(model: DiffusionModel) -> None:
    start = torch.zeros(1, 1, 8, 8)
    made = model.sample([5], steps=2, start=start)
    other = model.sample([5], steps=2, start=start + 1)
    assert made.metadata["start"] != other.metadata["start"]
    with refused("missing", "start"):
        replay({**made.metadata, "row": 0})
    own = model.sample([5], steps=2, grid=grids.trailing(model.schedule, 2), solver=DDIM(eta=0.1))
    with refused("missing", "grid"):
        replay({**own.metadata, "row": 0})
    plain = model.sample([5], steps=2).metadata
    with refused("newer", "format"):
        replay({**plain, "row": 0, "format": METADATA + 1})
    with refused("missing", "arguments"):
        replay({"seed": 1})


def test_two_ways_of_giving_one_thing_are_refused(model: DiffusionModel) -> None:
    condition = Condition(label=torch.tensor([5]))
    with refused("conflict", "condition"):
        model.sample([5], steps=2, condition=condition)
    with refused("conflict", "spacing"):
        model.sample([5], steps=2, grid="trailing", spacing="karras")


def test_every_input_is_recorded(model: DiffusionModel) -> None:
    made = [model.sample(steps=2, condition=Condition(label=torch.tensor([label]))) for label in (5, 6)]
    assert len({samples.metadata["condition.label"] for samples in made}) == 2
    with refused("missing", "condition"):
        replay({**made[0].metadata, "row": 0})


@pytest.mark.parametrize(
    "pair",
    [([0.5], [0.6]), (["a dog"], ["a cat"]), (torch.zeros(2), torch.ones(2)), (np.zeros(5000), np.arange(5000) > 2500)],
)
def test_fingerprints_differ_where_inputs_do(pair: tuple[Any, Any]) -> None:
    assert fingerprint(pair[0]) != fingerprint(pair[1])
    assert fingerprint(pair[0]) == fingerprint(deepcopy(pair[0]))


def test_few_frames_lead_to_the_network(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a guided pixel model: sample, integrate, the solver's step, threshold, guidance, denoiser."""
    forward, names = model.network.forward, []

    def spy(*arguments: Any) -> torch.Tensor:
        frame = inspect.currentframe()
        while frame is not None:
            if "carrara" in frame.f_code.co_filename and "/src/" in frame.f_code.co_filename:
                names.append(frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name)
            frame = frame.f_back
        return forward(*arguments)  # type: ignore[no-any-return]

    monkeypatch.setattr(model.network, "forward", spy)
    model.sample([1], steps=1, guidance=2.0, solver="ddim")
    assert len(names) <= 6, names


def test_modes_are_restored_one_by_one() -> None:
    model = unconditional()
    model.network.train()
    frozen = next(module for module in model.network.modules() if not list(module.children()))
    frozen.eval()
    with eval_mode(model.network), eval_mode(model.network):
        assert not any(module.training for module in model.network.modules())
    assert model.network.training
    assert not frozen.training


def test_threads_that_share_a_network_in_training_make_the_same_picture() -> None:
    model = unconditional()
    for module in model.network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    model.network.train()
    expected = model.sample(count=1, steps=4, seed=1).images
    found: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.append(model.sample(count=1, steps=4, seed=1).images)) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert all(torch.equal(images, expected) for images in found)
    assert model.network.training
