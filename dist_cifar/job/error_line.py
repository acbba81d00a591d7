"""An error as one line on standard error, from one rank."""

from __future__ import annotations

import os
import sys
import time

from dist_cifar import stopping
from dist_cifar.distributed.launch_env import launcher_rank
from dist_cifar.errors import printable
from dist_cifar.terminal import coloured

_RANK0_SECONDS = 3.0
"""How long the other ranks leave it to rank 0 to report an error that all ranks have."""


def report_error(message: str) -> None:
    """Prints the message on rank 0; on another rank only if rank 0 has not ended the job by then."""
    rank = launcher_rank(os.environ)
    deadline = time.monotonic() + _RANK0_SECONDS
    while rank != "0" and time.monotonic() < deadline:
        time.sleep(0.05)
        if stopping.stop_requested():
            return
    print_error(message, rank)


def print_error(message: str, rank: str = "0") -> None:
    """Prints the message at once, with the rank in front of it if that is not 0."""
    prefix = "" if rank == "0" else f"rank {rank}: "
    line = f"dist_cifar: error: {prefix}{printable(' '.join(message.split()))}"
    print(coloured(line, sys.stderr), file=sys.stderr, flush=True)
