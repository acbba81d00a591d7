"""Writes an exported model and its card."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dist_cifar import plugins
from dist_cifar.config import Config, is_own
from dist_cifar.data.dataset import load_dataset, missing_download
from dist_cifar.data.sources.synthetic import synthetic_split
from dist_cifar.errors import ConfigError, DataError, UserError
from dist_cifar.inference import Classifier, WithPreprocessing
from dist_cifar.models import build_model
from dist_cifar.run.atomic_io import make_dirs, write_atomic
from dist_cifar.run.run_dir import RunDir
from dist_cifar.run.run_files import read_bytes
from dist_cifar.run.summary import test_step
from dist_cifar.tools.export.graph import CHECKED_IMAGES, Compute, largest_difference, to_onnx, to_torch
from dist_cifar.tools.export.model_card import MODEL_FILES, OWN_MARK, model_card, model_metadata

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Export:
    """A graph that was written, and how it compares with the model on the same images."""

    path: Path
    image_count: int
    image_kind: str
    """`test images of the run`, or `generated images` where the run's data cannot be read."""
    largest_difference: float
    """The largest difference of a logit between the graph and the model in float32."""
    same_class_count: int
    """Images to which the graph gives the class that the model gives them in the precision of its run."""


def default_directory(classifier: Classifier) -> Path:
    """`export` in the run directory. Raises `ConfigError` for a checkpoint that lies in none."""
    run = _run_of(classifier)
    if run is None:
        raise ConfigError(f"--out: {classifier.checkpoint} is in no run directory; give a folder for the export")
    return run / "export"


def _run_of(classifier: Classifier) -> Path | None:
    """The run directory in which the checkpoint lies."""
    folder = classifier.checkpoint.absolute().parent
    return folder.parent if folder.name == "checkpoints" else None


def export(classifier: Classifier, kind: str, directory: Path) -> Export:
    """Writes the model as `kind` (`torch` or `onnx`), in float32, and its card into `directory`.

    The graph is compared with the model on test images of the run, in batches of three sizes. Raises `ConfigError` if
    the packages are missing or the network cannot be exported, and `CheckpointError` if the graph computes something
    else, in which case nothing is written; also if the folder has a README of another kind.
    """
    _require_own(directory / "README.md")
    module = build_model(classifier.config.model, num_classes=len(classifier.classes), seed=0)
    module.load_state_dict(classifier.module.state_dict())
    graph = WithPreprocessing(module, classifier.stats).eval()
    metadata = model_metadata(classifier)
    pixels, image_kind = _checked_images(classifier)
    images = torch.from_numpy(pixels)
    data, compute = _traced(graph, images[:2], metadata, kind, classifier.config)
    difference = largest_difference(graph, compute, images)
    same = compute(images).argmax(1) == classifier.probabilities(pixels).argmax(1)
    make_dirs(directory)
    path = directory / MODEL_FILES[kind]
    write_atomic(path, data)
    card = model_card(classifier, metadata, _summary_of(classifier), _files_of(classifier, directory))
    write_atomic(directory / "README.md", card)
    return Export(
        path=path,
        image_count=len(pixels),
        image_kind=image_kind,
        largest_difference=difference,
        same_class_count=int(same.sum()),
    )


def _traced(
    graph: nn.Module, example: torch.Tensor, metadata: dict[str, Any], kind: str, config: Config
) -> tuple[bytes, Compute]:
    """The exported graph. Raises `ConfigError` where a network from outside the package cannot be exported."""
    try:
        return (to_torch if kind == "torch" else to_onnx)(graph, example, metadata)
    except UserError:
        raise
    except Exception as error:
        if not is_own(config, "model"):
            raise
        raise plugins.broken(f"model.name={config.model.name}", error, f"exporting it to {kind}") from None


def _checked_images(classifier: Classifier) -> tuple[npt.NDArray[np.uint8], str]:
    """Test images of the run, at most `CHECKED_IMAGES`, spread over the split, which may be sorted by class; generated
    ones where its data is not there. Returns uint8 [n, 32, 32, 3] and what they are."""
    data = dataclasses.replace(classifier.config.data, stage_dir=None)
    try:
        if (url := missing_download(data)) is not None:
            raise DataError(f"they would have to be downloaded from {url}")
        test = load_dataset(data).test
    except (ConfigError, DataError) as error:
        logger.info("the test images of the run cannot be read, and generated ones take their place: %s", error)
        return synthetic_split(1, CHECKED_IMAGES)[0], "generated images"
    chosen = np.unique(np.linspace(0, len(test.labels) - 1, CHECKED_IMAGES).astype(np.int64))
    return np.ascontiguousarray(test.images[chosen]), "test images of the run"


def _require_own(card: Path) -> None:
    """Raises `ConfigError` for a card that this program has not written."""
    if card.exists() and OWN_MARK not in (read_bytes(card) or b""):
        raise ConfigError(f"{card}: is not of an export, and would be overwritten; give another folder with --out")


def _files_of(classifier: Classifier, directory: Path) -> list[str]:
    """The exports of this very model in `directory`, which may hold others: both kinds hold the hash as text."""
    found = [name for name in sorted(MODEL_FILES.values()) if (directory / name).exists()]
    return [name for name in found if classifier.sha256.encode() in (directory / name).read_bytes()]


def _summary_of(classifier: Classifier) -> dict[str, Any]:
    """The summary of the run, if it is about the exported model; else empty."""
    run = _run_of(classifier)
    if run is None or classifier.is_changed:
        return {}
    try:
        summary = RunDir(run).summary()
    except DataError as error:
        logger.warning(f"{error}; the card has no result")
        return {}
    return summary if summary and test_step(summary) == classifier.step else {}
