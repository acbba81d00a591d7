"""Saves and restores a run on several ranks, and decides whether a resume keeps its result.

Contract: replicas that do not agree are not saved. A resume that would change the result is refused on every rank.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from dist_cifar.augment.image import ImageStats
from dist_cifar.config import AtResume, Config, at_resume, batch_differences, differences, flatten, own_files
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.distributed.failure_detector import is_lost_peer
from dist_cifar.errors import CheckpointError, ConfigError, one_line
from dist_cifar.ops.transfer import download
from dist_cifar.run.checkpoint import Checkpoint, CheckpointStore, Tensors, weights_sha256
from dist_cifar.run.checkpoint_state import require_state
from dist_cifar.run.provenance import numerics_fingerprint, versions
from dist_cifar.run.run_dir import RunDir
from dist_cifar.state import StepTotals, TrainState

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """The content of the newest checkpoint, on every rank."""

    train_state: TrainState
    schedule: dict[str, Any]
    totals: StepTotals
    """Totals of all ranks since the last log."""
    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    per_rank: dict[str, torch.Tensor]


class DatasetFacts(Protocol):
    """The facts about the data set that a checkpoint stores."""

    @property
    def content_sha256(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def stats(self) -> ImageStats: ...


class RunCheckpoints:
    """Saves and restores a run. Every method is a collective, unless it says otherwise."""

    def __init__(
        self,
        run_dir: RunDir,
        config: Config,
        communicator: Communicator,
        *,
        dataset: DatasetFacts,
        bitwise: bool,
    ) -> None:
        """`bitwise` says whether the strategy keeps its bits on any number of ranks."""
        self._run_dir, self._config, self._communicator = run_dir, config, communicator
        self._dataset, self._bitwise = dataset, bitwise
        self.store = CheckpointStore(
            run_dir.checkpoints,
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
            keep_every_steps=config.checkpoint.keep_every_steps,
            on_write_error=config.checkpoint.on_write_error,
        )
        self.saved_step: int | None = None
        """Step of the checkpoint that was restored or saved last."""
        self._asked_at = time.monotonic()

    def restore(self, *, must_resume: bool, resume_anyway: bool) -> Restored | None:
        """The newest checkpoint, or None if there is none. Raises `ConfigError` where a resume would change the result.

        `must_resume`: fail if there is no checkpoint. `resume_anyway`: resume even if the result changes.
        """
        tensors: dict[str, dict[str, torch.Tensor]] = {}

        def read() -> dict[str, Any] | None:
            checkpoint = self.store.load_newest()
            if checkpoint is None:
                if must_resume:
                    raise CheckpointError(
                        f"--resume: {self._run_dir.path} holds no checkpoint; leave --resume (in Python must_resume)"
                        " out to start a new run"
                    )
                return None
            require_state(checkpoint)
            self._compare(checkpoint, resume_anyway)
            tensors.update(checkpoint.tensors)
            return checkpoint.state

        state = self._communicator.run_on_rank0(read)
        if state is None:
            return None
        model, optimizer, per_rank = (
            self._communicator.broadcast_tensors(tensors.get(name)) for name in ("model", "optimizer", "ranks")
        )
        restored = Restored(
            train_state=TrainState(**state["train_state"]),
            schedule=state["schedule"],
            totals=StepTotals(*state["sums"]),
            model=model,
            optimizer=optimizer,
            per_rank=per_rank,
        )
        self.saved_step = restored.train_state.step
        return restored

    def save(
        self,
        train_state: TrainState,
        tensors: Mapping[str, Tensors],
        *,
        schedule: Mapping[str, Any],
        totals: StepTotals,
        best: bool,
    ) -> None:
        """Begins to write a checkpoint. Raises `TrainingError` if the replicas do not agree.

        `tensors`: `model`, `optimizer` and `ranks`, by name. `totals`: those of all ranks since the last log.
        """
        tensors = {**tensors, "model": download(tensors["model"])}  # once, for the digest and for the file
        self._communicator.assert_tensors_equal_across_ranks("the weights", tensors["model"], weights_sha256)
        state = {
            "train_state": dataclasses.asdict(train_state),
            "schedule": dict(schedule),
            "sums": list(totals),
            "config": flatten(self._config),
            "data_sha256": self._dataset.content_sha256,
            "classes": self._dataset.classes,
            "mean": self._dataset.stats.mean,
            "std": self._dataset.stats.std,
            "world_size": self._communicator.world_size,
            "numerics": numerics_fingerprint(self._communicator.device),
            "versions": versions(),
            "own_files": own_files(self._config),
        }

        def begin_save() -> None:
            self.store.begin_save(train_state.step, tensors, state, best=best)
            self._run_dir.append_event("checkpoint", step=train_state.step, best=best)

        self._communicator.run_on_rank0(begin_save)
        self.saved_step, self._asked_at = train_state.step, time.monotonic()

    def falls_on(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` because of `checkpoint.every_steps`. No collective."""
        every = self._config.checkpoint.every_steps
        return every is not None and step % every == 0

    def asks(self) -> bool:
        """Whether this rank wants a checkpoint because of `checkpoint.every_seconds`: rank 0, once each time that they
        have passed. No collective."""
        seconds, now = self._config.checkpoint.every_seconds, time.monotonic()
        if seconds is None or self._communicator.rank != 0 or now - self._asked_at < seconds:
            return False
        self._asked_at = now
        return True

    def wait(self, *, must_succeed: bool = False) -> None:
        """Waits for the write under way; see `CheckpointStore.wait`."""
        self._communicator.run_on_rank0(lambda: self.store.wait(must_succeed=must_succeed))

    def load_best(self, step: int | None) -> dict[str, torch.Tensor]:
        """The weights of the best checkpoint, which must be that of `step`, on every rank."""
        tensors: dict[str, torch.Tensor] = {}

        def read() -> None:
            checkpoint = self.store.load_best()
            if checkpoint is None or checkpoint.step != step:
                raise CheckpointError(
                    f"{self._run_dir.checkpoints}: the best checkpoint (step {step}) is gone; the last one is whole:"
                    " a larger train.epochs resumes from it"
                )
            tensors.update(checkpoint.tensors["model"])

        self._communicator.run_on_rank0(read)
        return self._communicator.broadcast_tensors(tensors)

    def _compare(self, checkpoint: Checkpoint, resume_anyway: bool) -> None:
        """Refuses a resume that would change the result; logs smaller changes and notes them in the state."""
        refused, noted = self._changes(checkpoint.state)
        if refused and not resume_anyway:
            raise ConfigError(
                f"run.dir={self._run_dir.path} holds a run whose result would change ({'; '.join(refused)}); give"
                " the old values to resume it, another run.dir to start a new one, or --resume-anyway (in Python"
                " resume_anyway=True)"
            )
        if refused or noted:
            logger.info("exactness  ends at step %d; changed: %s", checkpoint.step, "; ".join(refused + noted))
            train_state = checkpoint.state["train_state"]
            train_state["inexact_since_step"] = train_state["inexact_since_step"] or checkpoint.step

    def _changes(self, state: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """One `name: old -> new` for everything that the result depends on and that differs from the checkpoint.

        The first list is to be refused. The second one only changes how the same training is rounded, which a strategy
        that is not `bitwise` does not keep anyway.
        """

        def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
            names = dict.fromkeys([*old, *new])
            return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in names if old.get(name) != new.get(name)]

        ranks = {"old_ranks": state["world_size"], "ranks": self._communicator.world_size}
        found = differences(state["config"], self._config)
        found = batch_differences(found, state["config"], self._config, **ranks)
        data = changed({"data": state["data_sha256"][:12]}, {"data": self._dataset.content_sha256[:12]})
        data += changed(_short(state.get("own_files", {})), _short(own_files(self._config)))
        rounding = changed(state["numerics"], numerics_fingerprint(self._communicator.device))
        if self._bitwise and state["config"].get("strategy.name") == self._config.strategy.name:
            return [*found.values(), *data, *rounding], []
        rounding = changed({"ranks": state["world_size"]}, {"ranks": self._communicator.world_size}) + rounding
        noted = {key for key in found if at_resume(key) is AtResume.ROUNDING}
        refused = [text for key, text in found.items() if key not in noted]
        return refused + data, [text for key, text in found.items() if key in noted] + rounding


def _short(files: Mapping[str, str]) -> dict[str, str]:
    """The beginning of each hash."""
    return {name: known[:12] for name, known in files.items()}


def unfit(config: Config, error: Exception) -> Exception:
    """The error for tensors or a schedule that do not fit the config: of another model, after --resume-anyway, or of
    another program. An error that another rank has caused is what it was."""
    if is_lost_peer(error):
        return error
    return ConfigError(
        f"run.dir={config.run.dir}: its weights are not those of model.name={config.model.name}, or its state not"
        f" that of this training ({one_line(error)[:200]}); give another run.dir"
    )
