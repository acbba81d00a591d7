"""SGD, from its section of the config."""

from __future__ import annotations

from dist_cifar.config import Config
from dist_cifar.optim.fused_sgd import FusedSGD
from dist_cifar.optim.grouped import Group


def build_sgd(groups: list[Group], config: Config) -> FusedSGD:
    """Fused SGD over `groups`, whose parameters are on one device and of one type."""
    optimizer = config.optimizer
    return FusedSGD(
        groups,
        lr=optimizer.lr,
        momentum=optimizer.momentum,
        nesterov=optimizer.nesterov,
        weight_decay=optimizer.weight_decay,
        decoupled=optimizer.decoupled_decay,
    )
