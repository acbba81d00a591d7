"""Sums over virtual ranks in one balanced binary tree, whichever rank computes which leaf.

Contract: the leaves of the tree are the virtual ranks 0..V-1 of a step, V a power of two; its shape is
((0+1)+(2+3))+((4+5)+(6+7)) for V = 8. Rank r of W holds the leaves r*V/W to (r+1)*V/W - 1, so the tree is V/W leaves
deep on each rank and W ranks wide above them, and the sum has the same bits for every W that divides V.

Across ranks a tensor moves as in a ring all-reduce: each rank gets its shard of every rank's sum (all-to-all), adds
them up in the order of the tree, and sends the result to all (all-gather). Every rank sends 2 (W-1)/W times the bytes
of the tensor, padded to a multiple of W elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dist_cifar.distributed.collectives import Communicator


class TreeAccumulator:
    """Adds up this rank's leaves: it holds one list of tensors for each level, as the digits of a binary counter."""

    def __init__(self) -> None:
        self._sums: list[tuple[int, list[torch.Tensor]]] = []  # (level, tensors), levels falling

    def add(self, leaf: list[torch.Tensor]) -> None:
        """Adds the next leaf; its tensors belong to the tree from now on."""
        level = 0
        while self._sums and self._sums[-1][0] == level:
            left = self._sums.pop()[1]
            torch._foreach_add_(left, leaf)
            leaf, level = left, level + 1
        self._sums.append((level, leaf))

    def root(self, last: list[torch.Tensor], places: slice = slice(None)) -> list[torch.Tensor]:
        """The sum of all leaves, `last` being those tensors of the last leaf that are at `places` in every leaf.

        The sum overwrites `last`. Each place has one root; after it come the roots of other places, or `clear`.
        """
        for _, left in reversed(self._sums):
            torch._foreach_add_(last, left[places])  # in place: on a CPU, new memory costs as much as adding up
        return last

    def clear(self) -> None:
        """Forgets all leaves."""
        self._sums.clear()


def tree_sum(rows: torch.Tensor) -> torch.Tensor:
    """Sums the rows of [n, m] in a balanced binary tree, n a power of two, to [m]; the rows are overwritten."""
    while len(rows) > 1:
        rows = rows[0::2].add_(rows[1::2])
    return rows[0]


class Bucket:
    """Tensors that are reduced over the ranks together, in one flat tensor."""

    def __init__(self, like: Sequence[torch.Tensor], communicator: Communicator) -> None:
        """`like` gives the shapes, memory formats and the one dtype; every tensor is dense."""
        self._communicator = communicator
        world_size = communicator.world_size
        count = sum(tensor.numel() for tensor in like)
        shard = -(-count // world_size)
        self._flat = torch.zeros(shard * world_size, dtype=like[0].dtype, device=like[0].device)
        self._received = torch.empty_like(self._flat) if world_size > 1 else self._flat
        self.views: list[torch.Tensor] = []
        """The tensors, as views of the flat one."""
        start = 0
        for tensor in like:
            self.views.append(self._flat.as_strided(tensor.shape, tensor.stride(), start))
            start += tensor.numel()

    def reduce(self, sums: list[torch.Tensor], leaves: int) -> None:
        """Puts into `views` the mean over `leaves` leaves, `sums` being this rank's subtree. A collective."""
        torch._foreach_copy_(self.views, sums)
        world_size = self._communicator.world_size
        if world_size == 1:
            self._flat.div_(leaves)
            return
        self._communicator.all_to_all(self._received, self._flat)
        shard = tree_sum(self._received.view(world_size, -1)).div_(leaves)
        self._communicator.all_gather(self._flat, shard)
