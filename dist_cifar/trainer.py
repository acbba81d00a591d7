"""The training loop.

Contract: `train` runs a config until it is done or has to stop, and resumes by itself what the run directory holds. The
weights after a step depend on the config, the data, the machine's numerics and, unless the strategy is bitwise, on the
world size; not on how often the run was interrupted.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, nullcontext

import torch
from torch.nn.functional import cross_entropy

from dist_cifar.config import Config, is_own
from dist_cifar.data.batching import BatchPlan, TrainingBatches
from dist_cifar.data.due import evaluation_due, is_over, schedule_due
from dist_cifar.data.prefetch import Batch
from dist_cifar.data.training_data import build_training_data
from dist_cifar.distributed.any_reduce import AsyncAnyReduce
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.evaluate import Evaluator
from dist_cifar.ops.pass_random import seed_pass
from dist_cifar.ops.precision import resolve_precision
from dist_cifar.optim.lr_schedule import LRSchedule
from dist_cifar.optim.schedules import build_lr_schedule
from dist_cifar.run.checkpoint import weights_sha256
from dist_cifar.run.checkpointing import RunCheckpoints, unfit
from dist_cifar.run.provenance import choose_kernels, numerics_fingerprint
from dist_cifar.run.run_dir import LOCK_SECONDS, RunDir
from dist_cifar.run.step_profiler import Profile, phase
from dist_cifar.run.training_sums import TrainingSums
from dist_cifar.state import Evaluation, StepTotals, TrainState
from dist_cifar.stopping import Deadline, at_once, defer, seconds_left, stop_requested
from dist_cifar.strategy import build_strategy, properties, slice_count
from dist_cifar.strategy.base import Strategy
from dist_cifar.strategy.compute import build_evaluator, compile_kernels, kept_casts
from dist_cifar.strategy.initial_model import build_initial_model
from dist_cifar.tracking.base import OpenTracker
from dist_cifar.tracking.console import Console
from dist_cifar.tracking.records import RunRecords
from dist_cifar.tracking.training_log import TrainingLog, require_finite
from dist_cifar.tta import final_evaluation


def train(
    config: Config,
    communicator: Communicator,
    *,
    must_resume: bool = False,
    resume_anyway: bool = False,
    trackers: Sequence[OpenTracker] = (),
) -> bool:
    """Trains, evaluates and writes the run directory; returns whether the run is done, or was stopped and saved.

    A collective. Raises `UserError` for what the user can fix. `must_resume`: fail if there is no checkpoint.
    `resume_anyway`: also if it changes the result. `trackers` are opened on rank 0 and finished when the run is done.
    """
    run_dir = RunDir.of(config)
    with Console(is_main_process=communicator.rank == 0) as console, ExitStack() as held:
        # Rank 0 takes the lock; the others wait in the broadcast.
        lock = run_dir.lock(wait_seconds=min(LOCK_SECONDS, config.run.timeout_seconds / 2))
        communicator.run_on_rank0(lambda: held.enter_context(lock))
        config = resolve_precision(config, run_dir.previous_config, communicator)
        trainer = Trainer.build(
            config, communicator, console=console, must_resume=must_resume, resume_anyway=resume_anyway
        )
        with trainer.records.closed_on_error():
            return trainer.fit(trackers)


@dataclasses.dataclass(kw_only=True, eq=False)
class Trainer:
    """One run on the ranks of a communicator. `build` makes its collaborators from a config."""

    config: Config
    communicator: Communicator
    plan: BatchPlan
    batches: TrainingBatches
    strategy: Strategy
    schedule: LRSchedule
    evaluator: Evaluator
    checkpoints: RunCheckpoints
    records: RunRecords
    log: TrainingLog
    console: Console
    sums: TrainingSums
    profile: Profile | None
    deadline: Deadline
    timed_until: float  # `state.wall_seconds` counts up to this time of `time.perf_counter`
    state: TrainState = dataclasses.field(default_factory=TrainState)
    tested: dict[int | None, Evaluation] = dataclasses.field(default_factory=dict)  # on the test split, by step

    @classmethod
    def build(
        cls,
        config: Config,
        communicator: Communicator,
        *,
        console: Console | None = None,
        must_resume: bool = False,
        resume_anyway: bool = False,
    ) -> Trainer:
        """Everything that a run needs, restored from its newest checkpoint if there is one. A collective."""
        started = time.perf_counter()
        deadline = Deadline(seconds_left(os.environ, config.run.time_limit_seconds, wall_time=time.time()))
        run_dir, device, spec = RunDir.of(config), communicator.device, properties(config.strategy)
        slices = slice_count(config.batch, config.strategy, world_size=communicator.world_size)
        choose_kernels(device, bitwise=spec.bitwise)
        if spec.bitwise:
            communicator.assert_equal_across_ranks("the numerics", numerics_fingerprint(device))
        data = build_training_data(config, communicator, slices=slices)
        plan, dataset = data.plan, data.dataset
        model = build_initial_model(config, data, communicator)
        compile_kernels(model, config, communicator)
        evaluator = build_evaluator(model, config, data, communicator)
        console = console or Console(is_main_process=communicator.rank == 0)
        trainer = cls(
            config=config,
            communicator=communicator,
            plan=plan,
            batches=data.batches,
            strategy=build_strategy(model, config, communicator=communicator, plan=plan),
            schedule=build_lr_schedule(config, plan.global_size, plan.steps_per_epoch, plan.total_steps),
            evaluator=evaluator,
            checkpoints=RunCheckpoints(run_dir, config, communicator, dataset=dataset, bitwise=spec.bitwise),
            records=RunRecords(run_dir, config, communicator, plan, dataset=dataset, train_indices=data.train_indices),
            log=TrainingLog(config, plan, communicator=communicator, run_dir=run_dir, console=console),
            console=console,
            sums=TrainingSums(device, may_skip=config.optimizer.non_finite == "skip"),
            profile=Profile(run_dir.profile, rank=communicator.rank, device=device) if config.run.profile else None,
            deadline=deadline,
            timed_until=started,
        )
        trainer.restore(must_resume=must_resume, resume_anyway=resume_anyway)
        return trainer

    def fit(self, trackers: Sequence[OpenTracker] = ()) -> bool:
        """Trains to the end of the run, or until it has to stop; returns whether it is done. A collective."""
        config, plan, state, device = self.config, self.plan, self.state, self.communicator.device
        if self.communicator.run_on_rank0(lambda: self.records.is_done(state)):
            self.records.show_result(state)
            return True
        resume_step = self.checkpoints.saved_step
        self.log.trackers = self.records.begin(state, self.evaluator, self.schedule, resume_step, trackers)
        defer()  # from here on there is something to save
        self.console.start(plan.total_steps, state.step)
        vote, store = AsyncAnyReduce(self.communicator, 3), self.checkpoints.store
        with closing(self.batches.stream(state.step, device)) as batches, self.profile or nullcontext():
            self.deadline.begin()
            while not is_over(config, plan, state):
                phase("data")  # before the vote: the profiler may stop here, and a collective under way would crash it
                stops = stop_requested() or self.deadline.is_near(store.write_seconds, delay=vote.delay)
                vote.start(state.step + 1, stops, store.failed, self.checkpoints.asks())
                step_started = time.perf_counter()
                self.log.compute_timer.start()
                batch = next(batches)
                state.wait_seconds += time.perf_counter() - step_started
                self.train_step(batch)

                logs = state.step % config.run.log_every_steps == 0 or state.step == plan.total_steps
                ranks = self.log.take_totals(self.sums) if logs else None  # waits for the device
                state.train_seconds += time.perf_counter() - step_started
                if ranks is not None:
                    self.log.steps(self._timed_state(), ranks, lr=self.schedule.lr(state.step - 1))
                self.console.advance()
                if config.run.log_digests:
                    self.log.digests(state.step, self.strategy, self.sums.totals())
                if self.profile is not None and self.profile.is_complete:
                    self.records.profiled(self.profile)
                if evaluation_due(plan, config.eval.every_epochs, state.step):
                    self.evaluate()
                    if state.best_step == state.step or config.checkpoint.every_seconds is None:
                        self.save(best=state.best_step == state.step)
                stops, write_failed, is_due = vote.result()
                if write_failed:
                    self.checkpoints.wait()  # raises what went wrong
                if stops:
                    self.records.stopping(state, store.write_seconds)
                    self._leave_loop()
                    self.records.stopped(state)
                    return False
                if is_due or self.checkpoints.falls_on(state.step):
                    self.save()
        self._leave_loop()
        self._finish()
        return True

    def train_step(self, batch: Batch) -> torch.Tensor:
        """One optimizer step on this rank's share of a global batch; returns the gradient norm before clipping, [].

        A collective. Nothing waits for the device.
        """
        strategy, plan = self.strategy, self.plan
        inputs, labels = batch.inputs.split(plan.micro_sizes), batch.labels.split(plan.micro_sizes)
        with kept_casts(self.config, self.communicator.device):
            for i, weight in enumerate(plan.weights):
                phase("forward")
                if is_own(self.config, "model"):  # it may draw random numbers
                    seed_pass(self.config.run.seed, self.state.step, plan.first_pass + i)
                logits = strategy.forward(inputs[i])
                loss = cross_entropy(logits, labels[i], label_smoothing=self.config.train.label_smoothing)
                if i == plan.micro_batches - 1:
                    self.log.compute_timer.stop()
                phase("backward")
                strategy.backward(loss if weight == 1 else loss * weight)
                phase("other")
                self.sums.add(loss, logits, labels[i])
        phase("optimizer")
        grad_norm = strategy.step(self.schedule.lr(self.state.step))  # clipped
        phase("other")
        if self.communicator.rank == 0:  # it is the same on every rank
            self.sums.add_step(grad_norm)
        self.state.step += 1
        return grad_norm

    def evaluate(self) -> Evaluation:
        """Evaluates on the validation split, tells the schedule if that is due, notes the best step. A collective."""
        phase("evaluation")
        state = self.state
        result = self.evaluator.validate(self.strategy.model_state_dict())
        self.log.evaluation("eval", self._timed_state(), result, split=self.evaluator.split_name)
        if schedule_due(self.plan, self.config.eval.every_epochs, state.step):
            change = self.schedule.observe(result)
            self.communicator.assert_equal_across_ranks("the state of the schedule", self.schedule.state_dict())
            if change is not None:
                self.records.lr_reduced(state, change, lr=self.schedule.lr(state.step))
        if state.best_accuracy is None or result.accuracy > state.best_accuracy:
            state.best_accuracy, state.best_step = result.accuracy, state.step
        self.tested = {state.step: result} if self.evaluator.selects_on_test else {}
        return result

    def save(self, *, best: bool = False) -> None:
        """Begins to write a checkpoint, unless this step has one. A collective.

        Raises `TrainingError` if a loss since the last log was not finite or the replicas do not agree.
        """
        phase("checkpoint")
        if self.checkpoints.saved_step == self.state.step:
            return
        ranks = self.log.totals(self.sums)
        require_finite(self.state.step, ranks)
        tensors = {
            "model": self.strategy.model_state_dict(),
            "optimizer": self.strategy.optimizer_state_dict(),
            "ranks": self.strategy.per_rank_state(),
        }
        self.checkpoints.save(
            self._timed_state(), tensors, schedule=self.schedule.state_dict(), totals=StepTotals.sum(ranks), best=best
        )

    def restore(self, *, must_resume: bool, resume_anyway: bool) -> None:
        """Continues from the newest checkpoint, if there is one. A collective; see `RunCheckpoints.restore`."""
        restored = self.checkpoints.restore(must_resume=must_resume, resume_anyway=resume_anyway)
        if restored is None:
            return
        try:
            self.evaluator.model.load_state_dict(restored.model)
            self.strategy.load(restored.model, restored.optimizer, restored.per_rank)
            self.schedule.load_state_dict(restored.schedule)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise unfit(self.config, error) from None
        self.state = restored.train_state
        self.log.start(self.state)
        if self.communicator.rank == 0:
            self.sums.reset(restored.totals)

    def _timed_state(self) -> TrainState:
        """The state, with its `wall_seconds` up to now."""
        now = time.perf_counter()
        self.state.wall_seconds += now - self.timed_until
        self.timed_until = now
        return self.state

    def _leave_loop(self) -> None:
        """No more steps: when this returns, all is on the disk."""
        self.save()
        self.records.profiled(self.profile)
        self.checkpoints.wait(must_succeed=True)
        self.console.stop()

    def _finish(self) -> None:
        """Evaluates the model that `eval.select` names on the test split and writes the result."""
        state = self.state
        model = self.strategy.model_state_dict()
        sha256 = weights_sha256(model)
        chosen_step = state.best_step if self.config.eval.select == "best" else state.step
        if chosen_step != state.step:
            model = self.checkpoints.load_best(chosen_step)
        with at_once():  # all is saved: a signal ends the run, which evaluates again when it is resumed
            test = final_evaluation(self.evaluator, model, self.config.eval, plain=self.tested.get(chosen_step))
        self.log.evaluation("test", self._timed_state(), test)
        self.records.finished(
            state, test, weights_sha256=sha256, best_chosen_on=self.evaluator.split_name, store=self.checkpoints.store
        )
