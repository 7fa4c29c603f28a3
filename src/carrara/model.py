"""The assembled, saved, loadable thing: a network with its schedule, codec and conditioners."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from carrara import codecs, conditioning, networks, weights
from carrara.classifier import Classifier
from carrara.codecs import Codec, Identity
from carrara.condition import Condition
from carrara.conditioning import ClassLabels, Conditioner, LowRes, NullForm, WithFiles
from carrara.entries import Entry, read_entries
from carrara.errors import UserError, whole_number
from carrara.guidance import classifier_free, classifier_guidance, interval, static_threshold
from carrara.process import Denoiser, Grid, Guide, NetworkDenoiser, Noise, Predicts, Schedule, schedules
from carrara.process.parameterisation import SIGMA_DATA
from carrara.sampling import Plan, Samples, checked, describe, texts_of
from carrara.solvers import Solver, Step, grid_of, resolve

_DROWNED = 2 * math.log(0.01)
"""Below this log-SNR, α/σ = 1 %, a classifier cannot see the image."""

_DEFAULTS: dict[str, Any] = {"solver": "dpm++2m", "steps": 20, "grid": "trailing", "guidance": 1.0}

_C = TypeVar("_C")


@dataclass
class DiffusionModel:
    """A diffusion model: what a user of the library needs on page one.

    Attributes:
        network: predicts ε, x_0 or v from a noisy image and a time; its `params` define its shape.
        schedule: the noise levels it was trained on.
        shape: of an image, [C, H, W].
        predicts: what the network predicts.
        conditioners: what it is conditioned on; none for an unconditional model.
        levels: how many values a channel of the training images had (256; the scanned digits have 17).
        codec: pixels to latents and back; the identity for a pixel model.
        sampling: default `solver`, `steps`, `spacing` and `guidance`.
        origin: where the weights come from, for metadata ("EMA of step 1200").
        sigma_data: EDM's σ_data, the standard deviation of the clean data, where it predicts EDM's F.
    """

    network: nn.Module
    schedule: Schedule
    shape: tuple[int, ...]
    predicts: Predicts = "eps"
    conditioners: tuple[Conditioner, ...] = ()
    levels: int = 256
    codec: Codec = field(default_factory=Identity)
    sampling: dict[str, Any] = field(default_factory=dict)
    origin: str = ""
    sigma_data: float = SIGMA_DATA

    @property
    def class_labels(self) -> ClassLabels | None:
        """The classes, of a class-conditional model."""
        return self._conditioner(ClassLabels)

    @property
    def low_res(self) -> LowRes | None:
        """The low-resolution images, of an up-sampler."""
        return self._conditioner(LowRes)

    def _conditioner(self, kind: type[_C]) -> _C | None:
        return next((c for c in self.conditioners if isinstance(c, kind)), None)

    @property
    def learned_variance(self) -> bool:
        """Whether the network predicts its reverse variance too."""
        return isinstance(self.network, networks.Network) and self.network.learned_variance

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    def to(self, device: torch.device | str) -> DiffusionModel:
        """Move the weights; returns the model itself."""
        for module in self._modules():
            module.to(device)
        return self

    def _modules(self) -> tuple[nn.Module, ...]:
        parts = (self.network, codecs.whole(self.codec), *self.conditioners)
        return tuple(part for part in parts if isinstance(part, nn.Module))

    def denoiser(self) -> Denoiser:
        """The network as a denoiser, without any guidance."""
        return NetworkDenoiser(self.network, self.schedule, self.predicts, self.learned_variance, self.sigma_data)

    def grid(self, steps: int, spacing: str | Grid = "trailing", solver: str | Solver | None = None) -> Grid:
        """The times of a sampling run; see `carrara.solvers.grid_of`.

        Args:
            solver: what an optimised grid is for; by default the model's own.

        Raises:
            UserError: an unknown spacing, steps outside 1..T, or a grid that leaves the schedule.
        """
        return grid_of(spacing, self.schedule, steps, resolve(solver or self.choices()["solver"]))

    def plan(
        self,
        labels: Sequence[int | str] | Tensor | None = None,
        count: int | None = None,
        *,
        solver: str | Solver | None = None,
        steps: int | None = None,
        grid: str | Grid | None = None,
        guidance: float | None = None,
        guides: Sequence[Guide] = (),
        seed: int = 0,
        first: int = 0,
        start: Tensor | None = None,
        rescale: float = 0.0,
        classifier: Classifier | None = None,
        classifier_scale: float = 1.0,
        eta: float | None = None,
        spacing: str | None = None,
        condition: Condition | None = None,
        **inputs: Any,
    ) -> Plan:
        """Everything that sampling needs, decided and checked; nothing is computed.

        Args:
            labels: the class of every sample, as numbers or names; needed by a class-conditional model, and by a
                classifier.
            count: how many samples, where no input has one for each (1 by default).
            solver: a word of `carrara.solvers.SOLVERS`, or a solver.
            steps: pairs of the grid, 1..T.
            grid: a word ("trailing", "leading", "linspace", "quadratic", "karras", "log_snr", "optimised") or a
                `Grid`.
            guidance: classifier-free scale; 1 is the plain conditional model and costs one pass, 0 the model under its
                null condition.
            guides: your own, applied to the guided prediction before it is thresholded.
            seed: of all noise.
            first: the row number of the first sample, so that a large set can be made in parts.
            start: the noise to start from, [N, C', H', W'] of the model's own latents, in place of the seed's.
            rescale: φ in 0..1, how much of the conditional prediction's standard deviation is restored.
            classifier: of noisy images, trained for this model's schedule and size, that guides toward the labels.
            classifier_scale: its w; 0 does not evaluate it.
            eta: η of DDIM, Euler-ancestral and the DPM-Solver++ family, 0..1.
            spacing: the same as a word for `grid`.
            condition: of every sample, in place of the conditioners' inputs (what `conditioning.examples` returns).
            inputs: what the model's conditioners read (`prompts=` and `negative=` of a model of texts, `low_res=` and
                `noise_level=` of an up-sampler).

        Raises:
            UserError: an argument that does not fit; `key` is its name.
        """
        choices = self.choices(solver=solver, steps=steps, grid=grid, spacing=spacing, guidance=guidance)
        method, scale, seed = resolve(choices["solver"], eta), float(choices["guidance"]), whole_number(seed, "seed")
        times = grid_of(choices["grid"], self.schedule, choices["steps"], method)
        self._check_start(start)
        inputs = _present({"labels": labels, **inputs})
        given = _present({**(inputs if condition is None else _slots(condition, inputs)), "start": start})
        total = conditioning.count_samples(self.conditioners, given, count)
        texts = texts_of(given, total)
        first = whole_number(first, "first", least=0)
        noise = Noise(seed).rows(range(first, first + total))
        given = {name: value for name, value in given.items() if name not in texts}
        metadata = describe(method, times, choices["grid"], scale, rescale, noise, given) | {"weights": self.origin}
        if guides:
            metadata["needs"].append("guides")
        if classifier is not None:
            metadata |= {"classifier": classifier.origin, "classifier_scale": classifier_scale}
            metadata["needs"].append("classifier")
        if condition is None:
            condition = self._condition(inputs, noise, classifier)
        return Plan(
            denoiser=self._guided(scale, rescale, guides, classifier, classifier_scale),
            schedule=self.schedule,
            solver=method,
            grid=times,
            condition=condition.batch(total),
            noise=noise,
            shape=self.codec.latent_shape(self.shape),
            start=start,
            device=self.device,
            modules=(*self._modules(), *(() if classifier is None else (classifier.network,))),
            metadata=metadata,
            texts=texts,
        )

    def choices(self, **given: Any) -> dict[str, Any]:
        """The `solver`, `steps`, `grid` and `guidance` of a sampling run: those given, else the model's own, else the
        defaults. `spacing` and a given None are as in `plan`.

        Raises:
            UserError: both `grid` and `spacing`.
        """
        given = _present(given)
        if "grid" in given and "spacing" in given:
            raise UserError("grid and spacing mean the same: give one of them.", key="spacing", code="conflict")
        return _DEFAULTS | _with_grid(self.sampling) | _with_grid(given)

    def sample(
        self,
        labels: Sequence[int | str] | Tensor | None = None,
        count: int | None = None,
        *,
        batch_size: int = 256,
        on_step: Callable[[Step, int], None] | None = None,
        **arguments: Any,
    ) -> Samples:
        """Make images. Image k has seed `seed`, row `first + k`, whatever the batch size.

        Args:
            labels, count, arguments: those of `plan`.
            batch_size: how many images are computed at once.
            on_step: called after every step with the step and the index of the first image of its batch.

        Raises:
            UserError: an argument that does not fit; `key` is its name.
        """
        plan = self.plan(labels, count, **arguments)
        images, latents, done = [], [], 0
        with plan.running():
            for part in plan.parts(batch_size):
                for step in part.steps():
                    if on_step is not None:
                        on_step(step, done)
                decoded = self.codec.decode(step.x)
                _check_decoded(decoded)
                images.append(decoded.float().clamp(-1, 1).cpu())
                latents.append(step.x.cpu())
                done += len(part)
        known = plan.condition.target if self.class_labels is None else plan.condition.label
        classes = None if known is None else known.tolist()
        return Samples(torch.cat(images), torch.cat(latents), classes, plan.metadata, plan.texts)

    def with_codec(self, codec: Codec) -> DiffusionModel:
        """The model with another decoder for its latents: a codec of which only the decoder was fine-tuned.

        Raises:
            UserError: a model of pixels, or a codec whose latents are others than the model's; both are named.
        """
        if self.codec.bounded:
            raise UserError("this model works on pixels: it takes no codec.", key="codec", code="conflict")
        found = codecs.check_same(codec, self.codec.kind, codecs.content_hash(self.codec), "the model")
        return replace(self, codec=codec, origin=f"{self.origin}, codec {found}")

    def class_names(self, classifier: Classifier | None = None) -> tuple[str, ...] | None:
        """The classes that samples can have: the model's own, else those that a classifier guides toward; or None."""
        if self.class_labels is not None:
            return self.class_labels.names
        return None if classifier is None else classifier.names

    def _guided(
        self, scale: float, rescale: float, guides: Sequence[Guide], classifier: Classifier | None, strength: float
    ) -> Denoiser:
        """network → classifier-free → one's own → threshold → classifier: the documented order (docs/math.md §6)."""
        denoiser = self.denoiser()
        if scale != 1:
            denoiser = classifier_free(scale=scale, null=NullForm(self.conditioners), rescale=rescale)(denoiser)
        elif rescale:
            raise UserError(
                f"a guidance rescale of {rescale:g} changes what guidance did: give a guidance other than 1.",
                key="rescale",
                code="conflict",
            )
        for guide in guides:
            denoiser = checked(guide)(denoiser)
        denoiser = static_threshold()(denoiser) if self.codec.bounded else denoiser
        return denoiser if classifier is None else self._toward_classes(classifier, strength)(denoiser)

    def _toward_classes(self, classifier: Classifier, scale: float) -> Guide:
        """The classifier's guidance toward `Condition.target`, where the image is not drowned in noise.

        An exact classifier's gradient vanishes with the signal: it moves x̂_0 by σ²/α·g = E[x_0|x, y] - E[x_0|x]. A
        trained one's does not, and what is left of it would be divided by α (5·10⁻⁵ at the cosine schedule's T).
        """
        names = self.class_labels.names if self.class_labels else None
        noisy = classifier.to(self.device).guide_of(self.schedule, self.shape, names)
        last = float(self.schedule.time_at(torch.tensor(_DROWNED, dtype=torch.float64)))
        return interval(classifier_guidance(noisy, scale, form="mean"), 0.0, last)

    def _condition(self, inputs: Mapping[str, Any], noise: Noise, classifier: Classifier | None) -> Condition:
        """The condition of all samples, for the network and for the classifier."""
        if classifier is None:
            return conditioning.encode(self.conditioners, inputs, noise)
        target = ClassLabels(self.class_names(classifier) or ()).indices(inputs.get("labels"))
        if self.class_labels is None:
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        return replace(conditioning.encode(self.conditioners, inputs, noise), target=target)

    def _check_start(self, start: Tensor | None) -> None:
        """Raises UserError unless sampling can start from this noise."""
        expected = self.codec.latent_shape(self.shape)
        if start is not None and start.shape[1:] != expected:
            raise UserError(
                f"sampling starts from noise of the model's own shape, start = [N, {', '.join(map(str, expected))}], "
                f"not from {list(start.shape)}.",
                key="start",
                code="shape",
            )

    # ---- on disk -------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """Everything but the weights, as plain data."""
        return {
            "network": networks.config(self.network),
            "schedule": self.schedule.spec,
            "shape": list(self.shape),
            "predicts": self.predicts,
            **({"sigma_data": self.sigma_data} if self.predicts == "edm" else {}),
            "conditioners": [{"kind": c.kind, **c.config()} for c in self.conditioners],
            "levels": self.levels,
            "codec": {"kind": self.codec.kind, "hash": codecs.content_hash(self.codec)},
            "sampling": self.sampling,
            "origin": self.origin,
        }

    def save(self, folder: str | Path) -> None:
        """Write `config.json`, `network.safetensors` and, of a latent model, the folder `codec`; each file whole or
        not at all."""
        if not self.codec.bounded:
            codecs.save(self.codec, Path(folder) / "codec")
        for conditioner in self.conditioners:
            if isinstance(conditioner, WithFiles):
                conditioner.save(Path(folder))
        modules = {"network": self.network}
        modules |= {f"conditioner-{c.kind}": c for c in self.conditioners if isinstance(c, nn.Module)}
        weights.save(folder, "diffusion", self.config(), modules)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> DiffusionModel:
        """A model from a run folder or its `model/` folder.

        Raises:
            UserError: a missing or cut file, a config of a newer version, weights that do not fit it.
        """
        folder = weights.find(path)
        config = weights.read_config(folder, "diffusion")
        own = read_entries(config, CONFIG, str(folder / weights.CONFIG), others=True)
        try:
            network = networks.build({"kind": "unet", **own["network"]})
            stored = own["codec"]
            codec = Identity() if stored["kind"] == "identity" else codecs.load(folder / "codec", device)
            if not codec.bounded:
                codecs.check_same(codec, stored["kind"], stored["hash"], f"the model {folder}")
            model = cls(
                network=network,
                schedule=schedules.build(own["schedule"]),
                shape=own["shape"],
                predicts=own["predicts"],
                conditioners=tuple(conditioning.build(entry, folder) for entry in conditioner_configs(config)),
                levels=own["levels"],
                codec=codec,
                sampling=own["sampling"],
                origin=own["origin"],
                sigma_data=own["sigma_data"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{folder / 'config.json'} does not describe a model: {error!r} is wrong or missing.",
                key=str(folder / "config.json"),
                code="damaged",
            ) from None
        weights.load_weights(network, folder / "network.safetensors")
        for conditioner in model.conditioners:
            if isinstance(conditioner, nn.Module):
                weights.load_weights(conditioner, folder / f"conditioner-{conditioner.kind}.safetensors")
        for module in model._modules():
            module.eval()
        return model.to(device)


CONFIG = {
    "network": Entry(dict),
    "schedule": Entry(dict),
    "shape": Entry(tuple[int, ...]),
    "predicts": Entry(Predicts),
    "levels": Entry(int, least=2),
    "codec": Entry(dict),
    "sampling": Entry(dict),
    "origin": Entry(str),
    "sigma_data": Entry(float, SIGMA_DATA, zero=False),
}
"""The entries of a model's `config.json`, but for its conditioners."""


def conditioner_configs(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The conditioners of a config; the first edition had an entry for each of its two kinds."""
    if "conditioners" in config:
        return list(config["conditioners"])
    found = []
    if config["labels"] is not None:
        found.append({"kind": "labels", **config["labels"]})
    if config["network"].get("upsample_concat"):
        upsampling = config.get("upsampling") or {"factor": None, "noise": None}
        noise = upsampling["noise"]
        noise = noise and {"schedule": noise["schedule"], "highest": noise["highest"], "slot": noise["told"]}
        found.append({"kind": "low_res", "shape": config["shape"], "factor": upsampling["factor"], "noise": noise})
    return found


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def _with_grid(choices: Mapping[str, Any]) -> dict[str, Any]:
    """The same choices with a `spacing` named `grid`."""
    return {"grid" if name == "spacing" else name: value for name, value in choices.items()}


def _slots(condition: Condition, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The filled slots of a condition as `condition.SLOT`.

    Raises:
        UserError: there are inputs besides.
    """
    if inputs:
        raise UserError(
            f"a condition takes the place of all inputs: leave it out, or {', '.join(inputs)}.",
            key="condition",
            code="conflict",
        )
    return {f"condition.{slot}": value for slot, value in condition.tensors().items()}


def _check_decoded(decoded: Tensor) -> None:
    """Raises UserError where a decoder's answer is not finite: as pixels it would be black."""
    bad = len(decoded) - int(decoded.flatten(1).isfinite().all(1).sum())
    if bad:
        raise UserError(
            f"what the codec's decoder made of {bad} of {len(decoded)} pictures is not finite (NaN or infinite): its "
            "weights are damaged, so copy the model again, or take the codec of an earlier checkpoint.",
            key="codec",
            code="not_finite",
        )
