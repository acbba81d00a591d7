"""What is due after a step, as functions of the config, the plan and the state: evaluations, and the end of the run."""

from __future__ import annotations

from dist_cifar.config import Config
from dist_cifar.data.batching import BatchPlan
from dist_cifar.state import TrainState


def evaluation_due(plan: BatchPlan, every_epochs: int, step: int) -> bool:
    """Whether to evaluate the model after `step` steps: every `every_epochs` epochs, and at the end of the run."""
    return step == plan.total_steps or schedule_due(plan, every_epochs, step)


def is_over(config: Config, plan: BatchPlan, state: TrainState) -> bool:
    """Whether the training has ended: at its last step, or early as `train.patience_evaluations` says."""
    patience = config.train.patience_evaluations
    if state.step >= plan.total_steps or patience is None or state.best_step is None:
        return state.step >= plan.total_steps
    return state.step - state.best_step >= patience * config.eval.every_epochs * plan.steps_per_epoch


def schedule_due(plan: BatchPlan, every_epochs: int, step: int) -> bool:
    """Whether the schedule observes the evaluation after `step` steps; not one that is there only because the run ends.

    So a run whose end is moved has the learning rates of a run that was that long from the start.
    """
    return step % (every_epochs * plan.steps_per_epoch) == 0
