"""How many operations a step of `exact` hands to the device: on a GPU, each is started by the host."""

from __future__ import annotations

from contextlib import nullcontext
from unittest import mock

import pytest

from benchmarks.suite.host_time import Counting, operations
from dist_cifar import trainer as train_module
from dist_cifar.run.checkpoint import weights_sha256
from dist_cifar.strategy.compute import kept_casts
from dist_cifar.trainer import Trainer
from tests.small_runs import alone

MOST = 1550
"""The first count was 2,123. What is left has 160 convolutions, 160 normalisations and 136 rectifiers, all of them
forward and backward, 64 additions of shortcuts, and 168 casts of gradients."""
SAVED = {"pairs": 4 * 62 - 8, "counted": 7 * 20, "cast": 7 * 22}
"""Gradients added one by one, in a foreach operation instead; counts of layers; weights, and the head's bias."""


@pytest.fixture(scope="module")
def of_a_step() -> int:
    """ResNet-18 in bf16 on one rank, eight virtual ranks."""
    return operations("resnet18").total()


def test_a_step_hands_over_few_operations(of_a_step):
    assert of_a_step <= MOST


@pytest.mark.parametrize("left_out", SAVED)
def test_each_saving_is_counted(of_a_step, left_out):
    assert operations("resnet18", **{left_out: True}).total() - of_a_step == SAVED[left_out]


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
