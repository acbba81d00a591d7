"""The command line: `dist-cifar`, `python -m dist_cifar`, and what the front door `train.py` calls.

Contract: every error ends as one line on standard error from one rank and as an exit code of `errors.py`. A command
imports what it needs when it runs, so `--help` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dist_cifar.cli.error_line import is_disk_error, report_error, with_disk_advice
from dist_cifar.cli.parser import parse
from dist_cifar.distributed.launch_env import launcher_rank
from dist_cifar.errors import EXIT_DATA, EXIT_DONE, UserError
from dist_cifar.tracking.console import ROOT_LOGGER, log_to_stream


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    with _logging_by_rank():
        try:
            options = parse(sys.argv[1:] if argv is None else argv)
            code: int = options.command(options)
            return code
        except UserError as error:
            report_error(str(error))
            return error.exit_code
        except BrokenPipeError:  # the reader of our output has left, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_DONE
        except OSError as error:
            if not is_disk_error(error):
                raise
            report_error(with_disk_advice(error))
            return EXIT_DATA


@contextmanager
def _logging_by_rank() -> Iterator[None]:
    """Shows warnings of rank 0, and of other ranks only errors; what a command shows beyond that ends with it."""
    before = ROOT_LOGGER.handlers[:], ROOT_LOGGER.level, ROOT_LOGGER.propagate
    log_to_stream(sys.stderr, "dist_cifar: ")
    ROOT_LOGGER.setLevel(logging.WARNING if launcher_rank(os.environ) == "0" else logging.ERROR)
    try:
        yield
    finally:
        ROOT_LOGGER.handlers, ROOT_LOGGER.level, ROOT_LOGGER.propagate = before
