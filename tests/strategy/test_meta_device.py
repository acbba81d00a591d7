"""The whole step of `exact` on the device `meta`, which refuses tensors of another device, and every read."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.functional import cross_entropy

from dist_cifar.config import Config
from dist_cifar.data.batching import plan_batches
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.distributed.launch_env import DistEnv
from dist_cifar.models import build_model
from dist_cifar.optim import clipping
from dist_cifar.run.training_sums import TrainingSums
from dist_cifar.strategy import build_strategy, exact
from dist_cifar.strategy.exact import ExactStrategy

META = torch.device("meta")
OPTIMIZERS = {
    "adam": ("optimizer.non_finite=skip",),
    "without clipping": ("optimizer.max_grad_norm=null",),
    "adamw": ("optimizer.name=adamw", "optimizer.decay_norms_and_biases=false"),
    "muon": ("optimizer.name=muon", "muon.rest=adamw", "muon.renormalise_every_steps=2", "model.norm=group"),
}
"""All but SGD, whose kernel torch has not for this device."""


def take_steps(config: Config) -> ExactStrategy:
    """Two steps of a loop like the trainer's."""
    config = dataclasses.replace(config, strategy=dataclasses.replace(config.strategy, name="exact"))
    communicator = Communicator(DistEnv(), device=META, timeout_seconds=60)
    slices = config.strategy.virtual_ranks
    plan = plan_batches(config.batch, config.train, slices=slices, rank=0, world_size=1, train_size=16)
    model = build_model(config.model, num_classes=10, seed=0)
    strategy = build_strategy(model, config, communicator=communicator, plan=plan)
    assert isinstance(strategy, ExactStrategy)
    sums = TrainingSums(META, may_skip=config.optimizer.non_finite == "skip")
    images = torch.empty(16, 3, 32, 32, device=META).to(memory_format=torch.channels_last)
    labels = torch.empty(16, dtype=torch.int64, device=META)
    for _ in range(2):
        for inputs, targets in zip(images.split(plan.micro_sizes), labels.split(plan.micro_sizes), strict=True):
            logits = strategy.forward(inputs)
            loss = cross_entropy(logits, targets, label_smoothing=0.1)
            strategy.backward(loss)
            sums.add(loss, logits, targets)
        sums.add_step(strategy.step(1e-3))
    return strategy


@pytest.mark.parametrize("overrides", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_no_value_is_read_and_no_device_is_mixed(tiny, overrides):
    strategy = take_steps(tiny("strategy.virtual_ranks=8", "batch.global_size=16", *overrides))
    parameters = dict(strategy.module.named_parameters())
    for name, tensor in strategy.optimizer_state_dict().items():
        parameter = parameters[name.rpartition(".")[0]]
        assert tensor.device == META
        assert tensor.dim() == 0 or tensor.stride() == parameter.stride(), name  # else fused kernels copy it


def test_a_step_that_reads_a_value_is_caught(tiny, monkeypatch):
    clip = clipping.clip_by_norm
    monkeypatch.setattr(
        clipping, "clip_by_norm", lambda optimizer, most, norm: clip(optimizer, most if norm > 1 else None, norm)
    )
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        take_steps(tiny("batch.global_size=16"))


def test_a_step_that_mixes_devices_is_caught(tiny, monkeypatch):
    reduce = exact.Bucket.reduce

    def reduce_mixed(bucket, sums, divisor):
        changed = [sums[0][0] + torch.zeros(sums[0][0].shape), *sums[0][1:]]  # with one on the CPU
        reduce(bucket, [changed, *sums[1:]], divisor)

    monkeypatch.setattr(exact.Bucket, "reduce", reduce_mixed)
    with pytest.raises(RuntimeError, match="device"):
        take_steps(tiny("batch.global_size=16"))
