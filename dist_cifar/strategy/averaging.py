"""Averages of the weights over the training, around any strategy that holds whole weights.

Contract: an average covers parameters and floating-point buffers, BatchNorm's statistics among them; its factors are
closed functions of the step, and it is part of the optimizer's state in checkpoints. It is computed element by element
from what `model_state_dict` returns, so it has the same bits wherever that has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from dist_cifar.config import AverageConfig
from dist_cifar.data.batching import BatchPlan
from dist_cifar.errors import ConfigError
from dist_cifar.strategy.base import Strategy, Tensors
from dist_cifar.strategy.wrapping import WrappedStrategy


def averaged(strategy: Strategy, config: AverageConfig, plan: BatchPlan) -> Strategy:
    """`strategy` with the average that `average.name` names, if any."""
    if config.name == "ema":
        return EmaStrategy(strategy, config, plan)
    if config.name == "lookahead":
        return LookaheadStrategy(strategy, config, plan)
    return strategy


class _AveragingStrategy(WrappedStrategy, ABC):
    """A subclass says what is averaged when, and where the average is used."""

    _name = "average"
    _entry: str
    """Name of the entry of each tensor in the optimizer's state."""

    def __init__(self, inner: Strategy, config: AverageConfig, plan: BatchPlan) -> None:
        super().__init__(inner)
        self._every_steps = config.every_steps
        self._average: Tensors = {}
        """By name; empty before the average has begun."""

    def step(self, lr: float) -> torch.Tensor:
        norm = super().step(lr)
        self._update()
        return norm

    def optimizer_state_dict(self) -> Tensors:
        own = {f"{name}.{self._entry}": tensor for name, tensor in self._saved().items()}
        return super().optimizer_state_dict() | own

    def load(self, model: Tensors, optimizer: Tensors, ranks: Tensors) -> None:
        ending = f".{self._entry}"
        saved = {name.removesuffix(ending): value for name, value in optimizer.items() if name.endswith(ending)}
        super().load(self._restore(model, saved), optimizer, ranks)

    @abstractmethod
    def _update(self) -> None:
        """Takes in the weights after step number `self._step`, counted from 1."""

    @abstractmethod
    def _saved(self) -> Tensors:
        """What a resume needs beside the model's state."""

    @abstractmethod
    def _restore(self, model: Tensors, saved: Tensors) -> Tensors:
        """Takes over the two that were saved; returns the weights that are trained."""

    @torch.no_grad()
    def _move(self, weights: Tensors, share: float) -> None:
        """Moves the average by `share` of its distance to `weights`."""
        averages, new = list(self._average.values()), [weights[name] for name in self._average]
        torch._foreach_lerp_(averages, new, share)


class EmaStrategy(_AveragingStrategy):
    """The model that is evaluated, selected and exported is an exponential moving average of the trained weights.

    average <- d average + (1 - d) weights every k steps, with d = 2^(-k / half-life in steps). It begins as a copy of
    the weights at `average.start_epoch`.
    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", SIAM 1992; for BatchNorm's
    statistics as for weights, Page, "How to train your ResNet 8: Bag of tricks", 2019.
    """

    _entry = "trained"

    def __init__(self, inner: Strategy, config: AverageConfig, plan: BatchPlan) -> None:
        super().__init__(inner, config, plan)
        self._start_step = max(1, round(config.start_epoch * plan.steps_per_epoch))
        self._share = 1 - 2.0 ** (-config.every_steps / (config.half_life_epochs * plan.steps_per_epoch))

    def model_state_dict(self) -> Tensors:
        return super().model_state_dict() | self._average

    def _update(self) -> None:
        if self._step < self._start_step:
            return
        if not self._average:
            self._average = _copy(self._inner.model_state_dict())
        elif self._step % self._every_steps == 0:
            self._move(self._inner.model_state_dict(), self._share)

    def _saved(self) -> Tensors:
        trained = self._inner.model_state_dict() if self._average else {}
        return {name: trained[name] for name in self._average}

    def _restore(self, model: Tensors, saved: Tensors) -> Tensors:
        self._average = {name: _like(self.module, name, model[name]) for name in saved}
        return model | saved


class LookaheadStrategy(_AveragingStrategy):
    """Every k steps average <- a average + (1 - a) weights, and the weights are set to that average.

    a = decay^k (t / T)^3 after step t of T, so that the weights are hardly held at the beginning and strongly at the
    end; after step T the weights are the average, and a run that ends early has its weights as they are between two
    updates. The optimizer's state is left as it is.
    Source: Zhang et al., "Lookahead optimizer: k steps forward, 1 step back", NeurIPS 2019; the growing factor is of
    Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024, section 3.4.
    """

    _entry = "slow"

    def __init__(self, inner: Strategy, config: AverageConfig, plan: BatchPlan) -> None:
        super().__init__(inner, config, plan)
        self._decay, self._total_steps = config.decay, plan.total_steps
        if self._every_steps > self._total_steps:
            raise ConfigError(
                f"average.every_steps: {self._every_steps} steps are more than the run has ({self._total_steps}), and"
                " lookahead would end with the initial weights; make it smaller"
            )
        self._average = _copy(inner.model_state_dict())

    def _update(self) -> None:
        is_due = self._step % self._every_steps == 0
        if not is_due and self._step != self._total_steps:
            return
        weights = self._inner.model_state_dict()
        if is_due:
            self._move(weights, 1 - self._decay**self._every_steps * (self._step / self._total_steps) ** 3)
        self._inner.load_model(weights | self._average)

    def _saved(self) -> Tensors:
        return self._average

    def _restore(self, model: Tensors, saved: Tensors) -> Tensors:
        self._average = {name: _like(self.module, name, value) for name, value in (saved or _copy(model)).items()}
        return model


def _copy(model: Tensors) -> Tensors:
    """A copy of the floating-point tensors."""
    return {name: tensor.detach().clone() for name, tensor in model.items() if tensor.is_floating_point()}


def _like(module: Any, name: str, value: torch.Tensor) -> torch.Tensor:
    """`value` with the device and memory format of the tensor `name` of a module, in memory of its own."""
    own = module.state_dict()[name]
    return torch.empty_like(own).copy_(value)
