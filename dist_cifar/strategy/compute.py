"""How the module of a run computes: precision, kernels, compilation, as the config and the strategy allow."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from dist_cifar.augment import cpu
from dist_cifar.config import Config
from dist_cifar.data.training_data import TrainingData
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.evaluate import Evaluator
from dist_cifar.ops import numba_jit
from dist_cifar.ops.precision import prepare_forward, set_precision, warm_up_kernels
from dist_cifar.strategy import properties


def build_evaluator(module: nn.Module, config: Config, data: TrainingData, communicator: Communicator) -> Evaluator:
    """The evaluator of a run, with a copy of `module` that computes as the config says and that no strategy wraps."""
    device = communicator.device
    copied = copy.deepcopy(module).to(device).to(memory_format=torch.channels_last)
    set_precision(copied, config.compute.precision, device)
    return Evaluator(
        model=copied,
        dataset=data.dataset,
        validation_indices=data.validation_indices,
        batch_size=config.eval.batch_size,
        communicator=communicator,
    )


def prepare_module(module: nn.Module, config: Config, device: torch.device) -> None:
    """Sets how `module`, which is on its device, computes in training. Call it once, before it is wrapped."""
    known = properties(config.strategy)
    prepare_forward(module, config.compute, device, auto_compile=known.auto_compile, bitwise=known.bitwise)


def kept_casts(config: Config, device: torch.device) -> AbstractContextManager[object]:
    """A `with` block in whose forward passes each weight is cast to bf16 once, where the strategy allows that; weights
    must not change in it.

    torch keeps what autocast has cast until the outermost of nested blocks is left.
    """
    return torch.autocast(device.type, enabled=False) if properties(config.strategy).casts_once else nullcontext()


def compile_kernels(module: nn.Module, config: Config, communicator: Communicator) -> None:
    """Loads what numba has compiled for a run of `module` from its cache, or compiles it. A collective."""

    def use() -> None:
        cpu.warm_up()
        auto_compile = properties(config.strategy).auto_compile
        warm_up_kernels(module, config.compute, communicator.device, auto_compile=auto_compile)

    numba_jit.load(use)  # on all ranks in parallel; what follows compiles only on a miss
    # Rank 0 first, because it is the one that logs what takes long; the others load what it compiled. They wait in a
    # barrier, for as long as that takes on a busy machine.
    if communicator.rank == 0:
        numba_jit.warm_up(use)
    communicator.barrier()
    if communicator.rank != 0:
        numba_jit.warm_up(use)
