"""From epochs to steps, and the learning rate of each step: pure functions of the config, the step and the metrics.

Contract: no state is kept here and no optimizer is touched. The learning rate of a step is the plateau's current value
times the warm-up factor; whoever calls these functions with the same arguments gets the same numbers, so ranks that
see the same metrics agree without talking. Steps and epochs are counted from 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dist_cifar.config import BatchConfig, OptimizerConfig, PlateauConfig, TrainConfig
from dist_cifar.errors import ConfigError

_SMALLEST_CUT = 1e-8
"""A cut that would change the learning rate by less is not made (`eps` of torch's ReduceLROnPlateau)."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How a global batch is divided, and how many there are."""

    global_size: int
    """Samples of one step over all ranks."""
    per_rank_size: int
    """Samples of one step on one rank."""
    virtual_ranks: int
    """Slices of the global batch that are computed each by itself; without strategy `exact`, one on each rank."""
    micro_batches: int
    """Forward and backward passes of one step on one rank."""
    passes: int
    """Forward and backward passes of one virtual rank."""
    steps_per_epoch: int
    """Whole global batches in the training split; the samples left over are dropped, others each epoch."""
    total_steps: int
    """Steps of the whole run."""

    @property
    def micro_size(self) -> int:
        """Samples of one forward and backward pass."""
        return self.per_rank_size // self.micro_batches


def require_shareable(batch: BatchConfig, train: TrainConfig, *, world_size: int) -> None:
    """Raises `ConfigError` where `world_size` ranks cannot share a global batch equally."""
    if train.strategy == "exact":
        if batch.virtual_ranks % world_size:
            allowed = ", ".join(str(2**i) for i in range(batch.virtual_ranks.bit_length()))
            raise ConfigError(
                f"batch.virtual_ranks: {batch.virtual_ranks} virtual ranks cannot be shared equally by {world_size}"
                f" ranks; start {allowed} ranks, or choose train.strategy=ddp"
            )
    elif batch.global_size is not None and batch.global_size % world_size:
        lower = batch.global_size // world_size * world_size
        near = f"{lower} or {lower + world_size}" if lower else f"{world_size}"
        raise ConfigError(
            f"batch.global_size: {batch.global_size} samples cannot be shared equally by {world_size} ranks;"
            f" set batch.global_size={near}, or start another number of ranks"
        )


def plan_batches(batch: BatchConfig, train: TrainConfig, *, world_size: int, train_size: int) -> BatchPlan:
    """The plan for `train_size` samples on `world_size` ranks. Raises `ConfigError` where the numbers do not divide."""
    require_shareable(batch, train, world_size=world_size)
    global_size = batch.global_size or (batch.per_rank_size or 0) * world_size
    per_rank_size = global_size // world_size
    steps_per_epoch = train_size // global_size
    if steps_per_epoch == 0:
        raise ConfigError(
            f"batch: one global batch is {global_size} samples, the training split has {train_size}; make it smaller"
        )
    virtual_ranks = batch.virtual_ranks if train.strategy == "exact" else world_size
    virtual_size = global_size // virtual_ranks
    limit = min(batch.max_micro_batch or virtual_size, virtual_size)
    passes = next(n for n in range(1, virtual_size + 1) if virtual_size % n == 0 and virtual_size // n <= limit)
    total_steps = steps_per_epoch * train.epochs
    return BatchPlan(
        global_size=global_size,
        per_rank_size=per_rank_size,
        virtual_ranks=virtual_ranks,
        micro_batches=virtual_ranks // world_size * passes,
        passes=passes,
        steps_per_epoch=steps_per_epoch,
        total_steps=min(total_steps, train.max_steps or total_steps),
    )


def scaled_lr(optimizer: OptimizerConfig, global_size: int) -> tuple[float, str]:
    """The full learning rate for a global batch, and a line that says where it comes from.

    Square root for Adam: Malladi et al., "On the SDEs and scaling rules for adaptive gradient algorithms", 2022.
    Linear: Goyal et al., "Accurate, large minibatch SGD", 2017.
    """
    ratio = global_size / optimizer.lr_base_batch
    factor = {"sqrt": math.sqrt(ratio), "linear": ratio, "none": 1.0}[optimizer.lr_rule]
    lr = optimizer.lr * factor
    rule = {
        "sqrt": f"sqrt({global_size}/{optimizer.lr_base_batch})",
        "linear": f"{global_size}/{optimizer.lr_base_batch}",
        "none": "1",
    }[optimizer.lr_rule]
    return lr, f"lr {lr:.6g} = {optimizer.lr:g} x {rule} (rule {optimizer.lr_rule}, global batch {global_size})"


def warmup_factor(optimizer: OptimizerConfig, plan: BatchPlan, step: int) -> float:
    """Linear from 1/n in step 0 to 1 in step n - 1, where n is the warm-up in steps; 1 afterwards."""
    warmup_steps = round(optimizer.warmup_epochs * plan.steps_per_epoch)
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """ReduceLROnPlateau between two evaluations. All of it is saved and restored."""

    lr: float
    """Learning rate after the cuts so far, before the warm-up factor."""
    best: float
    """Best value of the watched metric so far."""
    bad_evaluations: int = 0
    """Evaluations in a row without improvement."""
    cooldown_left: int = 0
    """Evaluations that are still not counted after the last cut."""
    cuts: int = 0
    """Number of cuts so far."""


def start_plateau(config: PlateauConfig, lr: float) -> Plateau:
    """The state before the first evaluation."""
    return Plateau(lr=lr, best=math.inf if config.metric == "loss" else -math.inf)


def step_plateau(config: PlateauConfig, state: Plateau, metric: float) -> Plateau:
    """The state after one more evaluation; the rule is torch's, with a relative threshold. NaN never improves."""
    if config.metric == "loss":
        improved = metric < state.best * (1.0 - config.threshold)
    else:
        improved = metric > state.best * (1.0 + config.threshold)
    bad = 0 if improved else state.bad_evaluations + 1
    cooldown = state.cooldown_left
    if cooldown > 0:
        cooldown, bad = cooldown - 1, 0
    lr, cuts = state.lr, state.cuts
    if bad > config.patience_evaluations:
        cut = max(lr * config.factor, config.min_lr)
        if lr - cut > _SMALLEST_CUT:
            lr, cuts = cut, cuts + 1
        cooldown, bad = config.cooldown_evaluations, 0
    return replace(
        state,
        lr=lr,
        best=metric if improved else state.best,
        bad_evaluations=bad,
        cooldown_left=cooldown,
        cuts=cuts,
    )


def evaluation_due(plan: BatchPlan, every_epochs: int, step: int) -> bool:
    """Whether the model is evaluated after `step` steps: when the plateau is due, and at the end of the run."""
    return step == plan.total_steps or plateau_due(plan, every_epochs, step)


def plateau_due(plan: BatchPlan, every_epochs: int, step: int) -> bool:
    """Whether the evaluation after `step` steps moves the plateau: not one that there is only because the run ends.

    So a run that is made longer is the run that was meant to be so long.
    """
    return step % (every_epochs * plan.steps_per_epoch) == 0
