"""Schedules, respacing, transitions, reverse variances and the bound against guided-diffusion's stored runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from carrara.condition import Condition
from carrara.evaluation import bits_per_dimension
from carrara.process import Chain, Gaussian, GivenNoise, Prediction, Transition, diffuse, marginal, posterior, schedules
from tests.parity.reference import GUIDED_DIFFUSION_CASES, GuidedDiffusion, Reference

# Both programs take 1 - ratio of tabled numbers near one, which is good to about an ulp of one.
ULP = 2.0**-52


@pytest.fixture(params=GUIDED_DIFFUSION_CASES)
def case(request: pytest.FixtureRequest) -> GuidedDiffusion:
    return GuidedDiffusion(request.param)


def assert_tables_equal(value: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(value, reference, rtol=1e-12, atol=2 * ULP)


def test_tables_of_the_respaced_process(case: GuidedDiffusion) -> None:
    assert_tables_equal(case.schedule.betas, case.output("base_betas"))
    times = case.grid.times[:-1].flip(0)
    assert torch.equal((times - 1).long(), case.output("timestep_map"))
    pairs = [Transition.of(case.schedule, t, s) for t, s in reversed(case.grid.pairs())]
    chain = Chain(case.schedule, case.grid, "small")
    floors = [float(chain.reverse(zero_prediction(), i).log_variance) for i in reversed(range(len(chain)))]
    for name, value in {
        "betas": [p.variance for p in pairs],
        "alphas_cumprod": [p.alpha_t**2 for p in pairs],
        "alphas_cumprod_prev": [p.alpha_s**2 for p in pairs],
        "posterior_variance": [p.posterior_variance for p in pairs],
        "posterior_log_variance_clipped": floors,
        "posterior_mean_coef1": [p.x0_coefficient for p in pairs],
        "posterior_mean_coef2": [p.x_coefficient for p in pairs],
    }.items():
        # A variance of 1e-8 that is itself a quotient of differences keeps 1e-11 of itself.
        torch.testing.assert_close(
            torch.tensor(value, dtype=torch.float64), case.output(name), rtol=1e-11, atol=2 * ULP, msg=name
        )


def zero_prediction() -> Prediction:
    zero = torch.zeros(1, 1, dtype=torch.float64)
    return Prediction(zero, 1.0, 1.0, zero, zero)


def test_the_network_is_told_the_original_timesteps(case: GuidedDiffusion) -> None:
    spaced = case.input("t")
    times = case.grid.times[case.pair_index(spaced)]
    told = case.schedule.network_time(times)
    torch.testing.assert_close(told, case.output("model_timesteps").double(), rtol=1e-12, atol=0)


def test_forward_process_and_posterior(case: GuidedDiffusion) -> None:
    x, x0, eps = case.input("x"), case.input("x_start"), case.input("noise")
    index = case.pair_index(case.input("t"))
    times = case.grid.times[index]
    forward = marginal(case.schedule, x0, times)
    assert isinstance(forward.log_variance, Tensor)
    log_variance = forward.log_variance.expand_as(x)
    case.check("q_mean_variance.mean", forward.mean)
    case.check("q_mean_variance.variance", log_variance.exp())
    case.check("q_mean_variance.log_variance", log_variance)
    case.check("q_sample", diffuse(case.schedule, x0, times, eps))
    pairs = case.grid.pairs()
    one = [posterior(case.schedule, x[i : i + 1], x0[i : i + 1], *pairs[int(index[i])]) for i in range(len(x))]
    case.check("q_posterior.mean", torch.cat([q.mean for q in one]))
    variance = torch.tensor([q.log_variance for q in one], dtype=torch.float64).exp()
    case.check("q_posterior.variance", variance.reshape(-1, 1, 1, 1).expand_as(x))


def reverse(case: GuidedDiffusion, kind: str) -> tuple[Prediction, Gaussian]:
    x = case.input("x")
    index = case.pair_index(case.input("t"))
    prediction = case.denoiser(x, case.grid.times[index], Condition())
    if kind == "denoised_fn":
        prediction = prediction.with_x0(0.9 * prediction.x0 + 0.05)
    if kind != "noclip":
        prediction = prediction.with_x0(prediction.x0.clamp(-1, 1))
    return prediction, Chain(case.schedule, case.grid, case.variance).reverse(prediction, index)


@pytest.mark.parametrize("kind", ["clip", "noclip"])
def test_mean_and_variance_of_the_reverse_step(case: GuidedDiffusion, kind: str) -> None:
    prediction, step = reverse(case, kind)
    case.check(f"p_mean_variance_{kind}.pred_xstart", prediction.x0)
    case.check(f"p_mean_variance_{kind}.mean", step.mean)
    assert isinstance(step.log_variance, Tensor)
    log_variance = step.log_variance.expand_as(step.mean)
    case.check(f"p_mean_variance_{kind}.log_variance", log_variance)
    # "Small" on the pair that ends clean: the original's variance is 0 there, though its logarithm is floored.
    point = (case.variance == "small") & (case.input("t") == 0).reshape(-1, 1, 1, 1)
    case.check(f"p_mean_variance_{kind}.variance", torch.where(point, 0.0, log_variance.exp()))


def test_a_changed_image_moves_the_mean(case: GuidedDiffusion) -> None:
    case.check("p_mean_variance_denoised_fn.mean", reverse(case, "denoised_fn")[1].mean)


class TestHelpers:
    case = Reference("c7_schedules_and_helpers")

    @pytest.mark.parametrize(("name", "steps"), [("linear", 1000), ("linear", 100), ("cosine", 1000)])
    def test_betas(self, name: str, steps: int) -> None:
        make = {"linear": schedules.linear, "cosine": schedules.cosine}[name]
        assert_tables_equal(make(steps).betas, self.case.output(f"betas.{name}.{steps}"))

    def test_latent_diffusion_s_own_words_for_the_same_schedules(self) -> None:
        # Its "linear" is linear in the root of β, its "sqrt_linear" in β itself (docs/math.md §1).
        scaled = schedules.scaled_linear(1000, 0.00085, 0.012)
        assert_tables_equal(scaled.betas, self.case.output("ldm_betas.linear.1000.0.012"))
        straight = schedules.from_betas(torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64))
        assert_tables_equal(straight.betas, self.case.output("ldm_betas.sqrt_linear.1000.0.012"))
        assert_tables_equal(schedules.cosine(1000).betas, self.case.output("ldm_betas.cosine.1000.0.012"))

    def test_kl_between_gaussians(self) -> None:
        first = Gaussian(self.case.input("mean1"), self.case.input("logvar1"))
        second = Gaussian(self.case.input("mean2"), self.case.input("logvar2"))
        # The reference was computed in float32 and holds values up to a few hundred.
        torch.testing.assert_close(first.kl(second), self.case.output("normal_kl"), rtol=1e-6, atol=1e-6)

    def test_discretised_gaussian(self) -> None:
        gaussian = Gaussian(self.case.input("mean1"), 2 * self.case.input("log_scales"))
        images, reference = self.case.input("img"), self.case.output("discretized_gaussian_log_likelihood")
        # The original takes float32 differences of a distribution function near one: 6e-8 each, a few of them.
        probability = gaussian.bin_log_prob(images, 256, "tanh").exp()
        torch.testing.assert_close(probability, reference.exp(), rtol=1e-5, atol=3e-7)
        # The exact distribution function lies within the approximation's own error, 3e-4 at worst.
        torch.testing.assert_close(gaussian.bin_log_prob(images).exp(), reference.exp(), rtol=0, atol=1e-3)


def test_the_bound_term_by_term(case: GuidedDiffusion) -> None:
    images = case.input("img")
    noise = GivenNoise(tensors=(case.input("x_T"), *case.input("noise_seq")))
    bound = bits_per_dimension(
        case.denoiser, images, case.grid, levels=256, variance=case.variance, cdf="tanh", noise=noise, batch_size=1
    )
    case.check("bpd.prior_bpd", bound.prior)
    case.check("bpd.vb", bound.terms)
    case.check("bpd.xstart_mse", bound.x0_errors)
    case.check("bpd.mse", bound.eps_errors)
    case.check("bpd.total_bpd", bound.total)
