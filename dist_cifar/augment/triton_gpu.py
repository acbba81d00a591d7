"""Applies augmentation parameters on a GPU to a data set that is resident there: a Triton kernel, one program an image.

Contract: the result has the bits of `cpu.augment`, and so of `reference`. Nothing depends on the batch that an image is
in. Importing this module imports triton; `backend` decides whether it is used.

Why the bits are the same:
- Pixels are whole numbers in int32 from the gather to the table at the end. Rotation (16.16 fixed point), grey, the
  mean of contrast and the smoothing of sharpness are integer formulas, which have no rounding to differ in. No sum
  exceeds 2**24 but the one of the fixed-point coordinates, which PIL too keeps in 32 bits.
- What needs a float on its way from an angle or a factor to the kernel is computed on the CPU, by `pack`.
- PIL's blend is the only float arithmetic: one product and one sum of float32, each rounded to nearest. A GPU's
  compiler would contract them into one fused multiply-add, rounded once; `enable_fp_fusion=False` forbids it. Whether
  numbers below 2**-126 are flushed to zero does not matter: next to a whole number they vanish in the sum, and alone
  they are truncated to 0.
- There is no division by a variable. `(2 * total + 13) // 26` is PIL's rounding of thirteenths, a division by a
  constant of a number that is not negative.
- An area average is kept as a sum of whole numbers below 2**18: of the shares that the pixels under it have.
- ToTensor, Normalize and the rounding to bfloat16 are read from a table, which has for each channel the 256 values of
  a byte or, of averages, every sum that there is: torch made it on the CPU, as `reference` would.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from dist_cifar.augment.image import IMAGE_SIZE, ImageStats, require_images
from dist_cifar.augment.params import AugmentParams, erased_boxes
from dist_cifar.augment.resolution import taps, units
from dist_cifar.ops.transfer import upload

# Triton reads globals as constexpr only.
_SIDE, _PIXELS = tl.constexpr(32), tl.constexpr(1024)
assert _SIDE.value == IMAGE_SIZE
_BRIGHTNESS, _CONTRAST = tl.constexpr(0), tl.constexpr(1)
# Columns of what `pack` gives.
_INDEX, _SHIFT_DOWN, _SHIFT_RIGHT, _MIRROR = (tl.constexpr(column) for column in range(4))
_X_START, _Y_START, _COS, _SIN, _BACK = (tl.constexpr(column) for column in range(4, 9))
_OPERATIONS, _ALPHAS, _SHARPNESS = tl.constexpr(9), tl.constexpr(12), tl.constexpr(15)
_BOX, _CUTOUT = tl.constexpr(16), tl.constexpr(20)
_COLUMNS = tl.constexpr(24)


class DeviceAugmenter:
    """The images of a split on a GPU, and the tables that normalise them."""

    def __init__(
        self,
        images: npt.NDArray[np.uint8],
        stats: ImageStats,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Copies `images`, uint8 [N, 32, 32, 3], to `device`; `dtype` of the result is float32 or bfloat16."""
        require_images(images)
        self._images = torch.tensor(images, device=device)
        self._stats, self._dtype = stats, dtype
        self._tables: dict[int, torch.Tensor] = {}

    def __call__(self, indices: npt.ArrayLike, params: AugmentParams) -> torch.Tensor:
        """What `cpu.augment` gives: [n, 3, r, r] in channels-last memory format, on the device.

        Row i of `params` belongs to `indices[i]`. Copy and kernel are put on the current stream of the device, which
        must be the current one; the call does not wait for them.
        """
        rows = np.asarray(indices, np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self._images):
            raise IndexError(f"indices {rows.min()} to {rows.max()} of {len(self._images)} images")
        device, size = self._images.device, params.size
        packed = upload(torch.from_numpy(pack(rows, params)), device)
        if size not in self._tables:
            self._tables[size] = normalized_values(self._stats, self._dtype, size).to(device)
        out = torch.empty(
            (len(rows), 3, size, size), dtype=self._dtype, device=device, memory_format=torch.channels_last
        )
        _augment_images[(len(rows),)](
            self._images,
            packed,
            self._tables[size],
            out,
            SIZE=size,
            UNITS=units(size),
            TAPS=taps(size),
            num_warps=4,
            enable_fp_fusion=False,
        )
        return out


def normalized_values(stats: ImageStats, dtype: torch.dtype, size: int = IMAGE_SIZE) -> torch.Tensor:
    """What ToTensor and Normalize make of each value of a pixel, for each channel: [values, 3].

    Of a byte these are 256; of an average, which is a whole number of 1/units^2, all from 0 to 255.
    """
    parts = units(size) ** 2
    unit = torch.arange(255 * parts + 1).div(parts).div(255)
    mean, std = (torch.tensor(numbers, dtype=torch.float32) for numbers in (stats.mean, stats.std))
    return unit[:, None].sub(mean).div(std).to(dtype).contiguous()


def pack(indices: npt.NDArray[np.int64], params: AugmentParams) -> npt.NDArray[np.int32]:
    """The parameters as the kernel reads them, a row an image: int32 [n, 24], factors as the bits of a float32."""
    n = len(indices)
    if len(params.flip) != n:
        raise ValueError(f"parameters of {len(params.flip)} images for {n} indices")
    packed = np.empty((n, _COLUMNS.value), np.int32)
    packed[:, _INDEX.value] = indices
    packed[:, _SHIFT_DOWN.value : _MIRROR.value] = params.shift
    packed[:, _MIRROR.value] = np.where(params.flip, 31, 0)  # 31 - x is x ^ 31
    packed[:, _X_START.value : _OPERATIONS.value] = _rotation(params.angle)
    packed[:, _OPERATIONS.value : _ALPHAS.value] = params.order
    alphas = np.take_along_axis(params.factors, params.order.astype(np.intp), axis=1).astype(np.float32)
    packed[:, _ALPHAS.value : _SHARPNESS.value] = alphas.view(np.int32)
    packed[:, _SHARPNESS.value] = params.sharpness.astype(np.float32).view(np.int32)
    packed[:, _BOX.value :] = erased_boxes(params).reshape(n, 8)
    return packed


def _rotation(angle: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """PIL's inverse rotation in 16.16 fixed point, [n, 5]: x and y of the first pixel's source, then the steps.

    The formulas of `cpu`. The cosine is Python's, as in PIL: NumPy's may differ in the last bit.
    """
    radians = (-(angle % 360.0) * (math.pi / 180.0)).tolist()
    cos = np.rint(np.array([math.cos(number) for number in radians]) * 1e15) / 1e15
    sin = np.rint(np.array([math.sin(number) for number in radians]) * 1e15) / 1e15
    left = cos * -16.0 + sin * -16.0 + 16.0
    top = -sin * -16.0 + cos * -16.0 + 16.0
    real = np.stack([left + cos * 0.5 + sin * 0.5, top + -sin * 0.5 + cos * 0.5, cos, sin, -sin], axis=1)
    return np.floor(real * 65536.0 + 0.5)


# --- compiled for the GPU ----------------------------------------------------------------------------------------


@triton.jit
def _reflect(position):
    """A row or column beyond the border is reflected at the outermost one."""
    return 31 - tl.abs(31 - tl.abs(position))


@triton.jit
def _blend(degenerate, value, alpha):
    """PIL's blend: from `degenerate` (alpha 0) over `value` (alpha 1) and beyond, clipped, then truncated."""
    mixed = degenerate.to(tl.float32) + alpha * (value - degenerate).to(tl.float32)
    return tl.minimum(tl.maximum(mixed, 0.0), 255.0).to(tl.int32)


@triton.jit
def _sharpen(plane, p, alpha):
    """Blend with the 3x3 mean that weighs the centre five times; the outermost ring stays."""
    last: tl.constexpr = _PIXELS - 1  # what wraps around reaches the ring alone
    sums = tl.gather(plane, (p - 1) & last, 0) + plane + tl.gather(plane, (p + 1) & last, 0)
    total = tl.gather(sums, (p - _SIDE) & last, 0) + sums + tl.gather(sums, (p + _SIDE) & last, 0) + 4 * plane
    x, y = p % _SIDE, p // _SIDE
    on_ring = (x == 0) | (x == _SIDE - 1) | (y == 0) | (y == _SIDE - 1)
    return _blend(tl.where(on_ring, plane, (2 * total + 13) // 26), plane, alpha)


@triton.jit
def _share(j, pixel, SIZE: tl.constexpr, UNITS: tl.constexpr):
    """How many of the units of pixel `j` of `SIZE` lie in `pixel` of 32."""
    overlap = tl.minimum(j * _SIDE + _SIDE, pixel * SIZE + SIZE) - tl.maximum(j * _SIDE, pixel * SIZE)
    return tl.maximum(overlap, 0) // (_SIDE // UNITS)


@triton.jit
def _sum_areas(plane, p, SIZE: tl.constexpr, UNITS: tl.constexpr, TAPS: tl.constexpr):
    """The area averages times UNITS * UNITS, down the columns, then along rows; the first SIZE * SIZE count."""
    last: tl.constexpr = _PIXELS - 1  # what wraps around has no share, or does not count
    x, y = p % _SIDE, p // _SIDE
    strips = tl.zeros_like(plane)
    for k in tl.static_range(TAPS):
        pixel = y * _SIDE // SIZE + k
        strips += _share(y, pixel, SIZE, UNITS) * tl.gather(plane, (pixel * _SIDE + x) & last, 0)
    x, y = p % SIZE, p // SIZE
    sums = tl.zeros_like(plane)
    for k in tl.static_range(TAPS):
        pixel = x * _SIDE // SIZE + k
        sums += _share(x, pixel, SIZE, UNITS) * tl.gather(strips, (y * _SIDE + pixel) & last, 0)
    return sums


@triton.jit
def _outside(box, x, y):
    """Whether a pixel lies outside the box whose top, left, bottom and right are at `box`."""
    rows_kept = (y < tl.load(box)) | (y >= tl.load(box + 2))
    return rows_kept | (x < tl.load(box + 1)) | (x >= tl.load(box + 3))


@triton.jit
def _augment_images(images, packed, table, out, SIZE: tl.constexpr, UNITS: tl.constexpr, TAPS: tl.constexpr):
    """`images`: uint8 [N, 32, 32, 3]; `packed`: int32 [n, 24]; `table`: [values, 3]; `out`: [n, SIZE, SIZE, 3] like it.

    `UNITS` and `TAPS` are those of `resolution`.
    """
    image = tl.program_id(0).to(tl.int64)
    row = packed + image * _COLUMNS
    p = tl.arange(0, _PIXELS)
    x, y = p % _SIDE, p // _SIDE

    from_x = (tl.load(row + _X_START) + x * tl.load(row + _COS) + y * tl.load(row + _SIN)) >> 16
    from_y = (tl.load(row + _Y_START) + x * tl.load(row + _BACK) + y * tl.load(row + _COS)) >> 16
    inside = (from_x >= 0) & (from_x < _SIDE) & (from_y >= 0) & (from_y < _SIDE)
    from_x = _reflect((from_x ^ tl.load(row + _MIRROR)) + tl.load(row + _SHIFT_RIGHT))
    from_y = _reflect(from_y + tl.load(row + _SHIFT_DOWN))
    source = images + tl.load(row + _INDEX).to(tl.int64) * (3 * _PIXELS) + 3 * (from_y * _SIDE + from_x)
    red = tl.load(source, mask=inside, other=0).to(tl.int32)
    green = tl.load(source + 1, mask=inside, other=0).to(tl.int32)
    blue = tl.load(source + 2, mask=inside, other=0).to(tl.int32)

    for k in tl.static_range(3):
        operation = tl.load(row + _OPERATIONS + k)
        alpha = tl.load(row + _ALPHAS + k).to(tl.float32, bitcast=True)
        grey = (red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16
        mean = (tl.sum(grey) + _PIXELS // 2) // _PIXELS
        degenerate = tl.where(operation == _BRIGHTNESS, 0, tl.where(operation == _CONTRAST, mean, grey))
        red = _blend(degenerate, red, alpha)
        green = _blend(degenerate, green, alpha)
        blue = _blend(degenerate, blue, alpha)

    sharpness = tl.load(row + _SHARPNESS).to(tl.float32, bitcast=True)
    if sharpness != 1.0:
        red = _sharpen(red, p, sharpness)
        green = _sharpen(green, p, sharpness)
        blue = _sharpen(blue, p, sharpness)

    if SIZE != _SIDE:
        red = _sum_areas(red, p, SIZE, UNITS, TAPS)
        green = _sum_areas(green, p, SIZE, UNITS, TAPS)
        blue = _sum_areas(blue, p, SIZE, UNITS, TAPS)

    x, y = p % SIZE, p // SIZE
    is_pixel = p < SIZE * SIZE
    kept = is_pixel & _outside(row + _BOX, x, y) & _outside(row + _CUTOUT, x, y)
    target = out + image * (3 * SIZE * SIZE) + 3 * p
    tl.store(target, tl.load(table + 3 * red, mask=kept, other=0), mask=is_pixel)
    tl.store(target + 1, tl.load(table + 3 * green + 1, mask=kept, other=0), mask=is_pixel)
    tl.store(target + 2, tl.load(table + 3 * blue + 2, mask=kept, other=0), mask=is_pixel)
