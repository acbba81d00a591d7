"""The fused step of torch.optim.SGD without torch.optim, and its variant with decoupled weight decay.

Contract: `FusedSGD` gives the bits of `torch.optim.SGD(fused=True)`; with `decoupled`, those of its step without decay
after the weights have been multiplied by 1 - lr wd.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dist_cifar.optim.grouped import Group, GroupedOptimizer, State, decay, gradients


class FusedSGD(GroupedOptimizer):
    """SGD with momentum, one kernel for a group.

    g += wd w; m = mu m + g; w -= lr (g + mu m if Nesterov else m). The first m is g.
    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013.
    """

    def __init__(
        self,
        parameters: Iterable[torch.Tensor] | Iterable[Group],
        *,
        lr: float,
        momentum: float,
        nesterov: bool,
        weight_decay: float,
        decoupled: bool,
    ) -> None:
        super().__init__(parameters, lr=lr, weight_decay=weight_decay)
        self._momentum, self._nesterov, self._decoupled = momentum, nesterov, decoupled

    def new_state(self, parameter: torch.Tensor) -> State:
        """`momentum_buffer`, shaped and laid out as the parameter, as the kernel requires; nothing without momentum."""
        return {"momentum_buffer": torch.zeros_like(parameter)} if self._momentum else {}

    def update(self, group: Group, parameters: list[torch.Tensor], states: list[State]) -> None:
        if self._decoupled:
            decay(parameters, group["lr"] * group["weight_decay"], self.found_inf)
        torch._fused_sgd_(
            parameters,
            gradients(parameters),
            [state["momentum_buffer"] for state in states] if self._momentum else [],
            lr=group["lr"],
            weight_decay=0.0 if self._decoupled else group["weight_decay"],
            momentum=self._momentum,
            dampening=0.0,
            nesterov=self._nesterov,
            maximize=False,
            is_first_step=False,  # a buffer of zeros becomes the gradient
            found_inf=self.found_inf,
        )
