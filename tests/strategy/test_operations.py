"""How many operations a step of `exact` hands to the device: on a GPU, each is started by the host."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from dist_cifar import trainer as train_module
from dist_cifar.data.batching import plan_batches
from dist_cifar.models import build_model
from dist_cifar.ops import precision
from dist_cifar.run.checkpoint import weights_sha256
from dist_cifar.run.training_sums import TrainingSums
from dist_cifar.strategy import build_strategy
from dist_cifar.strategy.compute import kept_casts
from dist_cifar.trainer import Trainer
from tests.small_runs import alone

NO_WORK = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "_unsafe_view",
}
MOST = 1900
"""It was 2,123 when they were first counted."""


class Counting(TorchDispatchMode):
    """Counts the operators that are no views, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if not function.is_view and name not in NO_WORK:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def test_a_step_of_eight_virtual_ranks_hands_over_few_operations(tiny, monkeypatch):
    """ResNet-18 in bf16, on one rank."""
    for name in ("replace_small_convs", "fuse_batchnorm_relu", "fuse_gelu"):  # those are for CPUs
        monkeypatch.setattr(precision, name, lambda module: None)
    config = tiny("model.name=resnet18", "strategy.name=exact", "strategy.virtual_ranks=8", "compute.precision=bf16")
    plan = plan_batches(config.batch, config.train, slices=8, rank=0, world_size=1, train_size=16)
    model, communicator = build_model(config.model, num_classes=10, seed=0), alone()
    strategy, sums = (
        build_strategy(model, config, communicator=communicator, plan=plan),
        TrainingSums(torch.device("cpu"), may_skip=False),
    )
    images, labels = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))

    def step() -> None:
        with kept_casts(config, communicator.device):
            for inputs, targets in zip(images.split(plan.micro_sizes), labels.split(plan.micro_sizes), strict=True):
                logits = strategy.forward(inputs)
                loss = cross_entropy(logits, targets)
                strategy.backward(loss)
                sums.add(loss, logits, targets)
        sums.add_step(strategy.step(1e-3))

    step()
    with Counting() as counting:
        step()
    assert sum(counting.counts.values()) <= MOST, counting.counts


@pytest.mark.parametrize("max_micro_batch", ["null", "2"])
def test_weights_are_cast_once_a_step_with_the_same_bits(tiny, monkeypatch, max_micro_batch):
    overrides = (f"batch.max_micro_batch={max_micro_batch}", "strategy.virtual_ranks=4", "compute.precision=bf16")
    digests, casts = [], []
    for kept in (True, False):
        trainer = Trainer.build(tiny("strategy.name=exact", *overrides), alone())
        casting = kept_casts if kept else lambda config, device: nullcontext()
        with mock.patch.object(train_module, "kept_casts", casting), Counting() as counting:
            for step in range(3):
                trainer.train_step(trainer.batches.make(step))
        digests.append(weights_sha256(trainer.strategy.model_state_dict()))
        casts.append(counting.counts["_to_copy"])
    weights = sum(parameter.dim() > 1 for parameter in trainer.strategy.module.parameters()) + 1  # and the head's bias
    passes = 4 if max_micro_batch == "null" else 8
    assert digests[0] == digests[1] and casts[1] - casts[0] == 3 * (passes - 1) * weights
