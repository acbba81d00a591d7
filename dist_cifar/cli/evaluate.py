"""`evaluate`: measures the accuracy of a run's model, on the ranks of a launcher if there is one."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_cifar.cli.arguments import Commands, add_local_rank, new_file, path
from dist_cifar.errors import EXIT_DONE, printable

if TYPE_CHECKING:
    from dist_cifar.data.dataset import Split
    from dist_cifar.distributed.collectives import Communicator
    from dist_cifar.inference import Classifier

logger = logging.getLogger(__name__)


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "evaluate",
        help="the accuracy of a run's model, on its test split or on other data",
        description="Evaluate the best model of a run (or one of its checkpoints) on the run's test split or on --data:"
        " a folder or zip as for data.source=folder, or the files of CIFAR-10.1 or CIFAR-10-C as published. Under a"
        " launcher the ranks share the work, with the same result.",
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

    from dist_cifar.cli.job import connect
    from dist_cifar.distributed.device import choose_device
    from dist_cifar.inference import load_classifier
    from dist_cifar.tracking.console import log_to_stream, table

    if env.rank == 0:
        log_to_stream(sys.stderr, "dist_cifar: ")
    device = choose_device(Config().run.device, env)
    classifier = load_classifier(options.run, device)
    splits, data = _splits(classifier, options.data)
    communicator = connect(
        env,
        device,
        classifier.config.run.timeout_seconds,
        lambda: _shared_facts(classifier, splits, tta=options.tta),
    )
    results = {name: _measure(classifier, split, communicator, tta=options.tta) for name, split in splits.items()}
    communicator.close()
    if env.rank == 0:
        model = f"{classifier.checkpoint}" + (", mirror images averaged" if options.tta else "")
        print(printable(table([("model", model), ("data", data), *_rows(results)])))
        if options.json:
            facts = {"checkpoint": str(classifier.checkpoint), "weights_sha256": classifier.sha256, "tta": options.tta}
            _write_json(options.json, facts | {"data": data, "results": results})
    return EXIT_DONE


def _splits(classifier: Classifier, path: Path | None) -> tuple[dict[str, Split], str]:
    """What to evaluate on, by name: the test sets at `path`, or without one the run's test split.

    Beside them, a text that says which data they are. Warns where the data at the run's own path are no longer the
    run's; raises `DataError` for other classes.
    """
    from dist_cifar.data.dataset import load_dataset
    from dist_cifar.data.ood_test_sets import read_test_sets, require_classes

    data = classifier.config.data
    if path is not None:
        sets, sha256 = read_test_sets(path, classifier.classes, data.cache_dir)
        return sets, _of_data(str(path), sha256, classifier)
    dataset = load_dataset(dataclasses.replace(data, stage_dir=None))
    name = f"{data.source}, test split"
    require_classes(name, dataset.classes, classifier.classes)
    if dataset.content_sha256 != classifier.data_sha256:
        logger.info(
            f"warning: {data.source}, data.root={data.root}: these are not the images that the run was trained on"
            f" (sha256 {dataset.content_sha256[:12]}, the run's {classifier.data_sha256[:12]}); the result is not"
            " that of the run's test split"
        )
    return {name: dataset.test}, _of_data(data.source, dataset.content_sha256, classifier)


def _of_data(name: str, sha256: str | None, classifier: Classifier) -> str:
    if sha256 is None:
        return name
    return f"{name}, sha256 {sha256[:12]}, {'the' if sha256 == classifier.data_sha256 else 'not the'} data of the run"


def _shared_facts(classifier: Classifier, splits: Mapping[str, Split], *, tta: bool) -> dict[str, object]:
    """What must be the same on every rank, which measures its share of the images."""
    import hashlib

    def digest(split: Split) -> str:
        return hashlib.sha256(split.images.tobytes() + split.labels.tobytes()).hexdigest()

    images = {f"the SHA-256 of {name}": digest(split) for name, split in splits.items()}
    return {"the SHA-256 of the weights": classifier.sha256, "--tta": tta, **images}


def _measure(classifier: Classifier, split: Split, communicator: Communicator, *, tta: bool) -> dict[str, Any]:
    """The result on one split. A collective."""
    import numpy as np

    from dist_cifar.evaluate import evaluate
    from dist_cifar.inference import HorizontalFlipTTA
    from dist_cifar.run.predictions import wilson_interval

    result = evaluate(
        HorizontalFlipTTA(classifier.module) if tta else classifier.module,
        split,
        np.arange(len(split.labels)),
        stats=classifier.stats,
        num_classes=len(classifier.classes),
        batch_size=classifier.config.eval.batch_size,
        communicator=communicator,
    )
    return {
        "accuracy": result.accuracy,
        "accuracy_interval": list(wilson_interval(result.correct, result.count)),
        "loss": result.loss,
        "count": result.count,
        "class_accuracy": dict(zip(classifier.classes, result.class_accuracy, strict=True)),
    }


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
