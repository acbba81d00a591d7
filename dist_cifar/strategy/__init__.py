"""How replicas are kept in step. The trainer sees the protocol alone."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import nn


class Strategy(Protocol):
    """One model on several ranks."""

    module: nn.Module
    """The model itself, for evaluation and saving; its forward has the strategy's precision."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Training forward pass: float32 [n, 3, 32, 32] to logits float32 [n, classes]."""
        ...

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a micro-batch: gradients are reduced over the ranks in the last."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of `loss` []; over the ranks they are averaged."""
        ...

    def step(self, lr: float) -> torch.Tensor:
        """Clips, takes one optimizer step at `lr`, clears the gradients; returns their norm before clipping, []."""
        ...

    def average_buffers(self) -> None:
        """Gives every rank the mean over ranks of the floating-point buffers (BatchNorm's running statistics)."""
        ...

    def model_tensors(self) -> dict[str, torch.Tensor]:
        """The model's state on the CPU with its buffers averaged, the training undisturbed. A collective."""
        ...

    def rank_tensors(self) -> dict[str, torch.Tensor]:
        """What ranks hold that the others do not, stacked over ranks, on the CPU. A collective."""
        ...

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """The optimizer's state on the CPU."""
        ...

    def load(
        self,
        model: dict[str, torch.Tensor],
        optimizer: dict[str, torch.Tensor],
        ranks: dict[str, torch.Tensor],
    ) -> None:
        """Restores what the three methods above returned, on any number of ranks."""
        ...
