"""A trained classifier: saved with its schedule, refused where it does not fit, and leading samples to their class."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from carrara.classifier import Classifier
from carrara.condition import Condition
from carrara.conditioning import ClassLabels
from carrara.errors import UserError
from carrara.model import DiffusionModel
from carrara.networks import EncoderClassifier, EncoderClassifierParams
from carrara.process import NoisyClassifier, schedules
from tests.errors import refused

NAMES = tuple("0123456789")


def untrained(**changes: object) -> Classifier:
    """A classifier of 8x8 gray images with random weights."""
    torch.manual_seed(1)
    options = {"image_size": (8, 8), "in_channels": 1, "channels": 8, "channel_mult": (1, 1), "head_channels": 8}
    params = EncoderClassifierParams(**{**options, "attention": (2,), "num_classes": 10, **changes})  # type: ignore[arg-type]
    network = EncoderClassifier(params).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Classifier(network, schedules.cosine(1000), NAMES, origin="random")


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> DiffusionModel:
    return DiffusionModel.load(tiny_run)


def test_save_and_load_are_inverse(tmp_path: Path) -> None:
    classifier = untrained()
    classifier.save(tmp_path)
    again = Classifier.load(tmp_path)
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(again.read(x), classifier.read(x))
    assert (again.schedule.spec, again.names, again.noisy) == (classifier.schedule.spec, NAMES, True)


def test_reading_has_no_dropout_and_leaves_the_mode_as_it_was() -> None:
    classifier = untrained(dropout=0.5)
    x = torch.randn(16, 1, 8, 8)
    expected = classifier.read(x)
    classifier.network.train()
    assert all(torch.equal(classifier.read(x), expected) for _ in range(3))
    assert classifier.network.training


def test_a_scale_of_nought_changes_no_bit_and_the_guide_leads(model: DiffusionModel) -> None:
    classifier = untrained()
    labels = list(range(10)) * 2
    plain = model.sample(labels, steps=5, seed=3)
    nought = model.sample(labels, steps=5, seed=3, classifier=classifier, classifier_scale=0)
    assert torch.equal(plain.latents, nought.latents)
    led = model.sample(labels, steps=5, seed=3, classifier=classifier, classifier_scale=20, solver="ddim")
    away = model.sample(labels, steps=5, seed=3, classifier=classifier, classifier_scale=-20, solver="ddim")

    def support(images: torch.Tensor) -> float:
        with torch.no_grad():
            logits = NoisyClassifier(classifier.network, classifier.schedule)(images, 1.0)
        return float(logits.log_softmax(1).gather(1, torch.tensor(labels)[:, None]).mean())

    assert support(led.images) > support(plain.images) > support(away.images)
    assert led.metadata["classifier_scale"] == 20


def test_each_solver_hears_the_classifier(model: DiffusionModel) -> None:
    for solver in ("ddpm", "ddim", "dpm++2m", "heun"):
        plain = model.sample([3], steps=4, seed=0, solver=solver)
        led = model.sample([3], steps=4, seed=0, solver=solver, classifier=untrained(), classifier_scale=5)
        assert not torch.equal(plain.images, led.images), solver


def test_what_a_classifier_says_of_pure_noise_is_not_blown_up(model: DiffusionModel) -> None:
    """At T of the cosine schedule the signal is 5e-5 of the noise: there a gradient of 0.1 moves x̂_0 by thousands."""
    reached: list[float] = []
    model.sample(
        [1, 2],
        steps=20,
        seed=0,
        guidance=1.0,
        solver="ddim",
        classifier=untrained(),
        classifier_scale=20.0,
        on_step=lambda step, low: reached.append(float(step.x.abs().max())),
    )
    assert max(reached) < 6  # noise of unit variance: five standard deviations and a picture's range


def test_one_that_does_not_fit_is_refused(model: DiffusionModel) -> None:
    good = untrained()
    for wrong, words in (
        (replace(good, schedule=schedules.linear(1000)), "schedule kind linear"),
        (replace(good, schedule=schedules.cosine(500)), "steps 500"),
        (untrained(image_size=(16, 16)), "reads images of 1×16×16"),
        (untrained(in_channels=3), "reads images of 3×8×8"),
        (replace(untrained(num_classes=5), names=NAMES[:5]), "knows 5 classes"),
        (replace(good, noisy=False), "clean images only"),
    ):
        with pytest.raises(UserError, match=words):
            model.sample([1], steps=2, classifier=wrong)
    named = replace(model, conditioners=(ClassLabels(tuple("abcdefghij"), 0.1),))
    swapped = replace(good, names=tuple("bacdefghij"))
    with pytest.raises(UserError, match="class 0 is 'b' to the classifier and 'a'"):
        named.sample([1], steps=2, classifier=swapped)
    for scale in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="finite"):
            model.sample([1], steps=2, classifier=good, classifier_scale=scale)
    with refused("invalid", "labels"):
        model.sample([10], steps=2, classifier=good)


def test_a_model_that_is_told_nothing_is_led_by_the_classifiers_own_classes(model: DiffusionModel) -> None:
    bare = replace(model, conditioners=(), network=_Deaf(model), sampling={})
    named = replace(untrained(), names=tuple("abcdefghij"))
    by_name = bare.sample(["b", "d"], steps=3, classifier=named, classifier_scale=5)
    by_number = bare.sample([1, 3], steps=3, classifier=named, classifier_scale=5)
    assert by_name.labels == [1, 3]
    assert torch.equal(by_name.images, by_number.images)
    with refused("missing", "labels"):
        bare.sample(count=2, steps=2, classifier=named)


class _Deaf(torch.nn.Module):
    """The model's network under its null label, whatever the condition."""

    def __init__(self, model: DiffusionModel) -> None:
        super().__init__()
        assert model.class_labels is not None
        self.network = model.network
        self.null = model.class_labels.null(Condition(label=torch.tensor([0])))

    def forward(self, x: torch.Tensor, time: torch.Tensor, condition: object) -> torch.Tensor:
        answer: torch.Tensor = self.network(x, time, self.null.batch(len(x)))
        return answer
