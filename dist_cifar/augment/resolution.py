"""The size of the training images: which one a step has, and how 32x32 pixels become r x r.

Contract: pure functions. The size is a function of the step and the length of the run alone, so that it is the same on
every rank and after a resume. An image is shrunk by its area average: each pixel of the result is the mean of what it
covers, where a pixel that is covered in part counts in part.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from dist_cifar.augment.image import IMAGE_SIZE
from dist_cifar.config import ResolutionPhase, as_written


def size_at(phases: Sequence[ResolutionPhase], step: int, total_steps: int) -> int:
    """Height and width in pixels of the images of `step`, counted from 0, in a run of `total_steps`."""
    done = Fraction(step, total_steps)
    return next((phase.size for phase in phases if done < as_written(phase.until)), IMAGE_SIZE)


def sizes(phases: Sequence[ResolutionPhase]) -> tuple[int, ...]:
    """The sizes that a run may have, each once."""
    return tuple(dict.fromkeys([*(phase.size for phase in phases), IMAGE_SIZE]))


def units(size: int) -> int:
    """Into how many equal parts the width of a pixel of the result is cut, so that each lies in one pixel of 32."""
    return IMAGE_SIZE // math.gcd(IMAGE_SIZE, size)


def taps(size: int) -> int:
    """The most pixels of 32 that one of `size` touches."""
    return max((IMAGE_SIZE * (j + 1) - 1) // size - IMAGE_SIZE * j // size + 1 for j in range(size))


@functools.cache
def area_weights(size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The pixels of 32 under each pixel of `size`: the first of them, int64 [r], and weights, float32 [r, taps].

    From `first[j]` on, `weights[j]` times the pixels is their average; all of them are pixels of the image. For r = 24
    the weights are quarters, (3, 1), (2, 2), (1, 3); for 16 halves; for 20 eighths.
    """
    width = taps(size)
    first = np.minimum(IMAGE_SIZE * np.arange(size) // size, IMAGE_SIZE - width)
    start = IMAGE_SIZE * np.arange(size)[:, None]  # in units of 1/r of a pixel of 32
    pixel = size * (first[:, None] + np.arange(width))
    overlap = np.minimum(start + IMAGE_SIZE, pixel + size) - np.maximum(start, pixel)
    weights = (np.maximum(overlap, 0) / IMAGE_SIZE).astype(np.float32)
    for array in (first, weights):
        array.flags.writeable = False  # they are shared by all callers
    return first, weights


def scaled_edges(edges: npt.NDArray[np.int16], size: int) -> npt.NDArray[np.int16]:
    """Places between the pixels of 32 as places between those of `size`, the nearest, the upper of two."""
    return ((edges.astype(np.int32) * size + IMAGE_SIZE // 2) // IMAGE_SIZE).astype(np.int16)
