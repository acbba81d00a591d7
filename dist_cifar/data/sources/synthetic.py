"""The synthetic data set: ten classes of 32x32 images of shapes and patterns, generated in a second or two.

Contract: image `i` of a split is a function of (split, i) alone and its class is `i % 10`, so a larger split begins
with the smaller one and any split is balanced as evenly as its size allows. The splits are sampled independently.

Only form tells the classes apart. Foreground and background colour come from one distribution, exchangeable, for all
classes; position, size, rotation, line width, shading, a faint texture and noise vary within each. So mean colour says
nothing and a linear classifier on pixels next to nothing. No class changes under a flip or a rotation.

Arithmetic per pixel is +, -, *, /, square root and comparison in float32, which IEEE 754 rounds exactly; sines and
cosines are taken in double precision and rounded to float32. So the bytes are the same on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dist_cifar.augment.image import IMAGE_SHAPE, IMAGE_SIZE
from dist_cifar.config import DataConfig
from dist_cifar.data.arrays import Arrays
from dist_cifar.data.sources.base import Source
from dist_cifar.ops import philox

CLASSES = ("disc", "ring", "square", "frame", "triangle", "cross", "star", "stripes", "checkerboard", "dots")

GENERATOR_VERSION = 1
"""Increase it with every change that changes a byte."""

_SEED = 0
_PARAMETERS = 20
_CHUNK = 50 * len(CLASSES)
"""Images generated at a time: bounds the memory."""

_Field = npt.NDArray[np.float32]
_Inside = Callable[[_Field, _Field, _Field, _Field], _Field]


class Synthetic(Source):
    """Generated images, as many as the config asks for."""

    def key(self, config: DataConfig, cache_dir: Path) -> str:
        sizes = (config.synthetic_train_size, config.synthetic_test_size)
        return hashlib.sha256(f"synthetic {GENERATOR_VERSION} {sizes}".encode()).hexdigest()

    def read(self, config: DataConfig) -> Arrays:
        train_images, train_labels = synthetic_split(0, config.synthetic_train_size)
        test_images, test_labels = synthetic_split(1, config.synthetic_test_size)
        return Arrays(
            train_images=train_images,
            train_labels=train_labels,
            test_images=test_images,
            test_labels=test_labels,
            classes=CLASSES,
        )


def synthetic_split(split: int, size: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """The first `size` images of a split (0: training, 1: test): uint8 [size, 32, 32, 3] and labels int64 [size]."""
    images = np.empty((size, *IMAGE_SHAPE), np.uint8)
    for start in range(0, size, _CHUNK):
        indices = np.arange(start, min(start + _CHUNK, size))
        images[indices] = _generate(split, indices)
    return images, np.arange(size, dtype=np.int64) % len(CLASSES)


def _generate(split: int, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """The images of `indices`: uint8 [len(indices), 32, 32, 3]."""
    words = philox.random_words(_SEED, philox.STREAM_SYNTHETIC, split, indices, _PARAMETERS + IMAGE_SIZE * IMAGE_SIZE)
    draws = words[:, :_PARAMETERS, None, None] * 2.0**-32
    noise = words[:, _PARAMETERS:].view(np.uint8).reshape(len(indices), IMAGE_SIZE, IMAGE_SIZE, 4)[..., :3]

    radius = 9.0 + 4.0 * draws[:, 0]
    shift_x, shift_y = ((2 * draws[:, i] - 1) * (16.0 - radius) for i in (1, 2))
    grid = np.arange(IMAGE_SIZE, dtype=np.float32) - (IMAGE_SIZE - 1) / 2
    x, y = _float32(grid[None, None, :] - shift_x), _float32(grid[None, :, None] - shift_y)
    u, v = _rotated(x, y, draws[:, 3])
    form = np.empty((len(indices), IMAGE_SIZE, IMAGE_SIZE), np.float32)
    radius, width = _float32(radius), _float32(draws[:, 4])
    for label, inside in enumerate(_FORMS):
        rows = indices % len(CLASSES) == label
        form[rows] = np.clip(0.5 + inside(u[rows], v[rows], radius[rows], width[rows]), 0, 1)

    background = draws[:, 5:8, 0, 0]
    # A shift on the circle keeps the foreground uniform too, and at least a quarter away in every channel.
    foreground = (background + 0.25 + 0.5 * draws[:, 8:11, 0, 0]) % 1.0
    shading = _float32(0.3 * draws[:, 11] - 0.15) * (x / 16) + _float32(0.3 * draws[:, 12] - 0.15) * (y / 16)
    along, _ = _rotated(x, y, draws[:, 13])
    texture = _float32(0.1 * draws[:, 14]) * _triangle_wave(along / _float32(3.0 + 5.0 * draws[:, 15]))
    # Chance decides which of the two grounds bears the texture, so that texture does not mark the foreground.
    textured = np.where(draws[:, 16] < 0.5, form, 1 - form)
    shade = shading + textured * texture

    low, high = _float32(background)[:, None, None, :], _float32(foreground)[:, None, None, :]
    amplitude = _float32(0.02 + 0.1 * draws[:, 17])[..., None]
    colour = low + (high - low) * form[..., None] + shade[..., None]
    colour += amplitude * (noise.astype(np.float32) / np.float32(127.5) - 1)
    return np.rint(np.clip(colour, 0, 1) * 255).astype(np.uint8)


def _float32(values: npt.NDArray[np.floating]) -> _Field:
    return values.astype(np.float32)


def _rotated(x: _Field, y: _Field, turn: npt.NDArray[np.floating]) -> tuple[_Field, _Field]:
    """Coordinates in a frame rotated by `turn` (of a full turn)."""
    cos, sin = _float32(np.cos(2 * np.pi * turn)), _float32(np.sin(2 * np.pi * turn))
    return x * cos + y * sin, y * cos - x * sin


def _triangle_wave(phase: _Field) -> _Field:
    """A wave of period 1, range [-1, 1] and slope 4 or -4, which is -1 at whole numbers."""
    return 4 * np.abs(phase - np.floor(phase + np.float32(0.5))) - 1


# --- the forms -----------------------------------------------------------------------------------------------------
# Each takes pixel coordinates in the form's own frame, its radius in pixels and a width in [0, 1), and returns how many
# pixels deep inside the form a pixel lies; negative outside.


def _disc(u: _Field, v: _Field, radius: _Field, width: _Field) -> _Field:
    return radius - np.sqrt(u * u + v * v)


def _square(u: _Field, v: _Field, radius: _Field, width: _Field) -> _Field:
    return np.float32(0.8) * radius - np.maximum(np.abs(u), np.abs(v))


def _outline(shape: _Inside) -> _Inside:
    """The band along the edge of a shape, 2.5 to 4 pixels wide."""

    def inside(u: _Field, v: _Field, radius: _Field, width: _Field) -> _Field:
        half = np.float32(1.25) + np.float32(0.75) * width
        return half - np.abs(shape(u, v, radius, width) - half)

    return inside


def _half_planes(u: _Field, v: _Field, sides: int, distance: _Field) -> _Field:
    """Depths [sides, ...] inside the half planes whose edges bound a regular polygon with that inner radius."""
    angles = 2 * np.pi * np.arange(sides) / sides
    normals = zip(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), strict=True)
    return np.stack([distance - (u * cos + v * sin) for cos, sin in normals])


def _triangle(u: _Field, v: _Field, radius: _Field, width: _Field) -> _Field:
    return _half_planes(u, v, 3, np.float32(0.6) * radius).min(axis=0)


def _star(u: _Field, v: _Field, radius: _Field, width: _Field) -> _Field:
    # A pentagram is what lies in at least four of the half planes of its inner pentagon.
    return np.partition(_half_planes(u, v, 5, np.float32(0.38) * radius), 1, axis=0)[1]


def _cross(u: _Field, v: _Field, radius: _Field, width: _Field) -> _Field:
    half = np.float32(2) + np.float32(1.25) * width
    long, short = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
    return np.minimum(radius - long, half - short)


def _period(radius: _Field) -> _Field:
    """The period of the patterns: 6 to 10 pixels."""
    return radius - 3


def _stripes(u: _Field, v: _Field, radius: _Field, width: _Field) -> _Field:
    return _triangle_wave(u / _period(radius)) * _period(radius) / np.float32(4)


def _checkerboard(u: _Field, v: _Field, radius: _Field, width: _Field) -> _Field:
    # A field is half a period: 5 to 8 pixels, larger than a stripe, or the fields blur.
    period = np.float32(1.6) * _period(radius)
    across, down = (np.clip(_triangle_wave(w / period) * period / 4, -0.5, 0.5) for w in (u, v))
    return _float32(2 * across * down)


def _dots(u: _Field, v: _Field, radius: _Field, width: _Field) -> _Field:
    period = np.float32(1.1) * _period(radius)
    across, down = (w - period * np.floor(w / period + np.float32(0.5)) for w in (u, v))
    return (np.float32(0.26) + np.float32(0.08) * width) * period - np.sqrt(across * across + down * down)


_FORMS: tuple[_Inside, ...] = (
    _disc,
    _outline(_disc),
    _square,
    _outline(_square),
    _triangle,
    _cross,
    _star,
    _stripes,
    _checkerboard,
    _dots,
)
