"""The streams of a GPU, by vector clocks on a CPU: what one makes is not touched by the other before it is there."""

from __future__ import annotations

from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from dist_cifar.config import BatchConfig, Config, ModelConfig, StrategyConfig
from dist_cifar.data import prefetch as prefetch_module
from dist_cifar.data.batching import plan_batches
from dist_cifar.data.prefetch import Batch, prefetch
from dist_cifar.distributed.collectives import Communicator, Group
from dist_cifar.distributed.launch_env import DistEnv
from dist_cifar.models import build_model
from dist_cifar.ops import precision
from dist_cifar.optim import optimizer_factory
from dist_cifar.strategy import reduction_queue
from dist_cifar.strategy.exact import ExactStrategy
from dist_cifar.strategy.reduction_queue import ReductionQueue
from tests import fake_streams

GPU = torch.device("cuda", 0)


class TwoRanks(Communicator):
    """Rank 0 of two that always have the same."""

    def __init__(self) -> None:
        super().__init__(DistEnv(), device=torch.device("cpu"), timeout_seconds=60)
        self.world_size, self.identities = 2, self.identities * 2

    def group(self, groups):
        return Group(ranks=[0, 1], place=0, handle=None)

    def all_to_all(self, received, sent, counts, group):
        received.copy_(sent)

    def all_gather(self, gathered, part, group):
        gathered.view(2, -1).copy_(part.expand(2, -1))


def races_of_steps(monkeypatch) -> list[str]:
    """Of three steps of `exact` on one of two ranks."""
    for name in ("replace_small_convs", "fuse_batchnorm_relu", "fuse_gelu"):  # those are for CPUs
        monkeypatch.setattr(precision, name, lambda module: None)
    monkeypatch.setattr(reduction_queue, "BUCKET_BYTES", 10_000)
    config = Config(
        model=ModelConfig(name="resnet8"),
        batch=BatchConfig(global_size=16),
        strategy=StrategyConfig(name="exact", virtual_ranks=8),
    )
    plan = plan_batches(config.batch, config.train, slices=8, rank=0, world_size=2, train_size=16)
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    communicator = TwoRanks()
    with fake_streams.watched() as streams:
        strategy = ExactStrategy(
            build_model(config.model, num_classes=10, seed=0),
            config,
            communicator=communicator,
            plan=plan,
            make_optimizer=optimizer_factory(config),
        )
        assert len(strategy._buckets) > 3
        strategy._reductions = ReductionQueue(SimpleNamespace(device=GPU, world_size=2))
        for _ in range(3):
            for inputs, targets in zip(images.split(plan.micro_sizes), labels.split(plan.micro_sizes), strict=True):
                strategy.backward(cross_entropy(strategy.forward(inputs), targets))
            strategy.step(1e-3)
        assert strategy._reductions._stream.seen[strategy._reductions._stream] > 100
    return streams.races


def test_reductions_race_with_nothing(monkeypatch):
    assert races_of_steps(monkeypatch) == []


@pytest.mark.parametrize("waits", ["side", "main"])
def test_a_stream_that_does_not_wait_is_caught(monkeypatch, waits):
    """The two mutants: reductions before their gradients are there, and a step before the reductions are."""
    wait = fake_streams.Stream.wait_stream

    def wait_sometimes(stream, other):
        if (stream.priority == -1) != (waits == "side"):
            wait(stream, other)

    monkeypatch.setattr(fake_streams.Stream, "wait_stream", wait_sometimes)
    assert len(races_of_steps(monkeypatch)) > 10


def races_of_batches(monkeypatch) -> list[str]:
    """Of a loop that reads three batches, made on a side stream by the thread that prefetches."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(prefetch_module, "upload", lambda tensor, device: tensor + 0)
    with fake_streams.watched() as streams:
        make = lambda step: Batch(inputs=torch.ones(4) * step, labels=torch.arange(4))  # noqa: E731
        with closing(prefetch(make, range(3), GPU)) as batches:
            sums = [(batch.inputs * batch.labels).sum() for batch in batches]
        assert [int(total) for total in sums] == [0, 6, 12]
    return streams.races


def test_batches_are_read_when_they_are_filled(monkeypatch):
    assert races_of_batches(monkeypatch) == []


def test_a_loop_that_does_not_wait_for_its_batch_is_caught(monkeypatch):
    monkeypatch.setattr(fake_streams.Stream, "wait_event", lambda stream, event: None)
    assert len(races_of_batches(monkeypatch)) >= 3
