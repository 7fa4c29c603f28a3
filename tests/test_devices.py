"""Devices and precisions, by their words."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from carrara.devices import compute_in, resolve_device, resolve_precision
from tests.errors import refused

CPU = torch.device("cpu")


def test_auto_is_a_device_that_computes() -> None:
    device = resolve_device()
    assert torch.ones(1, device=device).add(1).item() == 2
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert device == CPU


@pytest.mark.parametrize("word", ["moon", "cuda:99", "", "xpu"])
def test_a_device_that_does_not_exist_is_refused(word: str) -> None:
    with refused("unsupported", key="device"):
        resolve_device(word)


def test_a_cpu_stays_at_fp32_unless_it_is_given_another_precision() -> None:
    assert resolve_precision("auto", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"
    assert resolve_precision("no", CPU) == "fp32"
    with refused("unknown", key="precision"):
        resolve_precision("bf17", CPU)


@pytest.mark.parametrize(("capability", "word"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_bf16_is_taken_where_it_is_native(
    capability: tuple[int, int], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda")
    assert resolve_precision("auto", device) == word
    if word == "fp32":
        with refused("unsupported", key="precision"):
            resolve_precision("bf16", device)


def test_a_network_computes_in_bf16_and_answers_in_float32() -> None:
    network, x = nn.Linear(8, 8), torch.randn(2, 8)
    before = network(x)
    compute_in(network, "fp32", CPU)
    assert torch.equal(network(x), before)
    compute_in(network, "bf16", CPU)
    after = network(x)
    assert after.dtype == torch.float32
    assert not torch.equal(after, before)
    assert (after - before).abs().max() < 0.05  # 8 bits of mantissa on values of order 1
