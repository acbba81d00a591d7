"""Sums over virtual ranks in one balanced binary tree, whichever rank computes which leaf.

Contract: the leaves of the tree are the virtual ranks 0..V-1 of a step. A node of n leaves is the sum of its first k
and of the others, k the largest power of two below n: ((0+1)+(2+3))+((4+5)+6) for V = 7. Rank r of W holds the leaves
rV//W to (r+1)V//W - 1. Those of one rank are a few whole nodes (at most 2 log2 V, and one where V is a power of two
that W divides): the rank adds up each of them, and the nodes of all ranks are added up as the tree has them. So the sum
has the same bits for every W from 1 to V.

Across ranks a tensor moves as in a ring all-reduce: each rank gets its shard of every rank's nodes (all-to-all), adds
them up in the order of the tree, and sends the result to all (all-gather). Where each rank has one node, it sends
2 (W-1)/W times the bytes of the tensor, padded to a multiple of W elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dist_cifar.data.batching import share
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.strategy.tree_nodes import Node, additions, nodes_of, parents_in


class TreeAccumulator:
    """Adds up this rank's leaves as they come, from left to right: it holds one list of tensors for each node."""

    def __init__(self, leaves: int) -> None:
        """`leaves` are those of the whole tree."""
        self._parents = parents_in(leaves)
        self._nodes: list[Node] = []
        self._sums: list[list[torch.Tensor]] = []

    def add(self, node: Node, tensors: list[torch.Tensor]) -> None:
        """Adds the next node, a leaf or larger; its tensors belong to the tree from now on."""
        while self._nodes and (parent := self._parents.get((self._nodes[-1], node))):
            left = self._sums.pop()
            torch._foreach_add_(left, tensors)
            self._nodes.pop()
            node, tensors = parent, left
        self._nodes.append(node)
        self._sums.append(tensors)

    def finish(self, node: Node, last: list[torch.Tensor], places: slice = slice(None)) -> list[list[torch.Tensor]]:
        """The sums of this rank's nodes, from left to right, `last` being those tensors of its last `node` that are at
        `places` in every leaf.

        A sum overwrites `last`. Each place is finished once; after it come other places, or `clear`.
        """
        count = len(self._nodes)
        while count and (parent := self._parents.get((self._nodes[count - 1], node))):
            count -= 1
            torch._foreach_add_(last, self._sums[count][places])  # in place: new memory costs as much as adding up
            node = parent
        return [*(tensors[places] for tensors in self._sums[:count]), last]

    def clear(self) -> None:
        """Forgets all leaves."""
        self._nodes.clear()
        self._sums.clear()


def tree_sum(rows: torch.Tensor, nodes: tuple[Node, ...], *, leaves: int) -> torch.Tensor:
    """Sums the rows of [n, m], which are these nodes of the tree from left to right, to [m]; rows are overwritten."""
    for targets, others in additions(nodes, leaves=leaves):
        torch._foreach_add_([rows[i] for i in targets], [rows[i] for i in others])
    return rows[0]


class Bucket:
    """Tensors that are reduced over the ranks together, in one flat tensor."""

    def __init__(self, like: Sequence[torch.Tensor], communicator: Communicator, *, leaves: int) -> None:
        """`like` gives the shapes, memory formats and the one dtype; every tensor is dense."""
        self._communicator, self._leaves = communicator, leaves
        world_size = communicator.world_size
        nodes = [nodes_of(share(rank, parts=world_size, count=leaves), leaves=leaves) for rank in range(world_size)]
        self._nodes = tuple(node for of_rank in nodes for node in of_rank)
        count = sum(tensor.numel() for tensor in like)
        shard = -(-count // world_size)
        own = len(nodes[communicator.rank])
        self._sent = torch.zeros(own, shard * world_size, dtype=like[0].dtype, device=like[0].device)
        self._received = self._sent.new_empty(len(self._nodes), shard) if world_size > 1 else self._sent
        self._counts = [len(of_rank) * shard for of_rank in nodes]
        """The elements that each rank sends to each."""
        self._views = [_views(row, like) for row in self._sent]
        self.views = self._views[0]
        """The tensors, as views of the flat one."""

    def reduce(self, sums: list[list[torch.Tensor]], divisor: int) -> None:
        """Puts into `views` the sum over all leaves divided by `divisor`; `sums` are those of this rank's nodes. A
        collective."""
        for views, tensors in zip(self._views, sums, strict=True):
            torch._foreach_copy_(views, tensors)
        flat, world_size = self._sent[0], self._communicator.world_size
        if world_size == 1:
            flat.div_(divisor)
            return
        by_rank = self._sent.view(len(self._sent), world_size, -1).transpose(0, 1)
        self._communicator.all_to_all(self._received.flatten(), by_rank.flatten(), self._counts)
        shard = tree_sum(self._received, self._nodes, leaves=self._leaves).div_(divisor)
        self._communicator.all_gather(flat, shard)


def _views(flat: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Views of `flat` [n] with the shapes and strides of `like`, one behind the other."""
    views, start = [], flat.storage_offset()
    for tensor in like:
        views.append(flat.as_strided(tensor.shape, tensor.stride(), start))
        start += tensor.numel()
    return views
