"""The assembled, saved, loadable thing: a network with its schedule, codec and conditioning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from carrara import codecs, weights
from carrara import images as pictures
from carrara.classifier import Classifier
from carrara.codecs import Codec, Identity
from carrara.condition import Condition
from carrara.conditioning import Labels
from carrara.errors import UserError, nearest
from carrara.guidance import classifier_free, classifier_guidance, interval, static_threshold
from carrara.networks import UNet, UNetParams
from carrara.objectives import Upsampling, shrunk_size
from carrara.process import (
    Denoiser,
    Grid,
    Guide,
    NetworkDenoiser,
    Noise,
    Predicts,
    Schedule,
    grids,
    schedules,
)
from carrara.solvers import DDIM, Solver, Step, integrate, named
from carrara.version import __version__

_DROWNED = 2 * math.log(0.01)
"""Below this log-SNR, a/s = 1 %, a classifier has nothing to say."""

_WHITE = 1.001
"""The largest value of an image, but for rounding."""

_DEFAULTS: dict[str, Any] = {"solver": "dpm++2m", "steps": 20, "spacing": "trailing", "guidance": 1.0}


@dataclass(frozen=True)
class Samples:
    """What sampling gives.

    Attributes:
        images: float32 [N, C, H, W] in [-1, 1].
        latents: what the codec decoded, [N, C', H', W']; for pixel models the images before clamping.
        labels: the class of every image, or None.
        protocol: everything needed to make them again.
    """

    images: Tensor
    latents: Tensor
    labels: list[int] | None
    protocol: dict[str, Any]

    def save(self, folder: str | Path, columns: int | None = None) -> None:
        """Write one PNG per image (its protocol and row in the metadata), `grid.png`, and `samples.npz`
        (`arr_0` uint8 [N, H, W, C], `arr_1` labels)."""
        folder = Path(folder)
        first = int(self.protocol["first"])
        for row, image in enumerate(self.images):
            history = {**self.protocol, "row": first + row}
            if self.labels is not None:
                history["label"] = self.labels[row]
            pictures.save_png(image, folder / f"seed{self.protocol['seed']}-{first + row:05d}.png", history)
        sheet = pictures.grid(self.images, columns)
        pictures.save_png(sheet, folder / "grid.png", self.protocol, scale=max(1, 64 // self.images.shape[-1]))
        pictures.save_npz(folder / "samples.npz", self.images, self.labels)


@dataclass
class DiffusionModel:
    """A diffusion model: what a user of the library needs on page one.

    Attributes:
        network: tells ε, x_0 or v at a noisy image and a time; its `params` say its shape.
        schedule: the noise levels it was trained on.
        shape: an image's [C, H, W].
        predicts: what the network tells.
        labels: the classes, or None for a model that is told nothing.
        levels: how many values a channel of the training images had (256; the scanned digits have 17).
        codec: pixels to latents and back; the identity for a pixel model.
        upsampling: of an up-sampler, how much smaller its small images are, and the noise that they had in training;
            None for other models, and for up-samplers of others, which do not say.
        sampling: default `solver`, `steps`, `spacing` and `guidance`.
        origin: where the weights come from, for protocols ("EMA of step 1200").
    """

    network: nn.Module
    schedule: Schedule
    shape: tuple[int, int, int]
    predicts: Predicts = "eps"
    labels: Labels | None = None
    levels: int = 256
    codec: Codec = field(default_factory=Identity)
    upsampling: Upsampling | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    origin: str = ""

    @property
    def learned_variance(self) -> bool:
        """Whether the network tells its reverse variance too."""
        return bool(getattr(getattr(self.network, "params", None), "learned_variance", False))

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.network.parameters()).device

    def to(self, device: torch.device | str) -> DiffusionModel:
        """Move the weights; returns the model itself."""
        self.network.to(device)
        codec = codecs.whole(self.codec)
        if isinstance(codec, nn.Module):
            codec.to(device)
        return self

    def denoiser(self) -> Denoiser:
        """The network as a denoiser, without any guidance."""
        return NetworkDenoiser(self.network, self.schedule, self.predicts, self.learned_variance)

    def grid(self, steps: int, spacing: str = "trailing") -> Grid:
        """The times of a walk.

        Raises:
            UserError: an unknown spacing, or steps outside 1..T.
        """
        spacings = (grids.leading, grids.trailing, grids.linspace, grids.quadratic, grids.karras, grids.log_snr)
        known: dict[str, Callable[[Schedule, int], Grid]] = {f.__name__: f for f in spacings}
        if spacing not in known:
            raise UserError(f"there is no spacing '{spacing}': {nearest(spacing, known)}")
        return known[spacing](self.schedule, steps)

    def sample(
        self,
        labels: Sequence[int | str] | Tensor | None = None,
        count: int | None = None,
        *,
        steps: int | None = None,
        solver: str | Solver | None = None,
        guidance: float | None = None,
        rescale: float = 0.0,
        classifier: Classifier | None = None,
        classifier_scale: float = 1.0,
        small: Tensor | None = None,
        small_noise: float = 0.0,
        seed: int = 0,
        eta: float | None = None,
        spacing: str | None = None,
        start: Tensor | None = None,
        first: int = 0,
        batch_size: int = 256,
        on_step: Callable[[Step, int], None] | None = None,
    ) -> Samples:
        """Make pictures. Picture k has seed `seed`, row `first + k`, whatever the batch size.

        Args:
            labels: the class of every picture, as numbers or names; needed by a class-conditional model, and by a
                classifier.
            count: how many pictures, where there are no labels (1 by default).
            steps: pairs of the grid, 1..T.
            solver: a word of `carrara.solvers.SOLVERS`, or a solver.
            guidance: classifier-free scale; 1 is the plain conditional model and costs one pass, 0 the model that is
                told nothing.
            rescale: φ in 0..1, how much of the plain prediction's spread the guided one is given back.
            classifier: of noisy images, trained for this model's schedule and size, that leads to the labels.
            classifier_scale: its w; 0 asks it nothing.
            small: what an up-sampler enlarges, float32 [N, C, h, w] in [-1, 1].
            small_noise: noise that is laid on it, and that the network is told of, as a share of its schedule: 0
                trusts every pixel, as befits a real picture; what another model made is better trusted less (0.1,
                say). At most what training had.
            seed: of all noise.
            eta: DDIM's η, 0..1.
            spacing: "trailing", "leading", "linspace", "quadratic", "karras" or "log_snr".
            start: the noise to begin from, [N, C', H', W'] of the model's own latents, in place of the seed's.
            first: the row number of the first picture, so that a large set can be made in parts.
            batch_size: how many pictures are worked on at once.
            on_step: called after every step with the step and the first row of its batch.

        Returns:
            Samples, whose images are float32 [N, C, H, W] in [-1, 1].

        Raises:
            UserError: a label out of range, guidance of a model that knows no null condition, a classifier of another
                schedule, size or classes, small images of another size or with more noise than training had, a start
                of another shape, steps outside 1..T.
        """
        said = {"solver": solver, "steps": steps, "spacing": spacing, "guidance": guidance}
        choices = _DEFAULTS | self.sampling | {key: value for key, value in said.items() if value is not None}
        method, scale = _solver(choices["solver"], eta), float(choices["guidance"])
        grid = self.grid(int(choices["steps"]), choices["spacing"])
        denoiser, leader = self._guided(scale, rescale), self._leader(classifier, classifier_scale)
        self._check_start(start)
        given = {"starting noises": start, "small images": small}
        condition, asked, total = self._told(labels, count, classifier, given)
        beside = self._enlarging(small, small_noise)
        noise = Noise(seed)

        def walked(part: slice) -> Tensor:
            own = noise.rows(range(first + part.start, first + part.stop))
            x = self._begin(grid, own, part.stop - part.start) if start is None else start[part]
            guided = denoiser if leader is None or asked is None else leader(asked[part].to(self.device))(denoiser)
            told = beside(condition.rows(part), part, own).to(self.device)
            for step in integrate(guided, self.schedule, method, grid, x.to(self.device, torch.float32), told, own):
                if on_step is not None:
                    on_step(step, part.start)
            return step.x

        with torch.no_grad(), _resting(self.network):
            parts = [slice(low, min(low + batch_size, total)) for low in range(0, total, batch_size)]
            latents = torch.cat([walked(part) for part in parts])
            decoded = torch.cat([self.codec.decode(z) for z in latents.split(batch_size)])
            _refuse_black(decoded)
        protocol = {
            "carrara": __version__,
            "weights": self.origin,
            "solver": repr(method),
            "steps": len(grid),
            "grid": grid.name,
            "guidance": scale,
            "seed": seed,
            "first": first,
        }
        protocol |= {"rescale": rescale} if rescale else {}
        protocol |= {"small_noise": small_noise} if self.upsampling is not None else {}
        if classifier is not None:
            protocol |= {"classifier": classifier.origin, "classifier_scale": classifier_scale}
        indices = None if asked is None else asked.tolist()
        return Samples(decoded.float().clamp(-1, 1).cpu(), latents.cpu(), indices, protocol)

    def with_codec(self, codec: Codec) -> DiffusionModel:
        """The model with another decoder for its latents: a codec whose decoder alone learned on.

        Raises:
            UserError: a model of pixels, or a codec whose latents are others than the model's; both are named.
        """
        if self.codec.pixels:
            raise UserError("this model works on pixels: it takes no codec.")
        found = codecs.check_same(codec, self.codec.kind, codecs.content_hash(self.codec), "the model")
        return replace(self, codec=codec, origin=f"{self.origin}, codec {found}")

    def _guided(self, scale: float, rescale: float) -> Denoiser:
        """network → classifier-free → threshold: the documented order (MATH §6); a classifier comes last."""
        denoiser = self.denoiser()
        if scale != 1:
            if self.labels is None:
                raise UserError(
                    f"guidance {scale:g} needs a conditional model, this one is told nothing: use guidance 1."
                )
            denoiser = classifier_free(scale=scale, null=self.labels.null(), rescale=rescale)(denoiser)
        elif rescale:
            raise UserError(f"a guidance rescale of {rescale:g} changes what guidance did: give a guidance beside 1.")
        return static_threshold()(denoiser) if self.codec.pixels else denoiser

    def _leader(self, classifier: Classifier | None, scale: float) -> Callable[[Tensor], Guide] | None:
        """The classifier's guidance to some labels, where the image is not drowned in noise.

        An exact classifier's gradient vanishes with the signal: it moves x̂_0 by s²/a·g = E[x_0|x, y] - E[x_0|x]. A
        trained one's does not, and what is left of it would be divided by a (5·10⁻⁵ at the cosine schedule's T).
        """
        if classifier is None:
            return None
        names = self.labels.names if self.labels else None
        judge = classifier.to(self.device).guide_of(self.schedule, self.shape, names)
        last = float(self.schedule.time_at(torch.tensor(_DROWNED, dtype=torch.float64)))
        return lambda labels: interval(classifier_guidance(judge, scale, labels, "mean"), 0.0, last)

    def _told(
        self,
        labels: Sequence[int | str] | Tensor | None,
        count: int | None,
        classifier: Classifier | None,
        given: dict[str, Tensor | None],
    ) -> tuple[Condition, Tensor | None, int]:
        """What the network is told, the labels as numbers (for it, or for the classifier alone), and how many pictures
        were asked for.

        Args:
            given: what was given for each picture, by name; their number follows from it where nothing else says it.
        """
        names = self.class_names(classifier)
        known = self.labels or (Labels(names) if names else None)
        condition, asked = Condition(), None
        if known is None:
            if labels is not None:
                raise UserError("this model was trained without labels: leave them out and give count.")
            lengths = [len(rows) for rows in given.values() if rows is not None]
            total = count if count is not None else next(iter(lengths), 1)
        else:
            if labels is None:
                who = "this model is told a class" if self.labels else "a classifier leads to a class"
                raise UserError(f"{who}: give labels, 0..{len(known.names) - 1} or their names.")
            told = known.condition(labels)
            asked = told.label
            assert asked is not None
            condition = told if self.labels else condition
            total = len(asked)
            if count is not None and count != total:
                raise UserError(f"{total} labels were given for a count of {count}: give one label for each picture.")
        if total < 1:
            raise UserError("at least one picture must be asked for.")
        for name, rows in given.items():
            if rows is not None and len(rows) != total:
                raise UserError(f"{len(rows)} {name} were given for {total} pictures.")
        return condition, asked, total

    def class_names(self, classifier: Classifier | None = None) -> tuple[str, ...] | None:
        """The classes that samples can be asked for: the model's own, else those a classifier leads it to; or None."""
        if self.labels is not None:
            return self.labels.names
        return None if classifier is None else classifier.names

    def check_enlarges(
        self, small: tuple[int, int, int], small_noise: float = 0.0, labels: Sequence[int | str] | None = None
    ) -> None:
        """Whether this is an up-sampler of images [C, h, w] that carry this much noise, and of these classes.

        Raises:
            UserError: it is none, or was trained on others.
        """
        self._enlarging(torch.zeros(1, *small), small_noise)
        self._told(labels if self.labels else None, None, None, {})

    def _enlarging(self, small: Tensor | None, share: float) -> Callable[[Condition, slice, Noise], Condition]:
        """What lays the small images of an up-sampler, with their noise, beside what a part of the pictures is told."""
        params = getattr(self.network, "params", None)
        channels = getattr(params, "concat_channels", 0) if getattr(params, "upsample_concat", False) else 0
        if not channels:
            if small is not None or share:
                raise UserError("this model is no up-sampler: it takes no small images.")
            return lambda condition, part, noise: condition
        if small is None:
            raise UserError("this model is an up-sampler: give it the small images, or use it after a base model.")
        self._check_small(small, channels)
        pictures = small.to(torch.float32)
        if self.upsampling is None:
            if share:
                raise UserError("this up-sampler knows no noise on its small images: leave it at 0.")
            return lambda condition, part, noise: replace(condition, concat=pictures[part])
        augmentation = self.upsampling.augmentation
        level = augmentation.level(share)
        return lambda condition, part, noise: augmentation.condition(pictures[part], level, noise, condition)

    def _check_small(self, small: Tensor, channels: int) -> None:
        """Whether these are what an up-sampler enlarges."""
        if self.upsampling is not None:
            wanted = (channels, *shrunk_size(self.upsampling.factor, *self.shape[1:]))
            fits, told = small.shape[1:] == wanted, f"{'×'.join(map(str, wanted))}"
        else:
            fits = small.ndim == 4 and not any(self.shape[i] % small.shape[i + 1] for i in (1, 2))
            fits, told = fits and small.shape[1] == channels, f"{channels} channels whose sides divide its own"
        if not fits:
            raise UserError(
                f"this up-sampler makes images of {'×'.join(map(str, self.shape))} from smaller ones of {told}, not "
                f"from {'×'.join(map(str, small.shape[1:]))}."
            )
        if not bool((small.abs() <= _WHITE).all()):
            raise UserError("the small images lie outside of [-1, 1]: make them with carrara.images.from_uint8, say.")

    def _check_start(self, start: Tensor | None) -> None:
        """Whether sampling can begin from this noise."""
        wanted = self.codec.latent_shape(*self.shape)
        if start is not None and start.shape[1:] != wanted:
            raise UserError(
                f"sampling starts from noise of the model's own shape, start = [N, {', '.join(map(str, wanted))}], not "
                f"from {list(start.shape)}."
            )

    def _begin(self, grid: Grid, noise: Noise, count: int) -> Tensor:
        """Pure noise at the grid's first time, s(t)·ε, float32 [count, C', H', W']."""
        scale = float(self.schedule.sigma(grid.times[0]))
        return scale * noise.normal((count, *self.codec.latent_shape(*self.shape)))

    # ---- on disk -------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """Everything but the weights, as plain data."""
        params = getattr(self.network, "params", None)
        if not isinstance(params, UNetParams):
            raise UserError("only models around Carrara's own networks can be saved.")
        labels = None if self.labels is None else {"names": list(self.labels.names), "dropout": self.labels.dropout}
        return {
            "network": {"kind": "unet", **asdict(params)},
            "schedule": self.schedule.spec,
            "shape": list(self.shape),
            "predicts": self.predicts,
            "labels": labels,
            "levels": self.levels,
            "codec": {"kind": self.codec.kind, "hash": codecs.content_hash(self.codec)},
            "upsampling": None if self.upsampling is None else self.upsampling.config(),
            "sampling": self.sampling,
            "origin": self.origin,
        }

    def save(self, folder: str | Path) -> None:
        """Write `config.json`, `network.safetensors` and, of a latent model, the folder `codec`; each file whole or
        not at all."""
        if not self.codec.pixels:
            codecs.save(self.codec, Path(folder) / "codec")
        weights.save(folder, "diffusion", self.config(), {"network": self.network})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> DiffusionModel:
        """A model from a run folder or its `model/` folder.

        Raises:
            UserError: a missing or cut file, a config of a newer version, weights that do not fit it.
        """
        folder = weights.find(path)
        config = weights.read_config(folder, "diffusion")
        try:
            network = UNet(UNetParams(**{k: v for k, v in config["network"].items() if k != "kind"}))
            labels = config["labels"]
            told = config["codec"]
            codec = Identity() if told["kind"] == "identity" else codecs.load(folder / "codec", device)
            if not codec.pixels:
                codecs.check_same(codec, told["kind"], told["hash"], f"the model {folder}")
            model = cls(
                network=network,
                schedule=schedules.build(config["schedule"]),
                shape=tuple(config["shape"]),
                predicts=config["predicts"],
                labels=labels and Labels(tuple(labels["names"]), labels["dropout"]),
                levels=config["levels"],
                codec=codec,
                upsampling=Upsampling.of(config["upsampling"]) if config.get("upsampling") else None,
                sampling=config["sampling"],
                origin=config["origin"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{folder / 'config.json'} does not describe a model: {error!r} is wrong or missing."
            ) from None
        weights.load_weights(network, folder / "network.safetensors")
        network.eval()
        return model.to(device)


def _refuse_black(decoded: Tensor) -> None:
    """Raises UserError where a decoder's answer is not finite: as pixels it would be black."""
    bad = len(decoded) - int(decoded.flatten(1).isfinite().all(1).sum())
    if bad:
        raise UserError(
            f"what the codec's decoder made of {bad} of {len(decoded)} pictures is not finite (NaN or infinite): its "
            "weights are damaged, so copy the model again, or take the codec of an earlier checkpoint."
        )


@contextmanager
def _resting(network: nn.Module) -> Iterator[None]:
    """The network as it samples, without dropout; then as it was."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def _solver(choice: str | Solver, eta: float | None) -> Solver:
    if eta is None:
        return named(choice) if isinstance(choice, str) else choice
    if choice != "ddim":
        raise UserError(f"only the solver ddim takes an eta, {choice} does not.")
    return DDIM(eta=eta)
