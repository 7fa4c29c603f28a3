"""The running mean of the weights."""

from __future__ import annotations

import torch
from torch import nn

from carrara.training.ema import EMA, Exponential


def test_the_mean_follows_the_closed_form() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    ema = EMA(module, Exponential(0.9))
    nn.init.ones_(module.weight)
    left = 1.0
    for step in range(1, 200):
        ema.update(module, step)
        left *= min(0.9, (1 + step) / (10 + step))
        # float32 products of 200 factors lose a few units in the last place each
        torch.testing.assert_close(ema.module.weight, torch.full((1, 1), 1 - left), atol=1e-5, rtol=0)


def test_the_mean_is_float32_and_does_not_freeze_under_half_weights() -> None:
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.zeros_(module.weight)
    ema = EMA(module, Exponential(0.9999))
    nn.init.ones_(module.weight)
    for _ in range(100):
        ema.update(module, step=10**6)
    assert ema.module.weight.dtype == torch.float32
    assert 0.0099 < float(next(ema.module.parameters())) < 0.0101, "bfloat16 would have rounded each 1e-4 away"


def test_buffers_are_copied_not_averaged() -> None:
    module = nn.BatchNorm1d(2)
    ema = EMA(module, Exponential(0.5))
    assert module.running_mean is not None
    module.running_mean.fill_(8.0)
    ema.update(module, 100)
    assert dict(ema.module.named_buffers())["running_mean"].tolist() == [8.0, 8.0]


def test_the_mean_needs_no_gradients_and_is_in_evaluation_mode() -> None:
    ema = EMA(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), Exponential(0.9))
    assert not ema.module.training
    assert not any(p.requires_grad for p in ema.module.parameters())
