"""Optimizers of torch's kind, torch's own and those that users write, as an `Optimizer` of this package.

Contract: the optimizer is used as torch documents it, so its steps have its bits. Its state must be tensors, which are
saved, cut and restored by the names of the parameters. A step that must change nothing is left out, which the host has
to know: it waits for the device once a step, unlike with fused Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from dist_cifar import plugins
from dist_cifar.config import OptimizerConfig
from dist_cifar.errors import ConfigError


class TorchOptimizer:
    """See `dist_cifar.optim.base.Optimizer`."""

    def __init__(
        self, parameters: Iterable[torch.Tensor], make: Callable[[list[Any]], torch.optim.Optimizer], origin: str
    ) -> None:
        """`make` makes the optimizer; `origin` begins the message of an error, e.g. `optimizer.name=my_parts:Lion`.

        Raises `ConfigError` if it makes none.
        """
        self._make, self._origin = make, origin
        self._optimizer = self._made(list(parameters))
        self.found_inf: torch.Tensor | None = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        return self._optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self._optimizer.state = state

    def new_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a step with a gradient of zeros makes of a copy of `parameter`, its count of steps set back."""
        probe = torch.zeros_like(parameter).requires_grad_()
        probe.grad = torch.zeros_like(probe)
        optimizer = self._made([probe])
        self._stepped(optimizer)
        state = dict(optimizer.state.get(probe, {}))
        if isinstance(state.get("step"), torch.Tensor):
            state["step"].zero_()
        return state

    @torch.no_grad()
    def step(self) -> None:
        if self.found_inf is None or not self.found_inf.item():
            self._stepped(self._optimizer)

    def zero_grad(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def _made(self, parameters: list[Any]) -> torch.optim.Optimizer:
        try:
            optimizer = self._make(parameters)
        except Exception as error:
            raise plugins.broken(self._origin, error, "making the optimizer") from None
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(f"{self._origin}: returns {type(optimizer).__name__}; it must be a torch.optim.Optimizer")
        return optimizer

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes a step, and checks that the state can be saved; what is None is no state."""
        try:
            optimizer.step()
        except Exception as error:
            raise plugins.broken(self._origin, error, "its step") from None
        for state in optimizer.state.values():
            for name in [name for name, value in state.items() if value is None]:
                del state[name]
            for name, value in state.items():
                if not isinstance(value, torch.Tensor):
                    raise ConfigError(
                        f"{self._origin}: its state {name} is {type(value).__name__}; keep a tensor there, e.g."
                        " torch.zeros(()), so that it can be saved"
                    )


def build_own(parameters: Iterable[torch.Tensor], config: OptimizerConfig) -> TorchOptimizer:
    """The optimizer from outside the package that `optimizer.name` names, over `parameters`."""
    component = plugins.find("optimizer", "optimizer.name", config.name)
    return TorchOptimizer(
        parameters,
        lambda given: component(given, lr=config.lr, **config.options),
        f"optimizer.name={config.name}",
    )
