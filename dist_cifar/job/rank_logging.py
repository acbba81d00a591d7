"""What a process shows of the package's log before and after a training, by its rank."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dist_cifar import stopping
from dist_cifar.distributed.launch_env import launcher_rank
from dist_cifar.tracking.console import ROOT_LOGGER, log_to_stream


@contextmanager
def logging_by_rank() -> Iterator[None]:
    """Shows warnings of rank 0, and of other ranks only errors; what a command shows beyond that ends with it."""
    before = ROOT_LOGGER.handlers[:], ROOT_LOGGER.level, ROOT_LOGGER.propagate
    log_to_stream(sys.stderr, "dist_cifar: ")
    is_rank0 = launcher_rank(os.environ) == "0"
    ROOT_LOGGER.setLevel(logging.WARNING if is_rank0 else logging.ERROR)
    if not is_rank0:
        stopping.be_quiet()
    try:
        yield
    finally:
        ROOT_LOGGER.handlers, ROOT_LOGGER.level, ROOT_LOGGER.propagate = before
