"""Every strategy around a compiled module, with the back end that computes by torch's own kernels: what a compiler does
to hooks, buffers and the order of gradients, without what it does to arithmetic."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn

from dist_cifar.config import Config
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.errors import ConfigError
from dist_cifar.ops import precision
from dist_cifar.trainer import Trainer

COMPILE = nn.Module.compile


def norms(communicator: Communicator, config: Config, is_compiled: bool) -> tuple[list[float], int]:
    """The gradients' norms of three steps; and how many modules were compiled."""
    compiled = 0
    torch.compiler.reset()  # what another test has compiled in this process

    def compile_(module: nn.Module, **options: object) -> None:
        nonlocal compiled
        compiled += 1
        COMPILE(module, backend="aot_eager", **options)

    with (
        mock.patch.object(nn.Module, "compile", compile_),
        mock.patch.object(precision, "compiles", lambda *arguments, **options: is_compiled),
        mock.patch.object(precision, "replace_small_convs"),
        mock.patch.object(precision, "fuse_batchnorm_relu"),
    ):
        trainer = Trainer.build(config, communicator)
        found = [trainer.train_step(trainer.batches.make(step)).item() for step in range(3)]
    return found, compiled


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("strategy", ["exact", "ddp", "deepspeed"])
def test_a_compiled_module_trains_as_one_that_is_not(ranks, tiny, strategy, dtype):
    config = tiny(f"strategy.name={strategy}", "strategy.virtual_ranks=4", f"compute.precision={dtype}")
    for (expected, none), (found, one) in zip(
        ranks.run(2, norms, config, False), ranks.run(2, norms, config, True), strict=True
    ):
        assert (none, one) == (0, 1)
        assert found == pytest.approx(expected, rel=2e-2 if dtype == "bf16" else 1e-4)


def test_fsdp_refuses_to_compile(tiny):
    """What these tests found of it: views of one tensor share its version, and blocks are compiled one by one."""
    with pytest.raises(ConfigError, match=r"compute\.compile: on does not go with strategy\.name=fsdp"):
        tiny("strategy.name=fsdp", "compute.compile=on")
    assert tiny("strategy.name=fsdp").compute.compile == "auto"
