"""The command line: `dist-cifar`, `python -m dist_cifar`, and what the front door `train.py` calls.

Contract: every error ends as one line on standard error from one rank and as an exit code of `errors.py`. A command
imports what it needs when it runs, so `--help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dist_cifar import stopping
from dist_cifar.cli import streams
from dist_cifar.cli.parser import parse
from dist_cifar.errors import EXIT_DATA, EXIT_DONE, EXIT_SIGINT, UserError, out_of_memory, system_error
from dist_cifar.job.error_line import report_error
from dist_cifar.job.rank_logging import logging_by_rank


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    streams.secure()
    with logging_by_rank():
        try:
            options = parse(sys.argv[1:] if argv is None else argv)
            code: int = options.command(options)
            sys.stdout.flush()
            return code
        except UserError as error:
            report_error(str(error))
            return error.exit_code
        except stopping.Stopped as stop:
            stopping.report(stop)
            return stop.exit_code
        except KeyboardInterrupt:  # where no handlers are installed
            stopping.report(stopping.Stopped("SIGINT"))
            return EXIT_SIGINT
        except BrokenPipeError:  # the reader of our output has left, as `| head` does
            streams.discard(sys.stdout)
            return EXIT_DONE
        except (MemoryError, RuntimeError) as error:
            lack = out_of_memory(error)
            if lack is None:
                raise
            report_error(str(lack))
            return lack.exit_code
        except OSError as error:
            message = system_error(error)
            if message is None:
                raise
            if isinstance(error, streams.OutputError):
                streams.discard(sys.stdout)  # what is left would fail again at the end of the process
            report_error(message)
            return EXIT_DATA
