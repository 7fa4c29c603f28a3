"""Each rule by itself: its formula, its limits, what it costs, what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from carrara.condition import Condition
from carrara.guidance import (
    autoguidance,
    classifier_free,
    classifier_guidance,
    compose,
    dynamic_threshold,
    interval,
    static_threshold,
)
from carrara.guidance.classifier import log_gradient
from carrara.guidance.rescale import Quantity
from carrara.networks import UNet, UNetParams
from carrara.process import GaussianMixture, Guide, NetworkDenoiser, NoisyClassifier, Prediction, schedules
from carrara.process.schedules import Time
from tests.errors import refused
from tests.guidance.oracle import MIXTURE, NULL, SCHEDULE, labelled, points

ORACLE = MIXTURE.denoiser(SCHEDULE)
CLASSIFIER = MIXTURE.classifier(SCHEDULE)
T = 400.0


class Counting:
    """The oracle, keeping the batch size of every call."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, x: Tensor, t: Time, condition: Condition) -> Prediction:
        self.sizes.append(len(x))
        return ORACLE(x, t, condition)


def images(count: int, seed: int = 0) -> Tensor:
    """Standard normal values, float64 [count, 3, 8, 8]."""
    return torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def consistent(prediction: Prediction) -> None:
    """x = a x_0 + s ε must hold after every rule."""
    torch.testing.assert_close(
        prediction.alpha * prediction.x0 + prediction.sigma * prediction.eps, prediction.x, rtol=0, atol=1e-12
    )


@given(scale=st.floats(-5, 15))
@settings(max_examples=30, deadline=None)
def test_classifier_free_is_the_line_through_both_predictions(scale: float) -> None:
    x = points(3)
    guided = classifier_free(scale, NULL)(ORACLE)(x, T, labelled(0))
    null, given_ = ORACLE(x, T, NULL), ORACLE(x, T, labelled(0))
    torch.testing.assert_close(guided.eps, null.eps + scale * (given_.eps - null.eps))
    consistent(guided)


def test_scale_1_costs_one_pass_and_any_other_one_call_of_twice_the_rows() -> None:
    for scale, sizes in ((1.0, [5]), (0.0, [10]), (3.0, [10])):
        counting = Counting()
        classifier_free(scale, NULL)(counting)(points(5), T, labelled(1))
        assert counting.sizes == sizes


def test_scale_0_evaluates_no_classifier() -> None:
    def never(x: Tensor, t: Time) -> Tensor:
        raise AssertionError

    assert classifier_guidance(never, 0.0)(ORACLE) is ORACLE


def test_the_null_may_be_a_function_of_time() -> None:
    times: list[Time] = []

    def null(t: Time) -> Condition:
        times.append(t)
        return NULL

    classifier_free(2.0, null)(ORACLE)(points(2), T, labelled(0))
    assert times == [T]


def test_guided_batches_take_a_time_for_each_row() -> None:
    x, times = points(3), torch.tensor([900.0, 400.0, 20.0], dtype=torch.float64)
    guides: list[Guide] = [
        classifier_free(2.0, NULL),
        classifier_guidance(CLASSIFIER, 2.0),
        interval(classifier_free(2.0, NULL), 100, 600),
        compose(2.0, [(0.5, labelled(1))], NULL),
        dynamic_threshold(),
    ]
    for guide in guides:
        together = guide(ORACLE)(x, times, labelled(0)).eps
        alone = torch.cat([guide(ORACLE)(x[i : i + 1], float(times[i]), labelled(0)).eps for i in range(3)])
        torch.testing.assert_close(together, alone)


def test_the_variance_is_the_conditional_one() -> None:
    def network(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        assert condition.label is not None
        return torch.cat([x, condition.label.to(x)[:, None].expand_as(x)], dim=1)

    denoiser = NetworkDenoiser(network, SCHEDULE, learned_variance=True)
    label = Condition(label=torch.tensor([1, 0]))
    guided = classifier_free(4.0, NULL)(denoiser)(points(2), T, label)
    assert guided.variance_fraction is not None
    assert guided.variance_fraction[:, 0].tolist() == [1.0, 0.0]


def test_v_prediction_is_guided_where_no_signal_is_left() -> None:
    schedule = schedules.zero_terminal_snr(schedules.linear(100))

    def network(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        assert condition.label is not None
        return x * condition.label.to(x)[:, None]

    guided = classifier_free(3.0, NULL)(NetworkDenoiser(network, schedule, "v"))(points(2), 100.0, labelled(1))
    # a = 0, s = 1: x_0 = -v, so with v = y·x for class y: -(2x + 3(1x - 2x)) = x.
    torch.testing.assert_close(guided.x0, points(2))


def test_a_null_that_was_never_trained_is_refused() -> None:
    params = UNetParams(image_size=(4, 4), channels=8, channel_mult=(1,), attention=(), num_classes=3)
    guided = classifier_free(2.0, Condition(label=torch.tensor([3])))(NetworkDenoiser(UNet(params), SCHEDULE))
    with refused("invalid", "label"):
        guided(torch.zeros(1, 3, 4, 4), T, Condition(label=torch.tensor([0])))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_scales_that_are_no_numbers_are_refused(wrong: float) -> None:
    makers: list[Callable[[float], Guide]] = [
        lambda w: classifier_free(w, NULL),
        lambda w: classifier_guidance(CLASSIFIER, w, label=0),
        lambda w: autoguidance(w, ORACLE),
        lambda w: compose(1.0, [(w, labelled(1))], NULL),
        lambda w: static_threshold(w),
        lambda w: dynamic_threshold(bound=w),
    ]
    for make in makers:
        with refused("invalid"):
            make(wrong)


def test_other_wrong_settings_are_refused() -> None:
    with refused("missing", "label"):
        classifier_guidance(CLASSIFIER, 1.0)(ORACLE)(points(1), T, Condition())
    with refused("invalid", "label"):
        classifier_guidance(CLASSIFIER, 1.0, label=2)(ORACLE)(points(1), T, Condition())
    with refused("unknown", "form"):
        classifier_guidance(CLASSIFIER, 1.0, form="meen")  # type: ignore[arg-type]
    with refused("missing", "grid"):
        classifier_guidance(CLASSIFIER, 1.0, at="mean")
    with refused("invalid", "interval"):
        interval(classifier_free(2.0, NULL), 500, 500)
    with refused("invalid", "rescale"):
        classifier_free(2.0, NULL, rescale=1.5)
    with refused("invalid", "percentile"):
        dynamic_threshold(percentile=0)
    with refused("missing", "others"):
        compose(2.0, [], NULL)


def test_the_classifiers_gradient_is_float32_under_autocast_and_without_gradients() -> None:
    network = nn.Linear(2, 3)

    def plain(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        out: Tensor = network(x)
        assert out.dtype == torch.float32
        return out

    classifier = NoisyClassifier(plain, SCHEDULE)
    x, labels = points(4).float(), torch.tensor([0, 1, 2, 0])
    expected = log_gradient(classifier, x, T, labels)
    assert expected.abs().min() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(log_gradient(classifier, x, T, labels), expected)
    with torch.no_grad():
        assert torch.equal(log_gradient(classifier, x, T, labels), expected)
    with torch.inference_mode():
        assert torch.equal(log_gradient(classifier, x.clone(), T, labels), expected)
    assert log_gradient(classifier, x.bfloat16(), T, labels).dtype == torch.bfloat16
    assert all(p.grad is None for p in network.parameters())


def test_the_classifier_gets_the_original_time() -> None:
    told_times: list[Tensor] = []

    def network(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        told_times.append(time)
        return x * 1.0

    guided = classifier_guidance(NoisyClassifier(network, SCHEDULE), 1.0, label=0)(ORACLE)
    guided(points(2), 400.0, Condition())
    assert told_times[0].tolist() == [399.0, 399.0]  # t = 1..T here, 0..T-1 in the network's training


@given(bound=st.floats(0.1, 2))
@settings(max_examples=20, deadline=None)
def test_static_threshold(bound: float) -> None:
    x = 2 * points(4)
    plain = ORACLE(x, T, Condition())
    bounded = static_threshold(bound)(ORACLE)(x, T, Condition())
    assert torch.equal(bounded.x0, plain.x0.clamp(-bound, bound))
    consistent(bounded)


def test_dynamic_threshold() -> None:
    wide = GaussianMixture([1.0], 3 * images(1), [1.0]).denoiser(SCHEDULE)
    x = images(2, seed=1)
    plain = wide(x, T, Condition()).x0
    result = dynamic_threshold(0.9)(wide)(x, T, Condition())
    for before, after in zip(plain, result.x0, strict=True):
        reach = before.abs().flatten().quantile(0.9)
        assert reach > 1
        torch.testing.assert_close(after, before.clamp(-reach, reach) / reach)
    consistent(result)
    calm = dynamic_threshold(bound=100.0)(wide)(x, T, Condition()).x0  # all inside: nothing changes
    torch.testing.assert_close(calm, plain)


@pytest.mark.parametrize("of", ["eps", "x0", "v"])
def test_full_rescale_restores_the_plain_deviation(of: Quantity) -> None:
    oracle = GaussianMixture([0.5, 0.5], images(2), [0.3, 0.2]).denoiser(SCHEDULE)
    x = images(3, seed=1)
    null = Condition(label=torch.tensor([2]))

    def deviation(prediction: Prediction) -> Tensor:
        v = prediction.alpha * prediction.eps - prediction.sigma * prediction.x0
        return {"eps": prediction.eps, "x0": prediction.x0, "v": v}[of].flatten(1).std(dim=1)

    plain = deviation(oracle(x, T, labelled(0)))
    full = classifier_free(6.0, null, rescale=1.0, of=of)(oracle)(x, T, labelled(0))
    torch.testing.assert_close(deviation(full), plain)
    consistent(full)
    unscaled = classifier_free(6.0, null)(oracle)(x, T, labelled(0))
    half = classifier_free(6.0, null, rescale=0.5, of=of)(oracle)(x, T, labelled(0))
    torch.testing.assert_close(deviation(half), (plain + deviation(unscaled)) / 2)


def test_interval_pays_and_guides_inside_only() -> None:
    counting = Counting()
    limited = interval(classifier_free(3.0, NULL), 100, 400)(counting)
    full = classifier_free(3.0, NULL)(ORACLE)
    x = points(2)
    for t, inside in ((401.0, False), (400.0, True), (101.0, True), (100.0, False)):
        counting.sizes.clear()
        expected = (full if inside else ORACLE)(x, t, labelled(0)).eps
        torch.testing.assert_close(limited(x, t, labelled(0)).eps, expected)
        assert counting.sizes == [4 if inside else 2]


def test_autoguidance() -> None:
    weak = GaussianMixture([1.0], torch.zeros(1, 2), [1.5], [0]).denoiser(SCHEDULE)
    x = points(3)
    strong, bad = ORACLE(x, T, labelled(0)), weak(x, T, labelled(0))
    guided = autoguidance(2.5, weak)(ORACLE)(x, T, labelled(0))
    torch.testing.assert_close(guided.eps, bad.eps + 2.5 * (strong.eps - bad.eps))
    consistent(guided)
    assert autoguidance(1.0, weak)(ORACLE) is ORACLE
    torch.testing.assert_close(autoguidance(9.0, ORACLE)(ORACLE)(x, T, labelled(0)).eps, strong.eps)


def test_composed_conditions_add_their_scores_in_one_call() -> None:
    counting = Counting()
    x = points(3)
    guided = compose(2.0, [(-0.5, labelled(1))], NULL)(counting)(x, T, labelled(0))
    assert counting.sizes == [9]
    null, first, second = (ORACLE(x, T, c).eps for c in (NULL, labelled(0), labelled(1)))
    torch.testing.assert_close(guided.eps, null + 2.0 * (first - null) - 0.5 * (second - null))
    consistent(guided)


def test_a_negative_condition_replaces_the_null() -> None:
    x = points(3)
    guided = classifier_free(2.0, labelled(1))(ORACLE)(x, T, labelled(0))
    wanted, unwanted = ORACLE(x, T, labelled(0)).eps, ORACLE(x, T, labelled(1)).eps
    torch.testing.assert_close(guided.eps, unwanted + 2.0 * (wanted - unwanted))


def test_nothing_is_clamped_after_the_classifier() -> None:
    x = 2 * points(6)
    guided = classifier_guidance(CLASSIFIER, 30.0, label=0)(static_threshold()(classifier_free(2.0, NULL)(ORACLE)))
    assert guided(x, T, labelled(0)).x0.abs().max() > 1
    inside = static_threshold()(classifier_guidance(CLASSIFIER, 30.0, label=0)(ORACLE))
    assert inside(x, T, labelled(0)).x0.abs().max() <= 1
