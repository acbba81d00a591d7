"""`data`: fetches, checks, decodes and caches a data set, without training."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from dist_cifar.cli.arguments import Commands, add_config, config_of
from dist_cifar.errors import EXIT_DONE, counted


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "data",
        help="fetch, check, decode and cache the data set of a config, where there is a network",
        description="Download the data set of a config, or find it, check and decode it, and keep it in the cache,"
        " without training: on a login node, so that nodes without a network find it. They must see the same"
        " data.cache_dir and, for data.source=folder, the same data.root.",
        allow_abbrev=False,
    )
    add_config(parser, example="data.cache_dir=PATH")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Prepares the data set and prints where it is. Returns the exit code."""
    from dist_cifar.data.dataset import load_dataset
    from dist_cifar.tracking.console import log_to_stream

    config = config_of(options)
    log_to_stream(sys.stdout)
    found = load_dataset(dataclasses.replace(config.data, stage_dir=None))  # the nodes that train have that directory
    images, classes = counted(len(found.train.labels), "image"), counted(len(found.classes), "class", "classes")
    print(
        f"data     {config.data.source}: {images} to train on, those held out for validation"
        f" among them, {len(found.test.labels):,} to test on, {classes}"
    )
    print(f"cache    {found.directory.absolute()}")
    print(f"sha256   {found.content_sha256}")
    return EXIT_DONE
