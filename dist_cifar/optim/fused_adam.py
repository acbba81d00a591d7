"""The fused step of torch.optim.Adam without torch.optim, whose every class imports torch's compiler when it is made:
that takes longer than all else before the first step, torch itself excepted.

Contract: `FusedAdam` gives the bits of `torch.optim.Adam(fused=True)` and is an `Optimizer` of this package.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class FusedAdam:
    """Adam with L2 weight decay, one kernel for all parameters. Source: Kingma and Ba, ICLR 2015; torch.optim.Adam."""

    def __init__(
        self,
        parameters: Iterable[torch.Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        """`parameters` are on one device and of one type."""
        self.param_groups: list[dict[str, Any]] = [{"params": list(parameters), "lr": lr}]
        """One group; its `lr` is that of the next step."""
        self.state: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
        """What `new_state` makes, for each parameter that has had a gradient."""
        self.found_inf: torch.Tensor | None = None
        """float32 []: where it is 1, the next step changes nothing."""
        self._constants: dict[str, Any] = {
            "beta1": betas[0],
            "beta2": betas[1],
            "eps": eps,
            "weight_decay": weight_decay,
        }

    def new_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """`step` [], `exp_avg` and `exp_avg_sq`, shaped and laid out as the parameter, which the kernel requires."""
        return {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }

    @torch.no_grad()
    def step(self) -> None:
        """Takes one step of all parameters that have a gradient."""
        group = self.param_groups[0]
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in parameters:
            if parameter not in self.state:
                self.state[parameter] = self.new_state(parameter)
        states = [self.state[parameter] for parameter in parameters]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        torch._fused_adam_(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps,
            lr=group["lr"],
            **self._constants,
            amsgrad=False,
            maximize=False,
            found_inf=self.found_inf,
        )
        if self.found_inf is not None:
            torch._foreach_sub_(steps, [self.found_inf] * len(steps))

    def zero_grad(self) -> None:
        """Clears all gradients."""
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None
