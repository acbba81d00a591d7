"""What an optimizer is, and its state by the names of the parameters, whatever that state consists of.

Contract: no function here knows an optimizer by name. What `new_state` returns says which entries there are; a tensor
of the parameter's shape belongs to its elements, any other (a count of steps) to the parameter as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn


class Optimizer(Protocol):
    """That part of `torch.optim.Optimizer` which the strategies use, with a state that can be made ahead of a step."""

    param_groups: list[dict[str, Any]]
    """As in torch: `params` and `lr` of each group; `lr` is that of the next step."""
    state: dict[torch.Tensor, dict[str, torch.Tensor]]
    """The state of each parameter that has been stepped or restored."""
    found_inf: torch.Tensor | None
    """float32 []: where it is 1, the next step changes nothing; torch's GradScaler gives it to fused optimizers."""

    def new_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state of `parameter` before its first step, like it in device and memory format."""
        ...

    def step(self) -> None:
        """Takes one step of all parameters that have a gradient."""
        ...

    def zero_grad(self) -> None:
        """Clears all gradients."""
        ...


OptimizerFactory = Callable[[Iterable[tuple[str, torch.Tensor]]], Optimizer]
"""Makes the optimizer of a run over the given parameters, with their names: rules of the config go by them."""


def trained_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are trained, with their names."""
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def optimizer_state_dict(module: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """The state as `<parameter>.<entry>` to tensor, on the device of the optimizer."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    return {
        f"{names[parameter]}.{key}": value.detach()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_state_dict(module: nn.Module, optimizer: Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Restores what `optimizer_state_dict` returned; a parameter that has no entry in it is left without state."""
    for name, parameter in module.named_parameters():
        state = optimizer.new_state(parameter)
        if any(f"{name}.{key}" in tensors for key in state):
            for key, value in state.items():
                value.copy_(tensors[f"{name}.{key}"])
            optimizer.state[parameter] = state


def is_per_element(value: torch.Tensor, parameter: torch.Tensor) -> bool:
    """Whether an entry of the state of `parameter` belongs to its elements, and is cut up as the parameter is."""
    return value.shape == parameter.shape
