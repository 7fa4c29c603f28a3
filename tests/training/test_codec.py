"""Runs that train a codec, and diffusion models that work in one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from carrara import codecs, distributed
from carrara.codecs import KLAutoencoder, VQAutoencoder
from carrara.data import Batches, Preprocess, open_source
from carrara.data.encode import encode_latents
from carrara.errors import Code, UserError
from carrara.model import DiffusionModel
from carrara.process import Noise
from carrara.recipe import CodecRecipe, DiffusionRecipe, load, validate
from carrara.training import Trainer
from carrara.training.assembly import spread
from carrara.training.codec import make_codec, make_loss
from tests.data.builders import files, folder
from tests.errors import refused
from tests.processes import together
from tests.runs import tiny_recipe, train
from tests.test_classifier import untrained


def recipe(kind: str = "kl", /, **sections: dict[str, Any]) -> CodecRecipe:
    """A small codec of the digits."""
    base: dict[str, Any] = {
        "name": "codec",
        "kind": "codec",
        "data": {"path": "digits", "resolution": 8, "channels": 1},
        "codec": {"kind": kind, "channels": 8, "channel_mult": [1, 2], "blocks_per_level": 1, "latent_channels": 2},
        "loss": {"adversarial": 0.0},
        "training": {"steps": 12, "batch_size": 16, "learning_rate": 3e-3, "warmup": 2, "ema": 0.9, "log_every": 4}
        | {"checkpoint_every": 5, "sample_every": 12, "tracker": "none"},
        "sampling": {"count": 4},
    }
    made = validate({**base, **{key: {**base.get(key, {}), **value} for key, value in sections.items()}})
    assert isinstance(made, CodecRecipe)
    return made


def last_line(run: Path) -> dict[str, Any]:
    *_, last = (run / "log.jsonl").read_text().splitlines()
    return dict(json.loads(last))


def test_a_codec_learns_and_its_latents_are_scaled_to_one(tmp_path: Path) -> None:
    longer: dict[str, dict[str, Any]] = {
        "training": {"steps": 120, "batch_size": 32, "validate_every": 60, "log_every": 20}
    }
    train(recipe(**longer), tmp_path)
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    last = last_line(tmp_path)
    assert last["validation"]["psnr"] > first["terms"]["psnr"] + 3
    assert 0.3 < last["validation"]["ssim"] <= 1
    assert "loss_by_quarter" not in last
    assert {"kl", "latent cost", "latent mean 0", "latent std 1"} <= last["terms"].keys()
    codec = codecs.load(tmp_path / "model")
    assert isinstance(codec, KLAutoencoder)
    images = Batches(open_source("digits"), Preprocess(8, 8, 1), 0, 256).at(0).images
    with torch.no_grad():
        latents = codec.encode(images).sample(Noise(0))
    # 256 of the 1,437 images that the scale was measured on
    assert float(latents.std()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("kind", "learned"), [("kl", False), ("vae", True), ("dvae", True)])
def test_a_likelihood_learns_its_width(kind: str, learned: bool, tmp_path: Path) -> None:
    """From below what pictures end at: a reconstruction that weighs little at first would leave latents unused."""
    codec = make_codec(recipe(kind))
    assert (getattr(codec, "log_scale", None) is not None) is learned
    if not learned:
        return
    assert float(cast(Tensor, codec.log_scale).detach().exp()) == pytest.approx(0.1)
    train(recipe(kind), tmp_path)
    assert last_line(tmp_path)["terms"]["learned scale"] > 0.1  # errors of untrained codecs are larger


def test_latents_are_scaled_as_one_or_channel_by_channel(tmp_path: Path) -> None:
    train(recipe(codec={"scale": "channel"}), tmp_path / "each")
    codec = codecs.load(tmp_path / "each" / "model")
    assert isinstance(codec, KLAutoencoder)
    images = torch.cat([Batches(open_source("digits"), Preprocess(8, 8, 1), 0, 256).at(step).images for step in (0, 1)])
    with torch.no_grad():
        latents = codec.encode(images).sample(Noise(0)).transpose(0, 1).flatten(1)
    # of 512 of the 1,437 images that mean and spread were measured on
    torch.testing.assert_close(latents.mean(1), torch.zeros(2), atol=0.1, rtol=0)
    torch.testing.assert_close(latents.std(1), torch.ones(2), atol=0.1, rtol=0)
    train(recipe(), tmp_path / "one")
    one = codecs.load(tmp_path / "one" / "model")
    assert isinstance(one, KLAutoencoder)
    assert len(one.latent_scale.unique()) == 1
    assert not one.latent_shift.any()
    # A codec that learns on is measured as it was.
    train(started(tmp_path / "each", None), tmp_path / "on")
    on = codecs.load(tmp_path / "on" / "model")
    assert isinstance(on, KLAutoencoder)
    assert bool(on.latent_shift.all())
    with refused("unknown", "codec.scale"):
        recipe(codec={"scale": "chanel"})


def test_the_shipped_codecs_fit_the_shipped_latent_model() -> None:
    kl, vq, latent = load("emoji-kl"), load("emoji-vq"), load("emoji-latent")
    assert isinstance(vq, CodecRecipe)
    assert isinstance(latent, DiffusionRecipe)
    for first_stage in (kl, vq):
        assert isinstance(first_stage, CodecRecipe)
        codec = make_codec(first_stage)
        loss = make_loss(first_stage, codec)
        shape = codec.latent_shape((first_stage.data.channels, *first_stage.data.resolution))
        assert shape[1:] == (16, 16)
        assert loss.adversarial == loss.perceptual == 0  # neither names a network to look through
        assert first_stage.data.resolution == latent.data.resolution
    images = vq.training.steps * vq.training.batch_size
    assert vq.codec.given()["restart_until"] == 0.8 * images  # the last fifth shows which codes live
    assert latent.network_params({"label": 10}, (4, 16, 16)).image_size == (16, 16)


def test_a_preview_shows_images_next_to_their_reconstructions(tmp_path: Path) -> None:
    train(recipe(), tmp_path)
    with Image.open(tmp_path / "samples" / "step-00000012-ema.png") as sheet:
        width, height = sheet.size
    assert width > height  # two by two pictures, each twice as wide as high


@pytest.mark.parametrize("kind", ["autoencoder", "vae", "vq", "dvae", "vqgan"])
def test_each_rung_trains_resumes_to_the_bit_and_loads(kind: str, tmp_path: Path) -> None:
    sections: dict[str, dict[str, Any]] = {"codec": {"codes": 16} if kind in ("vq", "vqgan", "dvae") else {}}
    if kind == "vqgan":
        sections |= {"loss": {"adversarial": 0.5, "start": 64}, "discriminator": {"layers": 1, "channels": 8}}
    made = recipe(kind, **sections)
    train(made, tmp_path / "straight")
    for progress in Trainer(made, tmp_path / "resumed").steps():
        if progress.step == 7:  # left unfinished, after the checkpoint of step 5
            break
    train(made, tmp_path / "resumed")
    checkpoint = Path("checkpoints") / "step-00000012"
    names = ["codec", "ema"] + (["discriminator"] if kind == "vqgan" else [])
    for part in ("model/codec.safetensors", *(f"{checkpoint}/{name}.safetensors" for name in names)):
        assert (tmp_path / "straight" / part).read_bytes() == (tmp_path / "resumed" / part).read_bytes(), part
    codec = codecs.load(tmp_path / "straight" / "model")
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    with torch.no_grad():
        assert codec.decode(codec.encode(x).mode()).shape == x.shape
    if kind == "vqgan":
        terms = last_line(tmp_path / "straight")["terms"]
        assert {"adversarial", "adaptive weight", "codebook use", "discriminator_logits real"} <= terms.keys()
        assert terms["discriminator_loss"] > 0


def sharded(run: Path) -> list[float]:
    """The losses of a run whose weights are spread over the processes."""
    made = recipe("vq", training={"steps": 3, "sample_every": 3, "batch_size": 16, "ema": 0.9, "parallel": "fsdp"})
    return [progress.loss for progress in train(made, run)]


def test_a_codec_is_whole_again_for_previews_and_saving(tmp_path: Path) -> None:
    """Each kind of codec has arguments of its own, which a copy in one piece must have too."""
    one, two = together(2, sharded, tmp_path / "run")
    assert one == two
    assert codecs.load(tmp_path / "run" / "model").latent_shape((1, 8, 8)) == (2, 4, 4)
    with refused("unsupported", "training.parallel"):
        spread([make_codec(recipe("vae"))], distributed.start())


def test_a_hierarchical_vae_trains_by_its_levels(tmp_path: Path) -> None:
    levels = [{"latent_channels": 2, "channel_mult": [1, 2]}, {"latent_channels": 3, "channel_mult": [1]}]
    base = recipe().model_dump()
    shared = {"channels": 8, "blocks_per_level": 1}
    train(validate({**base, "codec": {"kind": "hierarchical", "levels": levels, **shared}}), tmp_path)
    assert codecs.load(tmp_path / "model").latent_shape((1, 8, 8)) == (2, 4, 4)


def test_a_perceptual_term_looks_through_a_classifier(tmp_path: Path) -> None:
    untrained().save(tmp_path / "clf")
    train(recipe(loss={"perceptual": 1.0, "perceptual_from": str(tmp_path / "clf")}), tmp_path / "run")
    assert last_line(tmp_path / "run")["terms"]["perceptual"] > 0


def test_a_diffusion_model_works_in_the_codec_and_carries_it(tmp_path: Path) -> None:
    train(recipe("vq", codec={"codes": 16}), tmp_path / "codec")
    latent = tiny_recipe(f"codec.path={tmp_path / 'codec'}", "network.channel_mult=[1]", "network.attention=[1]")
    trainer = Trainer(latent, tmp_path / "run")
    assert trainer.summary()["latent"].startswith("2×4×4 of the vq codec")
    list(trainer.steps())
    model = DiffusionModel.load(tmp_path / "run")
    assert isinstance(model.codec, VQAutoencoder)
    samples = model.sample([1, 2], steps=2)
    assert samples.latents.shape == (2, 2, 4, 4)
    assert samples.images.shape == (2, 1, 8, 8)
    other = recipe("vq", codec={"codes": 16}).model_copy(update={"seed": 5})
    train(other, tmp_path / "other")
    for name in ("config.json", "codec.safetensors"):
        source = tmp_path / "other" / "model" / name
        (tmp_path / "run" / "model" / "codec" / name).write_bytes(source.read_bytes())
    with refused("mismatch", "codec"):
        DiffusionModel.load(tmp_path / "run")


def test_cached_latents_train_to_the_same_bits_as_images(tmp_path: Path) -> None:
    pictures = folder(tmp_path / "pictures", files(24, "a/{:03d}.png"))
    data = {"path": str(pictures), "resolution": 8, "channels": 3}
    train(recipe("autoencoder", data=data), tmp_path / "codec")
    codec = codecs.load(tmp_path / "codec" / "model")
    encode_latents(open_source(str(pictures)), Preprocess(8, 8, 3), codec, tmp_path / "cache")
    latent = [f"data.path={pictures}", "data.channels=3", "conditioning.kind=none", "sampling.guidance=1"]
    latent += [f"codec.path={tmp_path / 'codec'}", "network.channel_mult=[1]", "network.attention=[1]"]
    train(tiny_recipe(*latent), tmp_path / "images")
    train(tiny_recipe(*latent, f"codec.cache={tmp_path / 'cache'}"), tmp_path / "latents")
    weights = [DiffusionModel.load(tmp_path / run).network.state_dict() for run in ("images", "latents")]
    for name, value in weights[0].items():
        # images are encoded in other batches than the cache's, which rounds the last bits
        torch.testing.assert_close(value, weights[1][name], atol=1e-4, rtol=0)
    (pictures / "a" / "000.png").write_bytes((pictures / "a" / "001.png").read_bytes())
    with refused("mismatch", "a/000.png"):
        Trainer(tiny_recipe(*latent, f"codec.cache={tmp_path / 'cache'}"), tmp_path / "stale")


def started(start: Path, learn: str | None, /, **sections: dict[str, Any]) -> CodecRecipe:
    """A few steps more of a codec of the digits."""
    base = recipe().model_dump(include={"name", "kind", "data", "training", "sampling"})
    codec = {} if learn is None else {"learn": learn}
    loss = {"loss": {"adversarial": 0.0}}
    made = validate({**base, "start": str(start), "seed": 3, "codec": codec, **loss, **sections})
    assert isinstance(made, CodecRecipe)
    return made


@pytest.mark.parametrize("kind", ["kl", "vae", "vq", "dvae"])
def test_a_decoder_is_fine_tuned_and_every_latent_stays_the_same(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"codes": 16} if kind in ("vq", "dvae") else {}
    train(recipe(kind, codec=options), tmp_path / "codec")
    tuned = started(tmp_path / "codec", "decoder")
    trainer = Trainer(tuned, tmp_path / "tuned")
    assert trainer.summary()["learns"].startswith("the decoder alone")
    for progress in trainer.steps():
        if progress.step == 7:  # left unfinished, after the checkpoint of step 5
            break
    train(tuned, tmp_path / "tuned")
    before, after = (codecs.load(tmp_path / name / "model") for name in ("codec", "tuned"))
    images = Batches(open_source("digits"), Preprocess(8, 8, 1), 0, 64).at(0).images
    with torch.no_grad():
        z, same = (codec.encode(images).sample(Noise(0)) for codec in (before, after))
        assert torch.equal(z, same)
        # a decoder of other weights, which gives other images back
        assert not torch.equal(before.decode(z), after.decode(z))
    (latents, decoder), (latents_after, decoder_after) = (
        codecs.content_hash(codec).split("-") for codec in (before, after)
    )
    assert latents_after == latents
    assert decoder_after != decoder


def test_a_fine_tuned_decoder_gets_the_latents_that_are_used() -> None:
    codec = make_codec(recipe(codec={"dropout": 0.5}))
    for parameter in codec.encoder.parameters():  # blocks end in zeros at first, behind their dropout
        torch.nn.init.normal_(parameter, std=0.3)
    images = Noise(1).uniform((4, 1, 8, 8)).float() * 2 - 1
    used = codec.eval().encode(images).mode()
    for decoder_only in (False, True):
        if decoder_only:
            codec.train_decoder_only()
        assert torch.equal(codec.train().encode(images).mode(), used) is decoder_only
        assert codec.decoder.training


def test_a_model_takes_the_codec_whose_decoder_learned_on_and_no_other(tmp_path: Path) -> None:
    train(recipe(), tmp_path / "codec")
    latent = ("network.channel_mult=[1]", "network.attention=[1]")
    train(tiny_recipe(f"codec.path={tmp_path / 'codec'}", *latent), tmp_path / "run")
    train(started(tmp_path / "codec", "decoder"), tmp_path / "tuned")
    train(started(tmp_path / "codec", None), tmp_path / "all")
    model = DiffusionModel.load(tmp_path / "run")
    tuned, other = (codecs.load(tmp_path / name / "model") for name in ("tuned", "all"))
    own, with_tuned = model.sample([1, 2], steps=2), model.with_codec(tuned).sample([1, 2], steps=2)
    assert torch.equal(own.latents, with_tuned.latents)
    assert not torch.equal(own.images, with_tuned.images)
    assert codecs.content_hash(tuned) in with_tuned.metadata["weights"]
    with pytest.raises(UserError) as error:
        model.with_codec(other)
    for codec in (model.codec, other):
        assert codecs.content_hash(codec) in str(error.value)
    # saved with it, the model carries it
    model.with_codec(tuned).save(tmp_path / "both")
    assert codecs.content_hash(DiffusionModel.load(tmp_path / "both").codec) == codecs.content_hash(tuned)


@pytest.mark.parametrize("kind", ["kl", "discrete"])
@pytest.mark.parametrize("likelihood", [True, False])
def test_a_codec_learns_on_by_the_loss_of_what_it_is(kind: str, likelihood: bool, tmp_path: Path) -> None:
    """With a learned p(x|z) a variational autoencoder at weight 1, without one a first stage as it is published."""
    made = codecs.build({"kind": kind, "params": {"in_channels": 1, "channels": 8}, "learned_scale": likelihood})
    codecs.save(made, tmp_path)
    loss = make_loss(started(tmp_path, None), make_codec(started(tmp_path, None)))
    assert loss.latent == (1 if likelihood else {"kl": 1e-6, "discrete": 0.1}[kind])


def test_all_of_a_codec_learns_on_from_where_it_ended(tmp_path: Path) -> None:
    train(recipe("vq", codec={"codes": 16}), tmp_path / "codec")
    tuned = started(tmp_path / "codec", "all", training={"steps": 2, "batch_size": 16, "learning_rate": 1e-4, "ema": 0})
    trainer = Trainer(tuned, tmp_path / "tuned")
    before = codecs.load(tmp_path / "codec" / "model")
    assert isinstance(before, VQAutoencoder)
    assert all(torch.equal(v, before.state_dict()[k]) for k, v in trainer.network.state_dict().items())
    list(trainer.steps())
    after = codecs.load(tmp_path / "tuned" / "model")
    assert isinstance(after, VQAutoencoder)
    assert not torch.equal(after.encoder.state_dict()["stem.weight"], before.encoder.state_dict()["stem.weight"])
    assert not torch.equal(after.latent_scale, before.latent_scale)  # measured again: the latents are others


def test_what_a_codec_starts_from_decides_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    train(recipe(), tmp_path / "codec")
    for codec, code, key in (
        ({"kind": "kl", "channels": 8}, "conflict", "codec.channels"),
        ({"channels": 8}, "unknown", "codec.channels"),
        ({"preset": "ldm-kl-f4"}, "conflict", "codec.preset"),
        ({"kind": "kl"}, "conflict", "codec.kind"),
        ({"learn": "decodr"}, "unknown", "codec.learn"),
    ):
        with refused(code, key):  # type: ignore[arg-type]
            started(tmp_path / "codec", None, codec=codec)
    with refused("conflict", "codec.learn"):
        validate({**recipe().model_dump(), "codec": {"learn": "decoder"}})
    with refused("mismatch"):
        Trainer(started(tiny_run, "decoder"), tmp_path / "a")
    coloured = started(tmp_path / "codec", "decoder", data={"path": "digits", "resolution": 8, "channels": 3})
    with refused("shape", "data.channels"):
        Trainer(coloured, tmp_path / "b")
    with refused("conflict", "codec"):
        DiffusionModel.load(tiny_run).with_codec(codecs.load(tmp_path / "codec" / "model"))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    wrong: tuple[tuple[dict[str, dict[str, Any]], Code, str], ...] = (
        ({"codec": {"kind": "vqqan"}}, "unknown", "codec.kind"),
        ({"codec": {"kind": None}}, "unknown", "codec.channels"),
        ({"codec": {"chanels": 8}}, "unknown", "codec.chanels"),
        ({"codec": {"in_channels": 1}}, "conflict", "codec.in_channels"),
        ({"codec": {"codes": 16}}, "unknown", "codec.codes"),
        ({"codec": {"kind": "vq", "code": 16}}, "unknown", "codec.code"),
        ({"loss": {"distnce": "l1"}}, "unknown", "loss.distnce"),
        ({"discriminator": {"layers": 1}}, "conflict", "discriminator"),
        ({"loss": {"adversarial": 0.0, "start": 64}}, "conflict", "loss.start"),
    )
    for sections, code, key in wrong:
        with refused(code, key):
            recipe(**sections)
    with refused("missing", "codec.kind"):
        validate({**recipe().model_dump(), "codec": {}})
    unfit: tuple[tuple[dict[str, dict[str, Any]], Code, str], ...] = (
        ({"codec": {"kind": "vq"}, "loss": {"perceptual_from": "x"}}, "conflict", "loss.perceptual_from"),
        ({"loss": {"perceptual": 1.0}}, "missing", "loss.perceptual_from"),
        ({"loss": {"adversarial": 0.5}}, "shape", "discriminator.layers"),
        ({"data": {"resolution": 9}}, "shape", "data.resolution"),
    )
    for sections, code, key in unfit:
        with refused(code, key):
            Trainer(recipe(**sections), tmp_path / "run")
    with refused("unknown", "network"):
        recipe(network={"channels": 8})
    with refused("unknown", "codec.channels"):
        tiny_recipe("codec.path=x", "codec.channels=8")
    with refused("missing", "codec.path"):
        tiny_recipe("codec.cache=x")
    with refused("missing", str(tmp_path / "none")):
        Trainer(tiny_recipe(f"codec.path={tmp_path / 'none'}"), tmp_path / "run")
    late = recipe("vqgan", loss={"adversarial": 0.5, "start": 10**6}, discriminator={"layers": 1}, codec={"codes": 16})
    trainer = Trainer(late, tmp_path / "late")
    assert ["never take part" in notice for notice in trainer.notices] == [True]
    trainer.run.close()


@pytest.mark.parametrize("accepted", [True, False])
def test_a_run_resumes_in_the_latents_it_started_with(accepted: bool, tmp_path: Path) -> None:
    """Not in those of a codec trained again in the same folder, however the recipe reads."""
    latent = ("network.channel_mult=[1]", "network.attention=[1]", "training.checkpoint_every=5")
    train(recipe(), tmp_path / "codec")
    own = codecs.content_hash(codecs.load(tmp_path / "codec" / "model"))
    made = tiny_recipe(f"codec.path={tmp_path / 'codec'}", *latent)
    for progress in Trainer(made, tmp_path / "run").steps():
        if progress.step == 7:
            break
    train(recipe().model_copy(update={"seed": 5}), tmp_path / "other")
    shutil.rmtree(tmp_path / "codec")
    (tmp_path / "other").rename(tmp_path / "codec")
    other = codecs.content_hash(codecs.load(tmp_path / "codec" / "model"))
    with pytest.raises(UserError) as error:
        Trainer(made, tmp_path / "run", accept_changes=accepted)
    assert own in str(error.value)
    assert other in str(error.value)


def test_a_codebook_learns_the_same_of_a_batch_in_parts(tmp_path: Path) -> None:
    for size in (16, 4):
        train(recipe("vq", codec={"codes": 16}, training={"micro_batch": size}), tmp_path / str(size))
    whole, parts = (load_file(tmp_path / str(size) / "model" / "codec.safetensors") for size in (16, 4))
    assert int(whole["quantiser.usage.batches"]) == int(parts["quantiser.usage.batches"]) == 12
    # sums in another order; a code here and there is a tie
    torch.testing.assert_close(whole["quantiser.codebook"], parts["quantiser.codebook"], rtol=0, atol=0.02)
