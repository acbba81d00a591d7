"""How replicas are kept in step. The trainer sees the protocol alone."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from dist_cifar.augment import cpu
from dist_cifar.config import Config
from dist_cifar.data.batching import BatchPlan
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.ops import numba_jit
from dist_cifar.ops.precision import prepare_forward, warm_up_kernels
from dist_cifar.strategy import properties

Tensors = dict[str, torch.Tensor]
"""By name."""


class Strategy(Protocol):
    """One model on several ranks."""

    module: nn.Module
    """The model as this rank holds it."""

    def __init__(self, module: nn.Module, config: Config, *, communicator: Communicator, plan: BatchPlan) -> None:
        """Moves `module` to the device of the communicator and wraps it."""
        ...

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

    def model_state_dict(self) -> Tensors:
        """The whole model's state with its buffers averaged over ranks, the training undisturbed. A collective.

        Tensors are on the device and may be the model's own: copy what must outlive the next step. So the next two.
        """
        ...

    def per_rank_state(self) -> Tensors:
        """What ranks hold that the others do not, stacked over ranks. A collective."""
        ...

    def optimizer_state_dict(self) -> Tensors:
        """Adam's state of whole parameters, `<parameter>.<moment>` to tensor. A collective."""
        ...

    def load(self, model: Tensors, optimizer: Tensors, ranks: Tensors) -> None:
        """Restores what the three methods above returned, for the same model, of any strategy and number of ranks."""
        ...


def prepare_module(module: nn.Module, config: Config, device: torch.device) -> None:
    """Sets how `module`, which is on its device, computes in training. Call it once, before it is wrapped."""
    spec = properties(config.strategy)
    prepare_forward(module, config.compute, device, auto_compile=spec.auto_compile, bitwise=spec.bitwise)


def compile_kernels(config: Config, communicator: Communicator) -> None:
    """Loads what numba has compiled for this run from its cache, or compiles it. A collective."""

    def use() -> None:
        cpu.warm_up()
        warm_up_kernels(config.compute, communicator.device, auto_compile=properties(config.strategy).auto_compile)

    numba_jit.load(use)  # on all ranks in parallel; what follows compiles only on a miss
    # Rank 0 first, because it is the one that says what takes long; the others load what it compiled.
    communicator.run_on_rank0(lambda: numba_jit.warm_up(use))
    if communicator.rank != 0:
        numba_jit.warm_up(use)
