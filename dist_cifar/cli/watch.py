"""`watch`: serves a live report of a run, or shows the run in the terminal."""

from __future__ import annotations

import argparse
import sys

from dist_cifar import stopping
from dist_cifar.cli.arguments import Commands, path, port
from dist_cifar.errors import EXIT_DONE, ConfigError


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "watch",
        help="look at a run while it trains: a page on this machine, or in the terminal",
        description="Serve the report of a run on this machine's loopback address, kept up to date, until Ctrl-C.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", type=path, nargs="+", metavar="RUN", help="run directories")
    parser.add_argument("--port", type=port, default=8642, metavar="N", help="default: 8642; 0 takes any that is free")
    parser.add_argument("--terminal", action="store_true", help="show it here; ends with the run")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Serves or shows the runs until the user stops it. Returns the exit code."""
    from dist_cifar.run.run_dir import require_run
    from dist_cifar.tools.watch import serve, show
    from dist_cifar.tracking.console import log_to_stream

    runs = [require_run(run) for run in options.runs]
    if options.terminal and len(runs) > 1:
        raise ConfigError("watch: --terminal shows one run; leave it out to compare several on one page")
    log_to_stream(sys.stderr, "dist_cifar: ")
    try:
        return show(runs[0]) if options.terminal else serve(runs, options.port)
    except stopping.Stopped as stop:
        if stop.name != "SIGINT":  # Ctrl-C is how one leaves it
            raise
        return EXIT_DONE
