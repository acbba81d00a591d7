"""A strategy around another one, which does something more and leaves the rest to it.

Contract: what a subclass adds is a closed function of the number of steps, which is in the optimizer's state of a
checkpoint as `<name>.step`.
"""

from __future__ import annotations

from typing import Any

import torch

from dist_cifar.strategy.base import Strategy, Tensors


class WrappedStrategy:
    """See `dist_cifar.strategy.base.Strategy`. Counts the steps, and hands everything on."""

    _name: str
    """The word by which checkpoints know it."""

    def __init__(self, inner: Strategy) -> None:
        self.module: Any = inner.module
        self._inner = inner
        self._step = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._inner.forward(images)

    def backward(self, loss: torch.Tensor) -> None:
        self._inner.backward(loss)

    def step(self, lr: float) -> torch.Tensor:
        norm = self._inner.step(lr)
        self._step += 1
        return norm

    def model_state_dict(self) -> Tensors:
        return self._inner.model_state_dict()

    def per_rank_state(self) -> Tensors:
        return self._inner.per_rank_state()

    def optimizer_state_dict(self) -> Tensors:
        return self._inner.optimizer_state_dict() | {f"{self._name}.step": torch.tensor(self._step)}

    def load_model(self, model: Tensors) -> None:
        self._inner.load_model(model)

    def load(self, model: Tensors, optimizer: Tensors, ranks: Tensors) -> None:
        saved = optimizer.get(f"{self._name}.step")
        self._step = self._step if saved is None else int(saved)
        self._inner.load(model, optimizer, ranks)
