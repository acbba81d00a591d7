"""Applies augmentation parameters on the CPU, in one compiled pass over each image of a batch.

Contract: the result equals `reference` bit for bit: `augment_pixels` the uint8 image after crop, flip, rotation,
jitter and sharpness, `augment` the normalised tensor, of the size that the parameters say, with its boxes erased.
Nothing depends on the batch that an image is in. The compiled code, which is in `cpu_pass`, releases the GIL, runs in
the calling thread and is cached on disk.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from dist_cifar.augment.cpu_pass import augment_batch, normalize_batch
from dist_cifar.augment.image import IMAGE_SIZE, UNSCALED, ImageStats, require_images
from dist_cifar.augment.params import AugmentParams, sample_params
from dist_cifar.augment.resolution import area_weights
from dist_cifar.config import AugmentConfig

_WORDS = IMAGE_SIZE * IMAGE_SIZE * 3 // 4


def augment(
    images: npt.NDArray[np.uint8],
    indices: npt.ArrayLike,
    params: AugmentParams,
    stats: ImageStats,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The network's input: the images `indices` of uint8 [N, 32, 32, 3], augmented, normalised and erased.

    `images` is contiguous and may be a memory map. Row i of `params` belongs to `indices[i]`. `out`: float32 or
    bfloat16 [n, 3, r, r] in channels-last memory format, where r is `params.size`, new float32 memory if None;
    bfloat16 is the float32 result rounded to nearest even. Returns `out`.
    """
    n = np.size(indices)
    if len(params.flip) != n:
        raise ValueError(f"parameters of {len(params.flip)} images for {n} indices")
    if out is None:
        out = _new_batch(n, params.size)
    augment_batch(
        *_gathered(images, indices),
        params.shift,
        params.flip,
        params.angle,
        params.order,
        params.factors,
        params.sharpness,
        params.box,
        params.cutout,
        *area_weights(params.size),
        _scales(stats),
        *_memory(out, n, params.size),
    )
    return out


def augment_pixels(
    images: npt.NDArray[np.uint8], indices: npt.ArrayLike, params: AugmentParams
) -> npt.NDArray[np.uint8]:
    """What `augment` averages and normalises: the images `indices` before their boxes are erased, uint8 [n, 32, 32, 3].

    The same compiled pass; with `UNSCALED` statistics each value v comes out as v / 255.
    """
    no_box = np.zeros_like(params.box)
    scaled = augment(images, indices, replace(params, box=no_box, cutout=no_box, size=IMAGE_SIZE), UNSCALED)
    return scaled.mul_(255).round_().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def normalize(
    images: npt.NDArray[np.uint8],
    indices: npt.ArrayLike,
    stats: ImageStats,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The images `indices` normalised but not augmented, otherwise as by `augment`: the path of evaluation."""
    if out is None:
        out = _new_batch(np.size(indices), IMAGE_SIZE)
    normalize_batch(*_gathered(images, indices), _scales(stats), *_memory(out, np.size(indices), IMAGE_SIZE))
    return out


def warm_up() -> None:
    """Compiles the kernels, or loads them from numba's cache, by running each on one image."""
    image, index = np.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8), [0]
    augment(image, index, sample_params(AugmentConfig(), seed=0, epoch=0, indices=index), UNSCALED)
    normalize(image, index, UNSCALED)


# --- arguments of the compiled code, which checks no bounds itself -----------------------------------------------


def _gathered(
    images: npt.NDArray[np.uint8], indices: npt.ArrayLike
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """The images as words [N, 768] of four bytes, read-only, and the indices as int64 [n]."""
    require_images(images)
    rows = np.ascontiguousarray(indices, np.int64)
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(images):
        raise IndexError(f"indices {rows.min()} to {rows.max()} of {len(images)} images")
    words = np.asarray(images).reshape(len(images), 4 * _WORDS).view(np.uint32)
    words.flags.writeable = False  # a read-only memory map and an array in memory are then one type to numba
    return words, rows


def _scales(stats: ImageStats) -> tuple[tuple[np.float32, ...], ...]:
    """For each channel the mean, the deviation, and the inverse of the deviation as a sum of two numbers."""
    shift, scale = np.asarray(stats.mean, np.float32), np.asarray(stats.std, np.float32)
    inverse = 1.0 / scale.astype(np.float64)
    high = inverse.astype(np.float32)
    low = (inverse - high).astype(np.float32)
    return tuple(zip(shift, scale, high, low, strict=True))


def _new_batch(n: int, size: int) -> torch.Tensor:
    return torch.empty((n, 3, size, size), memory_format=torch.channels_last)


def _memory(out: torch.Tensor, n: int, size: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint16]]:
    """The tensor's memory as [n, r * r * 3]: float32 and, as bits, bfloat16; one of them is empty."""
    if out.shape != (n, 3, size, size) or not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"out must be channels-last [{n}, 3, {size}, {size}], found {list(out.shape)}")
    numbers = 3 * size * size
    flat = out.permute(0, 2, 3, 1).view(n, numbers)
    if out.dtype == torch.float32:
        return flat.numpy(), np.empty((0, numbers), np.uint16)
    if out.dtype == torch.bfloat16:
        return np.empty((0, numbers), np.float32), flat.view(torch.uint16).numpy()
    raise ValueError(f"out must be float32 or bfloat16, found {out.dtype}")
