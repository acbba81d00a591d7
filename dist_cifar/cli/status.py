"""`status`: prints what `status.json` of a run says, for people and for scripts."""

from __future__ import annotations

import argparse
import json
from typing import Any

from dist_cifar.cli.arguments import Commands, path
from dist_cifar.errors import EXIT_DONE, ConfigError, DataError, did_you_mean, printable


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "status",
        help="print how a run stands: running, saved, failed or done, at which step, and why",
        description="Print the fields of a run's status.json, or the value of one of them for a script.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=path, metavar="RUN", help="run directory")
    parser.add_argument("field", nargs="?", metavar="FIELD", help="e.g. status, step, rank or reason; default: all")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Prints the fields. Returns the exit code."""
    from dist_cifar.run.run_dir import RunDir, require_run

    path = require_run(options.run)
    status = RunDir(path).status()
    if not status:
        raise DataError(f"{path}: there is no status.json; start the training again, which writes it")
    if options.field is None:
        width = max(map(len, status))
        for name, value in status.items():
            print(f"{printable(name):<{width}}  {_text(value)}")
    elif options.field in status:
        print(_text(status[options.field]))
    else:
        hint = did_you_mean(options.field, status) or f"; it has {', '.join(status)}"
        raise ConfigError(f"{path}: status.json has no field {options.field}{hint}")
    return EXIT_DONE


def _text(value: Any) -> str:
    """A string as it is, on one line; anything else as JSON writes it."""
    return printable(" ".join(value.split())) if isinstance(value, str) else json.dumps(value)
