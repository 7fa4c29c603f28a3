"""A codec's training on two processes is that on one: codebook, adaptive weight, both players."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from carrara import distributed
from carrara.codecs import QuantiserParams, VQAutoencoder
from carrara.networks.discriminator import Discriminator, DiscriminatorParams
from carrara.networks.layers import blocks
from carrara.objectives import CodecLoss, CodecObjective, Examples
from carrara.process import Noise
from tests.codecs.small import params, pictures
from tests.processes import together

BATCH, STEPS = 8, 4


def spread(module: nn.Module, sharded: bool) -> nn.Module:
    """The module over all processes: whole on each, or its weights shared out."""
    if not sharded:
        return distributed.replicated(module)
    distributed.shard(module, blocks(module), torch.device("cpu"))
    return module


def whole(module: nn.Module) -> dict[str, Tensor]:
    return {name: distributed.whole(value) for name, value in module.state_dict().items()}


def train(norm: Any, sharded: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """A few steps of both players on this process's share; codec, discriminator and adaptive weights."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world > 1:
        distributed.start()
    torch.manual_seed(0)
    codec = VQAutoencoder(params(), QuantiserParams(codes=16, decay=0.9))
    critic = Discriminator(DiscriminatorParams(channels=8, layers=1, norm=norm))
    joined = [spread(m, sharded) if world > 1 else m for m in (codec, critic)]
    loss = CodecLoss(distance="l2", adversarial=0.5, start=BATCH)
    objective = CodecObjective(joined[0], loss, discriminator=joined[1])
    optimisers = {n: torch.optim.SGD(p.parameters(), lr=0.1) for n, p in objective.players.items()}
    x = pictures(BATCH, size=16)
    share = BATCH // world
    mine = slice(rank * share, (rank + 1) * share)
    weights = []
    for step in range(STEPS):
        rows = range(step * BATCH, (step + 1) * BATCH)[mine]
        for name, player in objective.players.items():
            player.train()
            terms = objective.terms(Examples(x[mine]), Noise(0).rows(rows), name)
            terms.per_sample.mean().backward()
            optimisers[name].step()
            for other in optimisers.values():
                other.zero_grad(set_to_none=True)
            if name == "codec":
                weights.append(float(terms.scalars["adaptive weight"]))
    return whole(codec), whole(critic), weights


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_train_the_codec_that_one_does(sharded: bool) -> None:
    codec, critic, weights = train("group")
    assert weights[0] == 0 < min(weights[1:])
    for other_codec, other_critic, other_weights in together(2, train, "group", sharded):
        # Sums over the batch in another order, over four steps.
        torch.testing.assert_close(torch.tensor(other_weights), torch.tensor(weights), rtol=1e-3, atol=0)
        for own, other in ((codec, other_codec), (critic, other_critic)):
            for name, value in own.items():
                torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_batch_norms_of_several_processes_keep_the_weights_alike() -> None:
    """Their statistics are each process's own, their gradients are shared."""
    (_, one, _), (_, two, _) = together(2, train, "batch")
    for name, value in one.items():
        if "running" not in name:
            assert torch.equal(value, two[name]), name
