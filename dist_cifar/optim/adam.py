"""Adam, and its state by the names of the parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from dist_cifar.config import OptimizerConfig
from dist_cifar.optim.fused_adam import FusedAdam

Tensors = dict[str, torch.Tensor]
"""By name."""

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""Adam's state of one parameter."""


if TYPE_CHECKING:
    Adam = FusedAdam | torch.optim.Adam


def build_adam(parameters: Iterable[torch.Tensor], config: OptimizerConfig) -> FusedAdam:
    """Fused Adam over `parameters`."""
    return FusedAdam(parameters, **adam_options(config))


def adam_options(config: OptimizerConfig) -> dict[str, Any]:
    """The keyword arguments of Adam, torch's and ours."""
    return {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}


def clip(optimizer: Adam, max_grad_norm: float | None, grad_norm: torch.Tensor) -> None:
    """Scales the gradients, whose norm [] is given, to `max_grad_norm` where it is larger, and makes the next step of
    the optimizer change nothing where it is not finite.

    The device decides: nothing waits for it.
    """
    if max_grad_norm is not None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm)
    # What torch's GradScaler gives to fused optimizers; torch.optim.Adam does not declare it.
    optimizer.found_inf = (~grad_norm.isfinite()).to(torch.float32)  # type: ignore[union-attr]


def adam_step(optimizer: FusedAdam, lr: float, max_grad_norm: float | None, grad_norm: torch.Tensor) -> None:
    """Clips, takes one step at `lr` and leaves no gradients; see `clip`."""
    set_lr(optimizer, lr)
    clip(optimizer, max_grad_norm, grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def set_lr(optimizer: Adam, lr: float) -> None:
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def sharded_norm(gradients: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The L2 norm [], float32, of gradients of which every rank holds a part. A collective; no host waits for it."""
    own = nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=device)
    squares = own.double().square()
    dist.all_reduce(squares)
    return squares.sqrt().float()


def adam_tensors(module: nn.Module, optimizer: Adam) -> Tensors:
    """`<parameter>.<moment>` to tensor, on the device of the optimizer."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    return {
        f"{names[parameter]}.{moment}": moments[moment].detach()
        for parameter, moments in optimizer.state.items()
        for moment in MOMENTS
    }


def load_adam(module: nn.Module, optimizer: Adam, tensors: Tensors) -> None:
    """Restores what `adam_tensors` gave; parameters without moments are left as new."""
    for name, parameter in module.named_parameters():
        if f"{name}.step" in tensors:
            moments = {moment: tensors[f"{name}.{moment}"] for moment in MOMENTS}
            # Like the parameter in memory format and device; the step count stays where fused Adam keeps it.
            optimizer.state[parameter] = {
                "step": moments["step"].to(parameter.device, copy=True),
                "exp_avg": torch.empty_like(parameter).copy_(moments["exp_avg"]),
                "exp_avg_sq": torch.empty_like(parameter).copy_(moments["exp_avg_sq"]),
            }
