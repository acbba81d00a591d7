"""How a process becomes a rank: its place in the job, and the connection to the other ranks."""

from __future__ import annotations

import os
import signal
import socket
import threading
from typing import TYPE_CHECKING, NoReturn

from dist_cifar import stopping
from dist_cifar.distributed.accelerate_env import refuse_contradictions, started_by_accelerate
from dist_cifar.distributed.launch_env import DistEnv, check_local_rank, read_env
from dist_cifar.distributed.process_env import prepare_environment
from dist_cifar.errors import LaunchError
from dist_cifar.job.error_line import report_error
from dist_cifar.job.failure_exit import leave

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from dist_cifar.config import Config
    from dist_cifar.distributed.agreement import Facts
    from dist_cifar.distributed.collectives import Communicator

_RENDEZVOUS_GRACE_SECONDS = 1.0
"""The rendezvous times out this much before the clock of `connect`, because its error names the missing ranks."""


def enter_job(config: Config, local_rank: int | None) -> DistEnv:
    """This process's rank in its job, whose signals it heeds from now on. Before torch is imported, which is slow.

    `local_rank` is the option of that name. Raises `LaunchError` for a job that contradicts itself or the config.
    """
    env = read_env(os.environ)
    check_local_rank(os.environ, local_rank)
    refuse_contradictions(config, os.environ)
    prepare_environment(env, os.environ)
    stopping.install()
    if env.launcher in ("torchrun", "mpi"):
        stopping.die_with_launcher()
    elif started_by_accelerate(os.environ):  # for one process it hands on no signal, and dies of each
        stopping.die_with_launcher(signal.SIGTERM)
    return env


def connect(env: DistEnv, device: torch.device, timeout_seconds: float, facts: Callable[[], Facts]) -> Communicator:
    """Connects all ranks of the job, which all must have the same `facts`; a lone rank is not asked for any.

    Raises `LaunchError` if they are not to run the same thing, or are not connected within the timeout. Its own clock
    ends the process: gloo waits five times its timeout for each rank that is killed while it connects.
    """
    from dist_cifar.distributed.collectives import Communicator

    message = (
        f"launch: rank {env.rank} of {env.world_size} on {socket.gethostname()} waited {timeout_seconds:g} s"
        f" (run.timeout_seconds) for all ranks to connect at {env.master_addr}; look for one that failed, or set more"
        " if they start slowly"
    )
    known = facts() if env.world_size > 1 else {}
    clock = _Clock(timeout_seconds + _RENDEZVOUS_GRACE_SECONDS, message)
    try:
        # What the backend needs to start, NCCL some seconds a node, is not the time of ranks that come late.
        return Communicator(env, device=device, timeout_seconds=timeout_seconds, facts=known, met=clock.restart)
    finally:
        clock.stop()  # before the report, which waits some seconds for rank 0


class _Clock:
    """Ends the process with a message after some time, unless it is stopped."""

    def __init__(self, seconds: float, message: str) -> None:
        self._seconds, self._message = seconds, message
        self._timer: threading.Timer | None = None
        self.restart()

    def restart(self) -> None:
        self.stop()
        self._timer = threading.Timer(self._seconds, _end, [self._message, LaunchError.exit_code])
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def connect_or_leave(
    env: DistEnv, device: torch.device, timeout_seconds: float, facts: Callable[[], Facts]
) -> Communicator:
    """Does the same for a process that is a rank and nothing else: it prints the error and ends the process."""
    try:
        return connect(env, device, timeout_seconds, facts)
    except LaunchError as error:
        _end(str(error), error.exit_code)


def _end(message: str, code: int) -> NoReturn:
    report_error(message)
    leave(code)
