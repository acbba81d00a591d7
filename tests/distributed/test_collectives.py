"""The collectives: what ranks say when they do not agree."""

from __future__ import annotations

import pytest
import torch

from dist_cifar.distributed.collectives import Communicator
from dist_cifar.errors import LaunchError, TrainingError
from dist_cifar.run.checkpoint import weights_sha256


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
