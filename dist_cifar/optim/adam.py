"""Adam and AdamW, from their section of the config."""

from __future__ import annotations

from typing import Any

from dist_cifar.config import Config, OptimizerConfig
from dist_cifar.optim.fused_adam import FusedAdam, FusedAdamW
from dist_cifar.optim.grouped import Group


def build_adam(groups: list[Group], config: Config) -> FusedAdam:
    """Fused Adam over `groups`, whose parameters are on one device and of one type."""
    return FusedAdam(groups, **_settings(config.optimizer))


def build_adamw(groups: list[Group], config: Config) -> FusedAdamW:
    """Fused AdamW over `groups`, likewise."""
    return FusedAdamW(groups, **_settings(config.optimizer))


def _settings(optimizer: OptimizerConfig) -> dict[str, Any]:
    return {
        "lr": optimizer.lr,
        "betas": optimizer.betas,
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
    }
