"""Addressed noise: the same number at the same address in any company, independent numbers at others."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carrara.process import GivenNoise, Noise
from carrara.process.noise import slerp
from tests.errors import refused

shapes = st.lists(st.integers(1, 9), max_size=3).map(tuple)
seeds = st.integers(-(2**63), 2**64 - 1)

# |z| below this for every figure that is tested: a false alarm once in 1e9 tries.
SIX = 6.1


class TestAddress:
    @settings(max_examples=60)
    @given(seeds, st.integers(0, 10**6), st.integers(0, 15), shapes, st.integers(1, 40), st.data())
    def test_a_row_is_the_same_alone_and_in_any_batch(
        self, seed: int, draw: int, sub: int, shape: tuple[int, ...], batch: int, data: st.DataObject
    ) -> None:
        noise = Noise(seed).at(draw)
        if data.draw(st.booleans()):
            noise = noise.slerp(Noise(seed // 2), 0.3)
        dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
        ids = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=6))
        whole = noise.normal((batch, *shape), sub, dtype)
        assert whole.shape == (batch, *shape)
        assert torch.equal(noise.rows(ids).normal((len(ids), *shape), sub, dtype), whole[ids])
        assert torch.equal(noise.rows(ids).uniform((len(ids), *shape), sub), noise.uniform((batch, *shape), sub)[ids])

    def test_a_large_batch_is_made_in_pieces_that_do_not_show(self) -> None:
        # 70 rows of 3·33·37 numbers: several chunks, none a multiple of a vector register.
        whole = Noise(5).normal((70, 3, 33, 37))
        assert torch.equal(Noise(5).rows([69, 3]).normal((2, 3, 33, 37)), whole[[69, 3]])

    def test_threads_do_not_change_it(self) -> None:
        alone = Noise(5).normal((64, 3, 32, 32))
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            assert torch.equal(Noise(5).normal((64, 3, 32, 32)), alone)
        finally:
            torch.set_num_threads(threads)

    def test_shards_of_processes_make_the_whole(self) -> None:
        whole = Noise(1).normal((8, 5))
        for world in (2, 3, 8):
            for rank in range(world):
                rows = range(rank, 8, world)
                assert torch.equal(Noise(1).rows(rows).normal((len(rows), 5)), whole[rows.start :: world])

    def test_rows_take_tensors_and_far_numbers(self) -> None:
        far = 10**12
        both = Noise(1).rows(torch.tensor([far, far + 1])).normal((2, 4))
        assert torch.equal(Noise(1).rows([far + 1]).normal((1, 4)), both[1:])

    def test_types_agree_up_to_their_rounding(self) -> None:
        wide = Noise(2).normal((4, 100), dtype=torch.float64)
        assert wide.dtype == torch.float64
        torch.testing.assert_close(Noise(2).normal((4, 100)).double(), wide, rtol=5e-7, atol=1e-7)
        half = Noise(2).normal((4, 100), dtype=torch.float16)
        assert torch.equal(half, Noise(2).normal((4, 100)).half())

    def test_like_takes_shape_and_type(self) -> None:
        x = torch.zeros(3, 2, 2, dtype=torch.float64)
        assert torch.equal(Noise(4).at(3).like(x, sub=2), Noise(4).at(3).normal((3, 2, 2), 2, torch.float64))

    def test_nothing_is_remembered(self) -> None:
        noise = Noise(9)
        first = noise.normal((2, 3))
        noise.normal((5, 5))
        noise.uniform((5, 5))
        assert torch.equal(noise.normal((2, 3)), first)

    @pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
    def test_no_numbers_are_an_empty_tensor(self, shape: tuple[int, ...]) -> None:
        assert Noise().normal(shape).shape == shape
        assert Noise().uniform(shape).shape == shape


class TestDistribution:
    values = Noise(123).normal((400, 2500), dtype=torch.float64).flatten()

    def test_moments(self) -> None:
        n = self.values.numel()
        # Means of z^k have the variance (E z^2k - (E z^k)²)/n.
        for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            z = (float((self.values**power).mean()) - mean) / math.sqrt(variance / n)
            assert abs(z) < SIX, power

    def test_distribution_function(self) -> None:
        ordered = torch.special.ndtr(self.values.sort().values)
        n = len(ordered)
        steps = torch.arange(1, n + 1, dtype=torch.float64) / n
        distance = float(torch.maximum((steps - ordered).abs(), (ordered - steps + 1 / n).abs()).max())
        # Dvoretzky-Kiefer-Wolfowitz: P(distance > d) ≤ 2 exp(-2nd²), 1e-9 here.
        assert distance < math.sqrt(math.log(2e9) / (2 * n))

    def test_tails_are_there(self) -> None:
        # 1e6 normals beyond 4: 63.3 expected, Poisson.
        count = int((self.values.abs() > 4).sum())
        assert abs(count - 63.3) < SIX * math.sqrt(63.3)

    def test_uniform_numbers(self) -> None:
        values = Noise(7).uniform((200, 5000)).flatten()
        assert 0 < float(values.min()) < float(values.max()) < 1
        counts = torch.histc(values, 100, 0, 1)
        # Pearson's χ² over 99 degrees of freedom: mean 99, variance 198.
        chi_squared = float(((counts - 1e4) ** 2 / 1e4).sum())
        assert abs(chi_squared - 99) < SIX * math.sqrt(198)

    def test_numbers_of_one_row_are_uncorrelated(self) -> None:
        rows = self.values.reshape(400, 2500)
        for lag in (1, 2, 3, 4, 8, 1250, 1252):
            product = rows[:, lag:] * rows[:, :-lag]
            assert abs(float(product.mean()) * math.sqrt(product.numel())) < SIX, lag
            # Box-Muller's pairs share a radius: squares must not show it.
            squares = (rows[:, lag:] ** 2 - 1) * (rows[:, :-lag] ** 2 - 1)
            assert abs(float(squares.mean()) * math.sqrt(squares.numel()) / 2) < SIX, lag


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Noise(1), Noise(2)),
        (Noise(0), Noise(2**32)),
        (Noise(0), Noise(2**63)),
        (Noise(0), Noise(-1)),
        (Noise(1), Noise(1).at(1)),
        (Noise(1).at(2**20), Noise(1).at(2**20 + 1)),
        (Noise(1).rows(range(400)), Noise(1).rows(range(400, 800))),
        (Noise(1).rows(range(400)), Noise(1).rows(range(1, 401))),
        (Noise(1).at(16), Noise(17)),
    ],
)
def test_other_addresses_are_independent(first: Noise, second: Noise) -> None:
    shape = (400, 1000)
    a, b = first.normal(shape), second.normal(shape)
    assert abs(float((a * b).double().mean()) * math.sqrt(a.numel())) < SIX
    assert abs(float(((a**2 - 1) * (b**2 - 1)).double().mean()) * math.sqrt(a.numel()) / 2) < SIX
    assert int((a == b).sum()) < 5  # of 400,000 float32 numbers, a few may meet


def test_sub_draws_and_sizes_are_independent() -> None:
    a = Noise(1).normal((400, 1000))
    for b in (Noise(1).normal((400, 1000), sub=1), Noise(1).normal((400, 2000))[:, :1000]):
        assert abs(float((a * b).double().mean()) * math.sqrt(a.numel())) < SIX
        assert abs(float(((a**2 - 1) * (b**2 - 1)).double().mean()) * math.sqrt(a.numel()) / 2) < SIX
    uniform = Noise(1).uniform((400, 1000), sub=1)
    assert abs(float((a * (uniform - 0.5)).mean()) * math.sqrt(12 * a.numel())) < SIX


class TestSlerp:
    def test_ends_are_the_seeds_themselves(self) -> None:
        one, other = Noise(1), Noise(2)
        assert torch.equal(one.slerp(other, 0).normal((3, 4)), one.normal((3, 4)))
        assert torch.equal(one.slerp(other, 1).normal((3, 4)), other.normal((3, 4)))

    @given(st.floats(0, 1))
    def test_stays_on_the_circle(self, weight: float) -> None:
        a, b = Noise(1).normal((2, 500), dtype=torch.float64), Noise(2).normal((2, 500), dtype=torch.float64)
        a, b = (v / v.norm(dim=1, keepdim=True) for v in (a, b))
        between = slerp(a, b, weight)
        torch.testing.assert_close(between.norm(dim=1), torch.ones(2).double(), rtol=1e-12, atol=0)
        angle, whole = ((v * a).sum(1).clamp(-1, 1).acos() for v in (between, b))
        # The arc cosine near 1 resolves angles to the root of an ulp.
        torch.testing.assert_close(angle, weight * whole, rtol=1e-6, atol=5e-8)

    def test_parallel_noise_is_mixed_straight(self) -> None:
        a = Noise(1).normal((2, 3))
        torch.testing.assert_close(slerp(a, 2 * a, 0.5), 1.5 * a)

    def test_keeps_the_normal_s_size_and_follows_draws_and_rows(self) -> None:
        noise = Noise(1).slerp(Noise(2), 0.5).rows([4, 9]).at(3)
        value = noise.normal((2, 5000))
        assert abs(float(value.square().mean()) - 1) < 0.1
        one, other = (Noise(s).rows([4, 9]).at(3).normal((2, 5000), dtype=torch.float64) for s in (1, 2))
        by_hand = slerp(one, other, 0.5)
        torch.testing.assert_close(value.double(), by_hand, rtol=1e-6, atol=1e-6)


class TestRefusals:
    def test_negative_rows(self) -> None:
        with refused("invalid", "ids"):
            Noise().rows([3, -2])

    def test_negative_draws(self) -> None:
        with refused("invalid", "draw"):
            Noise().at(-1)

    def test_another_batch_than_its_rows(self) -> None:
        with refused("shape", "noise"):
            Noise().rows([0, 1]).normal((3, 4))

    def test_seventeen_draws_in_a_step(self) -> None:
        with refused("invalid", "sub"):
            Noise().normal((1, 1), sub=16)

    @pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
    def test_a_seed_of_more_than_64_bits(self, seed: int) -> None:
        with refused("invalid", "seed"):
            Noise(seed)

    def test_a_weight_outside_its_range(self) -> None:
        with refused("invalid", "weight"):
            Noise().slerp(Noise(1), 1.5)


class TestGivenNoise:
    tensors = (torch.zeros(3, 2), torch.arange(6.0).reshape(3, 2))

    def test_reads_its_list(self) -> None:
        noise = GivenNoise(tensors=self.tensors)
        assert torch.equal(noise.at(1).normal((3, 2)), self.tensors[1])
        assert torch.equal(noise.at(1).rows([2]).normal((1, 2)), self.tensors[1][2:])

    def test_refuses_what_was_not_given(self) -> None:
        noise = GivenNoise(tensors=self.tensors)
        with refused("missing", "tensors"):
            noise.at(2).normal((3, 2))
        with refused("shape", "tensors"):
            noise.normal((3, 3))
