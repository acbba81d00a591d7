"""The optimizers by name.

A new one is a file beside `adam.py`, with a builder that is entered in `OPTIMIZERS`; one from outside the package is
named in the config.
"""

from __future__ import annotations

from collections.abc import Callable

from dist_cifar.config import Config
from dist_cifar.optim.adam import build_adam, build_adamw
from dist_cifar.optim.base import Optimizer, OptimizerFactory
from dist_cifar.optim.grouped import Group
from dist_cifar.optim.muon import build_muon
from dist_cifar.optim.parameter_groups import group_parameters
from dist_cifar.optim.sgd import build_sgd
from dist_cifar.optim.torch_optimizer import build_own

OptimizerBuilder = Callable[[list[Group], Config], Optimizer]
"""Makes an optimizer over groups of parameters from a config."""

OPTIMIZERS: dict[str, OptimizerBuilder] = {
    "adam": build_adam,
    "adamw": build_adamw,
    "sgd": build_sgd,
    "muon": build_muon,
}
"""The builder of every optimizer by its name."""


def optimizer_factory(config: Config) -> OptimizerFactory:
    """Returns what makes the optimizer of `config` over some named parameters. The strategy calls it, for it alone
    knows whether a rank steps whole parameters or parts of them."""
    build = OPTIMIZERS.get(config.optimizer.name, build_own)
    return lambda parameters: build(group_parameters(parameters, config.optimizer), config)
