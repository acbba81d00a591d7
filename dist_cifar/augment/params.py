"""Samples the augmentation parameters of a batch in one vectorised call.

Contract: row i of the result is a function of (config, seed, epoch, indices[i]) alone. The distributions are those of
torchvision's transforms. Policy `seed`: RandomHorizontalFlip, RandomRotation, ColorJitter (its order sampled for each
image), RandomAdjustSharpness and RandomErasing. Policy `flip_crop`: RandomCrop(32, padding=4, padding_mode="reflect")
and RandomHorizontalFlip; it reads `flip_probability` and no other field. Policy `none` changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
import numpy.typing as npt

from dist_cifar.augment.image import IMAGE_SIZE
from dist_cifar.config import AugmentConfig
from dist_cifar.ops.numba_jit import compiled
from dist_cifar.ops.philox import STREAM_AUGMENT, uniform

CROP_PADDING = 4
"""Pixels by which `flip_crop` pads an image on each side before it crops."""
BRIGHTNESS, CONTRAST, SATURATION = range(3)

_ORDERS = np.array(list(permutations((BRIGHTNESS, CONTRAST, SATURATION))), np.uint8)
# numba freezes these into its disk cache and looks at no other file for changes: neither may be imported.
_SIDE = 32
assert _SIDE == IMAGE_SIZE
_ERASING_ATTEMPTS = 10
_UNIFORMS = 8 + 4 * _ERASING_ATTEMPTS


@dataclass(frozen=True, kw_only=True)
class AugmentParams:
    """Parameters of n images; an operation that is not applied to an image has a value that changes nothing."""

    shift: npt.NDArray[np.int16]
    """[n, 2]: rows and columns, each in [-CROP_PADDING, CROP_PADDING], by which the crop from the padded image lies
    below and right of the middle."""
    flip: npt.NDArray[np.bool_]
    """[n]: mirror left and right."""
    angle: npt.NDArray[np.float64]
    """[n]: rotation in degrees, counter-clockwise."""
    order: npt.NDArray[np.uint8]
    """[n, 3]: a permutation of BRIGHTNESS, CONTRAST, SATURATION."""
    factors: npt.NDArray[np.float64]
    """[n, 3]: the factors of BRIGHTNESS, CONTRAST, SATURATION, in this order whatever `order` is."""
    sharpness: npt.NDArray[np.float64]
    """[n]: sharpness factor, 1 where it stays."""
    box: npt.NDArray[np.int16]
    """[n, 4]: top, left, height, width of the erased box; height 0 where there is none."""


def sample_params(config: AugmentConfig, *, seed: int, epoch: int, indices: npt.ArrayLike) -> AugmentParams:
    """The parameters of the images `indices` (int [n], positions in the data set) in `epoch`."""
    if config.policy == "none":
        return _identity(np.size(indices))
    if config.policy == "flip_crop":
        u = uniform(seed, STREAM_AUGMENT, epoch, indices, 3)
        return replace(
            _identity(len(u)),
            shift=(u[:, 1:] * (2 * CROP_PADDING + 1)).astype(np.int16) - CROP_PADDING,
            flip=u[:, 0] < config.flip_probability,
        )
    u = uniform(seed, STREAM_AUGMENT, epoch, indices, _UNIFORMS)
    jitter = np.array([config.brightness, config.contrast, config.saturation])
    low, high = np.maximum(0.0, 1.0 - jitter), 1.0 + jitter
    return AugmentParams(
        shift=np.zeros((len(u), 2), np.int16),
        flip=u[:, 0] < config.flip_probability,
        angle=(2.0 * u[:, 1] - 1.0) * config.rotation_degrees,
        order=_ORDERS[(u[:, 2] * len(_ORDERS)).astype(np.intp)],
        factors=low + (high - low) * u[:, 4:7],
        sharpness=np.where(u[:, 3] < config.sharpness_probability, config.sharpness_factor, 1.0),
        box=_sample_boxes(
            u[:, 7] < config.erasing_probability,
            u[:, 8:].reshape(-1, _ERASING_ATTEMPTS, 4),
            *config.erasing_area,
            *np.log(config.erasing_aspect),
        ),
    )


def _identity(n: int) -> AugmentParams:
    """Parameters of `n` images that change nothing."""
    return AugmentParams(
        shift=np.zeros((n, 2), np.int16),
        flip=np.zeros(n, np.bool_),
        angle=np.zeros(n),
        order=np.tile(_ORDERS[0], (n, 1)),
        factors=np.ones((n, 3)),
        sharpness=np.ones(n),
        box=np.zeros((n, 4), np.int16),
    )


@compiled
def _sample_boxes(is_erased, u, area_low, area_high, log_aspect_low, log_aspect_high):
    """RandomErasing's rule: up to ten attempts at a box smaller than the image, else none.

    `is_erased`: bool [n]; `u`: [n, attempts, 4]. Returns int16 [n, 4].
    """
    boxes = np.zeros((len(u), 4), np.int16)
    for i in range(len(u)):
        for attempt in range(_ERASING_ATTEMPTS if is_erased[i] else 0):
            area = _SIDE * _SIDE * (area_low + (area_high - area_low) * u[i, attempt, 0])
            aspect = math.exp(log_aspect_low + (log_aspect_high - log_aspect_low) * u[i, attempt, 1])
            height, width = np.rint(math.sqrt(area * aspect)), np.rint(math.sqrt(area / aspect))
            if height < _SIDE and width < _SIDE:
                boxes[i, 0] = math.floor(u[i, attempt, 2] * (_SIDE - height + 1))
                boxes[i, 1] = math.floor(u[i, attempt, 3] * (_SIDE - width + 1))
                boxes[i, 2], boxes[i, 3] = height, width
                break
    return boxes
