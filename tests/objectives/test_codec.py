"""A codec's objective: every term against plain autograd, the two players, start and ramp, and when it stops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from carrara.codecs import Autoencoder, KLAutoencoder, LearnedCodec, VQAutoencoder
from carrara.networks.discriminator import Discriminator, DiscriminatorParams
from carrara.objectives import LOSSES, CodecLoss, CodecObjective, Examples
from carrara.objectives.adversarial import discriminator_loss
from carrara.objectives.codec import _COLLAPSED, _PATIENCE, CODEC, DISCRIMINATOR
from carrara.process import Noise
from tests.codecs.small import CODECS, make, params, pictures
from tests.errors import refused


def critic() -> Discriminator:
    torch.manual_seed(3)
    return Discriminator(DiscriminatorParams(channels=8, layers=1, norm="group"))


def examples(count: int = 4) -> Examples:
    return Examples(pictures(count, size=16))


def at(first: int, count: int = 4) -> Noise:
    """The randomness of samples at some global positions."""
    return Noise(0).rows(range(first, first + count))


def gradients(module: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters())))


def square_distance(x: Tensor, y: Tensor) -> Tensor:
    """A stand-in for a perceptual distance."""
    return (x.mean((2, 3)) - y.mean((2, 3))).square().sum(1)


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_the_codec_minimises_the_sum_of_its_terms(distance: Any) -> None:
    """Values and gradients against the same loss written out in plain autograd, the adaptive weight included."""
    codec, discriminator = make("kl"), critic()
    assert isinstance(codec, KLAutoencoder)
    loss = CodecLoss(distance=distance, latent=0.3, perceptual=0.7, adversarial=0.5)
    objective = CodecObjective(codec, loss, square_distance, discriminator)
    batch, draw = examples(), at(8)
    terms = objective.terms(batch, draw, CODEC)

    x = batch.x0
    made = codec(x, draw)
    power = 1 if distance == "l1" else 2
    error = (made.image - x).abs().pow(power).flatten(1).mean(1) + 0.7 * square_distance(made.image, x)
    assert codec.log_scale is not None
    b = codec.log_scale.exp()
    l_rec = (error / b if distance == "l1" else error / (2 * b**2)) + codec.log_scale
    l_gan = -discriminator(made.image).flatten(1).mean(1)
    last = codec.decoder.out.weight
    of_rec, of_gan = (torch.autograd.grad(value.mean(), last, retain_graph=True)[0].norm() for value in (l_rec, l_gan))
    weight = (of_rec / (of_gan + 1e-4)).clamp(0, 1e4) * 0.5
    expected = l_rec + weight.detach() * l_gan + 0.3 * made.penalty

    torch.testing.assert_close(terms.per_sample, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms.scalars["adaptive weight"], weight.detach(), rtol=1e-4, atol=0)
    ours, plain = (gradients(codec, value.mean()) for value in (terms.per_sample, expected))
    for mine, theirs in zip(ours, plain, strict=True):
        # Two float32 passes through the same graph, in another order of sums.
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_the_adaptive_weight_sees_through_a_closing_tanh() -> None:
    codec = Autoencoder(params(tanh=True))
    discriminator = critic()
    objective = CodecObjective(codec, CodecLoss(distance="l2", latent=0.0, adversarial=1.0), None, discriminator)
    batch, draw = examples(), at(0)
    weight = objective.terms(batch, draw, CODEC).scalars["adaptive weight"]
    image = codec(batch.x0, draw).image
    values = (image - batch.x0).square().mean(), -discriminator(image).mean()
    norms = [torch.autograd.grad(v, codec.decoder.out.weight, retain_graph=True)[0].norm() for v in values]
    torch.testing.assert_close(weight, (norms[0] / (norms[1] + 1e-4)).detach(), rtol=1e-4, atol=0)


def test_a_fixed_weight_where_none_is_adapted() -> None:
    objective = CodecObjective(make("kl"), CodecLoss(adversarial=0.25, adaptive=False), None, critic())
    assert float(objective.terms(examples(), at(0), CODEC).scalars["adaptive weight"]) == 0.25


def test_the_discriminator_sees_the_reconstructions_of_the_codecs_own_turn() -> None:
    codec, discriminator = make("kl"), critic()
    objective = CodecObjective(codec, CodecLoss(adversarial=0.5), None, discriminator)
    assert list(objective.players) == [CODEC, DISCRIMINATOR]  # the stepping order
    batch, draw = examples(), at(4)
    made = codec(batch.x0, draw).image.detach()
    objective.terms(batch, draw, CODEC)
    with torch.no_grad():
        for parameter in codec.parameters():  # the codec has stepped
            parameter.add_(1.0)
    terms = objective.terms(batch, draw, DISCRIMINATOR)
    real, fake = (discriminator(pictures_).flatten(1) for pictures_ in (batch.x0, made))
    torch.testing.assert_close(terms.per_sample, discriminator_loss(real, fake, "hinge"))
    torch.testing.assert_close(terms.scalars["logits real"], real.mean(1))
    torch.testing.assert_close(terms.scalars["logits fake"], fake.mean(1))


def test_each_player_leaves_the_other_alone() -> None:
    codec, discriminator = make("kl"), critic()
    objective = CodecObjective(codec, CodecLoss(adversarial=0.5), None, discriminator)
    objective.terms(examples(), at(0), CODEC).per_sample.mean().backward()
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    codec.zero_grad()
    objective.terms(examples(), at(0), DISCRIMINATOR).per_sample.mean().backward()
    assert all(parameter.grad is None for parameter in codec.parameters())
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


def test_before_its_start_the_discriminator_neither_counts_nor_learns() -> None:
    codec, discriminator = make("kl"), critic()
    plain = CodecObjective(make("kl"), CodecLoss())
    objective = CodecObjective(codec, CodecLoss(adversarial=0.5, start=100), None, discriminator)
    before = objective.terms(examples(), at(96), CODEC)
    torch.testing.assert_close(before.per_sample, plain.terms(examples(), at(96), CODEC).per_sample)
    terms = objective.terms(examples(), at(96), DISCRIMINATOR)
    terms.per_sample.mean().backward()
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    after = objective.terms(examples(), at(100), CODEC)
    assert float(after.scalars["adaptive weight"]) > 0
    # What is logged has the same names on both sides of the start, so that it can be joined over micro-batches.
    assert before.scalars.keys() == after.scalars.keys()
    assert terms.scalars.keys() == objective.terms(examples(), at(100), DISCRIMINATOR).scalars.keys()


def test_the_ramp_counts_images() -> None:
    objective = CodecObjective(make("kl"), CodecLoss(adversarial=0.5, start=100, ramp=50), None, critic())
    seen = torch.tensor([0.0, 100.0, 125.0, 150.0, 10_000.0])
    torch.testing.assert_close(objective.fraction(seen), torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


def test_a_start_beyond_the_end_gives_a_notice() -> None:
    objective = CodecObjective(make("kl"), CodecLoss(adversarial=0.5, start=5000), None, critic())
    assert objective.notices(6000) == []
    (notice,) = objective.notices(5000)
    assert "starts after 5,000 images, but the run ends after 5,000" in notice


@pytest.mark.parametrize("kind", sorted(CODECS))
def test_every_codec_is_trained_and_what_matters_is_logged(kind: str) -> None:
    name = {"vq-gradient": "vq", "discrete": "dvae"}.get(kind, kind)
    codec = make(kind)
    terms = CodecObjective(codec, LOSSES[name] if name != "kl" else LOSSES["vae"]).terms(examples(), at(0), CODEC)
    terms.per_sample.mean().backward()
    assert terms.per_sample.shape == (4,)
    lacking = [key for key, parameter in codec.named_parameters() if parameter.grad is None]
    assert lacking == []
    wanted = {
        "reconstruction",
        "psnr",
        "ssim",
        "latent cost",
        *(f"latent {what} {c}" for what in ("mean", "std") for c in range(3)),
    }
    wanted |= {"codebook use", "perplexity"} if codec.code_usage is not None else set()
    assert wanted <= terms.scalars.keys()
    assert not any(value.requires_grad for value in terms.scalars.values())


@pytest.mark.parametrize("kind", sorted(CODECS))
def test_the_pass_in_bfloat16_is_the_pass_but_for_its_rounding(kind: str) -> None:
    objective = CodecObjective(make(kind), CodecLoss(adversarial=0.5, latent=0.1), None, critic())
    with torch.autocast("cpu", torch.bfloat16):
        narrow = objective.terms(examples(), at(0), CODEC)
        narrow.per_sample.mean().backward()
        terms = objective.terms(examples(), at(0), DISCRIMINATOR)
    wide = CodecObjective(make(kind), CodecLoss(adversarial=0.5, latent=0.1), None, critic()).terms(
        examples(), at(0), CODEC
    )
    assert narrow.per_sample.dtype == terms.per_sample.dtype == torch.float32
    # 8 bits of mantissa through some ten layers; a code here and there is another.
    torch.testing.assert_close(narrow.scalars["reconstruction"], wide.scalars["reconstruction"], rtol=0.1, atol=0.02)


def test_psnr_is_per_image_with_peak_2() -> None:
    codec = make("autoencoder")
    batch = examples()
    terms = CodecObjective(codec, CodecLoss()).terms(batch, at(0), CODEC)
    with torch.no_grad():
        errors = (codec(batch.x0, at(0)).image - batch.x0).square().flatten(1).mean(1)
    torch.testing.assert_close(terms.scalars["psnr"], 10 * torch.log10(4 / errors), rtol=1e-5, atol=1e-4)


def test_validation_needs_no_gradients() -> None:
    codec = make("vq").eval()
    objective = CodecObjective(codec, CodecLoss(adversarial=0.5, perceptual=1.0), square_distance, critic())
    with torch.no_grad():
        terms = objective.terms(examples(), at(0), CODEC)
        others = objective.terms(examples(), at(0), DISCRIMINATOR)
    assert not terms.per_sample.requires_grad
    assert bool(terms.per_sample.isfinite().all() & others.per_sample.isfinite().all())


def test_a_weight_that_is_not_a_number_stops_the_run() -> None:
    codec = make("kl")
    with torch.no_grad():
        codec.decoder.out.weight[0, 0, 0, 0] = math.nan
    objective = CodecObjective(codec, CodecLoss(adversarial=0.5), None, critic())
    with refused("not_finite", "training.learning_rate"):
        objective.terms(examples(), at(4), CODEC)


@pytest.mark.parametrize("restart", [0.0, 0.1])
def test_a_collapsed_codebook_stops_the_run_once_it_had_time(restart: float) -> None:
    """The encoder gives every picture the same latent, also where unused codes are restarted again and again."""
    codec = make("vq")
    assert isinstance(codec, VQAutoencoder)
    objective = CodecObjective(codec, CodecLoss())
    codec.quantiser.params = type(codec.quantiser.params)(codes=16, restart=restart, usage_decay=0.5)
    for parameter in codec.encoder.parameters():
        parameter.data.zero_()
    for number in range(20):
        objective.terms(examples(), at(4 * number), CODEC)
        objective.end_step()
    codec.quantiser.usage.batches.fill_(_PATIENCE)
    with refused("not_finite", "codec.restart"):
        objective.terms(examples(), at(80), CODEC)
    assert _COLLAPSED > 1.0


def test_the_use_of_a_codebook_is_logged_in_training_only() -> None:
    """On held-out images the moving mean of training would pass for theirs."""
    codec = make("vq")
    training = CodecObjective(codec, CodecLoss()).terms(examples(), at(0), CODEC).scalars
    assert {"codebook use", "perplexity"} <= training.keys()
    with torch.no_grad():
        held_out = CodecObjective(codec.eval(), CodecLoss()).terms(examples(), at(0), CODEC).scalars
    assert not {"codebook use", "perplexity"} & held_out.keys()


def test_terms_without_their_networks_are_refused() -> None:
    codec: LearnedCodec = make("kl")
    with refused("missing", "loss.perceptual"):
        CodecObjective(codec, CodecLoss(perceptual=1.0))
    with refused("missing", "loss.adversarial"):
        CodecObjective(codec, CodecLoss(adversarial=1.0))
    with refused("unknown", "loss.gan"):
        CodecLoss(gan="hing")  # type: ignore[arg-type]
    with refused("invalid", "loss.latent"):
        CodecLoss(latent=-1)


@pytest.mark.parametrize("kind", ["kl", "vq", "discrete"])
def test_a_few_steps_of_both_players_learn(kind: str) -> None:
    """Reconstruction falls; discriminator and codec step in turn; the run is the same when it is repeated."""
    ends = []
    for _ in range(2):
        torch.manual_seed(0)
        codec, discriminator = CODECS[kind](), critic()
        objective = CodecObjective(
            codec, CodecLoss(distance="l2", latent=0.01, adversarial=0.1, start=40), None, discriminator
        )
        optimisers = {n: torch.optim.Adam(p.parameters(), lr=3e-3) for n, p in objective.players.items()}
        errors = []
        for step in range(20):
            for name, optimiser in optimisers.items():
                terms = objective.terms(examples(), at(4 * step), name)
                terms.per_sample.mean().backward()
                optimiser.step()
                for other in optimisers.values():
                    other.zero_grad(set_to_none=True)
                if name == CODEC:
                    errors.append(float(terms.scalars["reconstruction"].mean()))
            objective.end_step()
        assert errors[-1] < 0.7 * errors[0]
        ends.append(torch.cat([p.detach().flatten() for p in codec.parameters()]))
    assert torch.equal(*ends)
