"""Tensors that are reduced over the ranks together, by the tree of `dist_cifar.strategy.tree_reduce`.

Contract: across ranks a tensor moves as in a ring all-reduce. Each rank gets its shard of every rank's nodes
(all-to-all), adds them up in the order of the tree, and sends the result to all (all-gather). Where each rank has one
node, it sends 2 (W-1)/W times the bytes of the tensor, padded to a multiple of W `ALIGNMENT` elements. In several
levels (`dist_cifar.strategy.exchange`) some ranks do so, such as those of a host, and then those that have the same
place in each of these groups, with what they have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dist_cifar.distributed.collectives import Communicator, Group
from dist_cifar.strategy.exchange import flat_level, plan_levels
from dist_cifar.strategy.tree_nodes import Node
from dist_cifar.strategy.tree_reduce import tree_sum

ALIGNMENT = 32
"""Each tensor of a bucket, and each rank's part of it, begins at a multiple of so many elements, which are 128 bytes of
float32: CUDA sums in another order what begins at an odd place, and moves it more slowly."""


class Exchange:
    """The levels on which ranks exchange the sums of their nodes, with the groups of the ranks."""

    def __init__(self, communicator: Communicator, *, leaves: int, flat: bool = False) -> None:
        """A collective. `flat`: in one level, wherever the ranks are."""
        self.communicator, self.leaves = communicator, leaves
        levels = [flat_level(communicator.world_size, leaves=leaves)]
        if not flat:
            hosts = [identity.host for identity in communicator.identities]
            levels, _ = plan_levels(hosts, communicator.rank, leaves=leaves)
        self.levels = [(level.nodes, communicator.group(level.groups)) for level in levels]
        """The nodes that each rank of this rank's group brings, and the group, of each level."""


class Bucket:
    """Tensors that are reduced over the ranks together, in one flat tensor."""

    def __init__(self, like: Sequence[torch.Tensor], exchange: Exchange) -> None:
        """`like` gives the shapes, memory formats and the one dtype; every tensor is dense."""
        self._exchange = exchange
        world_size = exchange.communicator.world_size
        size = round_up(sum(round_up(tensor.numel(), ALIGNMENT) for tensor in like), world_size * ALIGNMENT)
        first, group = exchange.levels[0]
        sent = torch.zeros(len(first[group.place]), size, dtype=like[0].dtype, device=like[0].device)
        self._rows = [sent]
        """The sums of nodes, a row for each: this rank's own, and then what it has received on each level, of which the
        first row becomes the sum of all."""
        self._levels: list[tuple[Group, int, list[int], tuple[Node, ...]]] = []
        """Each has the group, how many nodes are this rank's, the elements that each rank sends to each, all nodes."""
        for nodes, group in exchange.levels if world_size > 1 else []:
            size //= len(group.ranks)
            self._rows.append(sent.new_empty(sum(map(len, nodes)), size))
            counts = [len(of_rank) * size for of_rank in nodes]
            all_nodes = tuple(node for of_rank in nodes for node in of_rank)
            self._levels.append((group, len(nodes[group.place]), counts, all_nodes))
        self._views = [_views(row, like) for row in sent]
        self.views = self._views[0]
        """The tensors, as views of the flat one."""

    def warm_up(self) -> None:
        """Reduces zeros, which opens the connections that the first step would otherwise wait for. A collective."""
        self.reduce([[torch.zeros_like(view) for view in views] for views in self._views], 1)

    def reduce(self, sums: list[list[torch.Tensor]], divisor: int) -> None:
        """Puts into `views` the sum over all leaves divided by `divisor`; `sums` are those of this rank's nodes. A
        collective."""
        for views, tensors in zip(self._views, sums, strict=True):
            torch._foreach_copy_(views, tensors)
        communicator, leaves = self._exchange.communicator, self._exchange.leaves
        levels = list(zip(self._levels, self._rows[:-1], self._rows[1:], strict=True))
        for (group, own, counts, nodes), rows, received in levels:
            by_rank = rows[:own].view(own, len(group.ranks), received.shape[1]).transpose(0, 1)
            communicator.all_to_all(received.flatten(), by_rank.flatten(), counts, group)
            tree_sum(received, nodes, leaves=leaves)
        self._rows[-1][0].div_(divisor)
        for (group, *_), rows, received in reversed(levels):
            communicator.all_gather(rows[0], received[0], group)


def round_up(count: int, multiple: int) -> int:
    """The least multiple that is not below `count`."""
    return -(-count // multiple) * multiple


def _views(flat: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Views of `flat` [n] with the shapes and strides of `like`, one behind the other, each begun aligned."""
    views, start = [], flat.storage_offset()
    for tensor in like:
        views.append(flat.as_strided(tensor.shape, tensor.stride(), start))
        start += round_up(tensor.numel(), ALIGNMENT)
    return views
