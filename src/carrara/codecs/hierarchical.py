"""The hierarchical Markov VAE: a chain of latents, each encoded from the one below it (Kingma et al. 2021; Luo 2022).

    ln p(x) ≥ E_q[ ln p(x|z_1) + Σ_{t=2}^T ln p(z_{t-1}|z_t) + ln p(z_T) - ln q(z_{1:T}|x) ],  q = Π q(z_t|z_{t-1}).

A diffusion model is the case whose encoder is not learned but the forward process, every z of x's own shape: then
the bound below is the diffusion bound (docs/math.md §4), which a test shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from carrara.codecs.kl import DiagonalGaussian
from carrara.codecs.learned import LearnedCodec, Reconstruction, initial_log_scale
from carrara.errors import UserError
from carrara.networks.autoencoder import AutoencoderParams, Decoder, Encoder
from carrara.networks.params import check_multiples
from carrara.process.noise import Noise
from carrara.process.transitions import Gaussian


class Link(Protocol):
    """One level of the chain: the Gaussians of z_t given z_{t-1}, and back. z_0 is x."""

    def up(self, below: Tensor) -> Gaussian:
        """q(z_t|z_{t-1})."""
        ...

    def down(self, above: Tensor) -> Gaussian:
        """p(z_{t-1}|z_t)."""
        ...


@dataclass(frozen=True)
class ChainBound:
    """-ELBO, level by level, in nats, [B] each; `total` is an upper bound of -ln p(x).

    Attributes:
        reconstruction: -ln p(x|z_1).
        levels: for t = 2..T, ln q(z_{t-1}|z_{t-2}) - ln p(z_{t-1}|z_t), one draw of what level t-1 costs.
        prior: KL(q(z_T|z_{T-1}) ‖ N(0, I)).
        latents: the draws z_1..z_T.
    """

    reconstruction: Tensor
    levels: tuple[Tensor, ...]
    prior: Tensor
    latents: tuple[Tensor, ...]

    @property
    def total(self) -> Tensor:
        return self.reconstruction + sum(self.levels, self.prior)


def chain_bound(links: Sequence[Link], x: Tensor, draws: Sequence[Tensor | Noise]) -> ChainBound:
    """The bound of a chain on one draw of its latents.

    Args:
        links: the levels, from the one nearest to x.
        x: [B, …].
        draws: the randomness of z_1..z_T, as addresses or as standard normal numbers.
    """
    q: list[Gaussian] = []
    z = [x]
    for link, draw in zip(links, draws, strict=True):
        q.append(link.up(z[-1]))
        z.append(q[-1].draw(draw if isinstance(draw, Tensor) else draw.like(q[-1].mean)))
    down = [-_sum(link.down(z[t + 1]).log_prob(z[t])) for t, link in enumerate(links)]
    levels = tuple(_sum(q[t - 1].log_prob(z[t])) + down[t] for t in range(1, len(links)))
    prior = _sum(q[-1].kl(Gaussian(torch.zeros_like(z[-1]), 0.0)))
    return ChainBound(down[0], levels, prior, tuple(z[1:]))


def _sum(value: Tensor) -> Tensor:
    return value.flatten(1).sum(1)


class LearnedLink(nn.Module):
    """A level whose two Gaussians convolutional networks predict, mean and log-variance each.

    Args:
        params: `in_channels` are those of the latent below.
    """

    def __init__(self, params: AutoencoderParams) -> None:
        super().__init__()
        self.encoder = Encoder(params, moments=2)
        self.decoder = Decoder(replace(params, out_channels=2 * params.in_channels))

    def up(self, below: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian.of(self.encoder(below).float())

    def down(self, above: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian.of(self.decoder(above).float())


class _FirstLink(nn.Module):
    """The level at the image: its Gaussian p(x|z_1) has one learned scale, as the reconstruction term has."""

    def __init__(self, encoder: Encoder, decoder: Decoder, log_scale: nn.Parameter) -> None:
        super().__init__()
        self.encoder, self.decoder, self.log_scale = encoder, decoder, log_scale

    def up(self, below: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian.of(self.encoder(below).float())

    def down(self, above: Tensor) -> Gaussian:
        return Gaussian(self.decoder(above).float(), 2 * self.log_scale)


class HierarchicalVAE(LearnedCodec):
    """A codec of several levels of latents, trained on the bound of the chain.

    As a codec it works in z_1, the level nearest to the image; the levels above are its learned prior, which
    `sample` draws from.

    Args:
        levels: the shape of every level, from the image on; `in_channels` of each is `latent_channels` of the last.

    Raises:
        UserError: no level, or levels that do not fit together.
    """

    kind = "hierarchical"

    def __init__(self, levels: Sequence[AutoencoderParams]) -> None:
        if not levels:
            raise UserError(
                "codec.levels is empty: a hierarchical VAE has at least one level.", key="codec.levels", code="missing"
            )
        for number, (below, above) in enumerate(pairwise(levels), start=2):
            if above.in_channels != below.latent_channels:
                raise UserError(
                    f"codec.levels: level {number} takes {above.in_channels} channels, but the level below has "
                    f"latents of {below.latent_channels}.",
                    key="codec.levels",
                    code="mismatch",
                )
        super().__init__(levels[0], moments=2)
        self.log_scale = initial_log_scale()
        self.above = nn.ModuleList(LearnedLink(params) for params in levels[1:])
        self.level_params = tuple(levels)

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "levels": [asdict(params) for params in self.level_params]}

    @property
    def links(self) -> list[Link]:
        """The levels, from the image on."""
        return [_FirstLink(self.encoder, self.decoder, self.log_scale), *self.above]

    def check_size(self, height: int, width: int) -> None:
        """Raises UserError unless the sides are divisible by the product of all levels' reductions."""
        total = math.prod(params.reduction for params in self.level_params)
        check_multiples((height, width), total, f"a hierarchical codec of total reduction {total}", "data.resolution")

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """z_1's [C', H', W'] for an image's [C, H, W].

        Raises:
            UserError: another number of channels, or a side that the levels' reductions together do not divide.
        """
        self.check_size(*shape[1:])
        return super().latent_shape(shape)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """q(z_1|x) of images [B, C, H, W] in [-1, 1], scaled."""
        raw = DiagonalGaussian.of(self.encoder(x).float())
        return raw.scaled(self.latent_shift, self.latent_scale)

    def bound(self, x: Tensor, noise: Noise) -> ChainBound:
        """-ELBO of images [B, C, H, W] by level, in nats.

        Raises:
            UserError: see `check_size`.
        """
        self.check_size(*x.shape[2:])
        return chain_bound(self.links, x, [noise.at(noise.draw + t) for t in range(len(self.links))])

    def forward(self, x: Tensor, noise: Noise) -> Reconstruction:
        bound = self.bound(x, noise)
        costs = {f"level {t}": cost for t, cost in enumerate((*bound.levels, bound.prior), start=1)}
        penalty = torch.stack(list(costs.values())).sum(0) / x[0].numel()
        scalars = {name: cost.detach() for name, cost in costs.items()}
        return self._reconstruct(bound.latents[0], penalty, scalars, log_scale=self.log_scale)

    def sample(self, count: int, height: int, width: int, noise: Noise) -> Tensor:
        """Pictures from the model's own prior: z_T from N(0, I), then down the chain, [count, C, height, width].

        Raises:
            UserError: see `check_size`.
        """
        self.check_size(height, width)
        shape = (self.params.in_channels, height, width)
        for params in self.level_params:
            shape = (params.latent_channels, shape[1] // params.reduction, shape[2] // params.reduction)
        z = noise.normal((count, *shape), device=self.latent_scale.device)
        for number, link in enumerate(reversed(self.links[1:]), start=1):
            below = link.down(z)
            z = below.draw(noise.at(noise.draw + number).like(below.mean))
        return self._decoded(z)
