"""The order of the samples, against torch's DistributedSampler."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from dist_cifar.config import BatchConfig, TrainConfig
from dist_cifar.data.batching import plan_batches
from dist_cifar.data.sampler import GlobalBatchSampler

SIZE, GLOBAL_SIZE, SEED = 203, 16, 7


def sampler(rank: int, world_size: int) -> GlobalBatchSampler:
    batch = BatchConfig(global_size=GLOBAL_SIZE)
    plan = plan_batches(batch, TrainConfig(), slices=8, rank=rank, world_size=world_size, train_size=SIZE)
    return GlobalBatchSampler(SIZE, plan, rank=rank, world_size=world_size, seed=SEED)


def global_batch(step: int, world_size: int) -> list[int]:
    return [index for rank in range(world_size) for index in sampler(rank, world_size).batch(step).tolist()]


@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
@pytest.mark.parametrize("step", [0, 5, 11, 12, 30])
def test_every_world_size_has_the_same_batches_in_the_same_order(world_size, step):
    assert global_batch(step, world_size) == global_batch(step, 1)


def test_samples_dealt_out_one_by_one_are_the_same_sets_in_another_order():
    """The mutant of the test above: DistributedSampler's own way, which comparing sets would let pass."""
    torchs = [DistributedSampler(range(SIZE), 2, rank, shuffle=True, seed=SEED, drop_last=True) for rank in range(2)]
    dealt = [index for indices in torchs for index in list(indices)[: GLOBAL_SIZE // 2]]
    assert set(dealt) == set(global_batch(0, 1)) and dealt != global_batch(0, 1)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_batches_are_the_sets_of_torchs_distributed_sampler(world_size):
    per_rank = GLOBAL_SIZE // world_size
    for epoch in range(2):
        theirs = []
        for rank in range(world_size):
            reference = DistributedSampler(range(SIZE), world_size, rank, shuffle=True, seed=SEED, drop_last=True)
            reference.set_epoch(epoch)
            theirs.append(list(reference))
        for position in range(SIZE // GLOBAL_SIZE):
            union = {index for indices in theirs for index in indices[position * per_rank : (position + 1) * per_rank]}
            assert len(union) == GLOBAL_SIZE
            assert set(global_batch(epoch * (SIZE // GLOBAL_SIZE) + position, world_size)) == union


def test_an_epoch_repeats_no_sample_and_epochs_differ():
    steps = SIZE // GLOBAL_SIZE
    epochs = [[index for step in range(e * steps, (e + 1) * steps) for index in global_batch(step, 2)] for e in (0, 1)]
    assert all(len(set(epoch)) == steps * GLOBAL_SIZE for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_iterating_gives_a_data_loader_the_same_batches():
    ours = sampler(1, 2)
    ours.set_epoch(3)
    loader = DataLoader(torch.arange(SIZE), batch_size=GLOBAL_SIZE // 2, sampler=ours)
    batches = [batch.tolist() for batch in loader]
    assert len(ours) == sum(map(len, batches))
    first = 3 * (SIZE // GLOBAL_SIZE)
    assert batches == [ours.batch(first + i).tolist() for i in range(SIZE // GLOBAL_SIZE)]
