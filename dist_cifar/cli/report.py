"""`report`: writes one HTML page about a run, or about several."""

from __future__ import annotations

import argparse
import gc
import logging
from collections.abc import Sequence
from pathlib import Path

from dist_cifar.cli.arguments import Commands, new_file, path
from dist_cifar.errors import EXIT_DONE, ConfigError, listed

logger = logging.getLogger(__name__)


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "report",
        help="one HTML page about a run, or about several, compared",
        description="Write one self-contained HTML page: results, curves, mistakes, timeline and settings of a run; of"
        " several, side by side with what differs in their configs.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", type=path, nargs="+", metavar="RUN", help="run directories")
    parser.add_argument(
        "--out",
        type=new_file,
        metavar="FILE",
        help="default: report.html in the run directory; of several: in this folder",
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Writes the page and prints where it is. Returns the exit code."""
    from dist_cifar.tools.report import write_report

    # The rows of a long run are millions of objects that stay: looking for garbage takes a third of the time.
    gc.disable()
    try:
        path = write_report(_begun(options.runs), options.out)
    finally:
        gc.enable()
    print(f"report   {path.absolute()}")
    return EXIT_DONE


def _begun(paths: Sequence[Path]) -> list[Path]:
    """The runs among `paths`. Of several, as `runs/*` gives them, those are skipped in which nothing has begun."""
    from dist_cifar.run.run_dir import is_run, require_run

    if len(paths) == 1:
        return [require_run(paths[0])]
    skipped = [path for path in paths if path.exists() and not (is_run(path) and (path / "status.json").exists())]
    if skipped:
        names = listed([str(path) for path in skipped], most=5)
        logger.warning("warning: report: skipped, because no training has begun there: %s", names)
    runs = [require_run(path) for path in paths if path not in skipped]
    if not runs:
        raise ConfigError("report: no training has begun in any of these; give the run.dir of one")
    return runs
