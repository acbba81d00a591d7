"""`train --ranks N`: starts the ranks on this machine, without a launcher.

Contract: each rank is the same command again, with torchrun's variables. What the ranks print is what is printed, so
the last line is that of the training, and the exit code is theirs. A signal that stops this process is handed on to
all of them, and none outlives it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence

from dist_cifar import stopping
from dist_cifar.distributed.launch_env import DistEnv, port_of, rank_environ
from dist_cifar.errors import EXIT_INTERNAL

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 30.0
"""How long the other ranks may take to end when one has failed: connected ranks need a few seconds."""


def run_ranks(count: int, command: Sequence[str] | None = None, *, environ: Mapping[str, str] | None = None) -> int:
    """Starts `count` ranks of `command`, by default this process's own, and returns their exit code."""
    stopping.defer()  # the ranks answer a signal, in their own time
    command = command or [sys.executable, *sys.orig_argv[1:]]
    environ = os.environ if environ is None else environ
    job = f"local {uuid.uuid4()}"
    places = [
        DistEnv(
            rank=rank,
            world_size=count,
            local_rank=rank,
            local_world_size=count,
            master_port=port_of(job),
            job=job,
        )
        for rank in range(count)
    ]
    ranks: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, frame: object) -> None:
        for rank in ranks:
            rank.send_signal(number)

    handed_on = [number for number in stopping.SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, hand_on) for number in handed_on}
    try:
        for place in places:  # in sessions of their own: a terminal's Ctrl-C reaches them once, through this process
            ranks.append(subprocess.Popen(command, env=rank_environ(environ, place), start_new_session=True))
        _wait(ranks)
    finally:
        for rank in ranks:
            rank.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    return outcome([rank.wait() for rank in ranks])


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Returns when all ranks have ended, or some time after one has failed."""
    failed_at: float | None = None
    while None in (codes := [rank.poll() for rank in ranks]):
        now = time.monotonic()
        if failed_at is None and any(codes):
            failed_at = now
        if failed_at is not None and now - failed_at > _GRACE_SECONDS:
            return
        time.sleep(_POLL_SECONDS)


def outcome(codes: Sequence[int]) -> int:
    """The exit code of a job whose ranks ended with `codes`, negative ones being signals.

    Ranks that were left behind by one that failed end with `EXIT_INTERNAL`: the code of that one says more.
    """
    reasons = [code for code in codes if code > 0 and code != EXIT_INTERNAL]
    if reasons:
        return reasons[0]
    if EXIT_INTERNAL in codes:
        return EXIT_INTERNAL
    return next((128 - code for code in codes if code < 0), 0)
