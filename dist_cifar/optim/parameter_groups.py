"""The parameters of a network in groups, each with its length and its factors on the learning rate and the decay.

Contract: a pure function of names, dimensions and the config; the order of the parameters is kept within a group.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch

from dist_cifar.config import GroupRule, OptimizerConfig
from dist_cifar.errors import ConfigError, listed
from dist_cifar.optim.grouped import Group

_OTHERS = GroupRule(match="*")


def group_parameters(parameters: Iterable[tuple[str, torch.Tensor]], config: OptimizerConfig) -> list[Group]:
    """Groups of the named `parameters`: of each, the first rule of `optimizer.groups` that matches its name holds, and
    its decay is 0 where it has fewer than two dimensions and `optimizer.decay_norms_and_biases` is off.

    Raises `ConfigError` for a rule that holds for no parameter.
    """
    named = list(parameters)
    for number, rule in enumerate(config.groups):
        matched = [name for name, _ in named if fnmatchcase(name, rule.match)]
        if not matched:
            names = listed([name for name, _ in named], most=5)
            raise ConfigError(f"optimizer.groups: {rule.match} matches no parameter; there are {names}")
        earlier = [other.match for other in config.groups[:number]]
        if all(any(fnmatchcase(name, match) for match in earlier) for name in matched):
            raise ConfigError(
                f"optimizer.groups: {rule.match} holds for no parameter, since earlier rules ({listed(earlier)}) match"
                " all of its own; put it before them"
            )
    groups: dict[tuple[float, float, float | None], list[torch.Tensor]] = {}
    for name, parameter in named:
        rule = next((rule for rule in config.groups if fnmatchcase(name, rule.match)), _OTHERS)
        decays = config.decay_norms_and_biases or parameter.dim() > 1
        factors = (rule.lr_scale, rule.decay_scale if decays else 0.0, rule.epochs)
        groups.setdefault(factors, []).append(parameter)
    return [
        {"params": members, "lr_scale": lr_scale, "decay_scale": decay_scale, "epochs": epochs}
        for (lr_scale, decay_scale, epochs), members in groups.items()
    ]
