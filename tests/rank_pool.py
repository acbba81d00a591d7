"""Gloo ranks that stay alive over the test session: building the first DDP imports for seconds, later ones do not."""

from __future__ import annotations

import dataclasses
import faulthandler
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_TIMEOUT_SECONDS = 240.0


class RankError(Exception):
    """A rank failed; the message holds every rank's traceback."""


@dataclasses.dataclass(frozen=True)
class _Call:
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    rank: int
    world_size: int
    store: str


class RankPool:
    """As many processes as were needed so far. `run(n, f, *args)` calls `f(communicator, *args)` on n ranks of a new
    process group."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._calls = directory, 0
        self._ranks: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The results in the order of the ranks. Raises `RankError` if one fails or does not answer."""
        while len(self._ranks) < world_size:
            self._start_one()
        self._calls += 1
        store = str(self._directory / f"store-{self._calls}")
        connections = [connection for _, connection in self._ranks[:world_size]]
        for rank, connection in enumerate(connections):
            connection.send(_Call(function, arguments, rank, world_size, store))
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while len(answers) + len(failures) < world_size:
            pending = [c for rank, c in enumerate(connections) if rank not in answers and rank not in failures]
            # Once a rank has failed, those that wait for it in a collective are not waited for.
            ready = wait(pending, timeout=2.0 if failures else _TIMEOUT_SECONDS)
            if not ready:
                break
            for connection in ready:
                rank = connections.index(connection)
                try:
                    succeeded, answer = connection.recv()
                except EOFError:
                    process, _ = self._ranks[rank]
                    process.join(10)
                    succeeded, answer = False, f"the process died, exit code {process.exitcode}"
                (answers if succeeded else failures)[rank] = answer
        if failures or len(answers) < world_size:
            silent = sorted(set(range(world_size)) - set(answers) - set(failures))
            if silent or not all(process.is_alive() for process, _ in self._ranks):
                self.close()  # they may hang in a collective: the next call starts anew
            text = "\n".join(f"rank {rank}:\n{failure}" for rank, failure in sorted(failures.items()))
            raise RankError(f"{text}\nranks without an answer: {silent}")
        return [answers[rank] for rank in range(world_size)]

    def close(self) -> None:
        """Ends the processes."""
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join()
        self._ranks = []

    def _start_one(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self._ranks.append((process, ours))


def _serve(connection: Connection) -> None:
    faulthandler.enable()  # a crash says where
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            call = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, _call(call)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


def _forget_deepspeed() -> None:
    """It keeps groups of its own, and stage 3 changes the process for good: two counters, and a `linear` whose
    gradients come in another order, so that ranks with another past would reduce other things.
    """
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
        from deepspeed.runtime.zero.partition_parameters import Init, InsertPostInitMethodToModuleSubClasses

        DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = Init.param_id = 0
        if hasattr(InsertPostInitMethodToModuleSubClasses, "linear_bk"):
            sys.modules["torch"].nn.functional.linear = InsertPostInitMethodToModuleSubClasses.linear_bk


def _call(call: _Call) -> Any:
    import torch
    import torch.distributed as dist
    from accelerate.state import AcceleratorState

    from dist_cifar.distributed.collectives import Communicator
    from dist_cifar.distributed.launch_env import DistEnv

    env = DistEnv(rank=call.rank, world_size=call.world_size, local_rank=call.rank, local_world_size=call.world_size)
    for name in env.variables():
        os.environ.pop(name, None)
    store = dist.FileStore(call.store, call.world_size)
    communicator = Communicator(env, device=torch.device("cpu"), timeout_seconds=60, store=store)
    try:
        return call.function(communicator, *call.arguments)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        _forget_deepspeed()
        communicator.close()
