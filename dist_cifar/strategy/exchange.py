"""Which ranks of the tree of `dist_cifar.strategy.tree_reduce` exchange their sums, and in which order.

Contract: pure functions of the hosts of the ranks and of the number of leaves; every plan gives the same bits. Flat is
one level: all ranks with each other. Where several hosts have as many ranks each, which are neighbours and whose leaves
are together one node of the tree, there are two: first the ranks of a host among each other, and then those that have
the same place on their hosts, with what the first level has left them. With L ranks a host, that sends 1/L of the bytes
of the flat exchange from host to host.

Source: Cho et al., "BlueConnect", MLSys 2019, for all-reduces of levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from dist_cifar.data.batching import share
from dist_cifar.strategy.tree_nodes import Node, nodes_of


@dataclass(frozen=True, kw_only=True)
class Level:
    """An exchange among some ranks."""

    groups: list[list[int]]
    """The ranks of each group, in the order of their leaves; every rank is in one group, and all are of one size."""
    nodes: list[list[Node]]
    """The nodes of the tree that each rank of this rank's group brings, from left to right."""


def plan_levels(hosts: Sequence[str], rank: int, *, leaves: int) -> tuple[list[Level], str | None]:
    """The levels for `rank` of ranks on `hosts`; and why it is flat where ranks are neighbours on several hosts."""
    world_size = len(hosts)
    held = [share(other, parts=world_size, count=leaves) for other in range(world_size)]
    flat = [Level(groups=[list(range(world_size))], nodes=[nodes_of(one, leaves=leaves) for one in held])]
    runs = [list(ranks) for _, ranks in groupby(range(world_size), key=lambda other: hosts[other])]
    if len(set(hosts)) in (1, world_size):
        return flat, None
    if len(runs) > len(set(hosts)):
        return flat, "the ranks of a host are not neighbours"
    if len({len(run) for run in runs}) > 1:
        return flat, "hosts have different numbers of ranks"
    of_hosts = [nodes_of(range(held[run[0]].start, held[run[-1]].stop), leaves=leaves) for run in runs]
    if any(len(nodes) > 1 for nodes in of_hosts):
        return flat, f"the virtual ranks of a host are no subtree of {leaves}"
    own = next(run for run in runs if rank in run)
    return [
        Level(groups=runs, nodes=[nodes_of(held[other], leaves=leaves) for other in own]),
        Level(groups=[list(places) for places in zip(*runs, strict=True)], nodes=of_hosts),
    ], None


def describe_levels(hosts: Sequence[str], *, leaves: int) -> str | None:
    """How ranks on `hosts` exchange, and if in one level, why; None where there could not be two."""
    levels, why_flat = plan_levels(hosts, 0, leaves=leaves)
    if why_flat is not None:
        return f"in one level, since {why_flat}: all ranks send to all hosts"
    if len(levels) == 1:
        return None
    inner = levels[0].groups
    return f"in two levels: among the {len(inner[0])} ranks of each of {len(inner)} hosts, then between hosts"
