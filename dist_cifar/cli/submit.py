"""`submit`: submits a training, or a sweep of trainings, to SLURM."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from dist_cifar.cli.arguments import Commands, add_config, count, path, positive
from dist_cifar.errors import EXIT_DONE, ConfigError


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "submit",
        help="submit a training to SLURM",
        description="Fill in a batch script of slurm/, have sbatch test it, and submit it. To be run in the folder that"
        " holds slurm/, where the job will run. docs/slurm.md says what the job does when it is preempted, out of time"
        " or broken.",
        allow_abbrev=False,
    )
    add_config(parser, example="run.dir=runs/first")
    parser.add_argument("--nodes", type=positive, default=1, metavar="N", help="default: 1")
    parser.add_argument("--gpus-per-node", type=count, default=1, metavar="G", help="default: 1; 0 asks for none")
    parser.add_argument("--ranks-per-node", type=positive, metavar="R", help="default: one for each GPU, at least one")
    parser.add_argument(
        "--cpus-per-task", type=positive, metavar="N", help="CPU cores of each task; default: 8 for each GPU"
    )
    parser.add_argument("--time", metavar="T", help="limit, as sbatch reads it: minutes, HH:MM:SS, D-HH; default: 12 h")
    parser.add_argument("--job-name", metavar="NAME")
    parser.add_argument("--partition", metavar="P")
    parser.add_argument("--account", metavar="A")
    parser.add_argument("--qos", metavar="Q")
    parser.add_argument("--constraint", metavar="C", help="features of the nodes")
    parser.add_argument("--container", metavar="IMAGE", help="run the ranks in this image with apptainer")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="another option of sbatch, e.g. --sbatch mem=64G; may be repeated",
    )
    parser.add_argument(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help='a line of shell for the beginning of the job, e.g. --setup "module load cuda"; may be repeated',
    )
    parser.add_argument("--max-restarts", type=count, metavar="N", help="requeues after a crash; default: 3")
    parser.add_argument("--no-torchrun", action="store_true", help="one task of SLURM for each rank")
    parser.add_argument("--sweep", type=path, metavar="FILE", help="a job array: one run for each line of overrides")
    parser.add_argument(
        "--at-once", type=positive, metavar="K", help="runs of the sweep at the same time; default: all"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the script and have sbatch test it; submit nothing"
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Submits the job. Returns the exit code."""
    from dist_cifar.config import load_config
    from dist_cifar.strategy import slice_count
    from dist_cifar.tools.slurm import JobVariables, Request, render, submit, template

    config = load_config(options.config, options.overrides, environ=JobVariables(os.environ))
    directory = Path.cwd()
    ranks = options.ranks_per_node or max(options.gpus_per_node, 1)
    slice_count(config.batch, config.strategy, world_size=options.nodes * ranks)
    arguments = ["--config", str(options.config)] if options.config else []
    arguments += options.overrides
    script = "train_srun" if options.no_torchrun else "train"
    array = None
    if options.sweep:
        if options.no_torchrun:
            raise ConfigError("submit: --sweep has a script of its own, with torchrun; leave --no-torchrun out")
        lines = _count_configs(options)
        array = f"1-{lines}" + (f"%{options.at_once}" if options.at_once else "")
        script, arguments = "sweep", [str(options.sweep), *arguments]
    names = "nodes gpus_per_node time job_name partition account qos constraint cpus_per_task container max_restarts"
    request = Request(
        arguments=tuple(arguments),
        directory=directory,
        ranks_per_node=ranks,
        array=array,
        sbatch=tuple(options.sbatch),
        setup=tuple(options.setup),
        **{name: getattr(options, name) for name in names.split()},
    )
    text = render(template(directory, script), request)
    if options.dry_run:
        print(text, end="", flush=True)
    print(submit(text, dry_run=options.dry_run), file=sys.stderr if options.dry_run else sys.stdout)
    return EXIT_DONE


def _count_configs(options: argparse.Namespace) -> int:
    """The number of lines of the sweep's file. Raises `ConfigError` unless each of them is a config."""
    from dist_cifar.config import load_config
    from dist_cifar.tools.slurm import JobVariables, sweep_lines

    environ = JobVariables(os.environ)
    try:
        content = options.sweep.read_bytes()
    except OSError as error:
        raise ConfigError(f"submit: --sweep {options.sweep}: cannot be read ({error})") from None
    if not content:
        raise ConfigError(f"submit: --sweep {options.sweep} is empty; give it a line of overrides for each run")
    try:
        lines = sweep_lines(content)
    except ConfigError as error:
        raise ConfigError(f"submit: --sweep {options.sweep}, {error}") from None
    for number, overrides in enumerate(lines, start=1):
        try:
            if not overrides:
                raise ConfigError("it is empty")
            of_the_script = ["run.dir=", "tracking.wandb_group="]
            load_config(options.config, [*options.overrides, *overrides, *of_the_script], environ=environ)
        except ConfigError as error:
            raise ConfigError(f"submit: --sweep {options.sweep}, line {number}: {error}") from None
    return len(lines)
