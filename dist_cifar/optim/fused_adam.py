"""The fused steps of torch.optim.Adam and AdamW without torch.optim.

Contract: `FusedAdam` gives the bits of `torch.optim.Adam(fused=True)`, `FusedAdamW` those of `AdamW(fused=True)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from dist_cifar.optim.grouped import Group, GroupedOptimizer, State, gradients


class FusedAdam(GroupedOptimizer):
    """Adam with L2 weight decay, one kernel for a group. Source: Kingma and Ba, ICLR 2015; torch.optim.Adam.

    g += wd w; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; w -= lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    """

    _kernel: Callable[..., None] = staticmethod(torch._fused_adam_)

    def __init__(
        self,
        parameters: Iterable[torch.Tensor] | Iterable[Group],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        super().__init__(parameters, lr=lr, weight_decay=weight_decay)
        self._constants: dict[str, Any] = {"beta1": betas[0], "beta2": betas[1], "eps": eps}

    def new_state(self, parameter: torch.Tensor) -> State:
        """`step` [], `exp_avg` and `exp_avg_sq`, shaped and laid out as the parameter, which the kernel requires."""
        return {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }

    def update(self, group: Group, parameters: list[torch.Tensor], states: list[State]) -> None:
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        self._kernel(
            parameters,
            gradients(parameters),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            **self._constants,
            amsgrad=False,
            maximize=False,
            found_inf=self.found_inf,
        )
        if self.found_inf is not None:
            torch._foreach_sub_(steps, [self.found_inf] * len(steps))


class FusedAdamW(FusedAdam):
    """Adam with decoupled weight decay: w *= 1 - lr wd, then Adam's step without it.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019; torch.optim.AdamW.
    """

    _kernel = staticmethod(torch._fused_adamw_)
