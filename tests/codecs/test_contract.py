"""What every learned codec promises, whatever its kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from carrara import codecs
from carrara.codecs import Autoencoder, Codec, LearnedCodec, VQAutoencoder, content_hash
from carrara.errors import UserError
from carrara.process import Noise
from tests.codecs.small import CODECS, make, params, pictures
from tests.errors import refused

KINDS = sorted(CODECS)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_the_round_trip_in_scaled_latents(kind: str) -> None:
    codec = make(kind).eval()
    x = pictures()
    with torch.no_grad():
        plain = codec.decode(codec.encode(x).mode())
        raw = codec.encode(x).mode()
        codec.set_latent_scale(torch.tensor([2.0, 0.5, 3.0]), torch.tensor([0.1, -0.2, 0.3]))
        z = codec.encode(x).mode()
        assert z.shape[1:] == codec.latent_shape(x.shape[1:]) == (3, 4, 4)
        # Powers of two and a third: scaling there and back costs a rounding or two.
        torch.testing.assert_close(codec.unscaled(z), raw, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(codec.decode(z), plain, rtol=1e-4, atol=1e-4)
        assert codec.encode(x).sample(Noise(0)).shape == z.shape


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_codec_is_the_same_codec(kind: str, tmp_path: Path) -> None:
    codec = make(kind).eval()
    codec.set_latent_scale(0.5)
    identity = codecs.save(codec, tmp_path)
    again = codecs.load(tmp_path)
    assert isinstance(again, LearnedCodec)
    assert type(again) is type(codec)
    assert not again.training
    assert identity == content_hash(codec) == content_hash(again)
    x = pictures()
    with torch.no_grad():
        assert torch.equal(codec.decode(codec.encode(x).mode()), again.decode(again.encode(x).mode()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_hash_depends_on_weights_scales_and_shapes_but_not_on_statistics(kind: str) -> None:
    hashes = {content_hash(make(kind, seed)) for seed in (0, 1)}
    codec = make(kind)
    codec.set_latent_scale(2.0)
    hashes.add(content_hash(codec))
    assert len(hashes) == 3
    if codec.code_usage is not None:
        codec.code_usage.observe(torch.arange(16.0))
        if isinstance(codec, VQAutoencoder):
            codec.quantiser.credit.fill_(1 / 16)
        assert content_hash(codec) in hashes


@pytest.mark.parametrize("kind", KINDS)
def test_the_training_pass_reaches_every_parameter(kind: str) -> None:
    codec = make(kind)
    made = codec(pictures(), Noise(0))
    assert made.image.shape == (2, 3, 8, 8)
    assert made.penalty.shape == (2,)
    loss = made.image.square().mean() + made.penalty.mean()
    if made.log_scale is not None:
        loss = loss + made.log_scale**2
    loss.backward()
    lacking = [name for name, parameter in codec.named_parameters() if parameter.grad is None]
    assert lacking == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_trained_on_alike_in_any_company(kind: str) -> None:
    """Its randomness is its own, and in eval mode nothing else joins the samples of a batch."""
    codec = make(kind).eval()
    x = pictures(4)
    with torch.no_grad():
        together = codec(x, Noise(3).rows([5, 9, 2, 7]))
        alone = codec(x[2:3], Noise(3).rows([2]))
    # Convolutions over other batch sizes round otherwise.
    torch.testing.assert_close(together.image[2:3], alone.image, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.penalty[2:3], alone.penalty, rtol=1e-4, atol=1e-5)


def test_a_latent_of_one_position_needs_groups_of_several_channels() -> None:
    codec = Autoencoder(params(channels=8, channel_mult=(1, 1), norm_groups=8))
    with refused("shape", "codec.norm_groups"):
        codec.encode(pictures(size=2))
    assert Autoencoder(params(norm_groups=8)).encode(pictures(size=2)).mode().shape[2:] == (1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_refused(kind: str) -> None:
    codec = make(kind)
    with refused("shape", "data.resolution"):
        codec.encode(torch.zeros(1, 3, 9, 8))
    with refused("shape", "x"):
        codec.encode(torch.zeros(1, 1, 8, 8))
    with refused("shape", "z"):
        codec.decode(torch.zeros(1, 4, 4, 4))
    with refused("shape", "data.channels"):
        codec.latent_shape((4, 8, 8))
    with refused("shape", "latent_scale"):
        codec.set_latent_scale(torch.ones(2))
    with refused("not_finite", "latent_scale"):
        codec.set_latent_scale(float("inf"))


def test_another_codec_is_refused_and_both_are_named() -> None:
    own, other = make("kl"), make("vq")
    codecs.check_same(own, own.kind, content_hash(own), "the model runs/emoji")
    with pytest.raises(UserError) as caught:
        codecs.check_same(other, own.kind, content_hash(own), "the model runs/emoji")
    for word in ("the model runs/emoji", content_hash(own), content_hash(other), "(kl)", "(vq)"):
        assert word in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_trained_on_alone_leaves_every_latent_as_it_was(kind: str) -> None:
    codec = make(kind)
    before = content_hash(codec)
    codec.train_decoder_only()
    decoder = [p for p in codec.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(decoder, lr=0.1)
    x = pictures()
    latents = codec.encode(x).mode()
    made = codec(x, Noise(0))
    loss = made.image.square().mean() + (0.0 if made.log_scale is None else made.log_scale**2)
    loss.backward()
    optimiser.step()
    assert torch.equal(codec.encode(x).mode(), latents)
    after = content_hash(codec)
    assert after != before
    assert codecs.same_latents(after, before)
    codecs.check_same(codec, kind, before, "the model runs/emoji")
    assert not codecs.same_latents(content_hash(make(kind, seed=1)), before)


def test_the_identity_is_a_codec_too(tmp_path: Path) -> None:
    identity: Codec = codecs.Identity()
    codecs.save(identity, tmp_path)
    assert codecs.load(tmp_path) == identity
    assert content_hash(identity) == content_hash(codecs.load(tmp_path))


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    with refused("missing", str(tmp_path)):
        codecs.load(tmp_path)
    codecs.save(make("kl"), tmp_path)
    weights = tmp_path / "codec.safetensors"
    whole = weights.read_bytes()
    codecs.save(make("kl", seed=1), tmp_path / "other")
    weights.write_bytes((tmp_path / "other" / "codec.safetensors").read_bytes())
    with refused("mismatch", str(tmp_path)):
        codecs.load(tmp_path)
    weights.write_bytes(whole[: len(whole) // 2])
    with refused("damaged", str(weights)):
        codecs.load(tmp_path)
    weights.unlink()
    with refused("missing", str(weights)):
        codecs.load(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"format": 2', '"format": 3'))
    with refused("newer", str(config)):
        codecs.load(tmp_path)


def test_unknown_words_are_named() -> None:
    with refused("unknown", "codec.kind"):
        codecs.build({"kind": "discreet"})
    with refused("damaged", "codec"):
        codecs.build({"kind": "kl", "params": {"chanels": 8}})


@pytest.mark.parametrize("kind", ["kl", "autoencoder"])
def test_half_precision_that_overflows_is_decoded_again(kind: str) -> None:
    """A black picture is never returned silently: what is not finite in half precision is made in float32."""
    codec = make(kind).eval()
    with torch.no_grad():
        codec.decoder.norm.weight.mul_(300)
        codec.decoder.out.weight.mul_(300)  # every weight still fits
        z = codec.encode(pictures()).mode()
        exact = codec.decode(z)
        assert float(exact.abs().max()) > 65504  # float16's largest
        half = codec.half()
        with pytest.warns(UserWarning, match="not finite: it is done again in float32"):
            again = half.decode(z.half())
        assert again.dtype == torch.float32
        assert bool(again.isfinite().all())
        # Weights and latents were rounded to 11 bits.
        assert float((again - exact).abs().max() / exact.abs().max()) < 0.02


@pytest.mark.parametrize("damaged", ["decoder", "latents"])
def test_images_that_are_not_finite_in_float32_give_a_warning(damaged: str) -> None:
    codec = make("kl").eval()
    with torch.no_grad():
        z = codec.encode(pictures()).mode()
        if damaged == "decoder":
            codec.decoder.out.weight.fill_(float("inf"))
        else:
            z[0, 0, 0, 0] = float("nan")
        with pytest.warns(UserWarning, match="decoded image is not finite") as caught:
            codec.decode(z)
    assert len(caught) == 1  # and it was not done again
