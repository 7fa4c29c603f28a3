"""Training a codec: a first stage for latent diffusion to work in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from carrara import codecs
from carrara.classifier import Classifier
from carrara.codecs import Codec, LearnedCodec
from carrara.codecs.perceptual import LPIPS, ClassifierFeatures, Perceptual
from carrara.data import Batch, Batches, LatentBatch, Source
from carrara.distributed import Processes
from carrara.errors import UserError
from carrara.interop import lpips
from carrara.networks.discriminator import Discriminator, DiscriminatorParams
from carrara.objectives import Examples
from carrara.objectives.codec import CODEC, DISCRIMINATOR, CodecLoss, CodecObjective
from carrara.process import Noise
from carrara.recipe import CodecRecipe
from carrara.recipe import codecs as recipe_codecs
from carrara.training.assembly import shown_batch

SCALE_IMAGES = 4096
"""The latent scale is measured on so many training images."""


class CodecTask:
    """A codec that learns to reconstruct images, against a discriminator where its loss has one.

    Raises:
        UserError: choices of the recipe that do not go together, or with the images.
    """

    codec: Codec | None = None

    def __init__(self, recipe: CodecRecipe, source: Source, processes: Processes) -> None:
        self.recipe, self.source, self.device = recipe, source, processes.device
        self.pictures = recipe.sampling.count
        torch.manual_seed(recipe.seed)
        codec = make_codec(recipe)
        latent = codec.latent_shape((recipe.data.channels, *recipe.data.resolution))
        self.loss = make_loss(recipe, codec)
        shifted = recipe.start is not None and bool(codec.latent_shift.any())
        self.scale_each_channel = getattr(recipe.codec, "scale", "one") == "channel" or shifted
        self.perceptual = _perceptual(recipe, self.loss)
        if isinstance(self.perceptual, nn.Module):
            self.perceptual.to(self.device).requires_grad_(False)
        self.modules: dict[str, nn.Module] = {CODEC: codec.to(self.device)}
        if self.loss.adversarial:
            params = DiscriminatorParams(**recipe.discriminator.given(), in_channels=recipe.data.channels)
            params.check_size(*recipe.data.resolution)
            self.modules[DISCRIMINATOR] = Discriminator(params).to(self.device)
        self.summary: dict[str, Any] = {
            "image": "×".join(map(str, (recipe.data.channels, *recipe.data.resolution))),
            "latent": "×".join(map(str, latent)),
            "codec": recipe.codec.name if isinstance(recipe.codec, recipe_codecs.Codec) else codec.kind,
        }
        if recipe.start is not None:
            self.summary["starts from"] = recipe.start
            self.summary["learns"] = "the decoder alone: latents stay the same" if codec.decoder_only else "all"
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
        """Images and their reconstructions side by side, [len(rows), C, H, 2·W]."""
        codec = cast(LearnedCodec, module)
        training = codec.training
        codec.eval()
        images = shown_batch(self.recipe, self.source, rows).to(self.device).images
        again = codec.decode(codec.encode(images).mode()).clamp(-1, 1)
        codec.train(training)
        return torch.cat([images, again], dim=3), {"left": "image", "right": "reconstruction"}

    def save(self, module: nn.Module, folder: Path, origin: str) -> None:
        """The codec with its latent scale, measured on the training images; of a decoder that was fine-tuned alone
        the old scale stays, as models of its latents rely on it."""
        codec = cast(LearnedCodec, module)
        if not codec.decoder_only:
            prepare, count = self.recipe.data.preprocess(), len(self.source)
            batches = Batches(self.source, prepare, self.recipe.seed, min(self.recipe.training.batch_size, count))
            steps = max(1, min(SCALE_IMAGES, count) // batches.batch_size)
            images = (batches.at(step).images for step in range(steps))
            codecs.measure_latent_scale(codec, images, per_channel=self.scale_each_channel)
        codecs.save(codec, folder)


def make_codec(recipe: CodecRecipe) -> LearnedCodec:
    """The recipe's codec: with random weights, or the one that the run starts from.

    Raises:
        UserError: values that do not go together, or a start that has nothing to train.
    """
    if recipe.start is None:
        assert isinstance(recipe.codec, recipe_codecs.Codec)
        images = recipe.training.steps * recipe.training.batch_size
        return cast(LearnedCodec, codecs.build(recipe.codec.config(recipe.data.channels, images)))
    codec = codecs.load(recipe.start)
    if not isinstance(codec, LearnedCodec):
        raise UserError(
            f"{recipe.start} is the {codec.kind} codec, which has nothing to learn: name another as 'start'.",
            key="start",
            code="unsupported",
        )
    if isinstance(recipe.codec, recipe_codecs.TrainedCodec) and recipe.codec.learn == "decoder":
        codec.train_decoder_only()
    return codec


def make_loss(recipe: CodecRecipe, codec: LearnedCodec) -> CodecLoss:
    """The usual loss of the recipe's kind of codec, or of the one it starts from, with the recipe's changes.

    Raises:
        UserError: keys of a discriminator that takes no part.
    """
    if isinstance(recipe.codec, recipe_codecs.Codec):
        return recipe.loss.of(recipe.codec.kind)
    likelihood = getattr(codec, "log_scale", None) is not None
    usual = {"kl": "vae", "discrete": "dvae"} if likelihood else {"discrete": "gumbel"}
    return recipe.loss.of(usual.get(codec.kind, codec.kind))


def _perceptual(recipe: CodecRecipe, loss: CodecLoss) -> Perceptual | None:
    """The distance of the perceptual term; None where its weight is 0."""
    path, checksum = recipe.loss.perceptual_from, recipe.loss.perceptual_checksum
    if checksum is not None and (path is None or Path(path).is_dir()):
        raise UserError(
            "loss.perceptual_checksum is given, but loss.perceptual_from names no file of weights: name one, or leave "
            "this out.",
            key="loss.perceptual_checksum",
            code="conflict",
        )
    if not loss.perceptual:
        if path is not None:
            raise UserError(
                "loss.perceptual_from is given, but loss.perceptual is 0: set it above 0, or leave it out.",
                key="loss.perceptual_from",
                code="conflict",
            )
        return None
    if path is None:
        raise UserError(
            "loss.perceptual is above 0: name a classifier's folder or a file of VGG or LPIPS weights as "
            "loss.perceptual_from, or set loss.perceptual=0.",
            key="loss.perceptual_from",
            code="missing",
        )
    perceptual: LPIPS | ClassifierFeatures
    if Path(path).is_dir():
        classifier = Classifier.load(path)
        perceptual = ClassifierFeatures(classifier.network, classifier.clean_network_time)
    else:
        perceptual = lpips.load(path, checksum)
    try:
        perceptual.check_size(recipe.data.channels, *recipe.data.resolution)
    except UserError as error:
        sentence = f"loss.perceptual_from={path} does not fit the data: {error}"
        raise UserError(sentence, key="loss.perceptual_from", code="shape") from None
    return perceptual
