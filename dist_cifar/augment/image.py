"""What an image is, and the statistics that normalise it.

Contract: images are uint8 [n, 32, 32, 3], RGB. Another size is refused by `require_images`, in one place and with one
message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

IMAGE_SIZE = 32
"""Height and width of an image in pixels. Modules with compiled code have a constant of their own, because a compiler
freezes it into its disk cache and notices changes of that module alone; they assert that it is this number."""
IMAGE_SHAPE = (IMAGE_SIZE, IMAGE_SIZE, 3)


@dataclass(frozen=True)
class ImageStats:
    """Mean and standard deviation of the three channels, in units of [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


UNSCALED = ImageStats(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
"""Leaves pixels as they are, in [0, 1]."""


def are_images(array: npt.NDArray[Any]) -> bool:
    """Whether the array is C-contiguous uint8 [n, 32, 32, 3]."""
    return array.dtype == np.uint8 and array.shape[1:] == IMAGE_SHAPE and array.flags.c_contiguous


def require_images(array: npt.NDArray[Any]) -> None:
    """Raises `ValueError` unless `are_images`."""
    if not are_images(array):
        height, width, channels = IMAGE_SHAPE
        raise ValueError(
            f"images must be contiguous uint8 [n, {height}, {width}, {channels}],"
            f" found {array.dtype} {list(array.shape)}"
        )
