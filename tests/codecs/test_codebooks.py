"""Codebooks: lookup, learning, dead codes, use; and the discrete VAE's softened choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carrara.codecs import DiscreteAutoencoder, DiscreteParams, QuantiserParams, VQAutoencoder
from carrara.codecs.quantiser import Quantiser, nearest, perplexity, used
from carrara.process import Noise
from tests.codecs.small import make, params, pictures
from tests.errors import refused


def quantiser(**changes: object) -> Quantiser:
    torch.manual_seed(0)
    return Quantiser(replace(QuantiserParams(codes=8), **changes), 3)  # type: ignore[arg-type]


def latents(batch: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(2, 30), st.integers(1, 5), st.integers(0, 10**6))
def test_the_nearest_entry_is_the_nearest(count: int, codes: int, channels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors, codebook = (torch.randn(n, channels, generator=generator) for n in (count, codes))
    distances = (vectors.double()[:, None] - codebook.double()[None]).square().sum(2)
    chosen = distances.gather(1, nearest(vectors, codebook)[:, None])[:, 0]
    # Of two entries equally far up to float32's rounding, either is right.
    torch.testing.assert_close(chosen, distances.min(1).values, rtol=1e-5, atol=1e-5)


def test_entries_are_found_at_themselves() -> None:
    """Indices → entries → indices."""
    own = quantiser(decay=None)
    indices = torch.randint(0, 8, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(own.indices(own.lookup(indices)), indices)


@pytest.mark.parametrize("indices", [[[[0, 16]]], [[[-1, 3]]]])
@pytest.mark.parametrize("kind", ["vq", "discrete"])
def test_an_index_out_of_range_is_refused(kind: str, indices: list[list[list[int]]]) -> None:
    codec = make(kind)
    assert isinstance(codec, VQAutoencoder | DiscreteAutoencoder)
    with refused("mismatch", "indices"):
        codec.codes(torch.tensor(indices))
    with refused("shape", "indices"):
        codec.codes(torch.zeros(1, 2, 2))
    assert codec.codes(torch.full((1, 2, 2), 15)).vectors.shape == (1, 3, 2, 2)


@pytest.mark.parametrize("kind", ["vq", "discrete"])
def test_codes_latents_and_indices_decode_alike(kind: str) -> None:
    codec = make(kind).eval()
    assert isinstance(codec, VQAutoencoder | DiscreteAutoencoder)
    codec.set_latent_scale(1.5)
    with torch.no_grad():
        codes = codec.encode(pictures())
        decoded = codec.decode(codes)
        assert torch.equal(decoded, codec.decode(codec.codes(codes.indices)))
        assert torch.equal(decoded, codec.decode(codes.mode()))


def step(own: Quantiser, z: Tensor, ids: Sequence[int] = range(4)) -> None:
    """What a training step does."""
    own.accumulate(z, own.indices(z), Noise(0).rows(ids))
    own.end_step()


def test_an_ema_codebook_follows_the_moving_mean_of_what_chose_it() -> None:
    """e = m/N with N ← γN + (1-γ)n, m ← γm + (1-γ)Σz, by hand over three batches."""
    own = quantiser(decay=0.9, restart=0.0)
    counts, sums = own.counts.double(), own.sums.double()
    for seed in range(3):
        z = latents(seed=seed)
        indices = own.indices(z)
        step(own, z)
        flat, chosen = z.double().permute(0, 2, 3, 1).reshape(-1, 3), indices.flatten()
        for code in range(8):
            mine = flat[chosen == code]
            counts[code] = 0.9 * counts[code] + 0.1 * len(mine)
            sums[code] = 0.9 * sums[code] + 0.1 * mine.sum(0)
        total = counts.sum()
        smoothed = (counts + 1e-5) / (total + 8e-5) * total
        torch.testing.assert_close(own.codebook.double(), sums / smoothed[:, None], rtol=1e-5, atol=1e-6)


def test_gradient_codebooks_learn_and_ema_codebooks_have_no_gradient() -> None:
    for decay in (None, 0.99):
        own = quantiser(decay=decay)
        z = latents().requires_grad_()
        own.loss(z, own.lookup(own.indices(z)))[0].sum().backward()
        assert z.grad is not None
        assert (own.codebook.grad is not None) == (decay is None)


def test_the_first_step_fills_the_codebook_and_dead_codes_are_restarted() -> None:
    own = quantiser()
    z = latents()
    step(own, z)
    vectors = z.permute(0, 2, 3, 1).reshape(-1, 3)
    assert all((vectors == entry).all(1).any() for entry in own.codebook)
    # Then only codes that nobody chooses move by more than the mean does.
    alive = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    own.credit.copy_(alive / alive.sum())
    chosen = torch.arange(0, 64).reshape(4, 4, 4) % 8
    chosen[(chosen == 1) | (chosen == 4)] = 0
    own.accumulate(latents(seed=1), chosen, Noise(0).rows(range(4, 8)))
    own.end_step()
    others = latents(seed=1).permute(0, 2, 3, 1).reshape(-1, 3)
    restarted = torch.stack([(others == entry).all(1).any() for entry in own.codebook])
    assert torch.equal(restarted, alive == 0)
    torch.testing.assert_close(own.credit[alive == 0], torch.full((2,), 1 / 8))


def test_restarts_end_at_restart_until() -> None:
    for first, moves in ((97, False), (96, True)):
        own = quantiser(restart_until=100)
        step(own, latents(), range(first, first + 4))
        vectors = latents().permute(0, 2, 3, 1).reshape(-1, 3)
        assert bool((vectors == own.codebook[0]).all(1).any()) == moves


def test_a_restart_does_not_depend_on_the_order_of_the_batch() -> None:
    """Samples are known by their global positions, however they were shared out."""
    books = []
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        own = quantiser()
        step(own, latents()[order], [10 + i for i in order])
        books.append(own.codebook)
    assert torch.equal(*books)


@pytest.mark.parametrize("decay", [0.9, None])
def test_a_batch_teaches_the_same_in_parts(decay: float | None) -> None:
    """The codebook learns once for each step, however many passes it took: γ and restarts mean the same."""
    books = []
    for parts in (1, 4):
        own = quantiser(decay=decay)
        for number in range(3):
            whole, ids = latents(seed=number), range(4 * number, 4 * number + 4)
            for rows in torch.arange(4).chunk(parts):
                own.accumulate(whole[rows], own.indices(whole[rows]), Noise(0).rows([ids[i] for i in rows]))
            own.end_step()
        books.append(own)
    assert int(books[0].usage.batches) == int(books[1].usage.batches) == 3
    # the parts' sums are added up in another order
    for name, value in books[0].state_dict().items():
        torch.testing.assert_close(value, books[1].state_dict()[name], rtol=1e-6, atol=1e-7)


def test_a_batch_that_is_not_finite_teaches_nothing() -> None:
    own = quantiser()
    step(own, latents())
    before = {name: value.clone() for name, value in own.state_dict().items()}
    step(own, torch.full_like(latents(), torch.nan))
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())


def test_a_collapsed_codebook_is_detected_while_codes_are_restarted() -> None:
    """All positions choose one code, and in some steps another one, which was restarted there."""
    own = quantiser()
    for number in range(600):
        step(own, torch.ones(4, 3, 4, 4), range(4 * number, 4 * number + 4))
    assert float(own.usage.scalars()["perplexity"]) > 2
    assert float(own.usage.step_perplexity) == pytest.approx(1, abs=0.02)  # 0.99^600 of its beginning, 8


def test_perplexity_and_use() -> None:
    assert float(perplexity(torch.ones(16))) == pytest.approx(16, rel=1e-6)
    one = torch.zeros(16)
    one[3] = 5
    assert float(perplexity(one)) == pytest.approx(1)
    assert float(used(one)) == pytest.approx(1 / 16)
    assert float(used(torch.ones(16))) == 1


def test_evaluation_changes_no_codebook() -> None:
    codec = make("vq").eval()
    before = {key: value.clone() for key, value in codec.state_dict().items()}
    codec(pictures(), Noise(0))
    codec.train()
    with torch.no_grad():
        codec(pictures(), Noise(0))
    assert all(torch.equal(value, codec.state_dict()[key]) for key, value in before.items())


def test_wrong_codebooks_are_refused() -> None:
    wrong: dict[str, float] = {"codes": 1, "beta": -0.1, "decay": 1.0, "usage_decay": 1.0, "restart": 1.5}
    for key, value in wrong.items():
        with refused("invalid", f"codec.{key}"):
            QuantiserParams(**{key: value})  # type: ignore[arg-type]
    with refused("conflict", "codec.legacy"):
        QuantiserParams(legacy=True)
    for key, value in {"codes": 1, "temperature": 0.0, "final_temperature": 0.0, "anneal": -1}.items():
        with refused("invalid", f"codec.{key}"):
            DiscreteParams(**{key: value})  # type: ignore[arg-type]


def test_the_temperature_falls_along_a_half_cosine() -> None:
    choice = DiscreteParams(temperature=1.0, final_temperature=0.2, anneal=100)
    assert choice.temperature_at(0) == 1.0
    assert choice.temperature_at(50) == pytest.approx(0.6)
    assert choice.temperature_at(100) == choice.temperature_at(10**9) == 0.2
    codec = DiscreteAutoencoder(params(), replace(choice, codes=16))
    temperatures = [float(codec(pictures(), Noise(0).rows([s, s])).scalars["temperature"]) for s in (0, 50, 200)]
    held_out = codec.eval()(pictures(), Noise(0).rows([0, 1])).scalars["temperature"]
    assert float(held_out) == pytest.approx(0.2), "held-out images are encoded as the codec will be used"
    assert temperatures == pytest.approx([1.0, 0.6, 0.2])


def test_a_cold_choice_is_a_draw_of_the_categorical() -> None:
    """At a low temperature the soft choice takes the entry of the largest logit plus Gumbel noise; the shares of the
    entries drawn are the softmax of the logits."""
    codec = DiscreteAutoencoder(params(channel_mult=(1,)), DiscreteParams(codes=4, final_temperature=1e-3))
    bias = torch.tensor([0.0, 1.0, 2.0, -1.0])
    with torch.no_grad():
        codec.logits.load_state_dict({"weight": torch.zeros_like(codec.logits.weight), "bias": bias})
        codec.codebook.copy_(torch.eye(4)[:, :3] + torch.arange(4.0)[:, None])
        latent = codec.eval()(pictures(8, size=16), Noise(0)).latent
        shares = torch.bincount(nearest(latent.permute(0, 2, 3, 1).reshape(-1, 3), codec.codebook), minlength=4) / 2048
    # 2,048 draws: a share's standard error is at most ½/√2048 = 0.011; four of them.
    torch.testing.assert_close(shares, bias.softmax(0), rtol=0, atol=0.045)


def test_the_discrete_cost_is_the_kl_to_the_uniform_choice() -> None:
    codec = DiscreteAutoencoder(params(), DiscreteParams(codes=16))
    weight, bias = torch.zeros_like(codec.logits.weight), torch.zeros(16)
    with torch.no_grad():
        codec.logits.load_state_dict({"weight": weight, "bias": bias})
        even = codec(pictures(), Noise(0))
        codec.logits.load_state_dict({"weight": weight, "bias": bias.index_fill(0, torch.tensor(3), 100.0)})
        sure = codec(pictures(), Noise(0))
    torch.testing.assert_close(even.penalty, torch.zeros(2), rtol=0, atol=1e-6)
    # ln K at each of 16 positions, over 192 dimensions of the image.
    torch.testing.assert_close(sure.penalty, torch.full((2,), 16 * math.log(16) / 192))


def test_a_hard_choice_decodes_entries_with_the_soft_gradient() -> None:
    codec = DiscreteAutoencoder(params(), DiscreteParams(codes=16, hard=True))
    made = codec(pictures(), Noise(0))
    flat = made.latent.permute(0, 2, 3, 1).reshape(-1, 1, 3)
    # soft + (one - soft) leaves a rounding.
    assert float((flat - codec.codebook.detach()).abs().amax(2).min(1).values.max()) < 1e-6
    made.image.sum().backward()
    assert codec.logits.weight.grad is not None
    assert bool(codec.logits.weight.grad.abs().sum() > 0)
