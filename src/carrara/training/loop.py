"""The training loop. To resume, run the same command again.

Everything random in step k is a function of (seed, global position): the order, the augmentation, t, ε, the
condition dropout; network dropout draws from a generator that is seeded again at every step. So the state after step k
is the weights, their means, the optimiser and the objective's memory, and nothing else.
"""

from __future__ import annotations

import copy
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import carrara
from carrara import codecs, distributed
from carrara import images as pictures
from carrara.data import Batch, LatentBatch, one_ahead
from carrara.data.identity import identity
from carrara.distributed import Processes
from carrara.errors import UserError
from carrara.objectives import Examples
from carrara.recipe import Recipe
from carrara.training import checkpoint
from carrara.training.assembly import open_batches, open_held_out, spread
from carrara.training.compilation import check_compiler
from carrara.training.ema import EMA, Exponential, PowerFunction, decays_of
from carrara.training.log import Log
from carrara.training.micro_batch import largest_micro_batch, refuse_sharded
from carrara.training.phases import Phases, Timing, Watchdog, passed
from carrara.training.progress import Outcome, Progress, Window
from carrara.training.rates import learning_rate
from carrara.training.resume import changes, check, check_data, restore
from carrara.training.run import Run
from carrara.training.state import copied, pattern, put_weights, split
from carrara.training.step import LossScale, Stepper, autocast
from carrara.training.task import make_task
from carrara.training.validation import validate

BAD_STEPS = 10
"""So many steps in a row without a finite loss and gradient end the run."""

_BYTES_OF_FLOAT = 4
_BACKWARD = 2
"""A backward pass takes twice the multiplications of its forward pass."""


class Trainer:
    """A run, step by step: `for progress in Trainer(recipe, folder).steps(): …`

    Every process of a launcher makes its own and iterates over it; the first one writes.

    Args:
        recipe: what to train.
        folder: the run folder.
        accept_changes: resume although the folder's recipe or the data changed.
        device: as of `distributed.start`.

    Raises:
        UserError: data, recipe and folder do not fit together; before anything is trained.
    """

    def __init__(self, recipe: Recipe, folder: Path, accept_changes: bool = False, device: str = "auto") -> None:
        self.recipe = recipe
        self.phases = Phases()
        self.processes: Processes = distributed.start(device)
        if recipe.training.compile:
            check_compiler(self.processes.device)
        self.source, images = open_batches(recipe, self.processes)
        self.class_names = list(self.source.class_names or ())
        self.held_out = open_held_out(recipe, self.processes)
        self.task = make_task(recipe, self.source, self.processes)
        self.batches = self.task.batches(images)
        self.network = next(iter(self.task.modules.values()))
        wrapped = recipe.training.parallel == "fsdp" or recipe.training.compile
        self._plain = copy.deepcopy(self.network).to("meta") if wrapped else None  # its shape, as it is now
        self.means = {name: EMA(self.network, decay) for name, decay in decays_of(recipe.training).items()}
        self.step, self.bad_steps, self.window = 0, 0, Window()
        self.notices = [*self.source.warnings, *self.task.notices]
        self._stop = False
        self._saved = 0  # the step of the last checkpoint
        self._late: list[str] = []  # notices of what failed along the way
        self._interval: list[tuple[int, list[str], list[Outcome]]] = []  # steps whose results lie on the device still
        self.log: Log | None = None  # only the first process has one
        self.writer = checkpoint.Writer()
        self._copy: dict[str, Any] = {}  # the last checkpoint's, whose memory serves the next
        self.run = Run(folder, recipe)
        distributed.run_on_rank0(lambda: self.run.claim(accept_changes))
        try:
            self._prepare(accept_changes)
            distributed.run_on_rank0(self.run.write_recipe)
        except BaseException:
            self.run.close()
            raise

    def _prepare(self, accept_changes: bool) -> None:
        """What takes time or memory: only once this process holds the folder."""
        self._data = distributed.run_on_rank0(lambda: identity(self.source))
        training = self.recipe.training
        self.size = sum(p.numel() for module in self.task.modules.values() for p in module.parameters())
        distributed.run_on_rank0(self._refuse_full_disk)
        found, complaints = distributed.run_on_rank0(lambda: checkpoint.newest(self.run.checkpoints))
        self.notices += complaints
        sharded = training.parallel == "fsdp" and self.processes.world > 1  # reads its parts when it is
        weights, state = checkpoint.load(self.run.checkpoints, found, parts=not sharded) if found else ({}, {})
        self.flops_per_image = self._count_flops()
        self.micro_batch = self._micro_batch(state.get("setting", {}).get("micro_batch"))
        players = self._over_processes()
        if training.compile:
            for player in players.values():
                player.compile()
        self.objective = self.task.objective(players)
        self.stepper = Stepper(
            self.objective, training, self.recipe.seed, self.processes, self.micro_batch, self.phases
        )
        if found:
            self._resume(weights, state, accept_changes)

    def _refuse_full_disk(self) -> None:
        checkpoint.tidy(self.run.checkpoints)
        each = (len(self.means) + 3) * _BYTES_OF_FLOAT * self.size  # the weights, their means, AdamW's two moments
        checkpoint.refuse_full_disk(self.run.checkpoints, (self.recipe.training.keep_checkpoints + 1) * each)

    def _count_flops(self) -> int:
        """Of one image's forward and backward pass, twice its multiplications."""
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.task.forward(self.means["ema"].module, self.task.blank())
        return int(counter.get_total_flops() * (1 + _BACKWARD))

    def _micro_batch(self, before: int | None) -> int:
        """Images that this process works on at once.

        Args:
            before: of the checkpoint; another number would change the last bits.
        """
        training, processes = self.recipe.training, self.processes
        share = training.batch_size // processes.world
        if training.micro_batch != "auto":
            return min(training.micro_batch or share, share)
        refuse_sharded(training, processes)
        examples, largest = self.examples(self.batches.at(0)), min(before or share, share)
        self.network.train()
        with autocast(training, processes.device):
            size, notices = largest_micro_batch(self.network, self.task.forward, examples, largest, processes)
        self.notices += notices
        return size

    def _over_processes(self) -> dict[str, nn.Module]:
        """The modules as the objective sees them."""
        modules = self.task.modules
        if self.processes.world == 1:
            return modules
        if self.recipe.training.parallel == "ddp":
            return {name: distributed.replicated(module) for name, module in modules.items()}
        spread([*modules.values(), *(mean.module for mean in self.means.values())], self.processes)
        return modules

    # ---- the steps ---------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """Every effective number, printed once at the start."""
        training = self.recipe.training
        return {
            "data": f"{self.source.layout}: {len(self.source):,} images",
            **self.task.summary,
            "parameters": self.size,
            "device": str(self.processes.device),
            "processes": self.processes.world,
            "batch": training.batch_size,
            "micro-batch": self.micro_batch,
            "precision": training.precision,
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
        main = threading.current_thread() is threading.main_thread()
        before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT) if main}
        try:
            for notice in self.notices:
                yield self._notice(notice)
            distributed.run_on_rank0(self._open_log)
            stacks = self.run.folder / f"stuck-{self.processes.rank}.txt"
            with Watchdog(self.phases, self.recipe.training.stuck_after, stacks):
                yield from self._train()
        except Exception:
            self._rescue()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.writer.close()
            if self.log is not None:
                self.log.close()
            self.run.close()

    def _notice(self, sentence: str) -> Progress:
        return Progress(self.step, self.recipe.training.steps, torch.tensor(torch.nan), 0.0, 0.0, sentence)

    def _train(self) -> Iterator[Progress]:
        training, first, began = self.recipe.training, self.step, self.phases.clock()
        batches: Iterator[Batch | LatentBatch] = one_ahead(self.batches.iterate(self.step), self.processes.device)
        self.source.new_notices()  # up to here they are among the run's notices
        while self.step < training.steps and not self._stopping():
            with self.phases("reading data"):
                batch = distributed.fail_together(lambda: next(batches))
            yield from map(self._notice, self.source.new_notices())
            loss = self.one_step(batch)
            speed = (self.step - first) * training.batch_size / passed(began, self.phases.clock())
            if self.step == first + 1:
                self._reserve()
            self._after_step()
            yield from (self._notice(sentence) for sentence in self._late)
            self._late.clear()
            left = (training.steps - self.step) * training.batch_size / speed
            yield Progress(self.step, training.steps, loss, speed, left)
        with self.phases("saving"):
            if self.step > first:
                self.save_checkpoint()
                distributed.fail_together(self.writer.wait)
            if self.step == training.steps:
                self._save_models()

    def _after_step(self) -> None:
        """What is due every so many steps."""
        training = self.recipe.training
        last = self.step == training.steps
        if training.validate_every and self.step % training.validate_every == 0:
            with self.phases("validating"):
                self._optional("validation", self._validate)
        due, saving = self.step % training.log_every == 0, self.step % training.checkpoint_every == 0
        if due or saving or last:
            with self.phases("waiting for the device"):
                self.end_interval()
        if due and self.window.steps:
            self._write_log()
        if self.task.pictures and (self.step % training.sample_every == 0 or last):
            with self.phases("sampling"):
                self._optional("the preview", self._preview)
        with self.phases("saving"):
            if training.power_ema and self.step % training.power_ema_every == 0:
                self._save_snapshot()
            # Nothing is saved in the middle of a bad stretch, so that the last checkpoint is a good one.
            if saving and not last and not self.bad_steps:
                self.save_checkpoint()

    def _optional(self, name: str, work: Callable[[], None]) -> None:
        """Do what no run depends on: where it fails there is a notice, and training continues.

        Of several processes all fail together, see `_preview`; what a single one cannot do ends the run.
        """
        try:
            work()
        except Exception as error:
            if self.processes.world > 1 and not isinstance(error, UserError):
                raise
            self._late.append(f"{name} of step {self.step} failed and is left out: {type(error).__name__}: {error}")

    def _rescue(self) -> None:
        """Save a healthy run that ends by a failure. Nothing here waits for other processes: of sharded weights each
        writes its parts when it fails, alone or because it misses the one that did."""
        with suppress(Exception):
            if all(outcome.taken for _, _, outcomes in self._interval for outcome in outcomes):
                self.end_interval()
        saved = self.step <= self._saved and not self.writer.failed
        if saved or self.bad_steps or self._interval:
            return
        with suppress(Exception):  # a write that failed before is tried again
            self.writer.wait()
        with suppress(Exception):  # what ended the run is raised again, whatever becomes of this
            self._write_checkpoint()
            self.writer.wait()

    @property
    def stopped(self) -> bool:
        """Whether a signal ended the run before its last step."""
        return self._stop and self.step < self.recipe.training.steps

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop = True

    def _stopping(self) -> bool:
        """Whether a signal came, or a checkpoint failed, on any process: all stop at the same step."""
        self._stop = distributed.any_of(self._stop or self.writer.failed)
        return self._stop

    # ---- one step ----------------------------------------------------------------------------------------

    def examples(self, batch: Batch | LatentBatch) -> Examples:
        """What the objective learns from a batch."""
        return self.task.examples(batch, Stepper.draws(self.recipe.seed, batch.positions))

    def one_step(self, batch: Batch | LatentBatch) -> Tensor:
        """One optimiser step of every player, which the device may still be computing; returns the first player's loss,
        []. `end_interval` looks at what came of it."""
        outcomes = self.stepper.step(self.examples(batch), batch.positions, self.step)
        with self.phases("optimiser"):
            taken = torch.stack([outcome.taken for outcome in outcomes]).all()
            for mean in self.means.values():
                mean.update(self.network, self.step + 1, taken)
        self._interval.append((self.step, batch.names, outcomes))
        self.step += 1
        return outcomes[0].loss

    def end_interval(self) -> None:
        """Wait for the device and add the steps since the last call to the window of the log."""
        interval, self._interval = self._interval, []
        for step, names, on_device in interval:
            outcomes = [outcome.cpu() for outcome in on_device]
            if all(outcome.taken for outcome in outcomes):
                self.bad_steps = 0
                self.window.add(dict(zip(self.task.modules, outcomes, strict=True)))
            else:
                self._skip(step, names, next(outcome for outcome in outcomes if not outcome.taken))

    def _skip(self, step: int, names: list[str], outcome: Outcome) -> None:
        """Log a step that was not taken, and give up after too many in a row."""
        names, first = distributed.gather_lists(names), step * self.recipe.training.batch_size
        if self.log is not None:
            self.log.skipped({"step": step, **outcome.record(names, first)})
        if outcome.scale_fell:
            return
        self.bad_steps += 1
        if self.bad_steps >= BAD_STEPS:
            distributed.run_on_rank0(self._give_up)

    def _give_up(self) -> None:
        self.writer.wait()
        whole, _ = checkpoint.newest(self.run.checkpoints)
        good = f"the last good checkpoint is that of step {whole}" if whole else "there is no checkpoint yet"
        raise UserError(
            f"{BAD_STEPS} steps in a row had no finite loss or gradient (see {self.run.folder / 'skipped.jsonl'}); "
            f"{good}: lower training.learning_rate or use training.precision=fp32.",
            key="training.learning_rate",
            code="not_finite",
        )

    # ---- log, previews, validation --------------------------------------------------------------------------

    def _open_log(self) -> None:
        self.log = Log(self.run.folder, self.step, self.recipe)
        self._timing = Timing(self.phases, self.step)

    def _write_log(self) -> None:
        if self.log is not None:
            training = self.recipe.training
            entry = {"step": self.step, **self.window.means(), "learning_rate": learning_rate(training, self.step - 1)}
            timing = self._timing.since_last(self.step, training.batch_size, self.flops_per_image)
            self.log.write({**entry, **self.stepper.loss_scale, "timing": timing})
        self.window = Window()

    def _whole(self, network: nn.Module, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
        """The network as one process can run it without the others, uncompiled.

        Args:
            weights: of the network; by default they are gathered, for which all processes must call this.
        """
        if not distributed.is_sharded(network) and not (self.recipe.training.compile and network is self.network):
            return network
        assert self._plain is not None  # kept before the network was sharded or compiled
        plain = copy.deepcopy(self._plain).to_empty(device=self.processes.device).eval()
        for name, buffer in network.named_buffers():  # never sharded, and some are in no state dict
            plain.get_buffer(name).copy_(buffer)
        put_weights(plain, weights or copied(network.state_dict()))
        return plain

    def _preview(self) -> None:
        """The same few pictures from the mean and from the raw weights, so that progress can be seen; every
        process makes its part of them."""
        share = -(-self.task.pictures // self.processes.world)
        rows = range(self.processes.rank * share, (self.processes.rank + 1) * share)
        for name, network in (("ema", self.means["ema"].module), ("raw", self.network)):
            whole = self._whole(network)
            with self.phases.moved_by(whole):
                own, metadata = distributed.fail_together(partial(self._shown, whole, rows))
            images = distributed.gather(own.to(self.processes.device)).cpu()[: self.task.pictures]
            if self.log is not None:
                sheet = pictures.grid(images)
                scale = max(1, 64 // sheet.shape[-1])
                pictures.save_png(sheet, self.run.samples / f"step-{self.step:08d}-{name}.png", metadata, scale)
                self.log.picture(f"samples/{name}", sheet, self.step)

    def _shown(self, network: nn.Module, rows: range) -> tuple[Tensor, dict[str, Any]]:
        """This process's part of a preview; any failure is a `UserError`, which all processes hear of."""
        try:
            return self.task.preview(network, rows)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{type(error).__name__}: {error}", key="preview", code="invalid") from error

    def _validate(self) -> None:
        assert self.held_out is not None
        first = next(iter(self.task.modules))
        whole = self._whole(self.means["ema"].module)
        objective = self.task.objective({**self.task.modules, first: whole})
        with self.phases.moved_by(whole):
            metrics = validate(objective, self.task.examples, self.held_out, self.recipe.training.validation_images)
        self.window.validation = {"step": self.step, **metrics}

    # ---- on disk -----------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Any]:
        """All that a checkpoint holds of tensors, live."""
        return {
            "weights": {name: module.state_dict() for name, module in self._modules.items()},
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.stepper.optimisers.items()},
            "objective": self.objective.state_dict(),
        }

    def _reserve(self) -> None:
        """Allocate the memory of the checkpoints' copy in the background, before the first of them."""
        if self.processes.first and not distributed.is_sharded(self.network):
            live = self._tensors()

            def reserve() -> None:
                self._copy = copied(live)  # of a moving state: only its place will be used

            self.writer.start(reserve)

    def save_checkpoint(self) -> Path:
        """Copy the state and write it in the background; then old checkpoints are pruned."""
        self.end_interval()
        distributed.fail_together(self.writer.wait)  # the memory of the copy is what is being written
        return self._write_checkpoint()

    def _write_checkpoint(self) -> Path:
        step, training = self.step, self.recipe.training
        folder = checkpoint.folder_of(self.run.checkpoints, step)
        self._saved = step
        sharded = distributed.is_sharded(self.network)
        if not self.processes.first and not sharded:
            return folder
        tensors = self._tensors()
        if sharded:
            own, tensors = split({key: tensors[key] for key in ("weights", "optimisers")})
            parts = distributed.copy_parts(own)
            tensors["objective"] = self.objective.state_dict()
        self._copy = copied(tensors, self._copy)
        weights = self._copy["weights"]
        state = {
            "carrara": carrara.__version__,
            "setting": self.setting(),
            "step": step,
            "bad_steps": self.bad_steps,
            "window": asdict(self.window),
            "scale": self.stepper.scale.state_dict() if self.stepper.scale else None,
            "optimisers": self._copy["optimisers"],
            "objective": self._copy["objective"],
            "codec": self._codec,
            "classes": self.class_names,
            "data": self._data,
            "recipe": self.recipe.to_yaml(),
        }

        def write() -> None:
            if not sharded:
                checkpoint.save(self.run.checkpoints, step, weights, state)
            elif not checkpoint.save_parts(self.run.checkpoints, step, parts, {**state, "weights": weights}):
                return
            checkpoint.prune(self.run.checkpoints, step, training.keep_checkpoints, training.keep_every)

        self.writer.start(write)
        return folder

    def _save_snapshot(self) -> None:
        step = self.step
        modules = {name: mean.module for name, mean in self.means.items() if isinstance(mean.decay, PowerFunction)}
        weights = {name: copied(module.state_dict()) for name, module in modules.items()}
        if self.processes.first:
            self.writer.start(lambda: checkpoint.save(self.run.snapshots, step, weights, {"step": step}))

    def _save_models(self) -> None:
        """The mean of the first decay as the run's model, those of the others in folders of their own. Of sharded
        weights they are read back from the checkpoint, so that no device has to hold them whole."""
        weights: checkpoint.Weights = {}
        if distributed.is_sharded(self.network) and self.processes.first:
            weights, _ = checkpoint.load(self.run.checkpoints, self.step)
        for name, mean in self.means.items() if self.processes.first else ():
            if isinstance(mean.decay, Exponential):
                folder = self.run.model if name == "ema" else self.run.folder / f"model-{name}"
                self.task.save(self._whole(mean.module, weights.get(name)), folder, f"EMA of step {self.step}")

    def setting(self) -> dict[str, Any]:
        """What changes the last bits of the sums though not the result, for the checkpoint."""
        return {
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
            "device": self.processes.device.type,
            "processes": self.processes.world,
            "parallel": self.recipe.training.parallel if self.processes.world > 1 else "none",
            "micro_batch": self.micro_batch,
            "compile": self.recipe.training.compile,
        }

    @cached_property
    def _codec(self) -> dict[str, str] | None:
        """In whose latents the run works, for the checkpoint; hashed once, as no step changes it."""
        codec = self.task.codec
        return None if codec is None else {"kind": codec.kind, "hash": codecs.content_hash(codec)}

    def _resume(self, weights: dict[str, Any], state: dict[str, Any], accept_changes: bool) -> None:
        """Resume from a checkpoint."""
        self.notices += check_data(state, self._data, self.run.folder, accept_changes)
        check(state, self.recipe, self.run.folder, self.class_names, self.task.codec)
        if distributed.is_sharded(self.network):
            like = pattern(self._modules, self.stepper.optimisers)
            checkpoint.join_parts(self.run.checkpoints, state["step"], weights, state, like)
        restore(state, weights, self._modules, self.stepper.optimisers, self.run.folder)
        self.objective.load_state_dict(state["objective"])
        if self.stepper.scale is not None and state["scale"] is not None:
            self.stepper.scale = LossScale(**state["scale"], device=self.processes.device)
        self.step, self.bad_steps = state["step"], state["bad_steps"]
        self._saved = self.step
        self.window = Window.of(state["window"])
        self.notices.append(f"resuming from the checkpoint of step {self.step}.")
        self.notices += changes(state, self.setting())

    @property
    def _modules(self) -> dict[str, nn.Module]:
        """Those that learn, and their means."""
        return {**self.task.modules, **{name: mean.module for name, mean in self.means.items()}}
