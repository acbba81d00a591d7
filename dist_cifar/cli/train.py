"""`train`: trains a model, or resumes the run that the run directory holds."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import textwrap
from typing import TYPE_CHECKING, Any, NoReturn

from dist_cifar import stopping
from dist_cifar.cli.arguments import Commands, add_config, add_local_rank, config_of, positive
from dist_cifar.errors import EXIT_DONE, EXIT_SAVED, StoppedError

if TYPE_CHECKING:
    from dist_cifar.config import Config
    from dist_cifar.distributed.launch_env import DistEnv


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
        from dist_cifar.cli.local_ranks import run_ranks

        return run_ranks(options.ranks)
    return _run_rank(config, options)


def _run_rank(config: Config, options: argparse.Namespace) -> int:
    from dist_cifar.cli import streams
    from dist_cifar.cli.job import enter_job
    from dist_cifar.distributed.launch_env import refuse_lone_task

    streams.survive_lost_output()
    refuse_lone_task(os.environ)
    env = enter_job(config, options.local_rank)
    if env.world_size > 1:
        stopping.defer()  # the ranks stop together: where they wait for each other or for data, or after a step
    threads = _set_threads(config, env)
    # A store whose host dies is worth one line of ours, not a hundred of a stack trace.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    gc.disable()  # imports make a million objects that stay: looking for garbage among them takes a tenth of the time
    import torch

    from dist_cifar.cli.failure_exit import FailureExit
    from dist_cifar.cli.job import connect
    from dist_cifar.config import load_components
    from dist_cifar.distributed.device import choose_device
    from dist_cifar.ops.malloc import keep_freed_memory
    from dist_cifar.run.provenance import shared_facts
    from dist_cifar.run.run_dir import RunDir
    from dist_cifar.tools.report import ReportTracker
    from dist_cifar.trainer import train

    gc.freeze()
    gc.enable()
    load_components(config)
    torch.set_num_threads(threads)  # torchrun has put OMP_NUM_THREADS=1 before this process began
    device = choose_device(config.run.device, env)
    keep_freed_memory()
    communicator = connect(env, device, config.run.timeout_seconds, lambda: shared_facts(config))
    failure_exit = FailureExit(RunDir.of(config), communicator)
    detector = communicator.watch(failure_exit.end_as_survivor)
    try:
        is_done = train(
            config,
            communicator,
            must_resume=options.resume,
            resume_anyway=options.resume_anyway,
            trackers=[ReportTracker],
        )
    except stopping.Stopped as stop:
        stopping.report(stop)
        return failure_exit.fail(StoppedError(str(stop)), detector)
    except Exception as error:
        return failure_exit.fail(error, detector)
    if detector is not None:
        detector.close()
    communicator.close()
    return EXIT_DONE if is_done else EXIT_SAVED


def _print_of(config: Config, options: argparse.Namespace) -> None:
    from dist_cifar.config import to_yaml

    print(to_yaml(config) if options.print_config else f"{config.run.dir}\n", end="")


def _set_threads(config: Config, env: DistEnv) -> int:
    """Sets the number of CPU threads of this rank for libraries that are not imported yet, and returns it.

    Accelerate and DDP warn about OMP_NUM_THREADS when it is missing. A strategy that has the same bits on every machine
    has one thread, since their number changes how sums are rounded.
    """
    from dist_cifar.distributed.cores import available_cores
    from dist_cifar.strategy import properties

    is_single = properties(config.strategy).single_threaded
    share = 1 if is_single else max(1, available_cores() // env.local_world_size)
    threads = config.run.threads_per_rank or share
    os.environ["OMP_NUM_THREADS"] = str(threads)
    return threads


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
