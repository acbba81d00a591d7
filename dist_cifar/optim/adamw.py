"""AdamW, from its section of the config."""

from __future__ import annotations

from dist_cifar.config import Config
from dist_cifar.optim.fused_adam import FusedAdamW
from dist_cifar.optim.grouped import Group


def build_adamw(groups: list[Group], config: Config) -> FusedAdamW:
    """Fused AdamW over `groups`, whose parameters are on one device and of one type."""
    optimizer = config.optimizer
    return FusedAdamW(
        groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay
    )
