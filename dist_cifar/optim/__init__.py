"""The optimizers by name.

A new one is a file beside `adam.py`, with a builder that is entered in `OPTIMIZERS`; one from outside the package is
named in the config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from dist_cifar.config import OptimizerConfig
from dist_cifar.optim.adam import build_adam
from dist_cifar.optim.base import Optimizer, OptimizerFactory
from dist_cifar.optim.torch_optimizer import build_own

OptimizerBuilder = Callable[[Iterable[torch.Tensor], OptimizerConfig], Optimizer]
"""Makes an optimizer over parameters from its section of the config."""

OPTIMIZERS: dict[str, OptimizerBuilder] = {"adam": build_adam}
"""The builder of every optimizer by its name."""


def optimizer_factory(config: OptimizerConfig) -> OptimizerFactory:
    """Returns what makes the optimizer of `config` over some parameters. The strategy calls it, for it alone knows
    whether a rank steps whole parameters or parts of them."""
    build = OPTIMIZERS.get(config.name, build_own)
    return lambda parameters: build(parameters, config)
