"""The tree: the same bits however its leaves are shared out, and another sum than any other order gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dist_cifar.distributed.collectives import Communicator
from dist_cifar.strategy.tree_reduce import Bucket, TreeAccumulator, tree_sum

SHAPES = [(3,), (5, 2, 3, 3), (1,), (7, 4)]  # 126 numbers: no multiple of 4 or 8
LEAVES = 8


def leaf(index: int) -> list[torch.Tensor]:
    """Numbers of many magnitudes: every order of adding them up is rounded in its own way."""
    generator = torch.Generator().manual_seed(index)
    return [
        torch.randn(shape, generator=generator) * 10 ** (4 * torch.rand(shape, generator=generator) - 2)
        for shape in SHAPES
    ]


def by_definition(first: int = 0, last: int = LEAVES) -> list[np.ndarray]:
    """The sum of the leaves as the recursion that defines it, in numpy."""
    if last - first == 1:
        return [tensor.numpy() for tensor in leaf(first)]
    middle = (first + last) // 2
    return [a + b for a, b in zip(by_definition(first, middle), by_definition(middle, last), strict=True)]


def folded() -> list[np.ndarray]:
    """The mutant: one leaf after the other."""
    sums = [tensor.numpy().copy() for tensor in leaf(0)]
    for index in range(1, LEAVES):
        sums = [a + b.numpy() for a, b in zip(sums, leaf(index), strict=True)]
    return sums


def equal(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))


def mean(communicator: Communicator) -> list[np.ndarray]:
    """The mean of all leaves, this rank having its share of them."""
    local = LEAVES // communicator.world_size
    own = [leaf(communicator.rank * local + i) for i in range(local)]
    tree = TreeAccumulator()
    for tensors in own[:-1]:
        tree.add(tensors)
    bucket = Bucket([torch.empty(shape) for shape in SHAPES], communicator)
    bucket.reduce(tree.root(own[-1]), LEAVES)
    return [view.numpy().copy() for view in bucket.views]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_sum_is_that_of_the_definition_on_every_rank(ranks, world_size):
    expected = [total / np.float32(LEAVES) for total in by_definition()]
    for result in ranks.run(world_size, mean):
        assert equal(result, expected)


def test_a_left_fold_is_another_sum():
    assert not equal(folded(), by_definition())


def all_reduced(communicator: Communicator) -> list[np.ndarray]:
    """The mutant: the local sums in gloo's order."""
    local = LEAVES // communicator.world_size
    tree = TreeAccumulator()
    own = [leaf(communicator.rank * local + i) for i in range(local)]
    for tensors in own[:-1]:
        tree.add(tensors)
    return [communicator.all_reduce_sum(tensor).numpy() / np.float32(LEAVES) for tensor in tree.root(own[-1])]


def test_an_all_reduce_is_another_sum(ranks):
    expected = [total / np.float32(LEAVES) for total in by_definition()]
    assert not equal(ranks.run(4, all_reduced)[0], expected)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_the_local_tree_equals_the_sum_of_rows_and_keeps_few_sums(count):
    rows = torch.stack([leaf(index)[1].flatten() for index in range(count)])
    tree = TreeAccumulator()
    for row in rows[:-1]:
        tree.add([row.clone()])
        assert len(tree._sums) <= max(1, count.bit_length() - 1)
    assert torch.equal(tree.root([rows[-1].clone()])[0], tree_sum(rows))


def test_a_part_of_the_last_leaf_can_be_summed_by_itself():
    tree, whole = TreeAccumulator(), TreeAccumulator()
    for index in range(3):
        tree.add(leaf(index))
        whole.add(leaf(index))
    parts = [tree.root(leaf(3)[place], place) for place in (slice(0, 1), slice(1, 4))]
    assert all(torch.equal(a, b) for a, b in zip(parts[0] + parts[1], whole.root(leaf(3)), strict=True))


def test_memory_formats_survive(ranks):
    like = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    (stride, result), *_ = ranks.run(2, reduced_channels_last, like)
    assert stride == like.stride() and np.array_equal(result, like.numpy())


def reduced_channels_last(communicator: Communicator, like: torch.Tensor) -> tuple[tuple[int, ...], np.ndarray]:
    like = like.to(memory_format=torch.channels_last)
    bucket = Bucket([like], communicator)
    bucket.reduce([like], communicator.world_size)
    return bucket.views[0].stride(), bucket.views[0].numpy()
