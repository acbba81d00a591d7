"""`verify`: shows that all world sizes, and a run that is killed and resumed, give the same bits."""

from __future__ import annotations

import argparse

from dist_cifar import stopping
from dist_cifar.cli.arguments import Commands, add_config, add_local_rank, config_of, new_file, path
from dist_cifar.errors import DataError, system_error


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "verify",
        help="show that all world sizes, and a run that is killed and resumed, give the same bits on this machine",
        description="The acceptance test of a machine or cluster: train a few steps of a config in strategy exact at"
        " several world sizes, and once more while ranks are killed and resume at another world size, and compare every"
        " bit of every step. Alone it starts all ranks itself; under torchrun, accelerate, mpirun or srun each"
        " process starts its share of them.",
        epilog="exit codes: 0 all equal, 2 bad usage or config, 70 something differs or failed, 74 disk or data, 75"
        " stopped by a signal, 130 by Ctrl-C",
        allow_abbrev=False,
    )
    add_config(parser, example="model.name=resnet20")
    parser.add_argument(
        "--world-sizes",
        metavar="N,N,...",
        help="numbers of ranks up to strategy.virtual_ranks; default: the processes of the launcher, and powers of two"
        " up to them, at least to 4 on CPU",
    )
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="steps to compare; default: 20")
    parser.add_argument(
        "--dir",
        type=path,
        help="where the runs are written, which all nodes must share; default: a new directory below runs/. It is"
        " removed when all is equal",
    )
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the result for programs")
    add_local_rank(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Runs this process's share of the test. Returns the exit code."""
    from dist_cifar.cli import streams
    from dist_cifar.job.enter import enter_job
    from dist_cifar.tools.verify import verify

    config = config_of(options)
    env = enter_job(config, options.local_rank)
    stopping.defer()  # it asks in each of its waits, and ends its ranks
    streams.survive_lost_output()  # its exit code is its result
    try:
        return verify(
            config,
            env,
            world_sizes=options.world_sizes,
            steps=options.steps,
            directory=options.dir,
            json_file=options.json,
        )
    except OSError as error:
        message = system_error(error)
        if message is None:
            raise
        raise DataError(f"verify: {message}; --dir gives another directory") from error
