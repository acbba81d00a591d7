"""Adam, from its section of the config."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dist_cifar.config import OptimizerConfig
from dist_cifar.optim.fused_adam import FusedAdam


def build_adam(parameters: Iterable[torch.Tensor], config: OptimizerConfig) -> FusedAdam:
    """Fused Adam over `parameters`, which are on one device and of one type."""
    return FusedAdam(parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
