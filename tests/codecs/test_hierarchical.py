"""The hierarchical Markov VAE: its bound is a bound, and with the forward process as encoder it is diffusion's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from carrara.codecs import HierarchicalVAE
from carrara.codecs.hierarchical import chain_bound
from carrara.condition import Condition
from carrara.process import GaussianMixture, Noise, grids, schedules
from carrara.process.bound import Chain
from carrara.process.transitions import Gaussian, forward, posterior
from tests.codecs.small import params, pictures, upper
from tests.errors import refused

STEPS = 6
SAMPLES = 20_000


@dataclass(frozen=True)
class DiffusionLink:
    """A level that does not learn: up by the forward process, down by a denoiser's reverse chain."""

    chain: Chain
    oracle: GaussianMixture
    index: int  # of the pair (t, s), in walking order

    @property
    def pair(self) -> tuple[float, float]:
        return list(self.chain.grid.pairs())[self.index]

    def up(self, below: Tensor) -> Gaussian:
        t, s = self.pair
        return forward(self.chain.schedule, below, s, t)

    def down(self, above: Tensor) -> Gaussian:
        prediction = self.oracle.denoiser(self.chain.schedule)(above, self.pair[0], Condition())
        return self.chain.reverse(prediction, self.index)


def diffusion() -> tuple[Chain, GaussianMixture, list[DiffusionLink], Tensor, list[Tensor]]:
    """A mixture's exact denoiser over six steps; its data; the noise of every level."""
    schedule = schedules.cosine(STEPS)
    chain = Chain(schedule, grids.trailing(schedule, STEPS), levels=None)
    means = torch.tensor([[-0.8, 0.3], [0.5, -0.4]], dtype=torch.float64)
    oracle = GaussianMixture(torch.tensor([0.4, 0.6]), means, torch.tensor([0.05, 0.1]))
    links = [DiffusionLink(chain, oracle, index) for index in reversed(range(STEPS))]
    x = oracle.sample(SAMPLES, Noise(0)).double()
    draws = [Noise(1).at(t).normal(x.shape, dtype=torch.float64) for t in range(STEPS)]
    return chain, oracle, links, x, draws


def test_with_the_forward_process_as_encoder_the_bound_is_the_diffusion_bound() -> None:
    """Both are estimated on the same data: the chain's by one path a sample, diffusion's term by term with the
    Gaussian KLs in closed form, at x_t drawn straight from x_0."""
    chain, oracle, links, x, draws = diffusion()
    bound = chain_bound(links, x, draws)
    total = chain.prior(x) * x[0].numel()
    denoiser = oracle.denoiser(chain.schedule)
    for index, (t, _) in enumerate(chain.grid.pairs()):
        noise = Noise(2).at(index).normal(x.shape, dtype=torch.float64)
        alpha, sigma = float(chain.schedule.alpha(t)), float(chain.schedule.sigma(t))
        x_t = alpha * x + sigma * noise
        total = total + chain.term(denoiser(x_t, t, Condition()), x, index) * x[0].numel()
    gap = bound.total - total
    # Four standard errors of the mean difference.
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(SAMPLES)
    # And sharp enough to notice a level counted twice or left out: each costs more than that.
    assert 4 * float(gap.std()) / math.sqrt(SAMPLES) < 0.1


def test_on_every_path_the_two_ways_of_writing_it_are_the_same_number() -> None:
    """q(x_{1:T}|x_0) = q(x_T|x_0) Π q(x_{t-1}|x_t, x_0): Bayes' rule, before any expectation."""
    chain, _, links, x, draws = diffusion()
    bound = chain_bound(links, x, draws)
    z = [x, *bound.latents]
    q_last = links[-1].up(z[-2])
    one_way = bound.reconstruction + sum(bound.levels, _sum(q_last.log_prob(z[-1]) - _standard(z[-1])))
    t_last = float(chain.grid.times[0])
    alpha, sigma = float(chain.schedule.alpha(t_last)), float(chain.schedule.sigma(t_last))
    other = _sum(Gaussian(alpha * x, 2 * math.log(sigma)).log_prob(z[-1]) - _standard(z[-1]))
    for level, link in enumerate(links):
        down = link.down(z[level + 1]).log_prob(z[level])
        t, s = link.pair
        known = posterior(chain.schedule, z[level + 1], x, t, s).log_prob(z[level]) if level else torch.zeros_like(down)
        other = other + _sum(known - down)
    # Sums of six float64 log-densities of up to hundreds of nats.
    torch.testing.assert_close(one_way, other, rtol=1e-8, atol=1e-8)


def _sum(value: Tensor) -> Tensor:
    return value.flatten(1).sum(1)


def _standard(z: Tensor) -> Tensor:
    return Gaussian(torch.zeros_like(z), 0.0).log_prob(z)


def test_the_bound_lies_above_the_exact_negative_log_likelihood() -> None:
    _, oracle, links, x, draws = diffusion()
    total = chain_bound(links, x, draws).total
    excess = total + oracle.log_prob(x)
    assert float(excess.mean()) > 4 * float(excess.std()) / math.sqrt(SAMPLES)


def test_of_one_gaussian_level_the_bound_is_exact_where_the_posterior_is() -> None:
    """x = z + e: with q(z|x) the true posterior, -ELBO = -ln p(x) on every draw, once the prior's KL is replaced by its
    own draw."""

    class Exact:
        def up(self, below: Tensor) -> Gaussian:
            return Gaussian(below / 2, math.log(0.5))

        def down(self, above: Tensor) -> Gaussian:
            return Gaussian(above, 0.0)

    x = Noise(0).normal((5, 3), dtype=torch.float64) * math.sqrt(2)
    bound = chain_bound([Exact()], x, [Noise(1)])
    z = bound.latents[0]
    drawn = bound.reconstruction + _sum(Exact().up(x).log_prob(z) - _standard(z))
    torch.testing.assert_close(drawn, -_sum(Gaussian(torch.zeros_like(x), math.log(2)).log_prob(x)))
    assert bound.levels == ()


def test_three_levels_learn_report_each_level_and_sample() -> None:
    codec = HierarchicalVAE([params(), upper(), params(in_channels=5, channel_mult=(1,), latent_channels=2)])
    made = codec(pictures(), Noise(0))
    costs = [made.scalars[f"level {t}"] for t in (1, 2, 3)]
    torch.testing.assert_close(made.penalty, sum(costs, torch.zeros(2)) / 192)
    bound = codec.bound(pictures(), Noise(0))
    torch.testing.assert_close(made.scalars["level 3"], bound.prior)
    assert [z.shape[1:] for z in bound.latents] == [(3, 4, 4), (5, 2, 2), (2, 2, 2)]
    assert codec.sample(2, 8, 12, Noise(0)).shape == (2, 3, 8, 12)
    alone = codec.sample(1, 8, 12, Noise(0).rows([1]))
    torch.testing.assert_close(codec.sample(2, 8, 12, Noise(0))[1:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use", ["latent_shape", "forward", "sample"])
def test_images_that_an_upper_level_would_have_to_cut_are_refused_by_their_own_size(use: str) -> None:
    """6×6 fits the first level, whose 3×3 the second cannot halve."""
    codec = HierarchicalVAE([params(), upper()])
    uses: dict[str, Callable[[], object]] = {
        "latent_shape": lambda: codec.latent_shape((3, 6, 6)),
        "forward": lambda: codec(pictures(size=6), Noise(0)),
        "sample": lambda: codec.sample(1, 6, 6, Noise(0)),
    }
    with refused("shape", "data.resolution"):
        uses[use]()


def test_levels_that_do_not_fit_together_are_refused() -> None:
    with refused("mismatch", "codec.levels"):
        HierarchicalVAE([params(), params(in_channels=4)])
    with refused("missing", "codec.levels"):
        HierarchicalVAE([])
