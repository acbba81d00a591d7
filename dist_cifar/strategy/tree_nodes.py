"""The binary tree of `dist_cifar.strategy.tree_reduce`: which nodes it has, and which of them a rank holds.

Contract: pure functions of whole numbers. A node of n leaves has as its halves the first k and the other n - k of
them, k the largest power of two below n. So 2^i leaves that begin with a multiple of 2^i are a node, where they exist.
"""

from __future__ import annotations

from functools import cache

Node = tuple[int, int]
"""The first leaf of a node, and the one after its last."""


@cache
def parents_in(leaves: int) -> dict[tuple[Node, Node], Node]:
    """The node that is the sum of two others, for all nodes of the tree but its leaves."""
    parents, nodes = {}, [(0, leaves)]
    while nodes:
        first, end = node = nodes.pop()
        if end - first > 1:
            middle = first + 2 ** ((end - first - 1).bit_length() - 1)
            halves = (first, middle), (middle, end)
            parents[halves] = node
            nodes += halves
    return parents


def nodes_of(held: range, *, leaves: int) -> list[Node]:
    """The largest nodes of the tree that consist of leaves in `held`, from left to right."""
    nodes: list[Node] = []
    for leaf in held:
        nodes.append((leaf, leaf + 1))
        while len(nodes) > 1 and (parent := parents_in(leaves).get((nodes[-2], nodes[-1]))):
            nodes[-2:] = [parent]
    return nodes


@cache
def additions(nodes: tuple[Node, ...], *, leaves: int) -> list[tuple[list[int], list[int]]]:
    """How all of `nodes`, from left to right, are added up to the root: the places of the sums to which, in each round,
    those at the other places are added."""
    parents, level, rounds = parents_in(leaves), list(enumerate(nodes)), []
    while len(level) > 1:  # all pairs that are there by now, as the levels of a balanced tree
        pairs = [i for i in range(len(level) - 1) if (level[i][1], level[i + 1][1]) in parents]
        rounds.append(([level[i][0] for i in pairs], [level[i + 1][0] for i in pairs]))
        for i in reversed(pairs):
            level[i : i + 2] = [(level[i][0], parents[level[i][1], level[i + 1][1]])]
    return rounds


def passes_of_nodes(slices: range, passes: int, *, pairs: bool) -> list[tuple[Node, bool, bool]]:
    """For each pass of a rank that holds `slices`: the node of the tree to which it belongs, and whether it is the
    first and the last pass of that.

    The passes of a node are added up by autograd, in their order, one gradient after the other: those of one virtual
    rank, and with `pairs`, where virtual ranks have one pass each, those of two that are the lowest level of the tree.
    The sum is the same.
    """
    nodes = [(leaf, leaf + 1) for leaf in slices]
    if pairs and passes == 1:
        left = {leaf - leaf % 2 for leaf in slices if leaf % 2 and leaf - 1 in slices}
        nodes = [(leaf, leaf + 2) if leaf in left else (leaf, leaf + 1) for leaf in slices if leaf - 1 not in left]
    found = []
    for first, end in nodes:
        count = (end - first) * passes
        found += [((first, end), i == 0, i == count - 1) for i in range(count)]
    return found
