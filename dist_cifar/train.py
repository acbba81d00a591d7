"""The training loop, and the front door of `accelerate launch`, `torchrun` and `python`.

Contract: `train` runs a config to its end, or to a signal, on the ranks of a communicator, and resumes by itself what
the run directory holds. The weights after a step depend on the config, the data set and the numerics of the machine,
and but for strategy `exact` on the world size; not on how often the run was interrupted.
"""

if __name__ == "__main__":
    # Started as a file: this folder is first on the path and would hide other packages' modules of the same names.
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from dist_cifar.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))

import copy
import dataclasses
import importlib.metadata
import math
import os
import platform
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy

import dist_cifar
from dist_cifar import jit, predictions, profile, report, signals
from dist_cifar.augment import kernel, policy
from dist_cifar.augment.place import augmenter, augments_on_device
from dist_cifar.checkpoint import CheckpointStore, weights_sha256
from dist_cifar.config import ROUNDING_AT_RESUME, Config, differences, flatten
from dist_cifar.data.dataset import Split, load_dataset, validation_split
from dist_cifar.data.loader import Batch, prefetch
from dist_cifar.data.sampler import GlobalBatchSampler
from dist_cifar.deadline import Deadline, seconds_left
from dist_cifar.display import Display, table
from dist_cifar.distributed.communicator import Communicator, Vote
from dist_cifar.errors import EXIT_SAVED, CheckpointError, ConfigError, TrainingError
from dist_cifar.evaluate import evaluate
from dist_cifar.metrics import Evaluation, OwnTime, TrainingSums, peak_memory_bytes
from dist_cifar.model import build_model
from dist_cifar.numerics import numerics, pin
from dist_cifar.precision import choose_precision, set_precision, use_kernels_once
from dist_cifar.profile import phase
from dist_cifar.rundir import LOCK_SECONDS, RunDir
from dist_cifar.schedule import (
    Plateau,
    evaluation_due,
    plan_batches,
    plateau_due,
    require_shareable,
    scaled_lr,
    start_plateau,
    step_plateau,
    warmup_factor,
)
from dist_cifar.strategy import build_strategy
from dist_cifar.tracking import Tracker, open_trackers
from dist_cifar.tracking.rows import Results

_SHOWN_IMAGES, _SHOWN_EPOCHS = 6, 9
"""Of the augmentation, in the report."""


@dataclasses.dataclass(kw_only=True)
class Progress:
    """How far the run is: everything but tensors that a checkpoint holds."""

    plateau: Plateau
    step: int = 0
    best_accuracy: float | None = None
    """Best accuracy on the watched split so far, at an evaluation."""
    best_step: int | None = None
    skipped_steps: int = 0
    """Steps that were left out because a gradient was not finite, up to the last log."""
    inexact_since_step: int | None = None
    """Where a resume first went on with something else than what the run had begun with."""
    train_seconds: float = 0.0
    """Time in steps, the wait for data included; evaluation and checkpoints excluded."""
    wait_seconds: float = 0.0
    """Time of rank 0 in which it waited for data."""
    wall_seconds: float = 0.0
    """Time since the first start; the time between a stop and a restart is not counted."""


def train(
    config: Config, communicator: Communicator, *, must_resume: bool = False, resume_anyway: bool = False
) -> bool:
    """Trains, evaluates and writes the run directory. A collective.

    Returns True when the run is done, False when a signal or its time limit stopped it and it was saved. Raises a
    `UserError` for what a person can mend. `must_resume` makes it an error that there is nothing to go on with,
    `resume_anyway` lets a run go on with what would change its result.
    """
    assert config.run.dir is not None  # the config resolved it
    say = Display(speaks=communicator.rank == 0).say
    # The other ranks wait in a collective for the one that waits for the lock.
    lock = RunDir(config.run.dir).lock(say, wait_seconds=min(LOCK_SECONDS, config.run.timeout_seconds / 2))
    with ExitStack() as held:
        communicator.on_first_rank(lambda: held.enter_context(lock))
        config = _with_precision(config, communicator, say)
        return _Run(config, communicator, must_resume=must_resume, resume_anyway=resume_anyway).train()


def _with_precision(config: Config, communicator: Communicator, say: Callable[[str], None]) -> Config:
    """`config` with `train.precision=auto` turned into what its run directory was begun with, or else into what is
    faster here."""
    if config.train.precision != "auto":
        return config

    def choose() -> str:
        begun_with = RunDir(config.run.dir or "").begun_with()
        if begun_with is not None:
            return begun_with.train.precision
        chosen, line = choose_precision(communicator.device)
        say(line)
        return chosen

    precision = communicator.on_first_rank(choose)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, precision=precision))


class _Run:
    def __init__(
        self, config: Config, communicator: Communicator, *, must_resume: bool = False, resume_anyway: bool = False
    ) -> None:
        self.started = time.perf_counter()
        self.config, self.communicator = config, communicator
        self.is_first = communicator.rank == 0
        self.display = Display(speaks=self.is_first)
        self.deadline = Deadline(seconds_left(os.environ, config.run.time_limit_seconds, wall_time=time.time()))
        require_shareable(config.batch, config.train, world_size=communicator.world_size)
        if config.train.strategy == "exact":
            pin(communicator.device)
            communicator.require_equal("the numerics", numerics(communicator.device))
        augments_on_device(config.data.device_augment, communicator.device)  # or an error, before anything takes long
        assert config.run.dir is not None  # the config resolved it
        self.run_dir = RunDir(config.run.dir)

        jit.load(self._use_kernels)  # side by side; what follows has something to do only where nothing was to load
        # Rank 0 first, because it is the one that says what takes long; the others load what it compiled.
        communicator.on_first_rank(lambda: jit.warm_up(self._use_kernels, self.display.say))
        if not self.is_first:
            jit.warm_up(self._use_kernels, self.display.say)
        self.dataset = load_dataset(config.data, say=self.display.say)
        communicator.wait_for_all()
        communicator.require_equal("the data set's hash", self.dataset.content_sha256)
        self.train_indices, validation_indices = validation_split(
            self.dataset.train.labels, config.data.validation_size
        )
        self.augment = augmenter(
            config.data.device_augment,
            self.dataset.train.images,
            self.dataset.mean,
            self.dataset.std,
            device=communicator.device,
            say=self.display.say,
        )
        self.test_indices = np.arange(len(self.dataset.test.labels))
        self.watches_test = len(validation_indices) == 0
        self.watched: tuple[Split, npt.NDArray[np.int64]] = (
            (self.dataset.test, self.test_indices) if self.watches_test else (self.dataset.train, validation_indices)
        )
        self.plan = plan_batches(
            config.batch, config.train, world_size=communicator.world_size, train_size=len(self.train_indices)
        )
        self.sampler = GlobalBatchSampler(
            len(self.train_indices),
            self.plan,
            rank=communicator.rank,
            world_size=communicator.world_size,
            seed=config.run.seed,
        )
        model = build_model(config.model, num_classes=len(self.dataset.classes), seed=config.run.seed)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        # A module of its own: a strategy may cut its one into pieces, whose forward passes need all ranks at once.
        self.evaluated = copy.deepcopy(model).to(communicator.device).to(memory_format=torch.channels_last)
        set_precision(self.evaluated, config.train.precision, communicator.device)
        self.strategy = build_strategy(model, config, communicator=communicator, plan=self.plan)
        lr, self.lr_reason = scaled_lr(config.optimizer, self.plan.global_size)
        self.progress = Progress(plateau=start_plateau(config.plateau, lr))
        self.sums = TrainingSums(communicator.device, may_skip=config.train.non_finite == "skip")
        self.own_time = OwnTime(communicator.device)
        self.store = CheckpointStore(
            self.run_dir.checkpoints,
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
            keep_every_steps=config.checkpoint.keep_every_steps,
            on_write_error=config.checkpoint.on_write_error,
            say=self.display.say,
        )
        self.saved_step = self._restore(must_resume, resume_anyway)
        self.logged = dataclasses.replace(self.progress)
        """The progress at the last log."""
        self.trackers: list[Tracker] = []
        self.profile = (
            profile.Profile(self.run_dir.profile, rank=communicator.rank, device=communicator.device)
            if config.run.profile
            else None
        )

    def train(self) -> bool:
        config, plan, progress, strategy = self.config, self.plan, self.progress, self.strategy
        if self.communicator.on_first_rank(self._is_done):
            if self.is_first:
                self.display.say(f"{self.run_dir.path}: this run is done; train.epochs=N makes it longer")
                self.display.say(result_table(self.run_dir.summary(), self.run_dir.path))
            return True
        self._begin()
        device = self.communicator.device
        vote = Vote(self.communicator, 2)
        steps = range(progress.step, plan.total_steps)
        with closing(prefetch(self.make_batch, steps, device)) as batches, self.profile or nullcontext():
            while progress.step < plan.total_steps:
                phase("data")  # before the vote: the profiler may stop here, and a collective under way would crash it
                stops = signals.stop_requested() or self.deadline.is_near(self.store.write_seconds)
                vote.cast(progress.step + 1, stops, self.store.failed)
                step_started = time.perf_counter()
                self.own_time.start()
                batch = next(batches)
                progress.wait_seconds += time.perf_counter() - step_started

                lr = progress.plateau.lr * warmup_factor(config.optimizer, plan, progress.step)
                inputs, labels = batch.inputs.split(plan.micro_size), batch.labels.split(plan.micro_size)
                for i in range(plan.micro_batches):
                    phase("forward")
                    logits = strategy.forward(inputs[i])
                    loss = cross_entropy(logits, labels[i], label_smoothing=config.train.label_smoothing)
                    if i == plan.micro_batches - 1:
                        self.own_time.stop()
                    phase("backward")
                    strategy.backward(loss)
                    phase("other")
                    self.sums.add(loss, logits, labels[i])
                phase("optimizer")
                grad_norm = strategy.step(lr)
                phase("other")
                if self.is_first:  # it is the same on every rank
                    self.sums.add_step(grad_norm)
                progress.step += 1

                logs = progress.step % config.run.log_every_steps == 0 or progress.step == plan.total_steps
                totals = self._reduce_sums() if logs else None  # waits for the device
                progress.train_seconds += time.perf_counter() - step_started
                if totals is not None:
                    self._log(totals, lr)
                self.display.stepped()
                if config.run.log_digests:
                    self._log_digests()
                if self.profile is not None and self.profile.is_complete:
                    self._report_profile()
                if evaluation_due(plan, config.eval.every_epochs, progress.step):
                    self._save(best=self._evaluate())
                stops, write_failed = vote.result()
                if write_failed:
                    self.communicator.on_first_rank(self.store.wait)  # raises what went wrong
                if stops:
                    self._save()
                    return self._stop()
                if config.checkpoint.every_steps and progress.step % config.checkpoint.every_steps == 0:
                    self._save()
        self._finish()
        return True

    def make_batch(self, step: int) -> Batch:
        """This rank's share of the global batch of `step`."""
        indices = self.train_indices[self.sampler.batch(step)]
        params = policy.draw(
            self.config.augment,
            seed=self.config.run.seed,
            epoch=step // self.plan.steps_per_epoch,
            indices=indices,
        )
        labels = torch.from_numpy(self.dataset.train.labels[indices])
        return Batch(inputs=self.augment(indices, params), labels=labels)

    def _use_kernels(self) -> None:
        """Calls all that numba compiles for this run."""
        kernel.use_once()
        use_kernels_once(self.config.train, self.communicator.device)

    # --- restoring and saving ------------------------------------------------------------------------------------

    def _restore(self, must_resume: bool, resume_anyway: bool) -> int | None:
        """Loads the newest checkpoint on every rank; returns its step, or None if there is none."""
        tensors: dict[str, dict[str, torch.Tensor]] = {}

        def read() -> dict[str, Any] | None:
            checkpoint = self.store.load_newest()
            if checkpoint is None:
                if must_resume:
                    raise CheckpointError(
                        f"--resume: {self.run_dir.path} holds no checkpoint; leave --resume out to start a new run"
                    )
                return None
            refused, noted = self._changes(checkpoint.state)
            if refused and not resume_anyway:
                raise ConfigError(
                    f"run.dir={self.run_dir.path} holds a run whose result would change ({'; '.join(refused)}); give"
                    " the old values to go on with it, another run.dir to start a new one, or --resume-anyway"
                )
            if refused or noted:
                self.display.say(f"exactness  ends at step {checkpoint.step}; changed: {'; '.join(refused + noted)}")
                progress = checkpoint.state["progress"]
                progress["inexact_since_step"] = progress["inexact_since_step"] or checkpoint.step
            tensors.update(checkpoint.tensors)
            return checkpoint.state

        state = self.communicator.on_first_rank(read)
        if state is not None:
            model, optimizer, ranks = (
                self.communicator.broadcast_tensors(tensors.get(name)) for name in ("model", "optimizer", "ranks")
            )
            try:
                self.evaluated.load_state_dict(model)
            except RuntimeError as error:  # only after --resume-anyway
                raise ConfigError(
                    f"run.dir={self.run_dir.path}: its weights are not those of model.name={self.config.model.name}"
                    f" ({' '.join(str(error).split())[:200]}); give another run.dir"
                ) from None
            self.strategy.load(model, optimizer, ranks)
            progress = state["progress"]
            self.progress = Progress(**progress | {"plateau": Plateau(**progress["plateau"])})
            if self.is_first:
                self.sums.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        return None if state is None else self.progress.step

    def _changes(self, state: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """One `name: old -> new` for each thing that the result depends on and that is not as in the checkpoint.

        The first list is refused. The second one is what strategies other than `exact` cannot keep the same: it only
        changes how they round.
        """

        def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
            names = dict.fromkeys([*old, *new])
            return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in names if old.get(name) != new.get(name)]

        found = differences(state["config"], self.config)
        data = changed({"data": state["data_sha256"][:12]}, {"data": self.dataset.content_sha256[:12]})
        rounding = changed(state["numerics"], numerics(self.communicator.device))
        if self.config.train.strategy == state["config"]["train.strategy"] == "exact":
            return [*found.values(), *data, *rounding], []
        rounding = changed({"ranks": state["world_size"]}, {"ranks": self.communicator.world_size}) + rounding
        refused = [text for key, text in found.items() if key not in ROUNDING_AT_RESUME]
        return refused + data, [text for key, text in found.items() if key in ROUNDING_AT_RESUME] + rounding

    def _save(self, *, best: bool = False) -> None:
        """Begins to write a checkpoint, unless this step has one. Raises if the replicas do not agree."""
        phase("checkpoint")
        if self.saved_step == self.progress.step:
            return
        rows = self.communicator.gather(self.sums.sums.tolist())
        self._require_finite(rows)
        model = self.strategy.model_tensors()
        self.communicator.require_equal_tensors("the weights", model, weights_sha256)
        tensors = {
            "model": model,
            "optimizer": self.strategy.optimizer_tensors(),
            "ranks": self.strategy.rank_tensors(),
        }
        state = {
            "progress": dataclasses.asdict(self._timed_progress()),
            "sums": _summed(rows),
            "config": flatten(self.config),
            "data_sha256": self.dataset.content_sha256,
            "classes": self.dataset.classes,
            "mean": self.dataset.mean,
            "std": self.dataset.std,
            "world_size": self.communicator.world_size,
            "numerics": numerics(self.communicator.device),
            "versions": versions(),
        }
        step = self.progress.step

        def begin_save() -> None:
            self.store.begin_save(step, tensors, state, best=best)
            self.run_dir.append_event("checkpoint", step=step, best=best)

        self.communicator.on_first_rank(begin_save)
        self.saved_step = step

    def _timed_progress(self) -> Progress:
        now = time.perf_counter()
        self.progress.wall_seconds += now - self.started
        self.started = now
        return self.progress

    # --- what is due between steps -------------------------------------------------------------------------------

    def _reduce_sums(self) -> list[list[float]]:
        """Every rank's `TrainingSums` since the last log; begins new ones. Waits for the device."""
        rows = self.communicator.gather(self.sums.sums.tolist())
        self.sums.sums.zero_()
        return rows

    def _require_finite(self, rows: list[list[float]]) -> None:
        """Raises `TrainingError`, on every rank, if a loss or a gradient since the last log was not finite."""
        if all(math.isfinite(loss + norms) for loss, _, _, norms, _, _ in rows):
            return
        ranks = [rank for rank, row in enumerate(rows) if not math.isfinite(row[0])]
        where = f"the loss of rank {', '.join(map(str, ranks))}" if ranks else "a gradient, and no loss,"
        raise TrainingError(
            f"step {self.progress.step}: {where} was not finite in a step since the last log; lower optimizer.lr or"
            " optimizer.clip_norm, set train.precision=fp32, or leave such steps out with train.non_finite=skip",
            rank=ranks[0] if ranks else None,
        )

    def _log(self, rows: list[list[float]], lr: float) -> None:
        self._require_finite(rows)
        loss, correct, count, norms, steps, skipped = _summed(rows)
        progress, last = self.progress, self.logged
        seconds = progress.train_seconds - last.train_seconds
        waited, own, memory, hosts = zip(
            *self.communicator.gather(
                (
                    progress.wait_seconds - last.wait_seconds,
                    self.own_time.take(),
                    peak_memory_bytes(self.communicator.device),
                    socket.gethostname(),
                )
            ),
            strict=True,
        )
        slowest, median = max(range(len(own)), key=own.__getitem__), statistics.median_low(own)
        images_per_second = (progress.step - last.step) * self.plan.global_size / seconds
        skips: dict[str, int] = {}
        if self.config.train.non_finite == "skip":
            progress.skipped_steps += int(skipped)
            skips["skipped_steps"] = progress.skipped_steps
        self._track(
            "train",
            loss=loss / count if count else None,
            accuracy=correct / count if count else None,
            lr=lr,
            grad_norm=norms / steps if steps else None,
            images_per_second=images_per_second,
            images_per_second_per_rank=images_per_second / self.communicator.world_size,
            data_wait_share=sum(waited) / self.communicator.world_size / seconds,
            rank_work_share=[share / seconds for share in own],
            straggler_ratio=own[slowest] / median if median else 1.0,
            memory_bytes=max(memory),
            **skips,
        )
        self.logged = dataclasses.replace(progress)
        if progress.skipped_steps > self.config.train.max_skipped_steps:
            raise TrainingError(
                f"step {progress.step}: {progress.skipped_steps} steps had gradients that were not finite, more than"
                f" train.max_skipped_steps={self.config.train.max_skipped_steps}; lower optimizer.lr"
            )
        if own[slowest] > self.config.run.straggler_factor * median:
            self.display.say(
                f"straggler: rank {slowest} on {hosts[slowest]} worked {own[slowest] / median:.1f}x as long as the"
                f" median rank since the last log ({own[slowest]:.2f} s, {median:.2f} s); the others waited for it"
            )

    def _log_digests(self) -> None:
        """Writes the digest of every tensor, and the sums since the last log: exact, so they can be compared too."""
        tensors = self.strategy.model_tensors() | self.strategy.optimizer_tensors()
        self.communicator.require_equal_tensors("the state of the training", tensors, weights_sha256)
        rows = self.communicator.gather(self.sums.sums.tolist())
        if self.is_first:
            digests = {name: weights_sha256({name: tensor})[:16] for name, tensor in sorted(tensors.items())}
            self.run_dir.append_digests({"step": self.progress.step, "sums": _summed(rows), "digests": digests})

    def _report_profile(self) -> None:
        """Says and writes where the time of a step went, once. A collective."""
        assert self.profile is not None
        ranks = self.communicator.gather(self.profile.milliseconds())
        self.profile = None
        if not ranks[0]:
            self.display.say(f"profile    nothing to say of: a start needs more than {profile.SKIPPED_STEPS + 1} steps")
        elif self.is_first:
            device = self.communicator.device.type
            facts = {"strategy": self.config.train.strategy, "world_size": len(ranks), "device": device}
            summary = facts | profile.summarize(ranks)
            path = self.run_dir.write_profile(summary)
            self.display.say(table([*profile.lines(summary), ("profile", str(path))]))

    def _evaluate(self) -> bool:
        """Evaluates on the watched split and steps the plateau; returns whether this is the best model so far."""
        phase("evaluation")
        result = self._evaluation(self.strategy.model_tensors(), *self.watched)
        progress = self.progress
        self._track("eval", split="test" if self.watches_test else "validation", **evaluation_fields(result))
        if plateau_due(self.plan, self.config.eval.every_epochs, progress.step):
            self._step_plateau(result.loss if self.config.plateau.metric == "loss" else result.accuracy)
        is_best = progress.best_accuracy is None or result.accuracy > progress.best_accuracy
        if is_best:
            progress.best_accuracy, progress.best_step = result.accuracy, progress.step
        return is_best

    def _step_plateau(self, metric: float) -> None:
        progress, cuts = self.progress, self.progress.plateau.cuts
        progress.plateau = step_plateau(self.config.plateau, progress.plateau, metric)
        self.communicator.require_equal("the state of the plateau", dataclasses.asdict(progress.plateau))
        if progress.plateau.cuts > cuts:
            self.display.say(
                f"plateau: no better {self.config.plateau.metric} for"
                f" {self.config.plateau.patience_evaluations + 1} evaluations; lr {progress.plateau.lr:.6g}"
            )
            if self.is_first:
                self.run_dir.append_event("lr_cut", step=progress.step, lr=progress.plateau.lr)

    def _evaluation(
        self, model: Mapping[str, torch.Tensor], split: Split, indices: npt.NDArray[np.int64]
    ) -> Evaluation:
        self.evaluated.load_state_dict(model)
        return evaluate(
            self.evaluated,
            split,
            indices,
            mean=self.dataset.mean,
            std=self.dataset.std,
            num_classes=len(self.dataset.classes),
            batch_size=self.config.eval.batch_size,
            communicator=self.communicator,
        )

    def _track(self, kind: str, **values: Any) -> None:
        progress = self._timed_progress()
        row = {
            "kind": kind,
            "step": progress.step,
            "epoch": progress.step / self.plan.steps_per_epoch,
            "samples": progress.step * self.plan.global_size,
            **values,
            "seconds": progress.wall_seconds,
        }
        self.display.row(row)
        for tracker in self.trackers:
            tracker.log(row)

    # --- beginning and end ---------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Says what is going to happen, opens the trackers and marks the run as running."""
        config, plan, communicator, say = self.config, self.plan, self.communicator, self.display.say
        validation = "none: the test set is watched" if self.watches_test else f"{len(self.watched[1]):,} images"
        virtual = f" ({plan.virtual_ranks} virtual ranks)" if config.train.strategy == "exact" else ""
        say(f"run        {config.run.name} in {self.run_dir.path}, seed {config.run.seed}")
        say(
            f"ranks      {communicator.world_size} x {communicator.device.type},"
            f" {torch.get_num_threads()} threads each, strategy {config.train.strategy}, {config.train.precision}"
        )
        say(
            f"data       {config.data.source}: {len(self.train_indices):,} images to train on, validation {validation},"
            f" test {len(self.test_indices):,} images, {len(self.dataset.classes)} classes"
        )
        say(f"model      {config.model.name}, {config.model.norm} norm, {self.parameters:,} parameters")
        say(
            f"batch      {plan.global_size} = {communicator.world_size} ranks x {plan.micro_batches} micro-batches x"
            f" {plan.micro_size}{virtual}; {plan.steps_per_epoch} steps an epoch, {plan.total_steps} in all"
        )
        say(
            f"schedule   {self.lr_reason}; warm-up {config.optimizer.warmup_epochs:g} epochs; plateau on"
            f" {config.plateau.metric}, patience {config.plateau.patience_evaluations}"
        )
        if self.saved_step is not None:
            say(f"resume     from the checkpoint of step {self.saved_step}")
        communicator.on_first_rank(self._open_records)
        self.display.start(plan.total_steps, self.progress.step)

    def _is_done(self) -> bool:
        return self.progress.step >= self.plan.total_steps and self.run_dir.status().get("status") == "done"

    def _open_records(self) -> None:
        world_size = self.communicator.world_size
        begun_with = self.run_dir.begun_with() if self.saved_step is None else None
        starts_over = begun_with is not None and bool(differences(flatten(begun_with), self.config))
        self.run_dir.write_config(self.config)
        self.run_dir.write_status("running", step=self.progress.step, world_size=world_size)
        self.run_dir.append_event(
            "started",
            step=self.progress.step,
            total_steps=self.plan.total_steps,
            steps_per_epoch=self.plan.steps_per_epoch,
            world_size=world_size,
            host=socket.gethostname(),
            device=device_name(self.communicator.device),
            strategy=self.config.train.strategy,
        )
        self.trackers = open_trackers(
            self.config,
            self.run_dir.path,
            resume_step=self.saved_step,
            starts_over=starts_over,
            git_revision=git_revision,
            say=self.display.say,
        )

    def _leave_loop(self) -> None:
        """No more steps: when this returns, what was saved is on the disk."""
        if self.profile is not None:
            self._report_profile()
        self.communicator.on_first_rank(lambda: self.store.wait(must_succeed=True))
        self.display.stop()

    def _stop(self) -> bool:
        """Ends after a signal or before the time limit, everything saved."""
        self._leave_loop()
        if self.is_first:
            for tracker in self.trackers:
                tracker.finish(EXIT_SAVED)
            self.run_dir.append_event("saved", step=self.progress.step)
            self.run_dir.write_status("saved", step=self.progress.step, world_size=self.communicator.world_size)
        self.display.say(f"stopped at step {self.progress.step} and saved; the same command goes on from there")
        return False

    def _finish(self) -> None:
        """Evaluates the best checkpoint on the test set and writes the summary."""
        self._leave_loop()
        progress, communicator = self.progress, self.communicator
        model = self.strategy.model_tensors()
        final_sha256 = weights_sha256(model)
        if progress.best_step != progress.step:
            tensors: dict[str, torch.Tensor] = {}
            communicator.on_first_rank(lambda: tensors.update(self._best_tensors()))
            model = communicator.broadcast_tensors(tensors)
        test = self._evaluation(model, self.dataset.test, self.test_indices)
        self._track("test", **evaluation_fields(test))
        summary = {
            "name": self.config.run.name,
            "test_accuracy": test.accuracy,
            "test_loss": test.loss,
            "test_class_accuracy": dict(zip(self.dataset.classes, test.class_accuracy, strict=True)),
            "test_confusion": test.confusion.tolist(),
            "best_val_accuracy": progress.best_accuracy,
            "best_step": progress.best_step,
            "best_chosen_on": "test" if self.watches_test else "validation",
            "steps": progress.step,
            "epochs": progress.step / self.plan.steps_per_epoch,
            "wall_seconds": self._timed_progress().wall_seconds,
            "images_per_second": progress.step * self.plan.global_size / progress.train_seconds,
            "data_wait_share": progress.wait_seconds / progress.train_seconds,
            "world_size": communicator.world_size,
            "threads_per_rank": torch.get_num_threads(),
            "device": device_name(communicator.device),
            "strategy": self.config.train.strategy,
            "precision": self.config.train.precision,
            "weights_sha256": final_sha256,
            "inexact_since_step": progress.inexact_since_step,
            "data_sha256": self.dataset.content_sha256,
            "numerics": numerics(communicator.device),
            "versions": versions(),
            "git_revision": git_revision(),
        }
        if self.is_first:
            found = self._predictions(test)
            predictions.write(self.run_dir.path, found)
            self.run_dir.append_event("done", step=progress.step)
            self.run_dir.write_summary(summary)
            checkpoints = self.store.best_and_last() if self.config.tracking.wandb_checkpoints else {}
            results = Results(summary=summary, predictions=found, checkpoints=checkpoints)
            for tracker in self.trackers:
                tracker.finish(0, results)
            self.run_dir.write_status("done", step=progress.step, world_size=communicator.world_size)
            self._report()
        self.display.say(result_table(summary, self.run_dir.path))

    def _report(self) -> None:
        try:
            report.write_report([self.run_dir.path])
        except Exception as error:  # the run is done all the same
            self.display.say(f"warning: no report ({' '.join(str(error).split())}); see dist-cifar report --help")

    def _predictions(self, test: Evaluation) -> predictions.Predictions:
        """What the report shows of the test split and of the augmentation."""
        images = self.dataset.train.images
        shown = self.train_indices[:: max(1, len(self.train_indices) // _SHOWN_IMAGES)][:_SHOWN_IMAGES]
        columns = [np.array(images[shown])]
        for epoch in range(_SHOWN_EPOCHS):
            params = policy.draw(self.config.augment, seed=self.config.run.seed, epoch=epoch, indices=shown)
            scaled = kernel.augment(images, shown, params, (0, 0, 0), (1, 1, 1))  # what is erased is black
            columns.append(scaled.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
        split = self.dataset.test
        return predictions.collect(
            test.logits, split.labels, split.images, self.dataset.classes, np.stack(columns, axis=1)
        )

    def _best_tensors(self) -> dict[str, torch.Tensor]:
        checkpoint = self.store.load_best()
        if checkpoint is None or checkpoint.step != self.progress.best_step:
            raise CheckpointError(
                f"{self.run_dir.checkpoints}: the best checkpoint (step {self.progress.best_step}) is gone; the last"
                " one is whole: a larger train.epochs goes on from it"
            )
        return checkpoint.tensors["model"]


def _summed(rows: list[list[float]]) -> list[float]:
    """The `TrainingSums` of all ranks as those of one."""
    return [sum(column) for column in zip(*rows, strict=True)]


def evaluation_fields(result: Evaluation) -> dict[str, Any]:
    """An evaluation as the fields of a row."""
    return {
        "loss": result.loss,
        "accuracy": result.accuracy,
        "count": result.count,
        "class_accuracy": result.class_accuracy,
    }


def result_table(summary: Mapping[str, Any], path: Path) -> str:
    """The end of a run on one screen."""
    return table(
        [
            ("test accuracy", f"{summary['test_accuracy']:.2%} (loss {summary['test_loss']:.4f})"),
            (
                "model",
                f"of step {summary['best_step']}, the best on the {summary['best_chosen_on']} split"
                f" ({summary['best_val_accuracy']:.2%})",
            ),
            (
                "trained",
                f"{summary['epochs']:g} epochs, {summary['steps']:,} steps in {summary['wall_seconds']:,.0f} s",
            ),
            (
                "speed",
                f"{summary['images_per_second']:,.0f} images/s, world size {summary['world_size']},"
                f" data wait {summary['data_wait_share']:.1%}",
            ),
            ("weights", f"sha256 {summary['weights_sha256'][:16]}"),
            ("run directory", str(path)),
            ("report", str(path / report.NAME)),
        ]
    )


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    packages = ("torchvision", "accelerate", "numpy", "pillow")
    ours = {"dist_cifar": dist_cifar.__version__, "python": platform.python_version(), "torch": torch.__version__}
    return ours | {name: importlib.metadata.version(name) for name in packages}


def git_revision() -> str | None:
    """Commit of the source, with `-dirty` where it was changed; None outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
