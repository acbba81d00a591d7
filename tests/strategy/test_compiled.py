"""Every strategy around a compiled module, with the back end that computes by torch's own kernels: what a compiler does
to hooks, buffers and the order of gradients, without what it does to arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import nn

from dist_cifar.config import Config
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.errors import ConfigError
from dist_cifar.ops import precision
from dist_cifar.strategy.ddp import DdpStrategy
from dist_cifar.trainer import Trainer

COMPILE = nn.Module.compile


@contextmanager
def compiling(is_compiled: bool = True) -> Iterator[list[nn.Module]]:
    """A `with` block in which modules are compiled if `is_compiled`, by that back end; has those that were."""
    compiled: list[nn.Module] = []
    torch.compiler.reset()  # what another test has compiled in this process

    def compile_(module: nn.Module, **options: object) -> None:
        compiled.append(module)
        COMPILE(module, backend="aot_eager", **options)

    with (
        mock.patch.object(nn.Module, "compile", compile_),
        mock.patch.object(precision, "compiles", lambda *arguments, **options: is_compiled),
        mock.patch.object(precision, "replace_small_convs"),
        mock.patch.object(precision, "fuse_batchnorm_relu"),
    ):
        yield compiled


def norms(communicator: Communicator, config: Config, is_compiled: bool) -> tuple[list[float], int]:
    """The gradients' norms of three steps; and how many modules were compiled."""
    with compiling(is_compiled) as compiled:
        trainer = Trainer.build(config, communicator)
        found = [trainer.train_step(trainer.batches.make(step)).item() for step in range(3)]
    return found, len(compiled)


def sent_early(communicator: Communicator, config: Config, splits: bool) -> bool:
    """Whether DDP begins to send gradients before it has that of the first layer."""
    events = []

    def send(state, bucket):  # type: ignore[no-untyped-def]  # DDP wants the types themselves, or none
        events.append("sent")
        whole = torch.futures.Future()
        whole.set_result(bucket.buffer())
        return whole

    with compiling() as compiled, torch._dynamo.config.patch(optimize_ddp=splits):
        trainer = Trainer.build(config, communicator)
        assert len(compiled) == 1 and isinstance(trainer.strategy, DdpStrategy)
        trainer.strategy._replica.register_comm_hook(None, send)
        next(trainer.strategy.module.parameters()).register_hook(lambda gradient: events.append("first layer"))
        trainer.train_step(trainer.batches.make(0))
    assert sorted(events) == ["first layer", "sent", "sent", "sent"]
    return events[0] == "sent"


@pytest.mark.slow
def test_compiled_ddp_sends_while_it_computes(ranks, tiny):
    """torch splits the graph of a module that DDP has wrapped where its buckets end; the mutant does not."""
    config = tiny("model.name=resnet18", "strategy.name=ddp")
    assert ranks.run(2, sent_early, config, True) == [True, True]
    assert ranks.run(2, sent_early, config, False) == [False, False]


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
