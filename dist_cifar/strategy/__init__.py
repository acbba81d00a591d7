"""How the replicas of the model are kept in step: the strategies by name, and the properties of each.

Contract: this module imports no torch. The command line asks for a strategy's properties before torch is imported,
since the number of threads has to be set by then.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dist_cifar import plugins
from dist_cifar.config import BatchConfig, Config, StrategyConfig
from dist_cifar.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from dist_cifar.data.batching import BatchPlan
    from dist_cifar.distributed.collectives import Communicator
    from dist_cifar.strategy.base import Strategy


@dataclass(frozen=True, kw_only=True)
class StrategyProperties:
    """What is known of a strategy before its module is imported."""

    class_path: str = ""
    """`module:class` of the `Strategy`, made from a module, the config, and by keyword `communicator`, `plan` and
    `make_optimizer`; nothing needs it of one from outside the package."""
    bitwise: bool = False
    """The weights have the same bits on every number of ranks: a global batch is cut into `strategy.virtual_ranks`
    slices, kernels are deterministic, and the numerics of the machine are compared at the start and at a resume."""
    single_threaded: bool = False
    """A rank has one CPU thread by default, since the number of threads changes how sums are rounded."""
    casts_once: bool = False
    """Weights are cast to bf16 once a step, not in each of its passes: not where a rank has them for a pass alone."""
    equal_shares: bool = False
    """Every rank must have as many samples of a global batch as the others."""
    auto_compile: bool = False
    """Whether `compute.compile=auto` may compile the module: not where it would change a promise, nor where no GPU has
    seen what the strategy wraps around a compiled module."""


STRATEGIES = {
    "exact": StrategyProperties(
        class_path="dist_cifar.strategy.exact:ExactStrategy", bitwise=True, single_threaded=True, casts_once=True
    ),
    "ddp": StrategyProperties(class_path="dist_cifar.strategy.ddp:DdpStrategy", auto_compile=True),
    "deepspeed": StrategyProperties(class_path="dist_cifar.strategy.deepspeed:DeepSpeedStrategy", equal_shares=True),
    "fsdp": StrategyProperties(class_path="dist_cifar.strategy.fsdp:FsdpStrategy"),
}
"""Every strategy by its name."""


def properties(config: StrategyConfig) -> StrategyProperties:
    """The properties of the strategy that `strategy.name` names; of one from outside the package its class attribute
    `properties`, if it has one."""
    if config.name in STRATEGIES:
        return STRATEGIES[config.name]
    found: StrategyProperties = getattr(_own(config), "properties", StrategyProperties())
    return found


def _own(config: StrategyConfig) -> Any:
    return plugins.find("strategy", "strategy.name", config.name)


def bitwise_strategy() -> str:
    """The name of the strategy whose weights have the same bits on every number of ranks."""
    return next(name for name, known in STRATEGIES.items() if known.bitwise)


def slice_count(batch: BatchConfig, config: StrategyConfig, *, world_size: int) -> int:
    """How many slices of the global batch are computed each by itself: at least one for each rank.

    Raises `ConfigError` where a rank would have nothing to compute, or less than another one in a strategy that
    cannot do with that.
    """
    known = properties(config)
    if known.bitwise:
        if config.virtual_ranks < world_size:
            raise ConfigError(
                f"strategy.virtual_ranks: {world_size} ranks cannot share {config.virtual_ranks} virtual ranks, since"
                f" each computes whole ones; start at most {config.virtual_ranks} ranks, or set more virtual ranks (in"
                " a new run: they are part of the result)"
            )
        return config.virtual_ranks
    if batch.global_size is not None and batch.global_size < world_size:
        raise ConfigError(
            f"batch.global_size: {world_size} ranks cannot share a global batch of {batch.global_size}; make it larger,"
            f" or start at most {batch.global_size} ranks"
        )
    if known.equal_shares and batch.global_size is not None and batch.global_size % world_size:
        lower = batch.global_size // world_size * world_size
        near = f"{lower} or {lower + world_size}" if lower else f"{world_size}"
        raise ConfigError(
            f"batch.global_size: {batch.global_size} samples cannot be shared equally by {world_size} ranks, which"
            f" strategy.name={config.name} needs; set batch.global_size={near}, or start another number of ranks"
        )
    return world_size


GOOD_SHARE = 0.9
"""The least share of a step that ranks may compute, on average, before another number of virtual ranks is proposed."""


def waiting(batch: BatchConfig, config: StrategyConfig, *, world_size: int) -> tuple[str, str] | None:
    """Where ranks have different numbers of virtual ranks: how much of a step they compute, and if that is little, what
    to do about it, else nothing. None where all have as many, and where there are too few."""
    count = config.virtual_ranks
    if not properties(config).bitwise or batch.global_size is None or count % world_size == 0 or count < world_size:
        return None
    computing = _computing(count, world_size)
    found = (
        f"{world_size} ranks share {count} virtual ranks: each computes {computing:.0%} of a step on average, and waits"
        " for those that have one more"
    )
    divisors = [n for n in range(world_size, batch.global_size + 1) if batch.global_size % n == 0]
    better = [n for n in divisors if _computing(n, world_size) >= GOOD_SHARE]
    if computing >= GOOD_SHARE or not better:
        return found, ""
    best = min(better, key=lambda n: (max(n, count) / min(n, count), n))
    share = f"{_computing(best, world_size):.0%}"
    return found, f"strategy.virtual_ranks={best} would make that {share}, in a new run: it is part of the result"


def _computing(virtual_ranks: int, world_size: int) -> float:
    """The share of a step that a rank computes, on average."""
    return virtual_ranks / world_size / -(-virtual_ranks // world_size)


def build_strategy(module: nn.Module, config: Config, *, communicator: Communicator, plan: BatchPlan) -> Strategy:
    """The strategy that `strategy.name` names, around `module`. The modules of the others are not imported."""
    from dist_cifar.optim import optimizer_factory
    from dist_cifar.strategy.averaging import averaged
    from dist_cifar.strategy.freezing import GroupLengths

    make_strategy: Callable[..., Strategy]
    if config.strategy.name in STRATEGIES:
        module_name, _, class_name = properties(config.strategy).class_path.partition(":")
        make_strategy = getattr(importlib.import_module(module_name), class_name)
    else:
        make_strategy = _own(config.strategy)
    lengths = GroupLengths(plan)
    make_optimizer = lengths.noted(optimizer_factory(config))
    strategy = make_strategy(module, config, communicator=communicator, plan=plan, make_optimizer=make_optimizer)
    return averaged(lengths.kept(strategy), config.average, plan)
