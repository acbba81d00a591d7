"""The arrays that every source returns, and what is computed from them once: their hash and their statistics.

Contract: pure functions of arrays in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_cifar.augment.image import ImageStats

_CHUNK = 4096


@dataclass(frozen=True, kw_only=True)
class Arrays:
    """A whole data set. A label is an index into `classes`."""

    train_images: npt.NDArray[np.uint8]
    """[n, 32, 32, 3], C-contiguous."""
    train_labels: npt.NDArray[np.int64]
    """[n], indices into `classes`."""
    test_images: npt.NDArray[np.uint8]
    """[m, 32, 32, 3], C-contiguous."""
    test_labels: npt.NDArray[np.int64]
    """[m], indices into `classes`."""
    classes: tuple[str, ...]
    """Class names, in the order of the labels."""


def content_sha256(arrays: Arrays) -> str:
    """SHA-256 over class names, pixels and labels: equal for equal data sets, wherever they were read from."""
    digest = hashlib.sha256(json.dumps([arrays.classes, len(arrays.train_labels), len(arrays.test_labels)]).encode())
    for images, labels in (
        (arrays.train_images, arrays.train_labels),
        (arrays.test_images, arrays.test_labels),
    ):
        digest.update(images.data)
        digest.update(labels.astype("<i8").data)
    return digest.hexdigest()


def channel_statistics(images: npt.NDArray[np.uint8]) -> ImageStats:
    """Mean and population standard deviation of each channel of uint8 [n, height, width, channels].

    A channel that does not vary, as of microscopes with one colour, has 1 for its deviation: it is centred, not scaled.

    The sums are integers, so the result does not depend on the order of the images and is exact but for one rounding.
    """
    channels = images.shape[-1]
    histogram = np.zeros((channels, 256), np.int64)
    for start in range(0, len(images), _CHUNK):  # bincount widens to int64: bound that copy
        for channel in range(channels):
            values = images[start : start + _CHUNK, ..., channel].ravel()
            histogram[channel] += np.bincount(values, minlength=256)
    count = images.size // channels
    mean, std = [], []
    for counts in histogram.tolist():
        total = sum(value * times for value, times in enumerate(counts))
        squares = sum(value * value * times for value, times in enumerate(counts))
        mean.append(total / (count * 255))
        std.append(math.sqrt((count * squares - total * total) / (count * 255) ** 2) or 1.0)
    return ImageStats(mean=tuple(mean), std=tuple(std))
