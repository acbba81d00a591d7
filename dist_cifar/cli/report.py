"""`report`: writes one HTML page about a run, or about several."""

from __future__ import annotations

import argparse
from pathlib import Path

from dist_cifar.cli.arguments import Commands, new_file
from dist_cifar.errors import EXIT_DONE


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "report",
        help="one HTML page about a run, or about several, compared",
        description="Write one self-contained HTML page: results, curves, mistakes, timeline and settings of a run; of"
        " several, side by side with what differs in their configs.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    parser.add_argument(
        "--out",
        type=new_file,
        metavar="FILE",
        help="default: report.html in the run directory; of several: in this folder",
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Writes the page and prints where it is. Returns the exit code."""
    from dist_cifar.run.run_dir import require_run
    from dist_cifar.tools.report import write_report

    path = write_report([require_run(run) for run in options.runs], options.out)
    print(f"report   {path.absolute()}")
    return EXIT_DONE
