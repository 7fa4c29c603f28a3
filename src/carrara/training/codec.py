"""Training a codec: a first stage for latent diffusion to work in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from carrara import codecs
from carrara.classifier import Classifier
from carrara.codecs import Codec, DiscreteParams, LearnedCodec, QuantiserParams
from carrara.codecs.perceptual import LPIPS, ClassifierFeatures, Perceptual
from carrara.data import Batch, Batches, LatentBatch, Preprocess, Source
from carrara.distributed import Processes
from carrara.errors import UserError, nearest
from carrara.networks.autoencoder import AutoencoderParams
from carrara.networks.discriminator import Discriminator, DiscriminatorParams
from carrara.objectives import Examples
from carrara.objectives.codec import CODEC, DISCRIMINATOR, LOSSES, CodecLoss, CodecObjective
from carrara.presets import published_codecs
from carrara.process import Noise
from carrara.recipe import Recipe, params_from
from carrara.training.assembly import shown_batch

KINDS = {
    "autoencoder": "autoencoder",
    "vae": "kl",
    "kl": "kl",
    "vq": "vq",
    "vqgan": "vq",
    "dvae": "discrete",
    "gumbel": "discrete",
    "hierarchical": "hierarchical",
}
"""The rungs of the ladder, by the codec that each is; `LOSSES` has the loss of each."""
_PUBLISHED = {"kl": "kl", "vq": "vqgan", "discrete": "gumbel"}
"""The rung that a published first stage of each kind of codec stands on: all were trained against a discriminator."""
_PARTS = {"vq": ("quantiser", QuantiserParams), "discrete": ("choice", DiscreteParams)}
SCALE_IMAGES = 4096
"""The latent scale is measured on so many training images."""


class CodecTask:
    """A codec that learns to give images back, against a discriminator where its loss has one.

    Raises:
        UserError: choices of the recipe that do not go together, or with the images.
    """

    codec: Codec | None = None

    def __init__(self, recipe: Recipe, source: Source, processes: Processes) -> None:
        self.recipe, self.source, self.device = recipe, source, processes.device
        self.pictures = recipe.sampling.count
        torch.manual_seed(recipe.seed)
        codec = make_codec(recipe)
        latent = codec.latent_shape((recipe.data.channels, *recipe.data.resolution))
        self.loss = make_loss(recipe, codec)
        begun_so = recipe.start is not None and bool(codec.latent_shift.any())
        self.scale_each_channel = recipe.codec.get("scale") == "channel" or begun_so
        self.perceptual = _perceptual(recipe, self.loss)
        if isinstance(self.perceptual, nn.Module):
            self.perceptual.to(self.device).requires_grad_(False)
        self.modules: dict[str, nn.Module] = {CODEC: codec.to(self.device)}
        if self.loss.adversarial:
            channels = {"in_channels": recipe.data.channels}
            params = params_from(DiscriminatorParams, recipe.discriminator, channels, "discriminator")
            params.check_size(*recipe.data.resolution)
            self.modules[DISCRIMINATOR] = Discriminator(params).to(self.device)
        elif recipe.discriminator:
            raise UserError("discriminator is given, but loss.adversarial is 0: set it above 0, or leave this out.")
        self.summary: dict[str, Any] = {
            "image": "×".join(map(str, (recipe.data.channels, *recipe.data.resolution))),
            "latent": "×".join(map(str, latent)),
            "codec": recipe.codec.get("preset") or recipe.codec.get("kind", codec.kind),
        }
        if recipe.start is not None:
            self.summary["starts from"] = recipe.start
            self.summary["learns"] = "the decoder alone: latents stay what they are" if codec.decoder_only else "all"
        images = recipe.training.steps * recipe.training.batch_size
        self.notices = self.objective(self.modules).notices(images)

    def batches(self, images: Batches) -> Batches:
        """The images."""
        return images

    def objective(self, modules: Mapping[str, nn.Module]) -> CodecObjective:
        """Reconstruction, the latent's cost, and the recipe's other terms."""
        return CodecObjective(modules[CODEC], self.loss, self.perceptual, modules.get(DISCRIMINATOR))

    def examples(self, batch: Batch | LatentBatch, draw: Noise) -> Examples:
        """The images alone."""
        assert isinstance(batch, Batch)  # `batches` gives images
        return Examples(batch.to(self.device).images)

    def blank(self) -> Examples:
        """A gray image."""
        return Examples(torch.zeros(1, self.recipe.data.channels, *self.recipe.data.resolution, device=self.device))

    def forward(self, module: nn.Module, examples: Examples) -> Tensor:
        """A reconstruction, as training makes it, of which the codebook learns nothing."""
        training = module.training
        module.eval()
        image: Tensor = module(examples.x0, Noise(0).rows(range(len(examples.x0)))).image
        module.train(training)
        return image

    @torch.no_grad()
    def preview(self, module: nn.Module, rows: range) -> tuple[Tensor, dict[str, Any]]:
        """Images beside what the codec gives back of them, [len(rows), C, H, 2·W]."""
        codec = cast(LearnedCodec, module)
        training = codec.training
        codec.eval()
        images = shown_batch(self.recipe, self.source, rows).to(self.device).images
        again = codec.decode(codec.encode(images).mode()).clamp(-1, 1)
        codec.train(training)
        return torch.cat([images, again], dim=3), {"left": "image", "right": "reconstruction"}

    def save(self, module: nn.Module, folder: Path, origin: str) -> None:
        """The codec with its latent scale, measured on the training images; with a decoder that learned alone the old
        scale stays, as models of its latents rely on it."""
        codec = cast(LearnedCodec, module)
        if not codec.decoder_only:
            data, count = self.recipe.data, len(self.source)
            prepare = Preprocess(*data.resolution, data.channels, resize=data.resize)
            batches = Batches(self.source, prepare, self.recipe.seed, min(self.recipe.training.batch_size, count))
            steps = max(1, min(SCALE_IMAGES, count) // batches.batch_size)
            images = (batches.at(step).images for step in range(steps))
            codecs.measure_latent_scale(codec, images, per_channel=self.scale_each_channel)
        codecs.save(codec, folder)


def make_codec(recipe: Recipe) -> LearnedCodec:
    """The recipe's codec: with random weights, or the one that the run starts from.

    Raises:
        UserError: no kind or preset or an unknown one, an unknown key, or one that the data decide.
    """
    if recipe.start is not None:
        return _begun(recipe.start, recipe.codec.get("learn") == "decoder")
    word, given = _chosen(recipe.codec)
    decided = {"in_channels": recipe.data.channels}
    _refuse_unknown(word, given)
    config: dict[str, Any] = {"kind": KINDS[word]}
    if word == "hierarchical":
        config["levels"] = _levels(given, decided)
    else:
        if KINDS[word] in _PARTS:
            name, params = _PARTS[KINDS[word]]
            own = {key: given.pop(key) for key in _names(params) if key in given}
            if params is DiscreteParams:
                own = _annealed(own, recipe.training.steps * recipe.training.batch_size)
            config[name] = asdict(params_from(params, own, {}, "codec"))
        config["params"] = asdict(params_from(AutoencoderParams, given, decided, "codec"))
        if word in ("vae", "dvae"):  # their KL weighs 1 against a likelihood, whose width is learned
            config["learned_scale"] = True
    return cast(LearnedCodec, codecs.build(config))


def _chosen(codec: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The word of `KINDS` that a recipe's codec is, and the keys of its shape, those that a preset fills in included.

    Raises:
        UserError: neither kind nor preset, an unknown one, or a kind that is not the preset's.
    """
    given = {key: value for key, value in codec.items() if key not in ("kind", "preset", "scale")}
    word, preset = codec.get("kind"), codec.get("preset")
    if preset is None:
        if word is None:
            raise UserError(f"the recipe lacks codec.kind ({', '.join(KINDS)}), or a published shape as codec.preset.")
        if word not in KINDS:
            raise UserError(f"codec.kind is '{word}': {nearest(str(word), KINDS)}")
        return word, given
    published = published_codecs.preset(preset)
    rung, shape = _PUBLISHED[published["kind"]], published["params"]
    if word not in (None, rung):
        raise UserError(f"codec.preset={preset} is of kind {rung}, not {word}: leave codec.kind out.")
    if published["kind"] in _PARTS:
        shape |= published[_PARTS[published["kind"]][0]]
    # The data decide their channels and the run's length the annealing, and β's first place is for old weights only.
    return rung, {k: v for k, v in shape.items() if k not in ("in_channels", "temperature", "anneal", "legacy")} | given


def _annealed(own: Mapping[str, Any], images: int) -> dict[str, Any]:
    """The keys of `DiscreteParams`, whose τ falls over the first four fifths of the run's images unless they say so.

    Raises:
        UserError: a temperature to begin with, but no annealing.
    """
    if "temperature" in own and own.get("anneal") == 0:
        raise UserError("codec.temperature is where annealing begins, but codec.anneal is 0: leave one of them out.")
    return {"anneal": 4 * images // 5, **own}


def _names(params: Any) -> list[str]:
    return [field.name for field in fields(params)]


def _refuse_unknown(word: str, given: Mapping[str, Any]) -> None:
    """Whether a kind of codec has all the keys that are given for it.

    Raises:
        UserError: it lacks one; the kinds that have it are named, or the nearest of its own keys. Or a new codec is
            to have the loss of old weights.
    """
    if given.get("legacy"):
        raise UserError("codec.legacy is the loss of VQGAN's first weights, which are loaded with it: leave it out.")
    known = {kind: {"kind", "preset", "scale", *_names(AutoencoderParams)} for kind in KINDS}
    known["hierarchical"].add("levels")
    for kind, codec in KINDS.items():
        known[kind] |= set(_names(_PARTS[codec][1])) if codec in _PARTS else set()
    for key in given:
        if key not in known[word]:
            others = [kind for kind, keys in known.items() if key in keys]
            meant = f"codec.kind={' or '.join(others)} has it." if others else nearest(key, known[word])
            raise UserError(f"a codec of kind {word} has an unknown key 'codec.{key}': {meant}")


def _begun(start: str, decoder_only: bool) -> LearnedCodec:
    """A trained codec, all or the decoder of which is to learn on."""
    codec = codecs.load(start)
    if not isinstance(codec, LearnedCodec):
        raise UserError(f"{start} is the {codec.kind} codec, which has nothing to learn: name another as 'start'.")
    if decoder_only:
        codec.train_decoder_only()
    return codec


def make_loss(recipe: Recipe, codec: LearnedCodec) -> CodecLoss:
    """The usual loss of the recipe's kind of codec, or of the one it starts from, with the recipe's changes.

    Raises:
        UserError: an unknown key, or words about a discriminator that takes no part.
    """
    likelihood = getattr(codec, "log_scale", None) is not None
    told = {"kl": "vae", "discrete": "dvae"} if likelihood else {"discrete": "gumbel"}
    told |= _PUBLISHED if recipe.codec.get("preset") else {}
    usually = told.get(codec.kind, codec.kind)
    changes = {key: value for key, value in recipe.loss.items() if not key.startswith("perceptual_")}
    usual = asdict(LOSSES[recipe.codec.get("kind", usually)])
    if "perceptual" not in changes and "perceptual_from" not in recipe.loss:
        usual["perceptual"] = 0.0  # without a network to look through there is none
    loss = cast(CodecLoss, params_from(CodecLoss, {**usual, **changes}, {}, "loss"))
    idle = [key for key in ("gan", "adaptive", "start", "ramp") if key in changes and not loss.adversarial]
    if idle:
        raise UserError(f"loss.{idle[0]} is given, but loss.adversarial is 0: set it above 0, or leave this out.")
    return loss


def _levels(given: dict[str, Any], decided: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The params of each level of a hierarchical VAE, whose shared keys may stand beside `levels`."""
    levels, made = given.pop("levels", None), []
    if not isinstance(levels, list) or not all(isinstance(level, dict) for level in levels):
        raise UserError("codec.levels must be a list with the params of every level, from the image on.")
    for level in levels:
        params = params_from(AutoencoderParams, {**given, **level}, decided, "codec")
        decided = {"in_channels": params.latent_channels}
        made.append(asdict(params))
    return made


def _perceptual(recipe: Recipe, loss: CodecLoss) -> Perceptual | None:
    """What the perceptual term looks through."""
    allowed = {"perceptual_from", "perceptual_checksum"}
    for key in recipe.loss:
        if key.startswith("perceptual_") and key not in allowed:
            raise UserError(f"the recipe has an unknown key 'loss.{key}': {nearest(key, allowed)}")
        if key in allowed and not isinstance(recipe.loss[key], str | None):
            raise UserError(f"loss.{key} is {recipe.loss[key]!r}: write it as text, in quotes.")
    path, checksum = recipe.loss.get("perceptual_from"), recipe.loss.get("perceptual_checksum")
    if checksum is not None and (path is None or Path(path).is_dir()):
        raise UserError(
            "loss.perceptual_checksum is given, but loss.perceptual_from names no file of weights: name one, or leave "
            "this out."
        )
    if not loss.perceptual:
        if path is not None:
            raise UserError("loss.perceptual_from is given, but loss.perceptual is 0: set it above 0, or leave it out.")
        return None
    if path is None:
        raise UserError(
            "loss.perceptual is above 0: name a classifier's folder or a file of VGG or LPIPS weights as "
            "loss.perceptual_from, or set loss.perceptual=0."
        )
    perceptual: LPIPS | ClassifierFeatures
    if Path(path).is_dir():
        classifier = Classifier.load(path)
        perceptual = ClassifierFeatures(classifier.network, classifier.clean_network_time)
    else:
        perceptual = LPIPS.load(path, checksum)
    try:
        perceptual.check_size(recipe.data.channels, *recipe.data.resolution)
    except UserError as error:
        raise UserError(f"loss.perceptual_from={path} does not fit the data: {error}") from None
    return perceptual
