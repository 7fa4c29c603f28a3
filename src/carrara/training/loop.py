"""The training loop. To resume, run the same command again.

Everything random in step k is a function of (seed, global position): the order, the augmentation, t, ε, the
condition dropout; network dropout draws from a generator that is set anew at every step. So the state after step k
is the weights, their mean, the optimiser and the objective's memory, and nothing else.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import carrara
from carrara import images as pictures
from carrara.codecs import Codec, Identity
from carrara.condition import Condition
from carrara.conditioning import Labels
from carrara.data import Batch, Batches, Preprocess, Source, open_source
from carrara.distributed import Processes, start
from carrara.errors import UserError
from carrara.model import DiffusionModel
from carrara.networks import UNet
from carrara.objectives import DiffusionObjective, Examples, Objective
from carrara.process import Noise, schedules
from carrara.recipe import Recipe
from carrara.training import checkpoint
from carrara.training.ema import EMA
from carrara.training.rates import learning_rate
from carrara.training.run import Log, Run

BAD_STEPS = 10
"""So many steps in a row without a finite loss and gradient end the run."""

_TRAINING_DRAWS = 2**40
"""Draw numbers of training start here, far from those of sampling, so that one seed serves both."""


@dataclass(frozen=True)
class Progress:
    """What a step yields.

    Attributes:
        step, total: optimiser steps done, of the whole run.
        loss: of this step.
        images_per_s: since this process started.
        seconds_left: at that speed.
        notice: a sentence for the user, or None.
    """

    step: int
    total: int
    loss: float
    images_per_s: float
    seconds_left: float
    notice: str | None = None


@dataclass
class Window:
    """Sums since the last log line; part of the checkpoint, so that a resumed log has the same numbers."""

    steps: int = 0
    loss: float = 0.0
    gradient: float = 0.0
    quarter_sums: tuple[float, ...] = (0.0,) * 4
    quarter_counts: tuple[int, ...] = (0,) * 4

    def add(self, loss: float, gradient: float, per_sample: Tensor, quarter: Tensor | None) -> None:
        """Take in one step."""
        self.steps += 1
        self.loss += loss
        self.gradient += gradient
        if quarter is not None:
            sums = torch.zeros(4, dtype=torch.float64).index_add_(0, quarter.cpu(), per_sample.double().cpu())
            counts = torch.bincount(quarter.cpu(), minlength=4)
            self.quarter_sums = tuple((torch.tensor(self.quarter_sums, dtype=torch.float64) + sums).tolist())
            self.quarter_counts = tuple((torch.tensor(self.quarter_counts) + counts).tolist())

    def means(self) -> dict[str, Any]:
        """What the log line says; a quarter that no sample fell into is null."""
        quarters = zip(self.quarter_sums, self.quarter_counts, strict=True)
        return {
            "loss": self.loss / self.steps,
            "loss_by_quarter": [total / count if count else None for total, count in quarters],
            "gradient_norm": self.gradient / self.steps,
        }


class Trainer:
    """A run that can be walked step by step: `for progress in Trainer(recipe, folder).steps(): …`

    Args:
        recipe: what to train.
        folder: the run folder.
        accept_changes: go on although the folder's recipe differs.

    Raises:
        UserError: data, recipe and folder do not fit together; said before anything is trained.
    """

    def __init__(self, recipe: Recipe, folder: Path, accept_changes: bool = False) -> None:
        self.recipe = recipe
        self.processes: Processes = start()
        self.source, self.batches = open_batches(recipe, self.processes)
        self.labels = _labels(recipe, self.source)
        torch.manual_seed(recipe.seed)
        params = recipe.network_params(len(self.labels.names) if self.labels else None)
        self.network = UNet(params).to(self.processes.device)
        self.codec: Codec = Identity()
        schedule = schedules.build(recipe.schedule.spec())
        null = self.labels.null() if self.labels and self.labels.dropout else None
        self.objective: Objective = DiffusionObjective(
            self.network,
            schedule,
            recipe.objective.predicts,
            null=null,
            dropout=self.labels.dropout if self.labels else 0.0,
        )
        self.optimisers = {
            name: torch.optim.AdamW(
                player.parameters(),
                lr=recipe.training.learning_rate,
                betas=recipe.training.betas,
                weight_decay=recipe.training.weight_decay,
                fused=True,
            )
            for name, player in self.objective.players.items()
        }
        self.ema = EMA(self.network, recipe.training.ema)
        self.model = DiffusionModel(
            network=self.ema.module,
            schedule=schedule,
            shape=(recipe.data.channels, *recipe.data.resolution),
            predicts=recipe.objective.predicts,
            labels=self.labels,
            levels=self.source.levels,
            codec=self.codec,
            sampling=recipe.sampling.model_dump(include={"solver", "steps", "spacing", "guidance"}),
        )
        self.model.grid(recipe.sampling.steps, recipe.sampling.spacing)
        self.step, self.bad_steps, self.window = 0, 0, Window()
        self.notices: list[str] = list(self.source.warnings)
        self._stop = False
        self.run = Run(folder, recipe, accept_changes)
        try:
            self._resume()
        except BaseException:
            self.run.close()
            raise

    def summary(self) -> dict[str, Any]:
        """Every effective number, to be said once at the start."""
        training = self.recipe.training
        count = sum(p.numel() for p in self.network.parameters())
        return {
            "data": f"{self.source.layout}: {len(self.source):,} images",
            "image": "×".join(map(str, self.model.shape)),
            "classes": len(self.labels.names) if self.labels else 0,
            "parameters": count,
            "device": str(self.processes.device),
            "processes": self.processes.world,
            "batch": training.batch_size,
            "learning rate": training.learning_rate,
            "steps": training.steps,
            "epochs": round(training.steps * training.batch_size / len(self.source), 1),
            "starts at step": self.step,
        }

    def steps(self) -> Iterator[Progress]:
        """Train to the last step, yielding after each. Ends early, with everything saved, on SIGTERM or Ctrl-C.

        Raises:
            UserError: too many steps in a row were not finite, or a checkpoint could not be written.
        """
        training = self.recipe.training
        log = Log(self.run.folder, self.step)
        before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT) if _main_thread()}
        began, first = time.perf_counter(), self.step
        try:
            yield from self._notices()
            batches = self.batches.iterate(self.step)
            while self.step < training.steps and not self._stop:
                loss = self._one_step(next(batches))
                speed = (self.step - first) * training.batch_size / (time.perf_counter() - began)
                left = (training.steps - self.step) * training.batch_size / speed
                self._log(log, speed)
                if self.step % training.sample_every == 0 or self.step == training.steps:
                    self._preview(log)
                # Nothing is saved in the middle of a bad stretch, so that the last checkpoint is a good one.
                if self.step % training.checkpoint_every == 0 and self.step < training.steps and not self.bad_steps:
                    self.save_checkpoint()
                yield Progress(self.step, training.steps, loss, speed, left)
            if self.step > first:
                self.save_checkpoint()
            if self.step == training.steps:
                self.model.origin = f"EMA of step {self.step}"
                self.model.save(self.run.model)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            log.close()
            self.run.close()

    @property
    def stopped(self) -> bool:
        """Whether a signal ended the run before its last step."""
        return self._stop and self.step < self.recipe.training.steps

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop = True

    def _notices(self) -> Iterator[Progress]:
        for notice in self.notices:
            yield Progress(self.step, self.recipe.training.steps, float("nan"), 0.0, 0.0, notice)

    def _one_step(self, batch: Batch) -> float:
        """One optimiser step of every player; returns the first player's loss."""
        training = self.recipe.training
        torch.manual_seed((self.recipe.seed * 1_000_003 + self.step) % 2**63)
        draw = Noise(self.recipe.seed).rows(batch.positions).at(_TRAINING_DRAWS)
        device = self.processes.device
        with torch.no_grad():
            latents = self.codec.encode(batch.images.to(device)).sample(draw.at(_TRAINING_DRAWS + 1))
        examples = Examples(latents, self._condition(batch).to(device))
        losses: list[float] = []
        for name, player in self.objective.players.items():
            player.train()
            with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16"):
                terms = self.objective.terms(examples, draw, name)
            loss = terms.per_sample.mean()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(player.parameters(), training.clip)
            value, gradient = float(loss.detach()), float(norm)
            if torch.isfinite(loss.detach() + norm):
                for group in self.optimisers[name].param_groups:
                    group["lr"] = learning_rate(training, self.step)
                self.optimisers[name].step()
                self.bad_steps = 0
                if not losses:
                    self.window.add(value, gradient, terms.per_sample.detach(), terms.quarter)
            else:
                self._bad(batch, value, gradient)
            self.optimisers[name].zero_grad(set_to_none=True)
            losses.append(value)
        self.step += 1
        self.ema.update(self.network, self.step)
        return losses[0]

    def _condition(self, batch: Batch) -> Condition:
        return Condition(label=batch.label) if self.labels else Condition()

    def _bad(self, batch: Batch, loss: float, gradient: float) -> None:
        """Skip the step, write down what it held, and give up after too many in a row."""
        import json

        self.bad_steps += 1
        entry = {"step": self.step, "loss": repr(loss), "gradient_norm": repr(gradient), "images": batch.names}
        with open(self.run.folder / "skipped.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({**entry, "positions": batch.positions.tolist()}) + "\n")
        if self.bad_steps >= BAD_STEPS:
            whole, _ = checkpoint.newest(self.run.checkpoints)
            good = f"the last good checkpoint is that of step {whole}" if whole else "there is no checkpoint yet"
            raise UserError(
                f"{BAD_STEPS} steps in a row had no finite loss or gradient (see {self.run.folder / 'skipped.jsonl'}); "
                f"{good}: lower training.learning_rate or use training.precision=fp32."
            )

    def _log(self, log: Log, speed: float) -> None:
        if self.step % self.recipe.training.log_every or not self.window.steps:
            return
        rate = learning_rate(self.recipe.training, self.step - 1)
        entry = {"step": self.step, **self.window.means(), "learning_rate": rate}
        log.write({**entry, "timing": {"images_per_s": round(speed, 2)}})
        self.window = Window()

    def _preview(self, log: Log) -> None:
        """The same few pictures from the mean and from the raw weights, so that progress can be seen."""
        choice = self.recipe.sampling
        labels = [i % len(self.labels.names) for i in range(choice.count)] if self.labels else None
        raw = DiffusionModel(**{**self.model.__dict__, "network": self.network})
        for name, model in (("ema", self.model), ("raw", raw)):
            samples = model.sample(labels, None if labels else choice.count, seed=choice.seed)
            sheet = pictures.grid(samples.images)
            scale = max(1, 64 // sheet.shape[-1])
            pictures.save_png(sheet, self.run.samples / f"step-{self.step:08d}-{name}.png", samples.protocol, scale)
            log.picture(f"samples/{name}", sheet, self.step)

    def save_checkpoint(self) -> Path:
        """Write the checkpoint of this step, then prune the oldest."""
        weights = {"network": self.network.state_dict(), "ema": self.ema.module.state_dict()}
        state = {
            "carrara": carrara.__version__,
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
            "step": self.step,
            "bad_steps": self.bad_steps,
            "window": self.window.__dict__,
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
            "objective": self.objective.state_dict(),
            "recipe": self.recipe.to_yaml(),
        }
        path = checkpoint.save(self.run.checkpoints, self.step, weights, state)
        checkpoint.prune(self.run.checkpoints, self.recipe.training.keep_checkpoints)
        return path

    def _resume(self) -> None:
        """Take up the newest whole checkpoint of the folder, if there is one."""
        step, complaints = checkpoint.newest(self.run.checkpoints)
        self.notices += complaints
        if step == 0:
            return
        weights, state = checkpoint.load(self.run.checkpoints, step)
        try:
            self.network.load_state_dict(weights["network"])
            self.ema.module.load_state_dict(weights["ema"])
            for name, optimiser in self.optimisers.items():
                optimiser.load_state_dict(state["optimisers"][name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"the checkpoint of step {step} in {self.run.folder} does not fit this network (Carrara "
                f"{state.get('carrara')} wrote it): name another --out. {str(error).splitlines()[0]}"
            ) from None
        self.objective.load_state_dict(state["objective"])
        self.step, self.bad_steps = state["step"], state["bad_steps"]
        self.window = Window(**state["window"])
        self.notices.append(f"going on from the checkpoint of step {step}.")
        for key, now in (("torch", str(torch.__version__)), ("threads", torch.get_num_threads())):
            if state[key] != now:
                self.notices.append(f"the checkpoint was made with {key} {state[key]}, this is {now}: bits may differ.")


def _main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


def open_batches(recipe: Recipe, processes: Processes) -> tuple[Source, Batches]:
    """The recipe's data, ready to be walked."""
    data = recipe.data
    source = open_source(data.path, data.split, data.unreadable_limit, data.caption_column)
    prepare = Preprocess(*data.resolution, data.channels, resize=data.resize, crop=data.crop, flip=data.flip)
    batches = Batches(
        source,
        prepare,
        recipe.seed,
        recipe.training.batch_size,
        processes.rank,
        processes.world,
        data.workers,
    )
    return source, batches


def _labels(recipe: Recipe, source: Source) -> Labels | None:
    if recipe.conditioning.kind == "none":
        return None
    if source.class_names is None:
        raise UserError(
            f"the recipe conditions on labels, but {source.name} has none: sort the images into one folder per class, "
            "or set conditioning.kind=none."
        )
    return Labels(source.class_names, recipe.conditioning.dropout)
