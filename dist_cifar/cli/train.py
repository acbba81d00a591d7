"""`train`: trains a model, or resumes the run that the run directory holds."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from typing import TYPE_CHECKING, Any, NoReturn

from dist_cifar.cli.arguments import Commands, add_config, add_local_rank, config_of, positive
from dist_cifar.errors import EXIT_DONE, EXIT_SAVED

if TYPE_CHECKING:
    from dist_cifar.config import Config


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "train",
        help="train a model; all config fields: dist-cifar train --help",
        description="Train a model, or resume the run that the run directory holds.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--help", "-h", action=_Help, nargs=0, help="show this and all config fields, and exit")
    add_config(parser, example="train.epochs=3")
    parser.add_argument("--resume", action="store_true", help="fail if there is nothing to resume")
    parser.add_argument(
        "--resume-anyway", action="store_true", help="resume even with what changes the result; the log names it"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
    parser.add_argument("--print-run-dir", action="store_true", help="print the run directory and exit")
    parser.add_argument(
        "--ranks", type=positive, metavar="N", help="start N ranks on this machine, one for each GPU or on the CPU"
    )
    add_local_rank(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Runs this process as one rank of the training, or with `--ranks` starts its ranks. Returns the exit code."""
    from dist_cifar.distributed.launch_env import launcher_rank, starts_ranks
    from dist_cifar.run.run_dir import where_it_lies

    config = where_it_lies(config_of(options), options.config, options.overrides)
    if options.print_config or options.print_run_dir:
        if launcher_rank(os.environ) == "0":
            _print_of(config, options)
        return EXIT_DONE
    if options.ranks is not None and starts_ranks(os.environ, options.ranks):
        from dist_cifar.job.local_ranks import run_ranks

        return run_ranks(options.ranks)
    return _run_rank(config, options)


def _run_rank(config: Config, options: argparse.Namespace) -> int:
    from dist_cifar.cli import streams
    from dist_cifar.job.enter import connect_or_leave
    from dist_cifar.job.failure_exit import FailureExit
    from dist_cifar.job.rank import enter_training, import_torch, run_rank

    streams.survive_lost_output()
    env = enter_training(config, options.local_rank)
    import_torch(config, env)
    return run_rank(
        config,
        env,
        must_resume=options.resume,
        resume_anyway=options.resume_anyway,
        connect=connect_or_leave,
        ended=lambda _, is_done: EXIT_DONE if is_done else EXIT_SAVED,
        failed=FailureExit.fail,
    )


def _print_of(config: Config, options: argparse.Namespace) -> None:
    from dist_cifar.config import to_yaml

    print(to_yaml(config) if options.print_config else f"{config.run.dir}\n", end="")


class _Help(argparse.Action):
    """Prints the help with every config field; the docstrings are read only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from dist_cifar.config import describe

        lines = [parser.format_help(), "config fields (type; default):"]
        section = ""
        for key, kind, default, text in describe():
            if key.partition(".")[0] != section:
                section = key.partition(".")[0]
                lines.append("")
            lines.append(f"  {key}  ({kind}; {default})")
            lines += textwrap.wrap(text, 110, initial_indent="      ", subsequent_indent="      ")
        print("\n".join(lines))
        sys.exit(EXIT_DONE)
