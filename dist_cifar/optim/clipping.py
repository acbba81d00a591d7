"""Clipping by the global norm, and steps that change nothing where that norm is not finite.

Contract: the device decides, and the host waits for nothing. The norm is an argument: a strategy knows how it is
computed from what its ranks hold.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from dist_cifar.optim.base import Optimizer


def clip_by_norm(optimizer: Optimizer, max_grad_norm: float | None, grad_norm: torch.Tensor) -> None:
    """Scales the gradients, whose norm [] is given, to `max_grad_norm` where it is larger, and makes the next step of
    the optimizer change nothing where it is not finite."""
    if max_grad_norm is not None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm)
    optimizer.found_inf = (~grad_norm.isfinite()).to(torch.float32)


def clipped_step(optimizer: Optimizer, lr: float, max_grad_norm: float | None, grad_norm: torch.Tensor) -> None:
    """Clips, takes one step at `lr` and clears the gradients; see `clip_by_norm`."""
    set_lr(optimizer, lr)
    clip_by_norm(optimizer, max_grad_norm, grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Sets the learning rate of the next step; a group may have an `lr_scale` by which its own is multiplied."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def sharded_norm(gradients: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The L2 norm [], float32, of gradients of which every rank holds a part. A collective; no host waits for it."""
    own = nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=device)
    squares = own.double().square()
    dist.all_reduce(squares)
    return squares.sqrt().float()
