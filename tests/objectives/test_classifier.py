"""The noisy classifier's objective."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from carrara.condition import Condition
from carrara.objectives import ClassifierObjective, Examples, LossAwareTimes
from carrara.process import GaussianMixture, Noise, schedules
from tests.errors import refused

SCHEDULE = schedules.cosine(100)
MEANS = 1.5 * Noise(1).normal((8, 1, 2, 2), dtype=torch.float64)
ORACLE = GaussianMixture([1] * 8, MEANS, [0.2] * 8, labels=[0, 1, 2, 3, 4, 5, 6, 6])


class Exact(nn.Module):
    """The exact noisy classifier as a network: it is given t - 1."""

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return ORACLE.classifier(SCHEDULE)(x, time + 1)


def labelled(n: int) -> Examples:
    """Samples of the mixture with their classes, class after class."""
    parts = [ORACLE.sample(n // 7, Noise(y), Condition(label=torch.tensor([y]))) for y in range(7)]
    return Examples(torch.cat(parts), Condition(label=torch.arange(7).repeat_interleave(n // 7)))


def test_cross_entropy_on_noised_images() -> None:
    batch = labelled(70)
    terms = ClassifierObjective(Exact(), SCHEDULE).terms(batch, Noise(3), "network")
    times = (Noise(3).uniform((70, 1), sub=1)[:, 0] * 100).floor() + 1
    a, s = (f(times).reshape(-1, 1, 1, 1) for f in (SCHEDULE.alpha, SCHEDULE.sigma))
    x = a * batch.x0 + s * Noise(3).normal(batch.x0.shape, dtype=torch.float64)
    logits = ORACLE.classifier(SCHEDULE)(x, times).float()
    label = batch.condition.label
    assert label is not None
    torch.testing.assert_close(terms.per_sample, -logits.gather(1, label.unsqueeze(1))[:, 0])
    assert torch.equal(terms.scalars["top1"], (logits.argmax(1) == label).float())
    five = logits.argsort(1, descending=True)[:, :5] == label.unsqueeze(1)
    assert torch.equal(terms.scalars["top5"], five.any(1).float())
    assert terms.quarter is not None
    assert sorted(set(terms.quarter.tolist())) == [0, 1, 2, 3]


def test_clean_images_are_classified_and_noise_is_not() -> None:
    terms = ClassifierObjective(Exact(), SCHEDULE).terms(labelled(7000), Noise(4), "network")
    assert terms.quarter is not None
    accuracy = [float(terms.scalars["top1"][terms.quarter == q].mean()) for q in range(4)]
    assert accuracy == sorted(accuracy, reverse=True)
    # The last levels hold no signal: the largest of the classes' shares, 2/8 and 1/8 drawn alike, is 1/7 of these.
    assert accuracy[3] < accuracy[0] - 0.2


def test_an_exact_classifier_cannot_be_beaten() -> None:
    # Any other temperature costs more (the cross-entropy is proper); classes drawn as often as the mixture has them.
    weights = [1000] * 6 + [2000]
    x0 = torch.cat([ORACLE.sample(n, Noise(y), Condition(label=torch.tensor([y]))) for y, n in enumerate(weights)])
    label = torch.repeat_interleave(torch.arange(7), torch.tensor(weights))

    class Tempered(Exact):
        def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
            return 0.7 * super().forward(x, time, condition)

    batch = Examples(x0, Condition(label=label))
    costs = [
        ClassifierObjective(n, SCHEDULE).terms(batch, Noise(5), "network").per_sample for n in (Exact(), Tempered())
    ]
    excess = costs[1] - costs[0]
    assert float(excess.mean()) > 3 * float(excess.std()) / math.sqrt(len(excess))


def test_few_classes_have_fewer_than_five_likeliest() -> None:
    network = nn.Module()
    network.forward = lambda x, time, condition: x.flatten(1)[:, :3]
    batch = Examples(Noise(1).normal((4, 1, 2, 2)), Condition(label=torch.tensor([0, 1, 2, 0])))
    assert bool((ClassifierObjective(network, SCHEDULE).terms(batch, Noise(), "network").scalars["top5"] == 1).all())


def test_it_can_be_trained_and_remembers_its_losses() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 7))

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
            out: Tensor = self.inner(x)
            return out

    times = LossAwareTimes(SCHEDULE)
    objective = ClassifierObjective(Head(), SCHEDULE, times)
    batch = Examples(labelled(70).x0.float(), labelled(70).condition)
    terms = objective.terms(batch, Noise(3), "network")
    terms.per_sample.mean().backward()
    assert all(p.grad is not None for p in objective.players["network"].parameters())
    objective.end_step()
    assert int(times.counts.sum()) > 0
    assert torch.equal(objective.state_dict()["counts"], times.counts)


def test_refusals() -> None:
    objective = ClassifierObjective(Exact(), SCHEDULE)
    x0 = torch.zeros(2, 1, 2, 2)
    with refused("missing", "label"):
        objective.terms(Examples(x0), Noise(), "network")
    with refused("invalid", "label"):
        objective.terms(Examples(x0, Condition(label=torch.tensor([0, 7]))), Noise(), "network")
