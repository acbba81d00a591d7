"""`bench`: measures this machine."""

from __future__ import annotations

import argparse
import sys

from dist_cifar.cli.arguments import Commands
from dist_cifar.errors import EXIT_DONE


def add(commands: Commands) -> None:
    """Adds the command and its benchmarks."""
    parser = commands.add_parser("bench", help="measure this machine", description="Measure this machine.")
    benchmarks = parser.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")
    augment = benchmarks.add_parser(
        "augment",
        help="images/s of the training augmentation on one core",
        description="Measure, in less than ten seconds, how many images one core augments, and say how many GPUs that"
        " feeds.",
    )
    augment.set_defaults(command=run_augment)


def run_augment(options: argparse.Namespace) -> int:
    """Measures the training augmentation. Returns the exit code."""
    from dist_cifar.tools.bench import bench_augment
    from dist_cifar.tracking.console import log_to_stream

    log_to_stream(sys.stdout)
    bench_augment()
    return EXIT_DONE
