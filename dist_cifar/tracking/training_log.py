"""What a run says while it trains: rows of metrics to the console and the trackers, stragglers, digests.

Contract: rows go to the trackers on rank 0 alone. `steps` and `digests` are collectives.
"""

from __future__ import annotations

import logging
import math
import socket
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from dist_cifar.config import Config
from dist_cifar.data.batching import BatchPlan
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.errors import TrainingError
from dist_cifar.run.checkpoint import weights_sha256
from dist_cifar.run.run_dir import RunDir
from dist_cifar.run.timers import ComputeTimer, peak_memory_bytes
from dist_cifar.run.training_sums import TrainingSums
from dist_cifar.state import Evaluation, StepTotals, TrainState
from dist_cifar.strategy.base import Strategy
from dist_cifar.tracking.base import Tracker
from dist_cifar.tracking.console import Console

logger = logging.getLogger(__name__)


class TrainingLog:
    """The rows of one run."""

    def __init__(
        self,
        config: Config,
        plan: BatchPlan,
        *,
        communicator: Communicator,
        run_dir: RunDir,
        console: Console,
    ) -> None:
        self._config, self._plan, self._communicator = config, plan, communicator
        self._run_dir, self._console = run_dir, console
        self._last = TrainState()
        self.trackers: Sequence[Tracker] = ()
        """Where rows go beside the console; empty but on rank 0."""
        self.compute_timer = ComputeTimer(communicator.device)

    def start(self, state: TrainState) -> None:
        """Counts from `state` on, that of the checkpoint from which the run resumes."""
        self._last = state.copy()

    def row(self, kind: str, state: TrainState, **values: Any) -> None:
        """One row of `kind`."""
        row = {
            "kind": kind,
            "step": state.step,
            "epoch": state.step / self._plan.steps_per_epoch,
            "samples": state.step * self._plan.global_size,
            **values,
            "seconds": state.wall_seconds,
        }
        self._console.row(row)
        for tracker in self.trackers:
            tracker.log(row)

    def evaluation(self, kind: str, state: TrainState, result: Evaluation, **values: Any) -> None:
        """The row of an evaluation."""
        self.row(
            kind,
            state,
            **values,
            loss=result.loss,
            accuracy=result.accuracy,
            count=result.count,
            class_accuracy=result.class_accuracy,
            **({} if result.tta is None else {"accuracy_tta": result.tta.accuracy, "loss_tta": result.tta.loss}),
        )

    def take_totals(self, sums: TrainingSums) -> list[StepTotals]:
        """Every rank's totals since the last log, for `steps`; `sums` starts again. Waits for the device."""
        return self._gathered(sums.take)

    def totals(self, sums: TrainingSums) -> list[StepTotals]:
        """Every rank's totals since the last log. Waits for the device."""
        return self._gathered(sums.totals)

    def _gathered(self, read: Callable[[], StepTotals]) -> list[StepTotals]:
        with self._communicator.reading():
            own = read()
        return self._communicator.all_gather_object(own)

    def steps(self, state: TrainState, ranks: Sequence[StepTotals], *, lr: float) -> None:
        """The row of the steps since the last one, of which `ranks` holds every rank's totals.

        Names a straggler. Raises `TrainingError` where a loss was not finite, or too many steps were skipped.
        """
        require_finite(state.step, ranks)
        totals, last = StepTotals.sum(ranks), self._last
        seconds = state.train_seconds - last.train_seconds
        waited, own, memory, hosts = zip(
            *self._communicator.all_gather_object(
                (
                    state.wait_seconds - last.wait_seconds,
                    self.compute_timer.take(),
                    peak_memory_bytes(self._communicator.device),
                    socket.gethostname(),
                )
            ),
            strict=True,
        )
        slowest, median = max(range(len(own)), key=own.__getitem__), statistics.median_low(own)
        images_per_second = (state.step - last.step) * self._plan.global_size / seconds
        skips: dict[str, int] = {}
        if self._config.optimizer.non_finite == "skip":
            state.skipped_steps += int(totals.skipped)
            skips["skipped_steps"] = state.skipped_steps
        self.row(
            "train",
            state,
            loss=totals.loss_sum / totals.samples if totals.samples else None,
            accuracy=totals.correct / totals.samples if totals.samples else None,
            lr=lr,
            grad_norm=totals.norm_sum / totals.steps if totals.steps else None,
            images_per_second=images_per_second,
            images_per_second_per_rank=images_per_second / self._communicator.world_size,
            data_wait_share=sum(waited) / self._communicator.world_size / seconds,
            rank_work_share=[share / seconds for share in own],
            straggler_ratio=own[slowest] / median if median else 1.0,
            memory_bytes=max(memory),
            **skips,
        )
        self._last = state.copy()
        if state.skipped_steps > self._config.optimizer.max_skipped_steps:
            raise TrainingError(
                f"step {state.step}: {state.skipped_steps} steps had gradients that were not finite, more than"
                f" optimizer.max_skipped_steps={self._config.optimizer.max_skipped_steps}; lower optimizer.lr"
            )
        if own[slowest] > self._config.run.straggler_factor * median:
            logger.info(
                f"straggler: rank {slowest} on {hosts[slowest]} worked {own[slowest] / median:.1f}x as long as the"
                f" median rank since the last log ({own[slowest]:.2f} s, {median:.2f} s); the others waited for it"
            )

    def digests(self, step: int, strategy: Strategy, totals: StepTotals) -> None:
        """Writes the digest of every tensor, and all ranks' totals since the last log: exact, so they can be compared.

        Raises `TrainingError` if the tensors differ between ranks.
        """
        tensors = strategy.model_state_dict() | strategy.optimizer_state_dict()
        self._communicator.assert_tensors_equal_across_ranks("the state of the training", tensors, weights_sha256)
        ranks = self._communicator.all_gather_object(totals)
        if self._communicator.rank == 0:
            digests = {name: weights_sha256({name: tensor})[:16] for name, tensor in sorted(tensors.items())}
            self._run_dir.append_digests({"step": step, "totals": StepTotals.sum(ranks)._asdict(), "digests": digests})


def require_finite(step: int, ranks: Sequence[StepTotals]) -> None:
    """Raises `TrainingError` if a loss or a gradient since the last log was not finite. `ranks`: every rank's
    totals."""
    if all(totals.is_finite for totals in ranks):
        return
    bad = [rank for rank, totals in enumerate(ranks) if not math.isfinite(totals.loss_sum)]
    where = f"the loss of rank {', '.join(map(str, bad))}" if bad else "a gradient, and no loss,"
    raise TrainingError(
        f"step {step}: {where} was not finite in a step since the last log; lower optimizer.lr or"
        " optimizer.max_grad_norm, set compute.precision=fp32, or skip such steps with optimizer.non_finite=skip",
        rank=bad[0] if bad else None,
    )
