"""The step waits for the device nowhere: between two rows of the log, the loop reads no tensor of the training."""

from __future__ import annotations

import sys
import threading
import traceback
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dist_cifar.config import Config
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.run.run_dir import RunDir
from dist_cifar.trainer import Trainer

STEPS = 6
READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "allclose")
"""Operators whose result, or whose shape, the host has to wait for."""
METHODS = ("tolist", "numpy", "cpu", "__array__")
"""Those that are no operators on a CPU."""


class Reads(TorchDispatchMode):
    """Who reads a tensor while `run` is between its first step and its first log."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self._run, self._thread = run, threading.get_ident()  # another thread prepares batches
        self.seen: list[str] = []
        """Each read with the files and functions that led to it."""

    def note(self, name: str) -> None:
        if 0 < self._run.state.step < STEPS and threading.get_ident() == self._thread:
            frames = traceback.extract_stack(sys._getframe(2))
            if frames[-1].name == "result" and frames[-1].filename.endswith("distributed/any_reduce.py"):
                return  # the ranks' answers to each other, which never leave the host
            if frames[-1].filename.endswith(("ops/fused_batchnorm.py", "ops/fused_gelu.py")):
                return  # the kernels themselves, which there are for CPUs alone
            self.seen.append(f"{name} by " + " < ".join(f"{f.filename}:{f.name}" for f in reversed(frames)))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in READS:
            self.note(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


def reads(communicator: Communicator, config: Config, careless: bool) -> list[str]:
    communicator.run_on_rank0(RunDir(config.run.dir).open)
    run = Trainer.build(config, communicator)
    seen = Reads(run)
    patches = []
    for name in METHODS:
        original = getattr(torch.Tensor, name)

        def method(tensor: torch.Tensor, *args: Any, original: Any = original, name: str = name, **kw: Any) -> Any:
            seen.note(name)
            return original(tensor, *args, **kw)

        patches.append(mock.patch.object(torch.Tensor, name, method))
    if careless:
        add = run.sums.add
        run.sums.add = lambda loss, *rest: add(loss * float(loss > -1), *rest)
    for patch in patches:
        patch.start()
    try:
        with seen:
            run.fit()
    finally:
        for patch in patches:
            patch.stop()
    return seen.seen


def short(tiny: Any, strategy: str) -> Config:
    name, _, stage = strategy.partition(" ")
    words = [f"train.max_steps={STEPS}", f"run.log_every_steps={STEPS}", "train.epochs=20", "eval.every_epochs=20"]
    return tiny(*words, f"strategy.name={name}", f"strategy.zero_stage={stage or 1}", "strategy.virtual_ranks=4")


@pytest.mark.parametrize("strategy", ["exact", "ddp", "fsdp"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_nothing_is_read_between_two_logs(ranks, tiny, strategy, world_size):
    assert ranks.run(world_size, reads, short(tiny, strategy), False) == [[]] * world_size


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_with_deepspeed_only_its_engine_reads(ranks, tiny, stage):
    for seen in ranks.run(2, reads, short(tiny, f"deepspeed {stage}"), False):
        assert [line for line in seen if "deepspeed/runtime" not in line] == []


def test_a_read_in_the_loop_is_found(ranks, tiny):
    (seen,) = ranks.run(1, reads, short(tiny, "ddp"), True)
    assert len(seen) == STEPS - 1
    assert "_local_scalar_dense" in seen[0] and "dist_cifar/trainer.py:train_step" in seen[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("strategy", ["exact", "ddp"])
def test_on_a_gpu_nothing_waits_between_two_logs(tiny, strategy):
    """torch raises at the first call that waits for the device."""
    from dist_cifar.distributed.launch_env import read_env

    communicator = Communicator(read_env({}), device=torch.device("cuda", 0), timeout_seconds=60)
    config = short(tiny, strategy)
    communicator.run_on_rank0(RunDir(config.run.dir).open)
    run = Trainer.build(config, communicator)
    take_step = run.strategy.step

    def step(lr: float) -> torch.Tensor:
        norm = take_step(lr)
        torch.cuda.set_sync_debug_mode("error" if 0 < run.state.step < STEPS - 1 else "default")
        return norm

    run.strategy.step = step
    try:
        run.fit()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        communicator.close()
