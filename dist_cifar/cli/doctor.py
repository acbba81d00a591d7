"""`doctor`: looks for what would make a training fail or slow."""

from __future__ import annotations

import argparse
import os

from dist_cifar.cli.arguments import Commands, add_config, add_local_rank, config_of, new_file


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "doctor",
        help="look for what would waste GPU hours: versions, network, disk, data, limits",
        description="Check this machine, or under a launcher (torchrun, srun, accelerate, mpirun) all ranks of a job,"
        " for what would make a training fail or slow, and say what to do. Takes about half a minute.",
        epilog="exit codes: 0 nothing failed (there may be warnings), 1 something failed, 2 bad usage or config",
        allow_abbrev=False,
    )
    add_config(parser, example="run.dir=/shared/run")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the findings for programs")
    add_local_rank(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Makes the checks of this rank. Returns the exit code."""
    from dist_cifar.job.enter import enter_job

    config = config_of(options)
    env = enter_job(config, options.local_rank)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from dist_cifar.distributed.device import choose_device
    from dist_cifar.tools.doctor import doctor

    return doctor(config, env, choose_device(config.run.device, env), json_file=options.json)
