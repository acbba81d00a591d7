"""Groups of parameters that are trained for a part of the run, around any strategy that holds whole weights.

Contract: in step t, counted from 0, the learning rate of a group whose length is n steps is multiplied by 1 - t / n,
and from step n on by 0. Its gradient is zero from then on, and nothing is computed for it; the gradients of all other
parameters have the bits that they would have without that.

Source: Brock et al., "FreezeOut", 2017; for the bias of a whitening layer, Jordan, "94% on CIFAR-10 in 3.29 seconds on
a single GPU", 2024.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from dist_cifar.config import as_written
from dist_cifar.data.batching import BatchPlan
from dist_cifar.optim.base import Optimizer, OptimizerFactory
from dist_cifar.strategy.base import Strategy
from dist_cifar.strategy.wrapping import WrappedStrategy


class GroupLengths:
    """The lengths of the groups of an optimizer that a strategy makes."""

    def __init__(self, plan: BatchPlan) -> None:
        self._plan = plan
        self._optimizer: Optimizer | None = None

    def noted(self, make_optimizer: OptimizerFactory) -> OptimizerFactory:
        """`make_optimizer`, whose optimizer is noted."""

        def make(parameters: Iterable[tuple[str, torch.Tensor]]) -> Optimizer:
            self._optimizer = make_optimizer(parameters)
            return self._optimizer

        return make

    def kept(self, strategy: Strategy) -> Strategy:
        """`strategy`, which made the optimizer, with the lengths of its groups, if one has any."""
        groups = self._optimizer.param_groups if self._optimizer is not None else []
        groups = [group for group in groups if group.get("epochs") is not None]
        return FreezingStrategy(strategy, groups, self._plan) if groups else strategy


class FreezingStrategy(WrappedStrategy):
    """See the module."""

    _name = "freezing"

    def __init__(self, inner: Strategy, groups: list[dict[str, Any]], plan: BatchPlan) -> None:
        """`groups` are those of the optimizer that have `epochs`."""
        super().__init__(inner)
        lengths = [float(as_written(group["epochs"]) * plan.steps_per_epoch) for group in groups]
        self._groups = [(group, length, group["lr_scale"]) for group, length in zip(groups, lengths, strict=True)]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        frozen = [p for group, length, _ in self._groups if self._step >= length for p in group["params"]]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            logits = super().forward(images)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
        return _WithZeroGradients.apply(logits, *frozen) if frozen else logits

    def step(self, lr: float) -> torch.Tensor:
        for group, length, lr_scale in self._groups:
            group["lr_scale"] = lr_scale * max(0.0, 1 - self._step / length)
        return super().step(lr)


class _WithZeroGradients(torch.autograd.Function):
    """The identity of its first argument; the others, which it does not depend on, get a gradient of zeros.

    A strategy waits for the gradient of each parameter.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*parameters)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)
