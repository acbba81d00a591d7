"""What a run writes about itself beside its rows: status, events, summary, predictions; and who is told of its end.

Contract: `is_done` is called on rank 0 alone; the other methods on every rank, of which rank 0 writes.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dist_cifar.config import Config, differences, flatten, follows_length, is_own, own_files
from dist_cifar.data.batching import BatchPlan
from dist_cifar.data.dataset import Dataset
from dist_cifar.data.due import is_over
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.distributed.cores import available_cores
from dist_cifar.distributed.idle import idle_line
from dist_cifar.errors import EXIT_DONE, EXIT_INTERNAL, EXIT_SAVED, DataError, counted, listed
from dist_cifar.evaluate import Evaluator
from dist_cifar.optim.lr_schedule import LRSchedule
from dist_cifar.run import predictions, step_profiler
from dist_cifar.run.checkpoint import CheckpointStore
from dist_cifar.run.provenance import device_name, git_revision
from dist_cifar.run.run_dir import RunDir
from dist_cifar.run.summary import build_summary, result_rows
from dist_cifar.state import Evaluation, TrainState
from dist_cifar.stopping import first_received, stop_requested
from dist_cifar.strategy import properties, waiting
from dist_cifar.strategy.exchange import describe_levels
from dist_cifar.tracking.base import OpenTracker, Results, Tracker
from dist_cifar.tracking.console import table
from dist_cifar.tracking.registry import open_trackers

logger = logging.getLogger(__name__)


class RunRecords:
    """The records of one run."""

    def __init__(
        self,
        run_dir: RunDir,
        config: Config,
        communicator: Communicator,
        plan: BatchPlan,
        *,
        dataset: Dataset,
        train_indices: npt.NDArray[np.int64],
    ) -> None:
        self.run_dir = run_dir
        self._config, self._communicator, self._plan = config, communicator, plan
        self._dataset, self._train_indices = dataset, train_indices
        self._is_main_process = communicator.rank == 0
        self._has_profile = False
        self._own: list[Tracker] = []
        self._of_caller: list[Tracker] = []

    def _describe_setup(self, evaluator: Evaluator, schedule: LRSchedule) -> None:
        """Says what is going to be trained."""
        config, plan, communicator, dataset = self._config, self._plan, self._communicator, self._dataset
        held_out = (
            "none: the test set is watched"
            if evaluator.selects_on_test
            else counted(len(evaluator.validation_indices), "image")
        )
        classes = counted(len(dataset.classes), "class", "classes")
        logger.info(f"run        {config.run.name} in {self.run_dir.path}, seed {config.run.seed}")
        logger.info(
            f"ranks      {communicator.world_size} x {communicator.device.type},"
            f" {counted(torch.get_num_threads(), 'thread')} each, strategy {config.strategy.name},"
            f" {config.compute.precision}"
        )
        self._describe_idle()
        logger.info(
            f"data       {config.data.source}: {counted(len(self._train_indices), 'image')} to train on,"
            f" validation {held_out}, test {counted(len(dataset.test.labels), 'image')}, {classes}"
        )
        norm = "" if is_own(config, "model") else f" {config.model.norm} norm,"
        logger.info(f"model      {config.model.name},{norm} {evaluator.parameter_count:,} parameters")
        own = [f"{name} ({known[:12]})" for name, known in own_files(config).items()]
        if own:
            logger.info(f"own files  {listed(own)}")
        steps = f"{counted(plan.steps_per_epoch, 'step')} an epoch, {plan.total_steps:,} in all"
        logger.info(f"batch      {self._division()}; {steps}")
        waits = waiting(config.batch, config.strategy, world_size=communicator.world_size)
        if waits is not None:
            logger.info(f"waiting    {'; '.join(filter(None, waits))}")
        if properties(config.strategy).bitwise and config.strategy.exchange == "auto":
            hosts = [identity.host for identity in communicator.identities]
            levels = describe_levels(hosts, leaves=plan.virtual_ranks)
            if levels is not None:
                logger.info(f"exchange   {levels}")
        logger.info(f"schedule   {schedule.describe()}")
        if config.average.name != "none":
            every = counted(config.average.every_steps, "step")
            logger.info(f"average    {config.average.name} of the weights, every {every}")

    def _division(self) -> str:
        """How a global batch is divided."""
        plan, ranks = self._plan, self._communicator.world_size
        is_bitwise = properties(self._config.strategy).bitwise
        virtual = f" ({counted(plan.virtual_ranks, 'virtual rank')})" if is_bitwise else ""
        passes = counted(plan.micro_batches, "micro-batch", "micro-batches")
        if plan.per_rank_size * ranks == plan.global_size and len(set(plan.micro_sizes)) == 1:
            return f"{plan.global_size} = {counted(ranks, 'rank')} x {passes} x {plan.micro_sizes[0]}{virtual}"
        return f"{plan.global_size}, of which the first of {ranks} ranks has {plan.per_rank_size} in {passes}{virtual}"

    def _describe_idle(self) -> None:
        """Says what this node could give to more ranks."""
        config, plan, communicator = self._config, self._plan, self._communicator
        ranks_here = sum(rank.host == communicator.identities[0].host for rank in communicator.identities)
        on_gpu = communicator.device.type == "cuda"
        if properties(config.strategy).bitwise:
            shared, limit = plan.virtual_ranks, f"strategy.virtual_ranks={plan.virtual_ranks}"
        else:
            shared, limit = plan.global_size, f"a global batch of {plan.global_size}"
        line = idle_line(
            "GPU" if on_gpu else "core",
            available=torch.cuda.device_count() if on_gpu else available_cores(),
            used=ranks_here * (1 if on_gpu else torch.get_num_threads()),
            ranks=communicator.world_size,
            ranks_here=ranks_here,
            shared=shared,
            equally=properties(config.strategy).equal_shares,
            limit=limit,
        )
        if line is not None:
            logger.info(f"idle       {line}")

    def stopping(self, state: TrainState, write_seconds: float) -> None:
        """Says that the run is about to stop, and how long that took before."""
        took = f", {write_seconds:.1f} s the last time" if write_seconds else ""
        logger.info(f"stopping at step {state.step} ({self._why_stopped()}): saving{took}")

    def is_done(self, state: TrainState) -> bool:
        """Whether the run directory holds a run of at least as many steps that is done, with its result."""
        if not is_over(self._config, self._plan, state):
            return False
        try:
            return self.run_dir.status().get("status") == "done" and bool(self.run_dir.summary())
        except DataError as error:
            logger.info(f"warning: {error}")
            return False

    def show_result(self, state: TrainState) -> None:
        """Shows the result of a run that was done before."""
        if not self._is_main_process:
            return
        summary, path = self.run_dir.summary(), self.run_dir.path
        logger.info(f"{path}: this run is done; {self._longer(state)}")
        views = (self._config.eval.tta, self._config.eval.tta_share)
        if views[0] != "none" and views != (summary.get("tta"), summary.get("tta_share")):
            instead = f"; dist-cifar evaluate {path} --tta has it" if views == ("mirror", 1.0) else ""
            logger.info(f"its final test did not use eval.tta={views[0]} (eval.tta_share={views[1]:g}){instead}")
        logger.info(table(result_rows(summary, self.run_dir)))

    def _longer(self, state: TrainState) -> str:
        """What makes a run longer that has ended."""
        if state.step < self._plan.total_steps:
            key = "train.patience_evaluations"
        elif follows_length(self._config):
            return "a longer one is a new run (run.dir=PATH), since its steps depend on its length"
        else:
            key = "train.max_steps" if self._config.train.max_steps == self._plan.total_steps else "train.epochs"
        return f"{key}=N makes it longer"

    def begin(
        self,
        state: TrainState,
        evaluator: Evaluator,
        schedule: LRSchedule,
        resume_step: int | None,
        trackers: Sequence[OpenTracker],
    ) -> list[Tracker]:
        """Says what is going to be trained, marks the run as running and opens its trackers. A collective.

        Returns the trackers, which are on rank 0 alone.
        """
        self._describe_setup(evaluator, schedule)
        if resume_step is not None:
            logger.info(f"resume     from the checkpoint of step {resume_step}")
        self._communicator.run_on_rank0(lambda: self._open(state, resume_step, trackers))
        return self._own + self._of_caller

    def _open(self, state: TrainState, resume_step: int | None, trackers: Sequence[OpenTracker]) -> None:
        config, world_size = self._config, self._communicator.world_size
        previous_config = self.run_dir.previous_config() if resume_step is None else None
        config_changed = previous_config is not None and bool(differences(flatten(previous_config), config))
        original = self.run_dir.copied_from()
        if original is not None:
            logger.info(f"copy       of {original}: a run of its own, with a new id for W&B and other trackers")
        self.run_dir.write_config(config)
        self.run_dir.write_status("running", step=state.step, world_size=world_size)
        self.run_dir.append_event(
            "started",
            step=state.step,
            total_steps=self._plan.total_steps,
            steps_per_epoch=self._plan.steps_per_epoch,
            world_size=world_size,
            host=socket.gethostname(),
            device=device_name(self._communicator.device),
            strategy=config.strategy.name,
        )
        self._own = open_trackers(
            config,
            self.run_dir.path,
            resume_step=resume_step,
            config_changed=config_changed,
            is_copy=original is not None,
            git_revision=git_revision,
        )
        self._of_caller = [open_tracker(config, self.run_dir.path) for open_tracker in trackers]

    def lr_reduced(self, state: TrainState, line: str, *, lr: float) -> None:
        """Notes that the schedule has reduced the learning rate, to `lr`."""
        logger.info(line)
        if self._is_main_process:
            self.run_dir.append_event("lr_reduction", step=state.step, lr=lr)

    def profiled(self, profile: step_profiler.Profile | None) -> None:
        """Shows and writes where the time of a step went, the first time that it is called. A collective."""
        if profile is None or self._has_profile:
            return
        self._has_profile = True
        ranks = self._communicator.all_gather_object(profile.milliseconds())
        if not ranks[0]:
            logger.info(f"profile    not available: the run was shorter than {step_profiler.SKIPPED_STEPS + 2} steps")
        elif self._is_main_process:
            device = self._communicator.device.type
            facts = {"strategy": self._config.strategy.name, "world_size": len(ranks), "device": device}
            summary = facts | step_profiler.summarize(ranks)
            path = self.run_dir.write_profile(summary)
            logger.info(table([*step_profiler.lines(summary), ("profile", str(path))]))

    def stopped(self, state: TrainState) -> None:
        """Notes that the run stopped before its end, everything saved."""
        if self._is_main_process:
            for tracker in self._own + self._of_caller:
                tracker.finish(EXIT_SAVED)
            self.run_dir.append_event("saved", step=state.step)
            self.run_dir.write_status("saved", step=state.step, world_size=self._communicator.world_size)
        why = self._why_stopped()
        logger.info(f"stopped at step {state.step} and saved ({why}); run the same command again to resume")

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """Closes the trackers where what is done inside raises, unless this rank is one of several: it ends at once."""
        try:
            yield
        except BaseException:
            if self._communicator.world_size == 1:
                for tracker in self._own + self._of_caller:
                    with suppress(OSError, ValueError):  # a full disk may be what the run ended by
                        tracker.finish(EXIT_INTERNAL)
            raise

    def _why_stopped(self) -> str:
        return first_received() if stop_requested() else "the end of its time, or a signal to another rank"

    def finished(
        self,
        state: TrainState,
        test: Evaluation,
        *,
        weights_sha256: str,
        best_chosen_on: str,
        store: CheckpointStore,
    ) -> None:
        """Writes the result of the run, whose model has the result `test` on the test split."""
        if not self._is_main_process:
            return
        if state.step < self._plan.total_steps:
            evaluations = counted(self._config.train.patience_evaluations or 0, "evaluation")
            logger.info(
                f"ended early at step {state.step}: no better accuracy than at step {state.best_step} in {evaluations}"
            )
        config, plan, dataset = self._config, self._plan, self._dataset
        summary: dict[str, Any] = build_summary(
            config,
            state,
            test,
            classes=dataset.classes,
            data_sha256=dataset.content_sha256,
            weights_sha256=weights_sha256,
            best_chosen_on=best_chosen_on,
            global_size=plan.global_size,
            steps_per_epoch=plan.steps_per_epoch,
            world_size=self._communicator.world_size,
            device=self._communicator.device,
        )
        found = predictions.collect(
            test.logits,
            dataset.test.labels,
            dataset.test.images,
            dataset.classes,
            predictions.augmentation_samples(
                dataset.train.images, self._train_indices, config.augment, seed=config.run.seed
            ),
        )
        predictions.write(self.run_dir.path, found)
        self.run_dir.append_event("done", step=state.step)
        self.run_dir.write_summary(summary)
        checkpoints = store.best_and_last() if config.tracking.wandb_checkpoints else {}
        results = Results(summary=summary, predictions=found, checkpoints=checkpoints)
        for tracker in self._own:
            tracker.finish(EXIT_DONE, results)
        self.run_dir.write_status("done", step=state.step, world_size=self._communicator.world_size)
        for tracker in self._of_caller:
            tracker.finish(EXIT_DONE, results)
        logger.info(table(result_rows(summary, self.run_dir)))
