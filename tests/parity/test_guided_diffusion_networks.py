"""ADM's networks against stored outputs of the original program: logits, predictions, input gradients."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from carrara.condition import Condition
from carrara.guidance.classifier import log_gradient
from carrara.interop import guided_diffusion
from tests.shared import shared


def read(case: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """The case's weights, its inputs and outputs, its description."""
    tensors = load_file(shared("golden", f"{case}.safetensors"))
    weights = {key.removeprefix("weights."): v for key, v in tensors.items() if key.startswith("weights.")}
    return weights, tensors, json.loads(shared("golden", f"{case}.json").read_text())


def check(name: str, got: Tensor, tensors: dict[str, Tensor], spec: dict[str, Any]) -> None:
    about = next(o for o in spec["outputs"] if o["name"] == name)
    # The README's tolerance: what the original itself moves by between kernels, four times, and float32 digits;
    # never above the 1e-5 for more than that rounding's sake.
    tolerance = 4 * about["rounding"] + 2e-6 * about["max_abs"]
    gap = float((got.detach() - tensors[f"output.{name}"]).abs().max())
    assert gap <= min(tolerance, 1e-5), f"{name}: {gap}"


@pytest.mark.parametrize("case", ["a1_unet_classcond_learnsigma", "a2_unet_uncond_legacyattn", "a3_unet_newattn"])
def test_unet(case: str) -> None:
    weights, tensors, spec = read(case)
    network = guided_diffusion.load_unet(weights, **spec["config"]["kwargs"]).eval()
    condition = Condition(label=tensors.get("input.y"))
    with torch.no_grad():
        check("out", network(tensors["input.x"], tensors["input.t"], condition), tensors, spec)
        if "input.t_float" in tensors:
            check("out_t_float", network(tensors["input.x"], tensors["input.t_float"], condition), tensors, spec)


def test_super_resolution() -> None:
    weights, tensors, spec = read("a4_superres")
    network = guided_diffusion.load_super_resolution(weights, **spec["config"]["kwargs"]).eval()
    condition = Condition(label=tensors["input.y"], concat=tensors["input.low_res"])
    with torch.no_grad():
        check("out", network(tensors["input.x"], tensors["input.t"], condition), tensors, spec)


def test_classifier_and_its_gradient() -> None:
    weights, tensors, spec = read("b1_classifier_attnpool")
    network = guided_diffusion.load_classifier(weights, **spec["config"]["kwargs"]).eval()
    x, t, y = tensors["input.x"], tensors["input.t"], tensors["input.y"]
    logits = network(x, t)
    check("logits", logits, tensors, spec)
    check("log_prob_y", logits.log_softmax(1)[range(len(y)), y], tensors, spec)
    check("grad_x", log_gradient(lambda at, time: network(at, t), x, 0.0, y), tensors, spec)
