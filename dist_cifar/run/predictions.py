"""Saves what the best model predicts for every test image, for the report's mistakes and calibration.

Contract: `predictions.npz` in the run directory holds arrays only (nothing is pickled), is written whole, and has the
few pictures that the report shows, so that it can be made where the data set is not.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_cifar.augment import cpu
from dist_cifar.augment.image import IMAGE_SHAPE, UNSCALED
from dist_cifar.augment.params import sample_params
from dist_cifar.config import AugmentConfig
from dist_cifar.errors import DataError, one_line
from dist_cifar.run.atomic_io import write_atomic
from dist_cifar.run.run_files import MAX_BYTES, read_bytes

NAME = "predictions.npz"
AUGMENTATION_SAMPLES, AUGMENTATION_EPOCHS = 6, 9
"""How many training images are kept, and as how many epochs see them."""
WORST = 32
"""How many mistakes are kept as pictures."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The predictions for the test split, in its order."""

    labels: npt.NDArray[np.int64]
    """[n], true classes."""
    probabilities: npt.NDArray[np.float32]
    """[n, classes]."""
    classes: tuple[str, ...]
    """Names, in the order of the labels."""
    worst_indices: npt.NDArray[np.int64]
    """[k], the wrongly classified images whose true class had the least probability, the worst first."""
    worst_images: npt.NDArray[np.uint8]
    """[k, 32, 32, 3]."""
    augmented: npt.NDArray[np.uint8]
    """[rows, columns, 32, 32, 3]: training images, each as it is and then as some epochs see it."""

    @property
    def predicted(self) -> npt.NDArray[np.int64]:
        """[n], the class with the highest probability."""
        return self.probabilities.argmax(axis=1)


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Converts logits [n, classes] to probabilities, in float64 inside."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


def collect(
    logits: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    images: npt.NDArray[np.uint8],
    classes: tuple[str, ...],
    augmented: npt.NDArray[np.uint8],
) -> Predictions:
    """Builds the predictions from `logits` [n, classes], `labels` [n] and `images` [n, 32, 32, 3] of the test split."""
    probabilities = softmax(logits)
    wrong = np.flatnonzero(logits.argmax(axis=1) != labels)
    worst = wrong[np.argsort(probabilities[wrong, labels[wrong]], kind="stable")][:WORST]
    return Predictions(
        labels=np.asarray(labels),
        probabilities=probabilities,
        classes=classes,
        worst_indices=worst,
        worst_images=np.array(images[worst]),
        augmented=augmented,
    )


def augmentation_samples(
    images: npt.NDArray[np.uint8], indices: npt.NDArray[np.int64], config: AugmentConfig, *, seed: int
) -> npt.NDArray[np.uint8]:
    """Shows some of the training images `indices` (int64 [n]) of `images`: each as it is, then as some epochs see it.

    Returns uint8 [AUGMENTATION_SAMPLES, 1 + AUGMENTATION_EPOCHS, 32, 32, 3]; of fewer images, fewer samples.
    """
    shown = indices[:: max(1, len(indices) // AUGMENTATION_SAMPLES)][:AUGMENTATION_SAMPLES]
    columns = [np.array(images[shown])]
    for epoch in range(AUGMENTATION_EPOCHS):
        params = sample_params(config, seed=seed, epoch=epoch, indices=shown)
        scaled = cpu.augment(images, shown, params, UNSCALED)  # what is erased is black
        columns.append(scaled.mul(255).round().byte().permute(0, 2, 3, 1).numpy())
    return np.stack(columns, axis=1)


def write(run_dir: Path, predictions: Predictions) -> None:
    """Writes the file of a run."""
    data = io.BytesIO()
    arrays: dict[str, Any] = {name: np.asarray(value) for name, value in vars(predictions).items()}
    np.savez_compressed(data, **arrays)
    write_atomic(run_dir / NAME, data.getvalue())


def read(run_dir: Path) -> Predictions | None:
    """Reads the predictions of a run; None before the run has finished. Raises `DataError` for a damaged file."""
    path = run_dir / NAME
    data = read_bytes(path)
    if data is None:
        return None
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_BYTES:
                raise ValueError(f"it unpacks to more than {MAX_BYTES:,} bytes")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            values = {name: arrays[name] for name in Predictions.__dataclass_fields__}
        _require_shapes(values)
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds for bytes that are not theirs
        raise DataError(
            f"{path}: not what this version writes ({one_line(error)}); move it away, the end of a training writes it"
            " again"
        ) from None
    return Predictions(**values | {"classes": tuple(values["classes"].tolist())})


def _require_shapes(arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Raises `ValueError` unless the arrays are those of a `Predictions` and agree with each other."""
    kinds = {"labels": "i", "probabilities": "f", "classes": "U", "worst_indices": "i"}
    for name, array in arrays.items():
        if array.dtype.kind != kinds.get(name, "u"):
            raise ValueError(f"{name} has the type {array.dtype}")
    labels, probabilities, indices = arrays["labels"], arrays["probabilities"], arrays["worst_indices"]
    fits = (
        probabilities.shape == (len(labels), len(arrays["classes"]))
        and labels.shape == (len(labels),)
        and arrays["worst_images"].shape == (len(indices), *IMAGE_SHAPE)
        and arrays["augmented"].shape == (*arrays["augmented"].shape[:2], *IMAGE_SHAPE)
    )
    if not fits or min(*probabilities.shape, *arrays["augmented"].shape) < 1:
        raise ValueError(f"its shapes are {', '.join(f'{name} {array.shape}' for name, array in arrays.items())}")
    if not (labels.min() >= 0 and labels.max() < probabilities.shape[1]):
        raise ValueError("a label is that of no class")
    if len(indices) and not (indices.min() >= 0 and indices.max() < len(labels)):
        raise ValueError("an index is that of no image")
    if not ((probabilities >= 0) & (probabilities <= 1.001)).all():
        raise ValueError("a probability is not between 0 and 1")


def wilson_interval(correct: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Bounds of a share, 95 % by default: the score interval of Wilson (1927)."""
    share, weight = correct / count, z * z / count
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / count + weight / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)
