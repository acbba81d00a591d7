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
from dist_cifar.config import Config
from dist_cifar.errors import ConfigError
from dist_cifar.optim.grouped import Group


class TorchOptimizer:
    """See `dist_cifar.optim.base.Optimizer`."""

    def __init__(
        self,
        parameters: Iterable[torch.Tensor] | Iterable[Group],
        make: Callable[[list[Any]], torch.optim.Optimizer],
        origin: str,
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


def build_own(groups: list[Group], config: Config) -> TorchOptimizer:
    """The optimizer from outside the package that `optimizer.name` names, over `groups`.

    Raises `ConfigError` where groups have settings of their own that the optimizer cannot follow.
    """
    name, options = config.optimizer.name, config.optimizer.options
    component = plugins.find("optimizer", "optimizer.name", name)
    made = TorchOptimizer(
        groups if len(groups) > 1 else groups[0]["params"],
        lambda given: component(given, lr=config.optimizer.lr, **options),
        f"optimizer.name={name}",
    )
    if all(group["lr_scale"] == group["decay_scale"] == 1 and group["epochs"] is None for group in groups):
        return made
    field = "groups" if config.optimizer.groups else "decay_norms_and_biases"
    if len(made.param_groups) != len(groups):
        raise ConfigError(f"optimizer.{field}: does not go with optimizer.name={name}, which makes groups of its own")
    for group, given in zip(made.param_groups, groups, strict=True):
        group["lr_scale"], group["epochs"] = given["lr_scale"], given["epochs"]
        if given["decay_scale"] != 1:
            if "weight_decay" not in group:
                raise ConfigError(f"optimizer.{field}: optimizer.name={name} has no weight_decay that could be scaled")
            group["weight_decay"] *= given["decay_scale"]
    return made
