"""Samples the augmentation parameters of a batch in one vectorised call.

Contract: row i of the result is a function of (config, seed, epoch, indices[i]) alone. The distributions are those of
torchvision's transforms. Policy `default`: RandomHorizontalFlip, RandomRotation, ColorJitter (its order sampled for
each image), RandomAdjustSharpness and RandomErasing. Policy `flip_crop`: RandomCrop(32, padding=4,
padding_mode="reflect") and RandomHorizontalFlip. Both take what `crop_padding`, `flip` and `cutout_size` add or change.
Policy `none` changes nothing.

Source of the alternating flip and of the cutout that stays inside the image: Jordan, "94% on CIFAR-10 in 3.29 seconds
on a single GPU", 2024; of cutout: DeVries and Taylor, "Improved regularization of convolutional neural networks with
cutout", 2017, whose box may be cut off by the border.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_cifar.augment.image import IMAGE_SIZE
from dist_cifar.augment.resolution import scaled_edges
from dist_cifar.config import AugmentConfig
from dist_cifar.ops.numba_jit import compiled
from dist_cifar.ops.philox import STREAM_AUGMENT, uniform

CROP_PADDING = {"default": 0, "flip_crop": 4}
"""Pixels by which a policy pads an image on each side before it crops, unless `crop_padding` says otherwise."""
MAX_CROP_PADDING = 8
BRIGHTNESS, CONTRAST, SATURATION = range(3)

_ORDERS = np.array(list(permutations((BRIGHTNESS, CONTRAST, SATURATION))), np.uint8)
# numba freezes these into its disk cache and looks at no other file for changes: neither may be imported.
_SIDE = 32
assert _SIDE == IMAGE_SIZE
_ERASING_ATTEMPTS = 10
_UNIFORMS = {"default": 8 + 4 * _ERASING_ATTEMPTS, "flip_crop": 3}


@dataclass(frozen=True, kw_only=True)
class AugmentParams:
    """Parameters of n images; an operation that is not applied to an image has a value that changes nothing."""

    shift: npt.NDArray[np.int16]
    """[n, 2]: rows and columns, at most `MAX_CROP_PADDING` in each direction, by which the crop from the padded image
    lies below and right of the middle."""
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
    """[n, 4]: top, left, height, width of the erased box, in pixels of 32; height 0 where there is none."""
    cutout: npt.NDArray[np.int16]
    """[n, 4]: the box of the cutout, likewise."""
    size: int = IMAGE_SIZE
    """Height and width in pixels to which all images are averaged, before they are normalised."""


def sample_params(
    config: AugmentConfig, *, seed: int, epoch: int, indices: npt.ArrayLike, size: int = IMAGE_SIZE
) -> AugmentParams:
    """The parameters of the images `indices` (int [n], positions in the data set) in `epoch`, with this `size`."""
    drawn = {} if config.policy == "none" else _sample_policy(config, seed, epoch, indices)
    n = np.size(indices)
    return AugmentParams(
        size=size, **{name: drawn[name] if name in drawn else make(n) for name, make in _UNCHANGED.items()}
    )


def _sample_policy(config: AugmentConfig, seed: int, epoch: int, indices: npt.ArrayLike) -> dict[str, Any]:
    """Fields of `AugmentParams` that the policy and the operations of both policies draw."""
    padding = CROP_PADDING[config.policy] if config.crop_padding is None else config.crop_padding
    draws = _UNIFORMS[config.policy]  # those of the policy; four for places follow where they are needed
    u = uniform(seed, STREAM_AUGMENT, epoch, indices, draws + 4 * bool(config.crop_padding or config.cutout_size))
    fields: dict[str, Any] = {"flip": u[:, 0] < config.flip_probability}
    if config.flip == "alternating":
        in_first_epoch = uniform(seed, STREAM_AUGMENT, 0, indices, 1)[:, 0] < 0.5
        fields["flip"] = in_first_epoch != (epoch % 2 == 1)
    if config.policy == "default":
        fields |= _sample_default_policy(config, u)
    if padding:
        place = u[:, 1:3] if config.policy == "flip_crop" else u[:, draws : draws + 2]
        fields["shift"] = (place * (2 * padding + 1)).astype(np.int16) - np.int16(padding)
    if config.cutout_size:
        fields["cutout"] = _sample_cutout(u[:, draws + 2 :], config.cutout_size)
    return fields


def erased_boxes(params: AugmentParams) -> npt.NDArray[np.int16]:
    """Top, left, bottom, right of the two boxes of each image, in pixels of `params.size`: int16 [n, 2, 4]."""
    boxes = np.stack([params.box, params.cutout], axis=1)
    boxes[:, :, 2:] += boxes[:, :, :2]
    return boxes if params.size == IMAGE_SIZE else scaled_edges(boxes, params.size)


_UNCHANGED: dict[str, Callable[[int], npt.NDArray[Any]]] = {
    "shift": lambda n: np.zeros((n, 2), np.int16),
    "flip": lambda n: np.zeros(n, np.bool_),
    "angle": np.zeros,
    "order": lambda n: _ORDERS[:1].repeat(n, axis=0),
    "factors": lambda n: np.ones((n, 3)),
    "sharpness": np.ones,
    "box": lambda n: np.zeros((n, 4), np.int16),
    "cutout": lambda n: np.zeros((n, 4), np.int16),
}
"""What each field of the parameters of n images is where nothing is changed."""


def _sample_default_policy(config: AugmentConfig, u: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Fields of `AugmentParams` that the policy `default` alone draws, from `u` [n, 48 or more]."""
    jitter = np.array([config.brightness, config.contrast, config.saturation])
    low, high = np.maximum(0.0, 1.0 - jitter), 1.0 + jitter
    return {
        "angle": (2.0 * u[:, 1] - 1.0) * config.rotation_degrees,
        "order": _ORDERS[(u[:, 2] * len(_ORDERS)).astype(np.intp)],
        "factors": low + (high - low) * u[:, 4:7],
        "sharpness": np.where(u[:, 3] < config.sharpness_probability, config.sharpness_factor, 1.0),
        "box": _sample_boxes(
            u[:, 7] < config.erasing_probability,
            u[:, 8 : _UNIFORMS["default"]].reshape(-1, _ERASING_ATTEMPTS, 4),
            *config.erasing_area,
            *np.log(config.erasing_aspect),
        ),
    }


def _sample_cutout(u: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.int16]:
    """A square of `size` pixels anywhere inside the image, from `u` [n, 2]: int16 [n, 4]."""
    boxes = np.full((len(u), 4), size, np.int16)
    boxes[:, :2] = u * (IMAGE_SIZE - size + 1)
    return boxes


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
