"""Which ranks of the tree of `dist_cifar.strategy.tree_reduce` exchange their sums, and in which order.

Contract: pure functions of the hosts of the ranks and of the number of leaves; every plan gives the same bits. Flat is
one level: all ranks with each other. Where several hosts have as many ranks each, which are neighbours and whose leaves
are together one node of the tree, the ranks of a host exchange first, and then those that have the same place on their
hosts, with what the level before has left them: with L ranks a host, that sends 1/L of the bytes of the flat exchange
from host to host. In the same way more than `MOST_AT_ONCE` ranks, or hosts, exchange in several levels, so that the
messages of a rank grow with the logarithm of the ranks; the bytes stay.

Source: Cho et al., "BlueConnect", MLSys 2019, for all-reduces of levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from dist_cifar.data.batching import share
from dist_cifar.strategy.tree_nodes import Node, nodes_of

MOST_AT_ONCE = 8
"""Ranks that send to each other directly, where more can be shared out among levels."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """An exchange among some ranks."""

    groups: list[list[int]]
    """The ranks of each group, in the order of their leaves; every rank is in one group, and all are of one size."""
    nodes: list[list[Node]]
    """The nodes of the tree that each rank of this rank's group brings, from left to right."""


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """Ranks that have exchanged: each has a part of the sum of `held`, the first of every unit the same part."""

    ranks: list[int]
    held: range


def plan_levels(hosts: Sequence[str], rank: int, *, leaves: int) -> tuple[list[Level], str | None]:
    """The levels for `rank` of ranks on `hosts`; and why hosts do not matter where ranks are neighbours on several."""
    world_size = len(hosts)
    units = [_Unit(ranks=[r], held=share(r, parts=world_size, count=leaves)) for r in range(world_size)]
    of_a_host, why_flat = _ranks_of_a_host(hosts, units, leaves=leaves)
    levels: list[Level] = []
    while len(units) > 1:
        within = of_a_host // len(units[0].ranks)
        size = _size_of_a_run(units, within if within > 1 else len(units), leaves=leaves)
        runs = [units[i : i + size] for i in range(0, len(units), size)]
        own = next(run for run in runs if any(rank in unit.ranks for unit in run))
        groups = [list(places) for run in runs for places in zip(*(unit.ranks for unit in run), strict=True)]
        levels.append(Level(groups=groups, nodes=[nodes_of(unit.held, leaves=leaves) for unit in own]))
        units = [_merged(run) for run in runs]
    return levels or [flat_level(world_size, leaves=leaves)], why_flat


def flat_level(world_size: int, *, leaves: int) -> Level:
    """All ranks with each other."""
    held = (share(rank, parts=world_size, count=leaves) for rank in range(world_size))
    return Level(groups=[list(range(world_size))], nodes=[nodes_of(one, leaves=leaves) for one in held])


def describe_levels(hosts: Sequence[str], *, leaves: int) -> str | None:
    """How ranks on `hosts` exchange where that is not in one level, or could be in several."""
    levels, why_flat = plan_levels(hosts, 0, leaves=leaves)
    sizes = [len(level.groups[0]) for level in levels]
    if why_flat is not None:
        return f"in groups of {' x '.join(map(str, sizes))} ranks wherever they are, since {why_flat}"
    if len(levels) == 1:
        return None
    order = ", within hosts first" if _share_hosts(hosts) else ""
    return f"in {len(levels)} levels of {' x '.join(map(str, sizes))} ranks{order}"


def _share_hosts(hosts: Sequence[str]) -> bool:
    """Whether there are several hosts, and several ranks on one of them."""
    return len(set(hosts)) not in (1, len(hosts))


def _ranks_of_a_host(hosts: Sequence[str], units: Sequence[_Unit], *, leaves: int) -> tuple[int, str | None]:
    """How many ranks of a host exchange before others, else 1; and why it is 1 where several ranks are neighbours."""
    runs = [list(ranks) for _, ranks in groupby(range(len(hosts)), key=lambda other: hosts[other])]
    if not _share_hosts(hosts):
        return 1, None
    if len(runs) > len(set(hosts)):
        return 1, "the ranks of a host are not neighbours"
    if len({len(run) for run in runs}) > 1:
        return 1, "hosts have different numbers of ranks"
    if not _are_nodes([[units[rank] for rank in run] for run in runs], leaves=leaves):
        return 1, f"the virtual ranks of a host are no subtree of {leaves}"
    return len(runs[0]), None


def _size_of_a_run(units: Sequence[_Unit], most: int, *, leaves: int) -> int:
    """How many neighbours exchange next, a divisor of `most`: at most `MOST_AT_ONCE`, if what they hold are nodes."""
    for size in range(min(most, MOST_AT_ONCE), 1, -1):
        runs = [units[i : i + size] for i in range(0, len(units), size)]
        if most % size == 0 and (size == len(units) or _are_nodes(runs, leaves=leaves)):
            return size
    return most


def _are_nodes(runs: Sequence[Sequence[_Unit]], *, leaves: int) -> bool:
    return all(len(nodes_of(_merged(run).held, leaves=leaves)) == 1 for run in runs)


def _merged(run: Sequence[_Unit]) -> _Unit:
    ranks = [rank for unit in run for rank in unit.ranks]
    return _Unit(ranks=ranks, held=range(run[0].held.start, run[-1].held.stop))
