"""Evaluates a trained model on its run's test split or on other data: what the command and the Python API share."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dist_cifar.data.dataset import Split, load_dataset
from dist_cifar.data.ood_test_sets import read_test_sets, require_classes
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.evaluate import evaluate
from dist_cifar.inference import Classifier
from dist_cifar.run.predictions import wilson_interval
from dist_cifar.tta import ViewAverage

logger = logging.getLogger(__name__)


def test_sets(classifier: Classifier, path: Path | None) -> tuple[dict[str, Split], str]:
    """What to evaluate on, by name: the test sets at `path`, or without one the run's test split.

    Beside them, a text that says which data they are. Warns where the data at the run's own path are no longer the
    run's; raises `DataError` for other classes.
    """
    data = classifier.config.data
    if path is not None:
        sets, sha256 = read_test_sets(path, classifier.classes, data.cache_dir)
        return sets, _of_data(str(path), sha256, classifier)
    dataset = load_dataset(dataclasses.replace(data, stage_dir=None))
    name = f"{data.source}, test split"
    require_classes(name, dataset.classes, classifier.classes)
    if dataset.content_sha256 != classifier.data_sha256:
        logger.warning(
            f"warning: {data.source}, data.root={data.root}: these are not the images that the run was trained on"
            f" (sha256 {dataset.content_sha256[:12]}, the run's {classifier.data_sha256[:12]}); the result is not"
            " that of the run's test split"
        )
    return {name: dataset.test}, _of_data(data.source, dataset.content_sha256, classifier)


def _of_data(name: str, sha256: str | None, classifier: Classifier) -> str:
    if sha256 is None:
        return name
    return f"{name}, sha256 {sha256[:12]}, {'the' if sha256 == classifier.data_sha256 else 'not the'} data of the run"


def shared_facts(classifier: Classifier, splits: Mapping[str, Split], *, tta: bool) -> dict[str, object]:
    """What must be the same on every rank, which measures its share of the images."""

    def digest(split: Split) -> str:
        return hashlib.sha256(split.images.tobytes() + split.labels.tobytes()).hexdigest()

    images = {f"the SHA-256 of {name}": digest(split) for name, split in splits.items()}
    return {"the SHA-256 of the weights": classifier.sha256, "--tta": tta, **images}


def measure(classifier: Classifier, split: Split, communicator: Communicator, *, tta: bool) -> dict[str, Any]:
    """The result on one split: `accuracy` with its 95% `accuracy_interval`, `loss`, `count`, and `class_accuracy` by
    class, None for one without images. A collective."""
    result = evaluate(
        ViewAverage(classifier.module, translate=False) if tta else classifier.module,
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
