"""The collectives: what ranks say when they do not agree."""

from __future__ import annotations

import re
import threading
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dist_cifar.distributed.any_reduce import AsyncAnyReduce
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.distributed.timeouts import Timeouts
from dist_cifar.distributed.wait_clock import WaitClock
from dist_cifar.errors import LaunchError, TrainingError
from dist_cifar.run.checkpoint import weights_sha256
from tests import PATIENCE_SECONDS


def compare(communicator: Communicator, values: list[int]) -> tuple[str, int | None]:
    with pytest.raises(TrainingError) as caught:
        communicator.assert_equal_across_ranks("it", values[communicator.rank])
    return str(caught.value), caught.value.rank


@pytest.mark.parametrize(
    ("values", "rank", "message"),
    [
        ([1, 2, 2], 0, r"it differs between ranks: rank 0 has 1, most have 2 .*: \[0\]"),
        ([1, 1, 2], 2, r"it differs between ranks: rank 2 has 2, most have 1 .*: \[2\]"),
        ([1, 2], None, r"no value is that of most: rank 0 has 1; rank 1 has 2"),
    ],
)
def test_the_rank_that_differs_from_most_is_named(ranks, values, rank, message):
    results = ranks.run(len(values), compare, values)
    assert len(set(results)) == 1  # all ranks raise the same
    assert results[0][1] == rank
    with pytest.raises(TrainingError, match=message):
        raise TrainingError(results[0][0])


def compare_tensors(communicator: Communicator, name: str | None, rank: int) -> str:
    tensors = {"a": torch.zeros(3), "b": torch.ones(2, 2)}
    if name is not None and communicator.rank == rank:
        tensors[name].view(-1)[-1:].view(torch.int32).bitwise_xor_(1)
    try:
        communicator.assert_tensors_equal_across_ranks("the weights", tensors, weights_sha256)
    except TrainingError as error:
        assert error.rank == rank
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["a", "b"])
def test_the_tensor_that_differs_is_named(ranks, name):
    assert ranks.run(3, compare_tensors, None, 0) == [""] * 3
    for rank in (0, 1):
        messages = ranks.run(3, compare_tensors, name, rank)
        assert len(set(messages)) == 1
        assert f"the weights ({name}, by its SHA-256) differs between ranks: rank {rank} has" in messages[0]


def out_of_order(communicator: Communicator) -> str:
    name = "first" if communicator.rank != 1 else "second"
    with pytest.raises(TrainingError) as caught:
        communicator.all_gather_object(0, name)
    assert caught.value.rank == 1
    return str(caught.value)


def test_ranks_in_different_collectives_are_told_apart(ranks):
    messages = ranks.run(3, out_of_order)
    assert len(set(messages)) == 1 and "the order of the collectives differs" in messages[0]


def require_same(communicator: Communicator, values: list[str]) -> str:
    with pytest.raises(LaunchError) as caught:
        communicator.require_same({"it": values[communicator.rank]})
    return str(caught.value)


def test_facts_are_compared_between_ranks(ranks):
    messages = ranks.run(3, require_same, ["a", "a", "b"])
    assert len(set(messages)) == 1 and 'it is "b" on rank 2 and "a" on most' in messages[0]


def votes(communicator: Communicator, steps: int, yes: dict[int, list[int]]) -> tuple[int, list[bool], int]:
    """The delay; the result of each step, where the ranks of `yes` answer yes in some steps; the messages sent."""
    vote, sent, isend = AsyncAnyReduce(communicator, 2), 0, dist.isend

    def counted(*arguments, **keywords):
        nonlocal sent
        sent += 1
        return isend(*arguments, **keywords)

    results = []
    with mock.patch.object(dist, "isend", counted):
        for step in range(7, 7 + steps):
            vote.start(step, False, communicator.rank in yes.get(step - 7, []))
            first, second = vote.result()
            assert not first
            results.append(second)
    return vote.delay, results, sent


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 8])
def test_a_vote_is_known_to_all_a_few_steps_later_by_one_message_a_step(ranks, world_size):
    delay = {1: 0, 2: 0, 3: 1, 4: 1, 5: 2, 8: 2}[world_size]
    cast = {rank + 12 * (rank % 2): [rank] for rank in range(world_size)} | {30: list(range(world_size))}
    expected = [step - delay in cast for step in range(36)]
    for found in ranks.run(world_size, votes, 36, cast):
        assert found == (delay, expected, 36 if world_size > 1 else 0)


def votes_by_one_distance(communicator: Communicator, steps: int, yes: dict[int, list[int]]) -> list[bool]:
    """A mutant: the messages go to the next rank in every step."""
    shift = Communicator.start_shift
    with mock.patch.object(
        Communicator,
        "start_shift",
        lambda self, received, sent, distance, name, *, step: shift(self, received, sent, 1, name, step=step),
    ):
        return votes(communicator, steps, yes)[1]


def test_ranks_that_are_not_told_are_caught(ranks):
    found = ranks.run(4, votes_by_one_distance, 6, {2: [0]})
    assert len({tuple(results) for results in found}) > 1


def stuck_in_a_read(communicator: Communicator) -> tuple[str | None, str | None, str | None]:
    """What the failure detector would be told while a read of the device ends, does not end, and has ended."""
    with (
        mock.patch.object(communicator, "_timeouts", Timeouts(run_seconds=1.0)),
        mock.patch.object(communicator, "_reads", WaitClock(threading.get_ident(), tick_seconds=0.2)),
    ):
        with communicator.reading():
            short = communicator._broken(False)
        deadline, found = time.monotonic() + PATIENCE_SECONDS, None
        with communicator.reading():
            while found is None and time.monotonic() < deadline:
                found = communicator._broken(False)
                time.sleep(0.05)
        return short, found, communicator._broken(False)


def test_a_rank_that_waits_for_ever_for_its_device_says_so(ranks):
    for short, found, after in ranks.run(2, stuck_in_a_read):
        assert short is None and after is None
        assert found is not None and re.fullmatch(
            r"it has waited \S+ s for what its device computes in step (None|\d+)", found
        )


def gathered(communicator: Communicator, sizes: list[int]) -> tuple[list[Any], int]:
    """What is gathered of values of these sizes, and the messages that this rank sends."""
    sent, isend = 0, dist.isend

    def counted(*arguments, **keywords):
        nonlocal sent
        sent += 1
        return isend(*arguments, **keywords)

    with mock.patch.object(dist, "isend", counted):
        return communicator.all_gather_object({"rank": communicator.rank, "text": "x" * sizes[communicator.rank]}), sent


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_objects_of_any_size_are_gathered_in_few_rounds(ranks, world_size):
    sizes = [0, 100_000, 3, 7, 50_000, 1, 0, 9][:world_size]
    expected = [{"rank": rank, "text": "x" * size} for rank, size in enumerate(sizes)]
    rounds = {1: 0, 2: 1, 3: 2, 5: 3, 8: 3}[world_size]
    for found, sent in ranks.run(world_size, gathered, sizes):
        assert found == expected
        assert sent == 2 * rounds  # the size and the data
