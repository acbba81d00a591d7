"""Adam, from its section of the config."""

from __future__ import annotations

from dist_cifar.config import Config
from dist_cifar.optim.fused_adam import FusedAdam
from dist_cifar.optim.grouped import Group


def build_adam(groups: list[Group], config: Config) -> FusedAdam:
    """Fused Adam over `groups`, whose parameters are on one device and of one type."""
    optimizer = config.optimizer
    return FusedAdam(
        groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay
    )
