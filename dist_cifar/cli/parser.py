"""The parser of the command line, made of the parsers of the commands.

Contract: errors are `ConfigError`s that name the nearest right word. Nothing but the commands' options is imported.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from dist_cifar import __version__
from dist_cifar.cli import (
    bench,
    data,
    doctor,
    evaluate,
    export,
    init,
    predict,
    report,
    status,
    submit,
    train,
    verify,
    watch,
)
from dist_cifar.cli.arguments import add_local_rank
from dist_cifar.errors import ConfigError, did_you_mean, nearest

COMMANDS = (init, train, verify, doctor, submit, data, evaluate, predict, export, report, watch, status, bench)
"""In the order of the help. Each has `add(commands)`, and `run(options)`, which returns the exit code."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command, and as `command` the function that runs it. Raises `ConfigError`.

    argparse takes positional arguments from one place only, and users write some `key=value` before an option and
    some behind it.
    """
    options, rest = build_parser().parse_known_args(arguments)
    flags = [argument for argument in rest if argument.startswith("-")]
    if flags or (rest and "overrides" not in options):
        parser: CommandParser = options.parser
        hint = _hint(flags[0].partition("=")[0], parser, "overrides" in options) if flags else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if rest:
        options.overrides += rest
    return options


def _hint(flag: str, parser: CommandParser, has_fields: bool) -> str:
    options = {option.lstrip("-"): option for option in parser.option_names}  # compared without the dashes they share
    name = nearest(flag.lstrip("-"), options)
    if name is not None or not has_fields:
        return f"; did you mean {options[name]}?" if name else ""
    from dist_cifar.config import key_hint

    return f"; config fields are given as key=value, without dashes{key_hint(flag.lstrip('-')).rstrip(';')}"


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = _Parser(
        prog="dist-cifar",
        description="Train the same CIFAR-10 model on any number of GPUs, and prove it.",
        epilog="exit codes: 0 done, 2 bad usage or config, 70 internal, 74 disk or data, 75 stopped and saved (run it"
        " again)",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dist_cifar {__version__}")
    parser.set_defaults(local_rank=None)
    add_local_rank(parser)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=CommandParser)
    for command in COMMANDS:
        command.add(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """An argparse parser that raises `ConfigError`."""

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if choice:
            message += did_you_mean(choice[1], re.findall(r"[\w-]+", choice[2]))
        raise ConfigError(f"{message}; see `{self.prog} --help`")


class CommandParser(_Parser):
    """The parser of one command, which is itself among the options that it parses."""

    def __init__(self, **options: Any) -> None:
        self.option_names: list[str] = []
        super().__init__(**options)
        self.set_defaults(parser=self)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        action = super().add_argument(*names, **options)
        self.option_names += action.option_strings
        return action
