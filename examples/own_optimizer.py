"""An optimizer of one's own: SGD with Nesterov's momentum.

    dist-cifar train --config configs/quickstart.yaml optimizer.name=examples.own_optimizer:Nesterov optimizer.lr=0.05

It is written as any `torch.optim.Optimizer`; `torch.optim:SGD` itself can be named too. Keep its state in tensors: they
are saved by the names of the parameters, cut up by `fsdp` and `deepspeed`, and restored on any number of ranks.

Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Nesterov(torch.optim.Optimizer):
    """The steps of `torch.optim.SGD(nesterov=True)`, to the last bit."""

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Takes one step of all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                if group["weight_decay"]:
                    gradient = gradient.add(parameter, alpha=group["weight_decay"])
                state = self.state[parameter]
                if "velocity" not in state:
                    state["velocity"] = torch.zeros_like(parameter)
                state["velocity"].mul_(group["momentum"]).add_(gradient)
                direction = gradient.add(state["velocity"], alpha=group["momentum"])
                parameter.add_(direction, alpha=-group["lr"])
