"""What networks tell, to and from (x_0, ε), on every schedule."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from carrara.condition import Condition
from carrara.process import NetworkDenoiser, Noise, NoisyClassifier, Prediction, Predicts, Schedule, diffuse, schedules
from carrara.process.denoiser import network_times
from carrara.process.parameterisation import SIGMA_DATA, network_input, posterior_coefficients, target, to_prediction
from carrara.process.transitions import Transition
from tests.errors import refused
from tests.process.strategies import SCHEDULES, place

KINDS: list[Predicts] = ["eps", "x0", "v", "flow", "edm", "previous"]
BOTH_ENDS: list[Predicts] = ["v", "flow", "edm"]


def pictures(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return Noise(seed).normal((3, 2, 4, 4), dtype=dtype)


def magnification(predicts: Predicts, schedule: Schedule, t: float) -> tuple[float, float]:
    """How much a rounding error of the network's output grows in (x̂_0, ε̂)."""
    a, s = float(schedule.alpha(t)), float(schedule.sigma(t))
    size = a + s  # of x
    if predicts == "eps":
        return size / a, 1.0
    if predicts == "x0":
        return 1.0, size / s
    if predicts == "previous":
        _, c_0 = posterior_coefficients(schedule, t, pictures(0))
        return float(size / c_0), float(size * a / (c_0 * s))
    return size / math.hypot(a, s), size / math.hypot(a, s)


@pytest.mark.parametrize("predicts", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: str(s.spec["kind"]))
@given(share=st.floats(0.0, 1.0))
def test_to_prediction_inverts_target(predicts: Predicts, schedule: Schedule, share: float) -> None:
    t = place(schedule, share)
    if predicts == "previous" and not schedule.discrete:
        return
    if predicts == "eps" and float(schedule.alpha(t)) == 0:
        return
    x0, eps = pictures(1), pictures(2)
    x = diffuse(schedule, x0, t, eps)
    prediction = to_prediction(predicts, schedule, x, t, target(predicts, schedule, x0, eps, t))
    of_x0, of_eps = magnification(predicts, schedule, t)
    torch.testing.assert_close(prediction.x0, x0, rtol=0, atol=2e-14 * of_x0)
    torch.testing.assert_close(prediction.eps, eps, rtol=0, atol=2e-14 * (of_eps + 1))


@pytest.mark.parametrize("predicts", KINDS)
def test_times_of_every_sample_are_those_of_one(predicts: Predicts) -> None:
    schedule, times = schedules.cosine(1000), torch.tensor([1.0, 400.0, 999.0])
    x, raw = pictures(1), pictures(2)
    together = to_prediction(predicts, schedule, x, times, raw)
    for i, t in enumerate(times.tolist()):
        alone = to_prediction(predicts, schedule, x[i : i + 1], t, raw[i : i + 1])
        # x_0 from ε near the noisy end is of the order 1/a = 2e4, "previous" of 1/c_0.
        torch.testing.assert_close(together.x0[i : i + 1], alone.x0, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(together.eps[i : i + 1], alone.eps, rtol=1e-10, atol=1e-10)


def test_previous_keeps_its_digits_in_float32() -> None:
    # σ²_{t|s} = 2e-4 as a float32 difference of numbers near 1 would be off by 1e-3.
    schedule, t = schedules.linear(1000), torch.tensor([2.0, 30.0, 900.0])
    x, raw = pictures(1), pictures(2)
    wide = to_prediction("previous", schedule, x, t, raw).x0
    narrow = to_prediction("previous", schedule, x.float(), t, raw.float()).x0
    torch.testing.assert_close(narrow.double() / wide.abs().max(), wide / wide.abs().max(), rtol=0, atol=1e-6)


class TestBothEnds:
    @pytest.mark.parametrize("predicts", BOTH_ENDS)
    def test_no_signal_left(self, predicts: Predicts) -> None:
        schedule = schedules.zero_terminal_snr(schedules.linear(100))
        x, raw = pictures(1), pictures(2)
        prediction = to_prediction(predicts, schedule, x, 100, raw)
        torch.testing.assert_close(prediction.eps, x if predicts != "flow" else x + 0 * raw)
        sign = {"v": -1.0, "edm": SIGMA_DATA}.get(predicts)
        torch.testing.assert_close(prediction.x0, x - raw if sign is None else sign * raw)

    @pytest.mark.parametrize("predicts", BOTH_ENDS)
    def test_no_noise_at_all(self, predicts: Predicts) -> None:
        x = pictures(1)
        torch.testing.assert_close(to_prediction(predicts, schedules.cosine(10), x, 0.0, pictures(2)).x0, x)

    def test_eps_without_signal_is_refused(self) -> None:
        schedule = schedules.zero_terminal_snr(schedules.linear(100))
        for t in (100, torch.tensor([3.0, 100.0, 1.0])):
            with refused("unsupported", "predicts"):
                to_prediction("eps", schedule, pictures(1), t, pictures(2))

    def test_x0_without_noise_is_refused(self) -> None:
        with refused("unsupported", "time"):
            to_prediction("x0", schedules.linear(100), pictures(1), 0.0, pictures(2))

    def test_previous_knows_whole_times_only(self) -> None:
        with refused("unsupported", "time"):
            to_prediction("previous", schedules.linear(100), pictures(1), 2.5, pictures(2))


def test_edm_is_karras_s_own_table() -> None:
    # D = c_skip·x + c_out·F(c_in·x) in EDM's coordinates, x/a and σ = s/a (Karras et al. 2022, table 1).
    schedule, t, x, raw = schedules.linear(1000), 321, pictures(1), pictures(2)
    a, s = float(schedule.alpha(t)), float(schedule.sigma(t))
    sigma, total = s / a, (s / a) ** 2 + 0.25
    denoised = 0.25 / total * (x / a) + sigma * 0.5 / total**0.5 * raw
    torch.testing.assert_close(to_prediction("edm", schedule, x, t, raw).x0, denoised)
    torch.testing.assert_close(network_input("edm", x, a, s), x / a / total**0.5)
    assert torch.equal(network_input("v", x, a, s), x)


def test_previous_is_the_mean_of_the_training_neighbours() -> None:
    schedule, t = schedules.linear(1000), 77
    x0, eps = pictures(1), pictures(2)
    x = diffuse(schedule, x0, t, eps)
    mean = Transition.of(schedule, t, t - 1).posterior_mean(x, x0)
    torch.testing.assert_close(target("previous", schedule, x0, eps, t), mean)


class TestNetworkDenoiser:
    schedule = schedules.linear(1000)

    def test_the_network_sees_its_own_time_in_float32(self) -> None:
        seen: list[Tensor] = []

        def network(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
            seen.append(time)
            return torch.zeros_like(x)

        NetworkDenoiser(network, self.schedule)(pictures(1, torch.float32), 500, Condition())
        NetworkDenoiser(network, self.schedule)(pictures(1), torch.tensor([1.0, 2.5, 1000.0]), Condition())
        assert torch.equal(seen[0], torch.full((3,), 499.0))
        assert seen[0].dtype == torch.float32
        assert torch.equal(seen[1], torch.tensor([0.0, 1.5, 999.0], dtype=torch.float64))
        assert network_times(self.schedule, torch.tensor(7.0), pictures(1)).shape == (3,)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("predicts", KINDS)
    def test_types_are_kept_whatever_the_network_computes_in(self, predicts: Predicts, dtype: torch.dtype) -> None:
        def network(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
            return x.bfloat16()

        for t in (300, torch.tensor([1.0, 300.0, 999.0])):
            prediction = NetworkDenoiser(network, self.schedule, predicts)(pictures(1, dtype), t, Condition())
            assert prediction.x0.dtype == prediction.eps.dtype == dtype

    def test_autocast_reaches_the_network_only(self) -> None:
        layer = torch.nn.Conv2d(2, 2, 1)
        inside: list[torch.dtype] = []

        def network(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
            out: Tensor = layer(x)
            inside.append(out.dtype)
            return out

        with torch.autocast("cpu", dtype=torch.bfloat16):
            prediction = NetworkDenoiser(network, self.schedule)(pictures(1, torch.float32), 300, Condition())
        assert inside == [torch.bfloat16]
        assert prediction.x0.dtype == torch.float32

    def test_a_learned_variance_is_the_second_half(self) -> None:
        raw = Noise(5).normal((3, 4, 4, 4), dtype=torch.float64)
        denoiser = NetworkDenoiser(lambda x, t, c: raw, self.schedule, "eps", learned_variance=True)
        prediction = denoiser(pictures(1), 10, Condition())
        assert torch.equal(prediction.eps, raw[:, :2])
        assert prediction.variance_fraction is not None
        assert torch.equal(prediction.variance_fraction, raw[:, 2:])

    @pytest.mark.parametrize(("learned", "channels"), [(True, 2), (False, 4), (False, 1)])
    def test_wrong_channels_are_refused(self, learned: bool, channels: int) -> None:
        denoiser = NetworkDenoiser(
            lambda x, t, c: x[:, :1].expand(-1, channels, -1, -1), self.schedule, "eps", learned_variance=learned
        )
        with refused("shape", "network"):
            denoiser(pictures(1), 10, Condition())

    def test_unknown_words_are_refused(self) -> None:
        with refused("unknown", "predicts"):
            NetworkDenoiser(lambda x, t, c: x, self.schedule, "epsilon")  # type: ignore[arg-type]
        with refused("unsupported", "schedule"):
            NetworkDenoiser(lambda x, t, c: x, schedules.edm(), "previous")

    def test_a_noisy_classifier_gets_the_original_time(self) -> None:
        seen: list[Tensor] = []

        def network(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
            seen.append(time)
            return x.flatten(1)[:, :2]

        NoisyClassifier(network, schedules.cosine(50, network_scale=20.0))(pictures(1), 11)
        assert seen[0].tolist() == [200.0] * 3


class TestPrediction:
    alpha, sigma = 0.6, 0.8

    def make(self) -> Prediction:
        x0, eps = pictures(1), pictures(2)
        x = self.alpha * x0 + self.sigma * eps
        spread = torch.ones_like(x)
        return Prediction.from_x0(x, x0, self.alpha, self.sigma, variance_fraction=spread, x0_variance=spread)

    def consistent(self, prediction: Prediction) -> None:
        again = prediction.alpha * prediction.x0 + prediction.sigma * prediction.eps
        torch.testing.assert_close(prediction.x, again, rtol=1e-13, atol=1e-13)

    def test_clipping_derives_eps_again(self) -> None:
        prediction = self.make()
        clipped = prediction.with_x0(prediction.x0.clamp(-0.5, 0.5))
        self.consistent(clipped)
        assert float(clipped.x0.abs().max()) == 0.5
        assert not torch.equal(clipped.eps, prediction.eps)

    def test_a_change_keeps_the_learned_variance_and_drops_the_known_one(self) -> None:
        changed = self.make().with_eps(pictures(3))
        self.consistent(changed)
        assert changed.variance_fraction is not None
        assert changed.x0_variance is None

    def test_a_score_moves_eps_against_it(self) -> None:
        prediction, gradient = self.make(), pictures(4)
        moved = prediction.with_score(gradient)
        self.consistent(moved)
        torch.testing.assert_close(-moved.eps / self.sigma, -prediction.eps / self.sigma + gradient)

    def test_pending_guidance_folds_once(self) -> None:
        from dataclasses import replace

        prediction, gradient = self.make(), pictures(4)
        pending = replace(prediction, pending=gradient)
        folded = pending.folded()
        torch.testing.assert_close(folded.eps, prediction.with_score(gradient).eps)
        assert folded.pending is None
        assert folded.folded() is folded
        assert prediction.folded() is prediction


@pytest.mark.parametrize("sigma_data", [0.1, 0.5, 2.0])
def test_a_zero_answer_is_the_posterior_mean_of_gaussian_data(sigma_data: float) -> None:
    """E[x_0|x] = a σ_d² x/(s² + a² σ_d²) for x_0 ~ N(0, σ_d²): EDM's network has to predict the rest alone."""
    schedule, t = schedules.cosine(100), torch.tensor([1, 40, 99])
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    found = to_prediction("edm", schedule, x, t, torch.zeros_like(x), sigma_data=sigma_data).x0
    a, s = (value.reshape(3, 1, 1, 1) for value in (schedule.alpha(t), schedule.sigma(t)))
    torch.testing.assert_close(found, a * sigma_data**2 * x / (s**2 + a**2 * sigma_data**2))


@pytest.mark.parametrize("sigma_data", [0.1, 2.0])
def test_the_network_sees_and_predicts_unit_variance(sigma_data: float) -> None:
    """What EDM's four coefficients are chosen for (Karras et al. 2022, appendix B.6)."""
    schedule, t = schedules.cosine(100), torch.tensor([50.0])
    x0, eps = sigma_data * torch.randn(1, 200_000), torch.randn(1, 200_000)
    a, s = schedule.alpha(t).float(), schedule.sigma(t).float()
    x = a * x0 + s * eps
    seen = network_input("edm", x, a, s, sigma_data)
    wanted = target("edm", schedule, x0, eps, t, sigma_data)
    for value in (seen, wanted):
        assert abs(float(value.std()) - 1) < 0.01  # the standard error of a standard deviation is 0.0016
    assert torch.allclose(to_prediction("edm", schedule, x, t, wanted, sigma_data=sigma_data).x0, x0, atol=1e-5)
