"""What the package's own optimizers share: groups of parameters, a state by parameter, steps of whole groups.

Contract: `GroupedOptimizer` is an `Optimizer` of this package without importing torch.optim, whose every class imports
torch's compiler when it is made: that takes longer than all else before the first step, torch itself excepted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch

State = dict[str, torch.Tensor]
"""The state of one parameter."""
Group = dict[str, Any]
"""As in torch: `params` and what differs from other groups, here `lr_scale` and `decay_scale`, which are 1 if unset,
and `epochs`, for which the group is trained if that is not None."""


class GroupedOptimizer(ABC):
    """See `dist_cifar.optim.base.Optimizer`. A subclass says what its state is and how it is stepped."""

    def __init__(self, parameters: Iterable[torch.Tensor] | Iterable[Group], *, lr: float, weight_decay: float) -> None:
        """`parameters`, or groups of them, are on one device and of one type."""
        given: list[Any] = list(parameters)
        groups: list[Group] = given if given and isinstance(given[0], dict) else [{"params": given}]
        self.param_groups: list[Group] = [
            {
                **group,
                "lr": lr * group.get("lr_scale", 1.0),
                "weight_decay": weight_decay * group.get("decay_scale", 1.0),
            }
            for group in groups
        ]
        """The `lr` of a group is that of the next step."""
        self.state: dict[torch.Tensor, State] = {}
        """What `new_state` makes, for each parameter that has had a gradient."""
        self.found_inf: torch.Tensor | None = None
        """float32 []: where it is 1, the next step changes nothing."""

    @abstractmethod
    def new_state(self, parameter: torch.Tensor) -> State:
        """The state of `parameter` before its first step, shaped and laid out as the kernels require."""

    @abstractmethod
    def update(self, group: Group, parameters: list[torch.Tensor], states: list[State]) -> None:
        """Steps those `parameters` of a group that have gradients, and their states; nothing where `found_inf` is 1."""

    @torch.no_grad()
    def step(self) -> None:
        """Takes one step of all parameters that have a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if parameter not in self.state:
                    self.state[parameter] = self.new_state(parameter)
            if parameters:
                self.update(group, parameters, [self.state[parameter] for parameter in parameters])

    def zero_grad(self) -> None:
        """Clears all gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def gradients(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients of parameters that have one."""
    return [parameter.grad for parameter in parameters]  # type: ignore[misc]  # none of them is None


def decay(parameters: list[torch.Tensor], rate: float, found_inf: torch.Tensor | None) -> None:
    """Multiplies `parameters` by 1 - `rate`, or by 1 where `found_inf` is 1: decoupled weight decay.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.
    """
    if rate == 0:
        return
    if found_inf is None:
        torch._foreach_mul_(parameters, 1 - rate)
    else:
        torch._foreach_mul_(parameters, torch.where(found_inf > 0, 1.0, 1 - rate))
