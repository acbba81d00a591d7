"""`evaluate`: measures the accuracy of a run's model, on the ranks of a launcher if there is one."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_cifar.cli.arguments import Commands, add_local_rank, new_file, path
from dist_cifar.errors import EXIT_DONE, printable


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "evaluate",
        help="the accuracy of a run's model, on its test split or on other data",
        description="Evaluate the model that a run tested (or one of its checkpoints) on the run's test split or on"
        " --data: a folder or zip as for data.source=folder, or the files of CIFAR-10.1 or CIFAR-10-C as published."
        " Under a launcher the ranks share the work, with the same result.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=path, metavar="RUN", help="run directory, or one of its checkpoints")
    parser.add_argument("--data", type=path, metavar="PATH", help="default: the test split that the run names")
    parser.add_argument("--tta", action="store_true", help="average each image with its mirror image")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the result for programs")
    add_local_rank(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Evaluates as one rank and prints the result on rank 0. Returns the exit code."""
    from dist_cifar.config import Config
    from dist_cifar.distributed.cores import available_cores
    from dist_cifar.distributed.launch_env import check_local_rank, read_env

    env = read_env(os.environ)
    check_local_rank(os.environ, options.local_rank)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // env.local_world_size)))

    from dist_cifar.distributed.device import choose_device
    from dist_cifar.inference import load_classifier
    from dist_cifar.job.enter import connect_or_leave
    from dist_cifar.tools import evaluation
    from dist_cifar.tracking.console import log_to_stream, table

    if env.rank == 0:
        log_to_stream(sys.stderr, "dist_cifar: ")
    device = choose_device(Config().run.device, env)
    classifier = load_classifier(options.run, device)
    splits, data = evaluation.test_sets(classifier, options.data)
    communicator = connect_or_leave(
        env,
        device,
        classifier.config.run.timeout_seconds,
        lambda: evaluation.shared_facts(classifier, splits, tta=options.tta),
    )
    results = {
        name: evaluation.measure(classifier, split, communicator, tta=options.tta) for name, split in splits.items()
    }
    communicator.close()
    if env.rank == 0:
        model = f"{classifier.checkpoint}" + (", mirror images averaged" if options.tta else "")
        print(printable(table([("model", model), ("data", data), *_rows(results)])))
        if options.json:
            facts = {"checkpoint": str(classifier.checkpoint), "weights_sha256": classifier.sha256, "tta": options.tta}
            _write_json(options.json, facts | {"data": data, "results": results})
    return EXIT_DONE


def _rows(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The table: a row for each split, and their mean; for a single one a row for each class."""
    rows = []
    for name, result in results.items():
        low, high = result["accuracy_interval"]
        text = f"{result['accuracy']:.2%}, 95% interval {low:.2%} to {high:.2%}, loss {result['loss']:.4f}"
        rows.append((name, f"{text}, {result['count']:,} images"))
    if len(results) > 1:
        return [*rows, ("mean", f"{sum(result['accuracy'] for result in results.values()) / len(results):.2%}")]
    (result,) = results.values()
    shares = result["class_accuracy"].items()
    return rows + [(f"  {label}", "-" if share is None else f"{share:.1%}") for label, share in shares]


def _write_json(path: Path, facts: Mapping[str, Any]) -> None:
    import json

    from dist_cifar.run.atomic_io import write_output

    write_output(path, json.dumps(facts, indent=2) + "\n")
