"""A data set of one's own, from numpy arrays: bars of seven directions.

    dist-cifar train --config configs/quickstart.yaml data.source=examples.own_data:bars model.name=resnet8

The function returns uint8 images [n, 32, 32, 3] and their labels, for training and for testing, and the names of the
classes, of which there may be any number. Every process calls it; the arrays are hashed, cached and shared.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def bars(count: int = 2800, test_count: int = 700, classes: int = 7, seed: int = 0) -> dict[str, object]:
    """Noisy images of a bar through the middle, one class for each direction."""
    generator = np.random.default_rng(seed)
    images, labels = draw(generator, count + test_count, classes)
    return {
        "train_images": images[:count],
        "train_labels": labels[:count],
        "test_images": images[count:],
        "test_labels": labels[count:],
        "classes": [f"{180 * i // classes} degrees" for i in range(classes)],
    }


def draw(
    generator: np.random.Generator, count: int, classes: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """`count` images and their labels."""
    labels = generator.permutation(np.arange(count) % classes)
    rows, columns = np.mgrid[-15.5:16.5, -15.5:16.5]
    angles = np.pi * labels / classes
    distance = np.abs(np.sin(angles)[:, None, None] * columns - np.cos(angles)[:, None, None] * rows)
    bright = np.where(distance < 3, 200, 60)[..., None]
    noisy = bright + generator.normal(0, 30, (count, 32, 32, 3))
    return noisy.clip(0, 255).astype(np.uint8), labels
