"""What a strategy is, and what the strategies share. The trainer sees the protocol alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch

from dist_cifar.config import Config
from dist_cifar.data.batching import BatchPlan
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.strategy.batchnorm_stats import PerRankBatchNormStats

Tensors = dict[str, torch.Tensor]
"""Tensors by name."""


class Strategy(Protocol):
    """One model on several ranks."""

    module: Any
    """The model as this rank holds it, a `torch.nn.Module`."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Training forward pass of the next micro-batch: float32 [n, 3, r, r] to logits float32 [n, classes]."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of `loss` [], the mean over the micro-batch of the last `forward`, times a weight where
        micro-batches have different sizes.

        The gradient of the step is the mean over all micro-batches of all ranks; it is reduced during the last one.
        """
        ...

    def step(self, lr: float) -> torch.Tensor:
        """Clips, takes one optimizer step at `lr`, clears the gradients; returns their norm before clipping, [].

        The norm is the same on every rank. Where it is not finite, the step changes nothing.
        """
        ...

    def model_state_dict(self) -> Tensors:
        """The whole model's state with its buffers averaged over ranks, the training undisturbed. A collective.

        Tensors are on the device and may be the model's own: copy what must outlive the next step. The same holds for
        the next two methods.
        """
        ...

    def per_rank_state(self) -> Tensors:
        """What each rank holds that the others do not, stacked over ranks. A collective."""
        ...

    def optimizer_state_dict(self) -> Tensors:
        """The optimizer's state of whole parameters, `<parameter>.<entry>` to tensor. A collective."""
        ...

    def load_model(self, model: Tensors) -> None:
        """Replaces weights and buffers by those of a whole model, and leaves the optimizer as it is."""
        ...

    def load(self, model: Tensors, optimizer: Tensors, ranks: Tensors) -> None:
        """Restores what the three methods above returned, for the same model, of any strategy and number of ranks."""
        ...


class DataParallelStrategy(ABC):
    """Ranks that normalise their own micro-batches, accumulate gradients over them and average these in the last one.

    It keeps count of the passes of a step, and the BatchNorm statistics of this rank: undone by a step that is not
    finite, averaged where the whole model is asked for. A subclass says how its engine does the rest.
    """

    module: Any
    """The model as this rank holds it, a `torch.nn.Module`."""
    _statistics: PerRankBatchNormStats
    """The subclass makes it when its engine has the module on the device for good."""

    def __init__(self, config: Config, *, communicator: Communicator, plan: BatchPlan) -> None:
        self._device, self._communicator = communicator.device, communicator
        self._max_grad_norm = config.optimizer.max_grad_norm
        self._micro_batches, self._pass = plan.micro_batches, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self._pass == 0:
            self._statistics.snapshot()
        return self._forward(images, is_last=self._pass == self._micro_batches - 1)

    def backward(self, loss: torch.Tensor) -> None:
        self._backward(loss)
        self._pass += 1

    def step(self, lr: float) -> torch.Tensor:
        assert self._pass == self._micro_batches
        self._pass = 0
        norm = self._step(lr)
        self._statistics.restore_where(~norm.isfinite())
        return norm

    def model_state_dict(self) -> Tensors:
        return self._whole_model() | self._statistics.averaged()

    def per_rank_state(self) -> Tensors:
        return self._statistics.all_gather()

    def load(self, model: Tensors, optimizer: Tensors, ranks: Tensors) -> None:
        self.load_model(model)
        self._statistics.load_per_rank(ranks)
        self._load_optimizer(optimizer)

    @abstractmethod
    def optimizer_state_dict(self) -> Tensors: ...

    @abstractmethod
    def load_model(self, model: Tensors) -> None: ...

    @abstractmethod
    def _forward(self, images: torch.Tensor, *, is_last: bool) -> torch.Tensor:
        """The forward pass; `is_last`: gradients are reduced in the backward pass that follows."""

    @abstractmethod
    def _backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of `loss`, divided by the number of micro-batches."""

    @abstractmethod
    def _step(self, lr: float) -> torch.Tensor:
        """The optimizer step of `Strategy.step`; returns the norm."""

    @abstractmethod
    def _whole_model(self) -> Tensors:
        """The whole model's state, with this rank's buffers."""

    @abstractmethod
    def _load_optimizer(self, optimizer: Tensors) -> None:
        """Restores what `optimizer_state_dict` returned."""
