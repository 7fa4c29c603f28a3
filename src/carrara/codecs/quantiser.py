"""Vector quantisation: every position of a map becomes the nearest entry of a codebook (van den Oord et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara.distributed import gather, is_sharded
from carrara.errors import UserError
from carrara.networks.params import Params
from carrara.process.noise import Noise

_DISTANCES = 2**24
"""How many distances are held at a time."""
_USED = 0.1
"""A code chosen less often than this fraction of 1/K does not count as used."""
POSITIONS = 1
"""The sub-draw of the positions that dead codes are restarted from."""


@dataclass(frozen=True, kw_only=True)
class QuantiserParams(Params):
    """How a codebook is learned.

    Attributes:
        codes: entries of the codebook, K.
        beta: weight β of the commitment term.
        legacy: VQGAN's first published loss, whose β stands at the codebook term instead: for old weights only.
        decay: of the moving means that an EMA codebook follows; None learns the codebook by gradient.
        usage_decay: of the moving mean of how often each code is chosen, over steps.
        restart: a code chosen less often than this fraction of 1/K is restarted, after a step, at the encoder's output
            for some position; 0 never. Above 0, the first step of all fills the codebook.
        restart_until: images seen after which no code is restarted; None for no end.
    """

    section: ClassVar[str] = "codec"

    codes: int = 512
    beta: float = 0.25
    legacy: bool = False
    decay: float | None = 0.99
    usage_decay: float = 0.99
    restart: float = 0.1
    restart_until: int | None = None

    def _check(self) -> None:
        self._at_least(2, "codes")
        self._at_least(0, "beta")
        self._fraction("decay", "usage_decay", "restart")
        gradient = self.decay is None or not self.legacy
        self._require(gradient, "legacy", "is the loss of gradient codebooks: set codec.decay to null.", "conflict")


@dataclass(frozen=True)
class Codes:
    """The codes of images.

    Attributes:
        indices: int64 [B, h, w], in 0..K-1.
        vectors: the entries, float32 [B, C', h, w], before the latent scale.
        latent: the encoder's output before quantisation, scaled, [B, C', h, w]: latent diffusion over a VQ codec works
            in it, and `decode` quantises it. Where only indices are known, the scaled entries.
    """

    indices: Tensor
    vectors: Tensor
    latent: Tensor

    def mode(self) -> Tensor:
        """`latent`: there is but one."""
        return self.latent

    def sample(self, noise: Noise) -> Tensor:
        """`latent`: there is but one."""
        return self.latent


def check_indices(indices: Tensor, codes: int) -> None:
    """Raises UserError unless all indices are whole numbers [B, h, w] in 0..codes - 1."""
    if indices.is_floating_point() or indices.ndim != 3:
        raise UserError(
            f"indices are whole numbers [B, h, w], not {indices.dtype} {list(indices.shape)}.",
            key="indices",
            code="shape",
        )
    low, high = (int(indices.min()), int(indices.max())) if indices.numel() else (0, 0)
    if low < 0 or high >= codes:
        raise UserError(
            f"the codebook has the entries 0..{codes - 1}, and there is no index {low if low < 0 else high}: these "
            "indices are another codec's, or damaged.",
            key="indices",
            code="mismatch",
        )


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The index of the codebook entry [K, D] nearest to every vector [N, D] (of several, the first), int64 [N]."""
    norms = codebook.square().sum(1)
    rows = max(1, _DISTANCES // len(codebook))
    parts = [torch.addmm(norms, part, codebook.T, alpha=-2).argmin(1) for part in vectors.split(rows)]
    return torch.cat(parts) if parts else vectors.new_zeros(0, dtype=torch.long)


def perplexity(usage: Tensor) -> Tensor:
    """e^entropy of how often each code is chosen, [K] to a number: K for uniform use, 1 where all choose one code."""
    fractions = usage / usage.sum().clamp(min=1e-12)
    return torch.special.entr(fractions).sum().exp()  # type: ignore[no-any-return]


def used(usage: Tensor) -> Tensor:
    """The fraction of the codes that are chosen at least a tenth as often as in uniform use, [K] to a number."""
    return (usage >= _USED / len(usage) * usage.sum()).float().mean()


class Usage(nn.Module):
    """How often each code was chosen lately: a moving mean over the steps of training."""

    def __init__(self, codes: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("share", torch.zeros(codes))
        self.register_buffer("step_perplexity", torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    share: Tensor
    step_perplexity: Tensor
    """The moving mean of the perplexity of a single step. Restarted codes take turns in being the one that all
    positions choose, so that over many steps a collapsed codebook looks used."""
    batches: Tensor

    def observe(self, counts: Tensor) -> None:
        """Update with a step's counts of every code, float [K], added up over the processes."""
        self.batches += 1
        self.share.lerp_(counts / counts.sum(), 1 - self.decay)
        self.step_perplexity.lerp_(perplexity(counts), 1 if int(self.batches) == 1 else 1 - self.decay)

    def scalars(self) -> dict[str, Tensor]:
        """The values to log."""
        return {"codebook use": used(self.share), "perplexity": perplexity(self.share)}


class _Part(NamedTuple):
    """What a part of a training batch was quantised to."""

    latent: Tensor
    indices: Tensor
    noise: Noise


class Quantiser(nn.Module):
    """A codebook, its lookup, its loss and its learning.

    Args:
        params: how it learns.
        channels: of the vectors.
    """

    def __init__(self, params: QuantiserParams, channels: int) -> None:
        super().__init__()
        self.params = params
        self.usage = Usage(params.codes, params.usage_decay)
        # The moving mean that restarts depend on: a restarted code starts at uniform use, and may decay from there.
        self.register_buffer("credit", torch.zeros(params.codes))
        self._parts: list[_Part] = []
        entries = torch.empty(params.codes, channels).uniform_(-1 / params.codes, 1 / params.codes)
        if params.decay is None:
            self.codebook = nn.Parameter(entries)
        else:
            self.register_buffer("codebook", entries)
            self.register_buffer("counts", torch.ones(params.codes))
            self.register_buffer("sums", entries.clone())

    codebook: Tensor
    counts: Tensor
    credit: Tensor
    sums: Tensor

    def indices(self, latent: Tensor) -> Tensor:
        """The nearest entry at every position: [B, C', h, w] to int64 [B, h, w]."""
        flat = latent.detach().float().permute(0, 2, 3, 1)
        with torch.autocast(latent.device.type, enabled=False):
            return nearest(flat.reshape(-1, flat.shape[-1]), self.codebook.detach().float()).reshape(flat.shape[:3])

    def lookup(self, indices: Tensor) -> Tensor:
        """The entries of some indices: int64 [B, h, w] to [B, C', h, w].

        Raises:
            UserError: an index that is not of the codebook.
        """
        check_indices(indices, self.params.codes)
        return F.embedding(indices, self.codebook).permute(0, 3, 1, 2)

    def loss(self, latent: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """‖sg[e] - z‖²·β + ‖e - sg[z]‖² as means over the dimensions; the second term moves a gradient codebook only.

        Args:
            latent: z, [B, C', h, w].
            vectors: e, the entries chosen.

        Returns:
            The loss, its commitment term and its codebook term without β, [B] each.
        """
        commitment = (latent - vectors.detach()).square().flatten(1).mean(1)
        codebook = (vectors - latent.detach()).square().flatten(1).mean(1)
        if self.params.legacy:
            return commitment + self.params.beta * codebook, commitment, codebook
        own = codebook if self.params.decay is None else 0.0
        return self.params.beta * commitment + own, commitment, codebook

    # ---- learning ------------------------------------------------------------------------------------------

    def accumulate(self, latent: Tensor, indices: Tensor, noise: Noise) -> None:
        """Keep what a training batch, or a part of one, was quantised to, for `end_step`.

        Args:
            latent: z, [B, C', h, w].
            indices: of the entries chosen, int64 [B, h, w].
            noise: at the batch's samples.
        """
        self._parts.append(_Part(latent.detach().float(), indices, noise))

    @torch.no_grad()
    def end_step(self) -> None:
        """Update, once a step, how often each code was chosen, and an EMA codebook. A batch has the same effect in one
        piece and in parts, on one process and on several.

        N ← γN + (1-γ)n, m ← γm + (1-γ)Σz, e = m/N, with N smoothed by 1e-5 (van den Oord et al. 2017, appendix A.1).
        """
        parts, self._parts = self._parts, []
        if not parts:
            return
        params = self.params
        with torch.autocast(self.codebook.device.type, enabled=False):
            totals = [_totals(part.indices.flatten(), _vectors(part.latent), params.codes) for part in parts]
        counts, sums = (summed(torch.stack(values).sum(0)) for values in zip(*totals, strict=True))
        if not bool(torch.isfinite(sums).all()):
            return  # the optimiser's step was skipped, too
        self.usage.observe(counts)
        self.credit.lerp_(counts / counts.sum(), 1 - params.usage_decay)
        if params.decay is not None:
            self.counts.lerp_(counts, 1 - params.decay)
            self.sums.lerp_(sums, 1 - params.decay)
            total = self.counts.sum()
            smoothed = (self.counts + 1e-5) / (total + params.codes * 1e-5) * total
            self.codebook.copy_(self.sums / smoothed[:, None])
        if params.restart:
            self._restart(parts)

    def _restart(self, parts: list[_Part]) -> None:
        """Restart dead codes.

        Code j becomes the latent of the batch's sample j mod B at a position drawn from that sample's own randomness,
        so that the number of processes and of parts does not matter.
        """
        params = self.params
        if params.decay is None and is_sharded(self):
            raise UserError(
                "a gradient codebook sharded over processes cannot restart codes: set codec.decay to 0.99.",
                key="codec.decay",
                code="conflict",
            )
        dead = self.credit < params.restart / params.codes
        if int(self.usage.batches) == 1:
            dead = torch.ones_like(dead)
        if not bool(dead.any()):
            return
        ids = [i for part in parts for i in part.noise.ids or range(len(part.latent))]
        everyone = gather(torch.tensor(ids, device=dead.device)).sort().values
        if params.restart_until is not None and int(everyone[-1]) >= params.restart_until:
            return
        latent, noise = torch.cat([part.latent for part in parts]), parts[0].noise.rows(ids)
        offered = self._offered(latent, noise, everyone)
        self.codebook.data.copy_(torch.where(dead[:, None], offered, self.codebook.data))
        self.credit.masked_fill_(dead, 1 / params.codes)
        if params.decay is not None:
            self.counts.masked_fill_(dead, 1.0)
            self.sums.copy_(torch.where(dead[:, None], offered, self.sums))

    def _offered(self, latent: Tensor, noise: Noise, everyone: Tensor) -> Tensor:
        """One vector of the batch for every code, [K, C']: zeros but for this process's samples, added up."""
        codes, (samples, channels) = self.params.codes, latent.shape[:2]
        flat = latent.flatten(2)  # [B, C', N]
        uniform = noise.uniform((samples, codes), sub=POSITIONS)
        positions = (uniform * flat.shape[2]).long().to(latent.device)  # [B, K]
        rows = torch.searchsorted(everyone, torch.tensor(noise.ids, device=latent.device))  # in the whole batch
        offered = flat.new_zeros(codes, channels)
        for sample, row in enumerate(rows.tolist()):
            dead = torch.arange(row, codes, len(everyone), device=latent.device)
            offered[dead] = flat[sample, :, positions[sample, dead]].T
        return summed(offered)


def _vectors(latent: Tensor) -> Tensor:
    """[B, C', h, w] as [B·h·w, C']."""
    return latent.permute(0, 2, 3, 1).flatten(0, 2)


def _totals(indices: Tensor, vectors: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """How many of the vectors [N, D] chose each code, [K], and their sums, [K, D].

    As matrix products, since scattered sums have no fixed order on accelerators and a run must repeat its bits.
    """
    counts, sums = vectors.new_zeros(codes), vectors.new_zeros(codes, vectors.shape[1])
    rows = max(1, _DISTANCES // codes)
    for index, part in zip(indices.split(rows), vectors.split(rows), strict=True):
        chosen = part.new_zeros(len(part), codes).scatter_(1, index[:, None], 1.0)
        counts += chosen.sum(0)
        sums += chosen.T @ part
    return counts, sums


def summed(values: Tensor) -> Tensor:
    """The values added up over the processes."""
    return gather(values[None]).sum(0)
