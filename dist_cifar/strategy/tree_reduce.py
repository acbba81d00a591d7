"""Sums over virtual ranks in one balanced binary tree, whichever rank computes which leaf.

Contract: the leaves of the tree are the virtual ranks 0..V-1 of a step. A node of n leaves is the sum of its first k
and of the others, k the largest power of two below n: ((0+1)+(2+3))+((4+5)+6) for V = 7. Rank r of W holds the leaves
rV//W to (r+1)V//W - 1. Those of one rank are a few whole nodes (at most 2 log2 V, and one where V is a power of two
that W divides): the rank adds up each of them, and the nodes of all ranks are added up as the tree has them. So the sum
has the same bits for every W from 1 to V.
"""

from __future__ import annotations

import torch

from dist_cifar.strategy.tree_nodes import Node, additions, parents_in


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
