"""The learning rate as a function of the step."""

from __future__ import annotations

import pytest

from carrara.recipe import Training
from carrara.training.rates import learning_rate


@pytest.mark.parametrize("decay", ["constant", "cosine", "inverse_sqrt"])
def test_the_warm_up_ends_at_the_full_rate(decay: str) -> None:
    training = Training(steps=100, learning_rate=0.5, warmup=10, decay=decay)
    rates = [learning_rate(training, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.05)
    assert rates[9] == 0.5
    assert max(rates) == 0.5, "a learning rate is never multiplied behind the user's back"
    after = rates[10:]
    assert after == sorted(after, reverse=True)


def test_the_ends_of_the_decays() -> None:
    cosine = Training(steps=1000, learning_rate=1.0, warmup=0, decay="cosine")
    assert learning_rate(cosine, 500) == pytest.approx(0.5)
    assert learning_rate(cosine, 999) < 1e-5
    root = Training(steps=1000, learning_rate=1.0, warmup=100, decay="inverse_sqrt")
    assert learning_rate(root, 399) == pytest.approx(0.5)
