"""Loss-aware timestep sampling against Improved DDPM's own, update by update."""

from __future__ import annotations

import torch

from carrara.objectives import LossAwareTimes, UniformTimes
from carrara.process import Noise, schedules
from tests.parity.reference import Reference


def test_history_weights_and_importance() -> None:
    case = Reference("g1_resampler")
    steps = case.config["num_timesteps"]
    schedule = schedules.cosine(steps)
    sampler = LossAwareTimes(schedule, history=case.config["history_per_term"], uniform=case.config["uniform_prob"])
    initial = case.output("weights_initial")
    torch.testing.assert_close(sampler.probabilities(), initial / initial.sum())
    indices, losses = case.input("ts"), case.input("losses")
    for update, (index, loss) in enumerate(zip(indices, losses, strict=True)):
        # Their t counts from 0.
        sampler.observe(index + 1, loss, range(len(index)))
        sampler.end_step()
        assert sampler.warm == bool(case.output("warmed_up_after_each_update")[update])
        weights = case.output("weights_after_each_update")[update]
        torch.testing.assert_close(sampler.probabilities(), weights / weights.sum(), rtol=1e-12, atol=0)
    assert torch.equal(sampler.history, case.output("loss_history"))
    assert torch.equal(sampler.counts, case.output("loss_counts"))
    torch.testing.assert_close(sampler.probabilities(), case.output("sample_p"), rtol=1e-12, atol=0)
    # A uniform number in the middle of each index's share draws that index.
    chosen = case.input("sampled_indices")
    probability = sampler.probabilities()
    middle = probability.cumsum(0)[chosen] - probability[chosen] / 2
    times, weights = sampler.draw(schedule, middle)
    assert torch.equal(times.long() - 1, chosen)
    torch.testing.assert_close(weights, case.output("sample_weights"), rtol=1e-7, atol=0)
    uniform, ones = UniformTimes().draw(schedule, Noise(0).uniform((9,)))
    assert torch.equal(ones, case.output("uniform_sample_weights"))
    assert bool(((uniform >= 1) & (uniform <= steps)).all())
