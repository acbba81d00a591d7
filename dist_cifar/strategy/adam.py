"""Adam, and its state by the names of the parameters."""

from __future__ import annotations

import torch
from torch import nn

from dist_cifar.config import OptimizerConfig
from dist_cifar.strategy import Tensors
from dist_cifar.strategy.fused_adam import FusedAdam

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""Adam's state of one parameter."""


def build_adam(module: nn.Module, config: OptimizerConfig) -> FusedAdam:
    """Fused Adam over the parameters of `module`."""
    return FusedAdam(
        module.parameters(), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )


def adam_step(optimizer: FusedAdam, lr: float, grad_norm: torch.Tensor) -> None:
    """One step at `lr`, and no gradients left. Where the norm [] is not finite nothing changes.

    The device decides: nothing waits for it.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.found_inf = (~grad_norm.isfinite()).to(torch.float32)  # what torch's GradScaler gives to fused optimizers
    optimizer.step()
    optimizer.zero_grad()


def adam_tensors(module: nn.Module, optimizer: FusedAdam) -> Tensors:
    """`<parameter>.<moment>` to tensor, on the device of the optimizer."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {
        f"{names[parameter]}.{moment}": moments[moment].detach()
        for parameter, moments in optimizer.state.items()
        for moment in _MOMENTS
    }


def load_adam(module: nn.Module, optimizer: FusedAdam, tensors: Tensors) -> None:
    """Restores what `adam_tensors` gave; parameters without moments are left as new."""
    for name, parameter in module.named_parameters():
        moments = {moment: tensors.get(f"{name}.{moment}") for moment in _MOMENTS}
        if moments["step"] is not None:
            # Like the parameter in memory format and device; the step count stays where fused Adam keeps it.
            optimizer.state[parameter] = {
                "step": moments["step"].to(parameter.device),
                "exp_avg": torch.empty_like(parameter).copy_(moments["exp_avg"]),
                "exp_avg_sq": torch.empty_like(parameter).copy_(moments["exp_avg_sq"]),
            }
