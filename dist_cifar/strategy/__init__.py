"""How replicas are kept in step. The trainer sees the protocol alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from dist_cifar.config import Config
from dist_cifar.distributed.communicator import Communicator
from dist_cifar.schedule import BatchPlan

Tensors = dict[str, torch.Tensor]
"""By name."""


class Strategy(Protocol):
    """One model on several ranks."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Training forward pass of the next micro-batch: float32 [n, 3, 32, 32] to logits float32 [n, classes]."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of `loss` [], the mean over the micro-batch of the last `forward`.

        The gradient of the step is the mean over all micro-batches of all ranks; it is reduced during the last one.
        """
        ...

    def step(self, lr: float) -> torch.Tensor:
        """Clips, takes one optimizer step at `lr`, clears the gradients; returns their norm before clipping, [].

        The norm is the same on every rank. Where it is not finite, the step changes nothing.
        """
        ...

    def model_tensors(self) -> Tensors:
        """The whole model's state with its buffers averaged over ranks, the training undisturbed. A collective.

        Tensors are on the device and may be the model's own: copy what must outlive the next step. So the next two.
        """
        ...

    def rank_tensors(self) -> Tensors:
        """What ranks hold that the others do not, stacked over ranks. A collective."""
        ...

    def optimizer_tensors(self) -> Tensors:
        """Adam's state of whole parameters, `<parameter>.<moment>` to tensor. A collective."""
        ...

    def load(self, model: Tensors, optimizer: Tensors, ranks: Tensors) -> None:
        """Restores what the three methods above returned, for the same model, of any strategy and number of ranks."""
        ...


def build_strategy(module: nn.Module, config: Config, *, communicator: Communicator, plan: BatchPlan) -> Strategy:
    """The strategy that `train.strategy` names. What only another one needs is not imported."""
    Chosen: Callable[..., Strategy]
    if config.train.strategy == "exact":
        from dist_cifar.strategy.exact import ExactStrategy as Chosen
    elif config.train.strategy == "fsdp":
        from dist_cifar.strategy.fsdp import FsdpStrategy as Chosen
    elif config.train.strategy == "deepspeed":
        from dist_cifar.strategy.deepspeed import DeepSpeedStrategy as Chosen
    else:
        from dist_cifar.strategy.ddp import DdpStrategy as Chosen
    return Chosen(module, config, communicator=communicator, plan=plan)
