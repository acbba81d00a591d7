"""Writes an exported model and its card."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from dist_cifar.data.sources.synthetic import synthetic_split
from dist_cifar.errors import ConfigError, DataError
from dist_cifar.inference import Classifier, WithPreprocessing
from dist_cifar.models import build_model
from dist_cifar.run.atomic_io import make_dirs, write_atomic
from dist_cifar.run.run_dir import RunDir
from dist_cifar.run.run_files import read_bytes
from dist_cifar.tools.export.graph import CHECKED_IMAGES, largest_difference, to_onnx, to_torch
from dist_cifar.tools.export.model_card import MODEL_FILES, OWN_MARK, model_card, model_metadata

logger = logging.getLogger(__name__)


def export(classifier: Classifier, kind: str, directory: Path) -> tuple[Path, float]:
    """Writes the model as `kind` (`torch` or `onnx`) and its card into `directory`.

    Returns the file and the largest difference of a logit from the model's own, on `CHECKED_IMAGES` images in batches
    of three sizes. Raises `ConfigError` if the packages are missing and `CheckpointError` if the graph computes
    something else, in which case nothing is written; also if the folder has a README of another kind.
    """
    _require_own(directory / "README.md")
    module = build_model(classifier.config.model, num_classes=len(classifier.classes), seed=0)
    module.load_state_dict(classifier.module.state_dict())
    graph = WithPreprocessing(module, classifier.stats).eval()
    metadata = model_metadata(classifier)
    images = torch.from_numpy(synthetic_split(1, CHECKED_IMAGES)[0])
    data, compute = (to_torch if kind == "torch" else to_onnx)(graph, images[:2], metadata)
    difference = largest_difference(graph, compute, images)
    make_dirs(directory)
    path = directory / MODEL_FILES[kind]
    write_atomic(path, data)
    card = model_card(classifier, metadata, _summary_of(classifier), _files_of(classifier, directory))
    write_atomic(directory / "README.md", card)
    return path, difference


def _require_own(card: Path) -> None:
    """Raises `ConfigError` for a card that this program has not written."""
    if card.exists() and OWN_MARK not in (read_bytes(card) or b""):
        raise ConfigError(f"{card}: is not of an export, and would be overwritten; give another folder with --out")


def _files_of(classifier: Classifier, directory: Path) -> list[str]:
    """The exports of this very model in `directory`, which may hold others: both kinds hold the hash as text."""
    found = [name for name in sorted(MODEL_FILES.values()) if (directory / name).exists()]
    return [name for name in found if classifier.sha256.encode() in (directory / name).read_bytes()]


def _summary_of(classifier: Classifier) -> dict[str, Any]:
    """The summary of the run, if it is about the exported checkpoint; else empty."""
    try:
        summary = RunDir(classifier.checkpoint.parent.parent).summary()
    except DataError as error:
        logger.warning(f"{error}; the card has no result")
        return {}
    return summary if summary.get("best_step") == classifier.step else {}
