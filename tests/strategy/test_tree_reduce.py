"""The tree: the same bits however its leaves are shared out, and another sum than any other order gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dist_cifar.data.batching import share
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.strategy import bucket as bucket_module
from dist_cifar.strategy import exchange, tree_nodes, tree_reduce
from dist_cifar.strategy.bucket import Bucket, Exchange, round_up
from dist_cifar.strategy.exchange import plan_levels
from dist_cifar.strategy.tree_nodes import nodes_of
from dist_cifar.strategy.tree_reduce import TreeAccumulator, tree_sum

SHAPES = [(3,), (5, 2, 3, 3), (1,), (7, 4)]  # 126 numbers: no multiple of 4 or 8
LEAVES = 8


def leaf(index: int) -> list[torch.Tensor]:
    """Numbers of many magnitudes: every order of adding them up is rounded in its own way."""
    generator = torch.Generator().manual_seed(index)
    return [
        torch.randn(shape, generator=generator) * 10 ** (4 * torch.rand(shape, generator=generator) - 2)
        for shape in SHAPES
    ]


def by_definition(first: int, end: int) -> list[np.ndarray]:
    """The sum of the leaves as the recursion that defines it, in numpy: the first ones are the largest power of two."""
    if end - first == 1:
        return [tensor.numpy() for tensor in leaf(first)]
    half = max(2**i for i in range(20) if 2**i < end - first)
    parts = by_definition(first, first + half), by_definition(first + half, end)
    return [a + b for a, b in zip(*parts, strict=True)]


def folded() -> list[np.ndarray]:
    """The mutant: one leaf after the other."""
    sums = [tensor.numpy().copy() for tensor in leaf(0)]
    for index in range(1, LEAVES):
        sums = [a + b.numpy() for a, b in zip(sums, leaf(index), strict=True)]
    return sums


def equal(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))


def mean(communicator: Communicator, leaves: int, hosts: str | None = None) -> list[np.ndarray]:
    """The mean of all leaves, this rank having its share of them; `hosts` has a letter for the host of each rank."""
    exchange = exchange_between(communicator, leaves, hosts)
    tree, held = TreeAccumulator(leaves), share(communicator.rank, parts=communicator.world_size, count=leaves)
    for index in held[:-1]:
        tree.add((index, index + 1), leaf(index))
    bucket = Bucket([torch.empty(shape) for shape in SHAPES], exchange)
    bucket.reduce(tree.finish((held[-1], held[-1] + 1), leaf(held[-1])), leaves)
    return [view.numpy().copy() for view in bucket.views]


def exchange_between(communicator: Communicator, leaves: int, hosts: str | None) -> Exchange:
    if hosts is None:
        return Exchange(communicator, leaves=leaves)
    placed = [
        dataclasses.replace(identity, host=host) for identity, host in zip(communicator.identities, hosts, strict=True)
    ]
    with mock.patch.object(communicator, "identities", placed):
        return Exchange(communicator, leaves=leaves)


@pytest.mark.parametrize(
    ("world_size", "leaves"),
    [
        *((1, leaves) for leaves in range(1, 17)),
        (2, 2),
        (2, 5),
        (2, 8),
        (3, 3),
        (3, 5),
        (3, 8),
        (3, 16),
        (4, 7),
        (4, 8),
    ],
)
def test_the_sum_is_that_of_the_definition_on_every_rank(ranks, world_size, leaves):
    expected = [total / np.float32(leaves) for total in by_definition(0, leaves)]
    for result in ranks.run(world_size, mean, leaves):
        assert equal(result, expected)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [5, 6, 7])
def test_the_sum_on_many_ranks(ranks, world_size):
    for leaves in (7, 8, 12):
        expected = [total / np.float32(leaves) for total in by_definition(0, leaves)]
        for result in ranks.run(world_size, mean, leaves):
            assert equal(result, expected)


def test_other_orders_are_other_sums():
    """A left fold, and a tree whose nodes are halved."""

    def halved(first: int, end: int) -> list[np.ndarray]:
        if end - first == 1:
            return [tensor.numpy() for tensor in leaf(first)]
        middle = (first + end) // 2
        return [a + b for a, b in zip(halved(first, middle), halved(middle, end), strict=True)]

    assert not equal(folded(), by_definition(0, LEAVES))
    assert equal(halved(0, LEAVES), by_definition(0, LEAVES)) and not equal(halved(0, 7), by_definition(0, 7))


def all_reduced(communicator: Communicator) -> list[np.ndarray]:
    """The mutant: the local sums in gloo's order."""
    tree, held = TreeAccumulator(LEAVES), share(communicator.rank, parts=communicator.world_size, count=LEAVES)
    for index in held[:-1]:
        tree.add((index, index + 1), leaf(index))
    (sums,) = tree.finish((held[-1], held[-1] + 1), leaf(held[-1]))
    return [communicator.all_reduce_sum(tensor).numpy() / np.float32(LEAVES) for tensor in sums]


def test_an_all_reduce_is_another_sum(ranks):
    expected = [total / np.float32(LEAVES) for total in by_definition(0, LEAVES)]
    assert not equal(ranks.run(4, all_reduced)[0], expected)


def one_of(index: int) -> torch.Tensor:
    return leaf(index)[1]


def sums_of(held: range, leaves: int, value: Callable[[int], torch.Tensor] = one_of) -> list[torch.Tensor]:
    """What a rank with these leaves brings."""
    tree = TreeAccumulator(leaves)
    for index in held[:-1]:
        tree.add((index, index + 1), [value(index)])
    return [row.flatten() for (row,) in tree.finish((held[-1], held[-1] + 1), [value(held[-1])])]


def local_means(leaves: int, world_size: int) -> np.ndarray:
    """The sum of all leaves, each rank's nodes and what adds them up computed in this process."""
    nodes, rows = [], []
    for rank in range(world_size):
        held = share(rank, parts=world_size, count=leaves)
        sums, found = sums_of(held, leaves), nodes_of(held, leaves=leaves)
        assert len(found) == len(sums) <= 2 * max(1, leaves.bit_length())
        assert [i for first, end in found for i in range(first, end)] == list(held)
        nodes += found
        rows += sums
    return tree_sum(torch.stack(rows), tuple(nodes), leaves=leaves).numpy()


def test_leaves_that_are_shared_by_another_rounding_are_caught():
    """The mutant: ranks compute other leaves than the plan of the exchange says, though as many sums in all."""
    plan = [node for rank in range(3) for node in nodes_of(share(rank, parts=3, count=8), leaves=8)]
    rows = [row for held in (range(3), range(3, 6), range(6, 8)) for row in sums_of(held, 8)]
    total = tree_sum(torch.stack(rows), tuple(plan), leaves=8).numpy()
    assert total.tobytes() != by_definition(0, 8)[1].flatten().tobytes() == local_means(8, 3).tobytes()


@pytest.mark.parametrize("leaves", range(1, 17))
def test_every_number_of_ranks_gives_the_bits_of_one(leaves):
    expected = by_definition(0, leaves)[1].flatten()
    for world_size in range(1, leaves + 1):
        assert local_means(leaves, world_size).tobytes() == expected.tobytes(), world_size


def test_a_border_that_is_off_by_one_is_found(monkeypatch):
    """The mutant: what a rank adds up by itself is no node of the tree."""

    def parents(leaves: int) -> dict:
        found = original(leaves)
        return {**found, ((5, 6), (6, 7)): (5, 7), ((5, 7), (7, 8)): (5, 8), ((4, 5), (5, 8)): (4, 8)}

    original = tree_nodes.parents_in
    for module in (tree_nodes, tree_reduce):
        monkeypatch.setattr(module, "parents_in", parents)
    assert local_means(8, 3).tobytes() != by_definition(0, 8)[1].flatten().tobytes()


@pytest.mark.parametrize("ranks_of", [(1, 8), (2, 8), (4, 8), (8, 8), (2, 4), (3, 3), (3, 6)])
def test_where_it_can_be_a_rank_has_one_node(ranks_of):
    world_size, leaves = ranks_of
    held = [share(rank, parts=world_size, count=leaves) for rank in range(world_size)]
    counts = [len(nodes_of(one, leaves=leaves)) for one in held]
    assert counts == [1] * world_size or ranks_of == (3, 6)


TWO_LEVELS = [("aabb", 4), ("aabb", 8), ("aabb", 16), ("aabbcc", 6), ("aaaabbbb", 8), ("aabbccdd", 8)]


@pytest.mark.parametrize(("hosts", "leaves"), TWO_LEVELS)
def test_two_levels_have_the_bits_of_one_and_send_a_part_between_hosts(ranks, hosts, leaves):
    flat = ranks.run(len(hosts), sent_between_hosts, leaves, None, hosts)
    levels = ranks.run(len(hosts), sent_between_hosts, leaves, hosts, hosts)
    expected = [value / np.float32(leaves) for value in by_definition(0, leaves)]
    for (result, _), (same, _) in zip(flat, levels, strict=True):
        assert equal(result, expected) and equal(same, expected)
    ranks_of_host = hosts.count("a")
    elements = round_up(32 + 96 + 32 + 32, 32 * len(hosts))  # of `SHAPES`, aligned
    hosts_count = len(set(hosts))
    for (_, all_bytes), (_, some_bytes) in zip(flat, levels, strict=True):
        assert some_bytes == 2 * 4 * elements // ranks_of_host * (hosts_count - 1) // hosts_count
        assert some_bytes * ranks_of_host == all_bytes


def sent_between_hosts(
    communicator: Communicator, leaves: int, seen: str | None, hosts: str
) -> tuple[list[np.ndarray], int]:
    """The mean, by an exchange that sees the hosts `seen`; and the bytes that this rank sends to ranks on others."""
    sent, own, all_to_all, point_to_point = 0, hosts[communicator.rank], dist.all_to_all_single, dist.P2POp

    def count_parts(received, tensor, counts, own_counts, group):
        nonlocal sent
        members = dist.get_process_group_ranks(group or dist.group.WORLD)
        sent += sum(count * 4 for member, count in zip(members, own_counts, strict=True) if hosts[member] != own)
        return all_to_all(received, tensor, counts, own_counts, group=group)

    def count_message(kind, tensor, peer, group):
        nonlocal sent
        sent += tensor.nbytes if kind is dist.isend and hosts[peer] != own else 0
        return point_to_point(kind, tensor, peer, group)

    with mock.patch.object(dist, "all_to_all_single", count_parts), mock.patch.object(dist, "P2POp", count_message):
        return mean(communicator, leaves, seen), sent


PLACES = [
    ("aaaa", 8, 1, None),
    ("abcd", 8, 1, None),
    ("aabb", 8, 2, None),
    ("abab", 8, 1, "the ranks of a host are not neighbours"),
    ("aaab", 8, 1, "hosts have different numbers of ranks"),
    ("aabb", 6, 1, "the virtual ranks of a host are no subtree of 6"),
    ("aaabbb", 6, 1, "the virtual ranks of a host are no subtree of 6"),
]


@pytest.mark.parametrize(("hosts", "leaves", "count", "reason"), PLACES)
def test_the_levels_follow_the_places_of_the_ranks(hosts, leaves, count, reason):
    for rank in range(len(hosts)):
        levels, why_flat = plan_levels(hosts, rank, leaves=leaves)
        assert (len(levels), why_flat) == (count, reason)
        for level in levels:
            assert sorted(member for group in level.groups for member in group) == list(range(len(hosts)))


def simulated(hosts: str, leaves: int) -> list[np.ndarray]:
    """The sum of all leaves on each of many ranks, by their plans, computed in this process."""
    world_size = len(hosts)
    plans = [plan_levels(hosts, rank, leaves=leaves)[0] for rank in range(world_size)]
    assert len({len(levels) for levels in plans}) == 1
    rng = np.random.default_rng(leaves)
    values = torch.from_numpy(rng.standard_normal((leaves, 2 * world_size)).astype(np.float32))
    all_held = (share(rank, parts=world_size, count=leaves) for rank in range(world_size))
    rows = [torch.stack(sums_of(held, leaves, lambda index: values[index].clone())) for held in all_held]
    for number in range(len(plans[0])):
        received = {}
        for group in plans[0][number].groups:
            for place, rank in enumerate(group):
                level = plans[rank][number]
                assert group in level.groups and len(level.nodes) == len(group)
                parts = [rows[other].chunk(len(group), dim=1)[place] for other in group]
                assert [len(part) for part in parts] == [len(nodes) for nodes in level.nodes]
                nodes = tuple(node for nodes in level.nodes for node in nodes)
                received[rank] = tree_sum(torch.cat(parts), nodes, leaves=leaves)[None]
        rows = [received[rank] for rank in range(world_size)]
    wholes = [row[0] for row in rows]
    for number in reversed(range(len(plans[0]))):
        for group in plans[0][number].groups:
            gathered = torch.cat([wholes[rank] for rank in group])
            for rank in group:
                wholes[rank] = gathered
    expected = tree_sum(values.clone(), tuple((i, i + 1) for i in range(leaves)), leaves=leaves)
    return [expected.numpy(), *(whole.numpy() for whole in wholes)]


MANY = [
    ("a" * 16, 16, [8, 2]),
    ("a" * 12, 12, [4, 3]),
    ("a" * 24, 48, [8, 3]),
    ("abcdefghijklmnop", 32, [8, 2]),
    ("a" * 16 + "b" * 16, 32, [8, 2, 2]),
    ("".join(8 * chr(97 + host) for host in range(16)), 128, [8, 8, 2]),
    ("".join(4 * chr(97 + host) for host in range(12)), 48, [4, 4, 3]),
    ("ab" * 16, 32, [8, 4]),
    ("a" * 11, 11, [11]),
    ("a" * 9, 18, [9]),
    ("a" * 20, 37, [20]),
]


@pytest.mark.parametrize(("hosts", "leaves", "sizes"), MANY, ids=lambda value: str(value)[:20])
def test_many_ranks_send_to_few_and_get_the_same_sum(hosts, leaves, sizes):
    levels, _ = plan_levels(hosts, 0, leaves=leaves)
    assert [len(level.groups[0]) for level in levels] == sizes
    expected, *found = simulated(hosts, leaves)
    assert all(whole.tobytes() == expected.tobytes() for whole in found)


def test_messages_grow_with_the_logarithm_of_the_ranks():
    for doublings in range(4, 11):
        hosts = [str(rank // 8) for rank in range(2**doublings)]
        levels, _ = plan_levels(hosts, 0, leaves=len(hosts))
        assert sum(len(level.groups[0]) - 1 for level in levels) <= 7 * -(-doublings // 3)


def test_several_levels_have_the_bits_of_one(ranks):
    for world_size, leaves in ((8, 8), (8, 16), (6, 12), (4, 8)):
        expected = [value / np.float32(leaves) for value in by_definition(0, leaves)]
        for result, sizes in ranks.run(world_size, in_pairs, leaves):
            assert equal(result, expected) and sizes == {8: [2, 2, 2], 6: [2, 3], 4: [2, 2]}[world_size]


def in_pairs(communicator: Communicator, leaves: int) -> tuple[list[np.ndarray], list[int]]:
    """The mean, and the sizes of the groups, if few exchange at once."""
    with mock.patch.object(exchange, "MOST_AT_ONCE", 3 if communicator.world_size == 6 else 2):
        sizes = [len(group.ranks) for _, group in Exchange(communicator, leaves=leaves).levels]
        return mean(communicator, leaves, None), sizes


def test_hosts_whose_sums_are_taken_in_another_order_are_caught(ranks):
    with pytest.raises(AssertionError):
        found = ranks.run(4, hosts_swapped, 8)
        assert equal(found[0], [value / np.float32(8) for value in by_definition(0, 8)])


def hosts_swapped(communicator: Communicator, leaves: int) -> list[np.ndarray]:
    """A mutant: the ranks of each host are those of every second place."""

    def crossed(hosts, rank, *, leaves):
        levels, _ = plan_levels(hosts, rank, leaves=leaves)
        inner, outer = (dataclasses.replace(level, groups=other.groups) for level, other in (levels, levels[::-1]))
        return [inner, outer], None

    with mock.patch.object(bucket_module, "plan_levels", crossed):
        return mean(communicator, leaves, "aabb")


def test_the_local_tree_keeps_few_sums():
    tree = TreeAccumulator(16)
    for index in range(15):
        tree.add((index, index + 1), leaf(index))
        assert len(tree._sums) <= 4


def test_a_part_of_the_last_leaf_can_be_summed_by_itself():
    tree, whole = TreeAccumulator(4), TreeAccumulator(4)
    for index in range(3):
        tree.add((index, index + 1), leaf(index))
        whole.add((index, index + 1), leaf(index))
    parts = [tree.finish((3, 4), leaf(3)[place], place) for place in (slice(0, 1), slice(1, 4))]
    (expected,) = whole.finish((3, 4), leaf(3))
    assert all(torch.equal(a, b) for a, b in zip(parts[0][0] + parts[1][0], expected, strict=True))


def test_tensors_and_the_parts_of_ranks_are_aligned(ranks):
    for world_size in (1, 2, 3):
        for starts, parts in ranks.run(world_size, places, 8):
            assert not any(start % 32 for start in starts) and not any(part % 32 for part in parts)
            assert len(starts) == len(SHAPES)


def places(communicator: Communicator, leaves: int) -> tuple[list[int], list[int]]:
    """Where the tensors of a bucket begin in each of its rows, and the sizes of the rows."""
    bucket = Bucket([torch.empty(shape) for shape in SHAPES], Exchange(communicator, leaves=leaves))
    return [view.storage_offset() for view in bucket.views], [rows.shape[1] for rows in bucket._rows]


def test_memory_formats_survive(ranks):
    like = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    (stride, result), *_ = ranks.run(2, reduced_channels_last, like)
    assert stride == like.stride() and np.array_equal(result, like.numpy())


def reduced_channels_last(communicator: Communicator, like: torch.Tensor) -> tuple[tuple[int, ...], np.ndarray]:
    like = like.to(memory_format=torch.channels_last)
    bucket = Bucket([like], Exchange(communicator, leaves=communicator.world_size))
    bucket.reduce([[like]], communicator.world_size)
    return bucket.views[0].stride(), bucket.views[0].numpy()
