"""The contrastive scorer: its towers, its objective, its folder."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from carrara.condition import Condition
from carrara.networks.contrastive import Towers, TowersParams
from carrara.objectives import Examples
from carrara.objectives.contrastive import ContrastiveObjective
from carrara.process import Noise
from carrara.scorer import Scorer, rank
from carrara.text import Vocabulary
from tests.errors import refused

pytest.importorskip("tokenizers")

CAPTIONS = ["a red square", "a green square", "a blue square", "nothing"]


def scorer() -> Scorer:
    torch.manual_seed(0)
    words = Vocabulary.train(CAPTIONS, 300, 8)
    params = TowersParams(width=16, image_size=(8, 8), channels=8, levels=2, vocabulary=len(words), text_width=16)
    return Scorer(Towers(params), words, about="squares")


def squares(count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Plain colours with noise, and their captions."""
    noise = Noise(seed).rows(range(count))
    kinds = [index % 4 for index in range(count)]
    colours = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [0, 0, 0]])[kinds]
    return colours[:, :, None, None] + 0.3 * noise.normal((count, 3, 8, 8)), [CAPTIONS[kind] for kind in kinds]


def examples(own: Scorer, count: int, seed: int) -> Examples:
    images, texts = squares(count, seed)
    return Examples(images, own.text_features(texts))


def test_embeddings_are_unit_vectors_of_their_rows_alone() -> None:
    own = scorer()
    images, texts = squares(6, 0)
    found, words = own.embed_images(images), own.embed_texts(texts)
    for rows in (found, words):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(own.embed_images(images[2:3]), found[2:3])
    torch.testing.assert_close(rank(own, images, texts), (found * words).sum(1))


def test_the_loss_is_symmetric_cross_entropy() -> None:
    """Against its definition where all texts differ."""
    own = scorer()
    images, texts = squares(4, 0)
    batch = Examples(images, own.text_features(texts))
    objective = ContrastiveObjective(own.network)
    terms = objective.terms(batch, Noise(), "network")
    logits = own.network(images, batch.condition)
    own_place = torch.arange(4)
    expected = (F.cross_entropy(logits, own_place) + F.cross_entropy(logits.T, own_place)) / 2
    torch.testing.assert_close(terms.per_sample.mean(), expected)


def test_equal_texts_are_all_right() -> None:
    """With one text throughout, nothing can be told apart: the loss is ln B whatever the images."""
    own = scorer()
    images, _ = squares(6, 0)
    batch = Examples(images, own.text_features(["nothing"] * 6))
    terms = ContrastiveObjective(own.network).terms(batch, Noise(), "network")
    by_image = math.log(6)  # the logits of a row are equal
    assert float(terms.per_sample.detach().mean()) >= by_image - 1e-4
    assert float(terms.scalars["top1"].min()) == 1


def test_it_learns_to_match_unseen_images() -> None:
    own = scorer()
    objective = ContrastiveObjective(own.network)
    optimiser = torch.optim.AdamW(own.network.parameters(), lr=3e-3)
    for step in range(40):
        optimiser.zero_grad()
        objective.terms(examples(own, 32, step), Noise(), "network").per_sample.mean().backward()
        optimiser.step()
    images, texts = squares(40, 999)
    nearest = (own.embed_images(images) @ own.embed_texts(CAPTIONS).T).argmax(1)
    right = torch.tensor([CAPTIONS.index(text) for text in texts])
    assert (nearest == right).float().mean() >= 0.95


def test_a_folder_holds_it(tmp_path: Path) -> None:
    own = scorer()
    own.save(tmp_path / "scorer")
    again = Scorer.load(tmp_path / "scorer")
    images, texts = squares(3, 1)
    assert torch.equal(again.embed_images(images), own.embed_images(images))
    assert torch.equal(again.embed_texts(texts), own.embed_texts(texts))
    assert again.name == own.name
    with torch.no_grad():
        again.network.image_head.weight.add_(1)
    assert again.name != own.name
    other = Scorer(own.network, Vocabulary.train([*CAPTIONS, "another word"], 300, 8))
    assert other.name != own.name
    with refused("shape", key="texts"):
        rank(own, images, texts[:1])
    (tmp_path / "scorer" / "tokenizer.json").unlink()
    with refused("missing"):
        Scorer.load(tmp_path / "scorer")


def test_towers_that_cannot_be_are_refused() -> None:
    with refused("missing", key="network.vocabulary"):
        TowersParams()
    with refused("shape", key="network.levels"):
        TowersParams(vocabulary=9, image_size=(8, 8), levels=4)
    with refused("invalid", key="network.dropout"):
        TowersParams(vocabulary=9, dropout=1.0)
    towers = Towers(TowersParams(image_features=4, text_features=5))
    with refused("missing", key="captions"):
        towers(torch.zeros(2, 4), Condition())
