"""What `fused_batchnorm` and `fused_gelu` compile: norms with what follows them.

Contract: arrays are float32, or uint16 for the bits of bfloat16, in rows of pixels whose channels are neighbours.
Nothing is rounded to bfloat16 but what is written. The result is a function of the arguments alone, on every processor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.core import types
from numba.extending import intrinsic

from dist_cifar.ops.numba_jit import compiled, inlined

_BLOCK = 64
"""The number of rows that are summed in float32."""


@intrinsic
def _widen(_: Any, value: Any) -> Any:
    """Converts a float32, or the bits of a bfloat16, to float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (bits,) = arguments
        if value == types.float32:
            return bits
        wide = context.get_value_type(types.uint32)
        return builder.bitcast(builder.shl(builder.zext(bits, wide), wide(16)), context.get_value_type(types.float32))

    return types.float32(value), generate


@intrinsic
def _narrow(_: Any, value: Any, like: Any) -> Any:
    """The inverse of `_widen`, for the type of `like`; rounds to the nearest, of two to the even one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number, _ = arguments
        if like == types.float32:
            return number
        wide = context.get_value_type(types.uint32)
        bits = builder.bitcast(number, wide)
        odd = builder.and_(builder.lshr(bits, wide(16)), wide(1))
        rounded = builder.lshr(builder.add(bits, builder.add(wide(0x7FFF), odd)), wide(16))
        is_nan = builder.fcmp_unordered("uno", number, number)
        return builder.trunc(builder.select(is_nan, wide(0x7FC0), rounded), context.get_value_type(types.uint16))

    return like(types.float32, like), generate


@intrinsic
def _unless(_: Any, condition: Any, value: Any) -> Any:
    """Selects `value`, or zero where the condition holds."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        zero = context.get_constant(value, 0)
        return builder.select(arguments[0], zero, arguments[1])

    return value(condition, value), generate


@inlined
def _repeated(values, width):
    """Repeats the values of the channels for each pixel of a row: float32 [width]."""
    repeated = np.empty(width, np.float32)
    for first in range(0, width, len(values)):
        for c in range(len(values)):
            repeated[first + c] = values[c]
    return repeated


@inlined
def _add_pixels(row, sums):
    """Adds each pixel of a row to the sums of the channels."""
    for first in range(0, len(row), len(sums)):
        for c in range(len(sums)):
            sums[c] += row[first + c]


@compiled
def normalize(x, shortcut, affine, running_mean, running_variance, momentum, epsilon, statistics, out):
    """Writes `out`, and into `statistics` mean, 1 / deviation and weight / deviation. `affine`: weight and bias."""
    rows, width = x.shape
    channels = affine.shape[1]
    first_pixel = np.empty(channels, np.float32)
    for c in range(channels):
        first_pixel[c] = _widen(x[0, c])
    origin = _repeated(first_pixel, width)  # near the mean: else a small variance would drown in a large mean
    sums, squares = np.zeros(channels, np.float64), np.zeros(channels, np.float64)
    of_block, squares_of_block = np.empty(width, np.float32), np.empty(width, np.float32)
    for start in range(0, rows, _BLOCK):
        of_block[:] = 0
        squares_of_block[:] = 0
        for i in range(start, min(start + _BLOCK, rows)):
            for j in range(width):
                difference = _widen(x[i, j]) - origin[j]
                of_block[j] += difference
                squares_of_block[j] += difference * difference
        _add_pixels(of_block, sums)
        _add_pixels(squares_of_block, squares)

    count = rows * width // channels
    offsets = np.empty(channels, np.float32)
    for c in range(channels):
        distance = sums[c] / count
        mean = first_pixel[c] + distance
        variance = max(squares[c] / count - distance * distance, 0.0)
        inverse = 1 / np.sqrt(variance + epsilon)
        statistics[0, c], statistics[1, c], statistics[2, c] = mean, inverse, affine[0, c] * inverse
        offsets[c] = affine[1, c] - mean * affine[0, c] * inverse
        running_mean[c] += momentum * (mean - running_mean[c])
        running_variance[c] += momentum * (variance * count / (count - 1) - running_variance[c])
    scale, offset = _repeated(statistics[2], width), _repeated(offsets, width)

    for i in range(rows):
        if len(shortcut):
            for j in range(width):
                value = _widen(x[i, j]) * scale[j] + offset[j] + _widen(shortcut[i, j])
                if value < 0:  # which NaN is not: it stays
                    value = np.float32(0)
                out[i, j] = _narrow(value, x[i, j])
        else:
            for j in range(width):
                value = _widen(x[i, j]) * scale[j] + offset[j]
                if value < 0:
                    value = np.float32(0)
                out[i, j] = _narrow(value, x[i, j])


@compiled
def differentiate(gradient, out, x, of_shortcut, of_x, statistics, of_affine):
    """Writes `of_x`, `of_affine` (of weight and bias) and, if it is not empty, `of_shortcut`: the gradient of what ReLU
    is given."""
    rows, width = x.shape
    channels = statistics.shape[1]
    mean = _repeated(statistics[0], width)
    sums, products = np.zeros(channels, np.float64), np.zeros(channels, np.float64)
    of_block, products_of_block = np.empty(width, np.float32), np.empty(width, np.float32)
    of_sum = of_shortcut if len(of_shortcut) else of_x
    for start in range(0, rows, _BLOCK):
        of_block[:] = 0
        products_of_block[:] = 0
        for i in range(start, min(start + _BLOCK, rows)):
            for j in range(width):
                kept: Any = _unless(_widen(out[i, j]) <= 0, gradient[i, j])
                of_sum[i, j] = kept
                value = _widen(kept)
                of_block[j] += value
                products_of_block[j] += value * (_widen(x[i, j]) - mean[j])
        _add_pixels(of_block, sums)
        _add_pixels(products_of_block, products)

    count = rows * width // channels
    slopes, offsets = np.empty(channels, np.float32), np.empty(channels, np.float32)
    for c in range(channels):
        inverse, scale_of_one = statistics[1, c], statistics[2, c] / count
        of_affine[0, c], of_affine[1, c] = products[c] * inverse, sums[c]
        slopes[c] = scale_of_one * inverse * inverse * products[c]
        offsets[c] = scale_of_one * sums[c]
    scale, slope, offset = _repeated(statistics[2], width), _repeated(slopes, width), _repeated(offsets, width)
    if len(of_shortcut):  # one loop for both would not be vectorised: its source could be its target
        for i in range(rows):
            for j in range(width):
                value = scale[j] * _widen(of_shortcut[i, j]) - slope[j] * (_widen(x[i, j]) - mean[j]) - offset[j]
                of_x[i, j] = _narrow(value, x[i, j])
    else:
        for i in range(rows):
            for j in range(width):
                value = scale[j] * _widen(of_x[i, j]) - slope[j] * (_widen(x[i, j]) - mean[j]) - offset[j]
                of_x[i, j] = _narrow(value, x[i, j])


# --- 2x2 max-pool, norm and GELU: of arrays [n, rows, pixels times channels], in chunks of images ---------------------

IMAGES_PER_CHUNK = 4
"""Images whose sums are one row of the sums that the caller adds up: threads may share the chunks as they like."""
_HALF_SQRT2 = np.float32(0.7071067811865476)
_DENSITY_AT_0 = np.float32(0.3989422804014327)
"""The density of the standard normal distribution at 0."""
_A = np.array([0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429], np.float32)
_P = np.float32(0.3275911)
_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
"""Their sum is ln 2; the first has few bits, so a whole number times it is exact."""
_EXP = np.array([1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1, 1], np.float32)
_MAGIC = np.float32(1.5 * 2**23)
"""Added to a number below 2^22, it leaves in the last bits that number, rounded."""
_LEAST = np.float32(-87)
"""The least power of e that is a normal number, nearly."""
_ONE, _HALF = np.float32(1), np.float32(0.5)


@intrinsic
def _divide(_: Any, value: Any, divisor: Any) -> Any:
    """Divides without Python's check of the divisor, with which a loop is not vectorised."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fdiv(*arguments)

    return types.float32(types.float32, types.float32), generate


@intrinsic
def _power_of_two(_: Any, magic: Any) -> Any:
    """Computes 2^n from n + `_MAGIC`, |n| <= 126."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = context.get_value_type(types.int32)
        bits = builder.shl(builder.add(builder.bitcast(arguments[0], word), word(127)), word(23))
        return builder.bitcast(bits, context.get_value_type(types.float32))

    return types.float32(types.float32), generate


@intrinsic
def _exceeds(_: Any, value: Any, other: Any) -> Any:
    """Tells whether a float32 is larger than the other or is NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, other = arguments
        is_nan = builder.fcmp_unordered("uno", value, value)
        return builder.or_(builder.fcmp_ordered(">", value, other), is_nan)

    return types.boolean(types.float32, types.float32), generate


@intrinsic
def _choose(_: Any, condition: Any, value: Any, other: Any) -> Any:
    """Selects `value` where the condition holds, else `other`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(*arguments)

    return value(types.boolean, value, value), generate


@inlined
def _normal(y):
    """The standard normal distribution at y: its cumulative function, to 1e-7, and its density times sqrt(2 pi).

    Source: Abramowitz and Stegun, "Handbook of mathematical functions", 1964, 7.1.26, and Taylor's series for e^x.
    """
    power = -_HALF * y * y
    power = _choose(power < _LEAST, _LEAST, power)
    magic = power * _LOG2_E + _MAGIC
    whole = magic - _MAGIC
    rest = (power - whole * _LN2_HIGH) - whole * _LN2_LOW
    bell = _EXP[0]
    bell = bell * rest + _EXP[1]
    bell = bell * rest + _EXP[2]
    bell = bell * rest + _EXP[3]
    bell = bell * rest + _EXP[4]
    bell = bell * rest + _EXP[5]
    bell = bell * rest + _EXP[6]
    bell *= _power_of_two(magic)

    t = _divide(_ONE, _ONE + _P * abs(y * _HALF_SQRT2))
    tail = _A[4]
    tail = tail * t + _A[3]
    tail = tail * t + _A[2]
    tail = tail * t + _A[1]
    tail = tail * t + _A[0]
    tail = _HALF * tail * t * bell
    return _choose(y < 0, tail, _ONE - tail), bell


@inlined
def _larger(value, place, best, later, its_place):
    """The larger of two values, its place, and it as float32; the first one if they are equal."""
    number: Any = _widen(later)
    wins = _exceeds(number, best)
    return _choose(wins, later, value), _choose(wins, its_place, place), _choose(wins, number, best)


@inlined
def _pool(x, values, places, channels):
    """2x2 max-pool of one image [h, w c] to [h // 2, w // 2 c], and where in its square each maximum stood first."""
    for i in range(values.shape[0]):
        for first in range(0, values.shape[1], channels):
            here = slice(2 * first, 2 * first + channels)
            right = slice(2 * first + channels, 2 * first + 2 * channels)
            a, b, c, d = x[2 * i, here], x[2 * i, right], x[2 * i + 1, here], x[2 * i + 1, right]
            maxima, places_of = values[i, first : first + channels], places[i, first : first + channels]
            for k in range(channels):
                value, place, best = a[k], np.uint8(0), _widen(a[k])
                value, place, best = _larger(value, place, best, b[k], np.uint8(1))
                value, place, best = _larger(value, place, best, c[k], np.uint8(2))
                value, place, best = _larger(value, place, best, d[k], np.uint8(3))
                maxima[k] = value
                places_of[k] = place


@compiled
def pool_and_sum(x, origin, values, places, sums, first, last):
    """Writes the maxima of `x` and their places where `places` is not empty (else `values` are the arguments), and into
    `sums` [chunks, 2, channels], for the chunks first to last - 1, the sums of the values and of their squares, both
    with `origin` subtracted, which is near the mean: else a small variance would drown in a large one."""
    channels = sums.shape[2]
    origins = _repeated(origin, values.shape[2])
    of_chunk, squares = np.empty(values.shape[2], np.float32), np.empty(values.shape[2], np.float32)
    for chunk in range(first, last):
        of_chunk[:] = 0
        squares[:] = 0
        for image in range(chunk * IMAGES_PER_CHUNK, min((chunk + 1) * IMAGES_PER_CHUNK, len(values))):
            if len(places):
                _pool(x[image], values[image], places[image], channels)
            for i in range(values.shape[1]):
                row = values[image, i]
                for j in range(len(row)):
                    difference = _widen(row[j]) - origins[j]
                    of_chunk[j] += difference
                    squares[j] += difference * difference
        _add_pixels(of_chunk, sums[chunk, 0])
        _add_pixels(squares, sums[chunk, 1])


@compiled
def apply_gelu(values, scale, offset, out, first, last):
    """Writes GELU(scale values + offset) for the images of the chunks first to last - 1."""
    scales, offsets = _repeated(scale, values.shape[2]), _repeated(offset, values.shape[2])
    for image in range(first * IMAGES_PER_CHUNK, min(last * IMAGES_PER_CHUNK, len(values))):
        for i in range(values.shape[1]):
            row, target = values[image, i], out[image, i]
            for j in range(len(row)):
                y = _widen(row[j]) * scales[j] + offsets[j]
                below, _ = _normal(y)
                target[j] = _narrow(y * below, row[j])


@compiled
def differentiate_gelu(gradient, values, scale, offset, mean, of_y, sums, first, last):
    """Writes the gradient of y = scale values + offset, and into `sums` [chunks, 2, channels] the sums over the pixels
    of it, and of it times (values - mean)."""
    width = values.shape[2]
    scales, offsets, means = _repeated(scale, width), _repeated(offset, width), _repeated(mean, width)
    of_chunk, products = np.empty(width, np.float32), np.empty(width, np.float32)
    for chunk in range(first, last):
        of_chunk[:] = 0
        products[:] = 0
        for image in range(chunk * IMAGES_PER_CHUNK, min((chunk + 1) * IMAGES_PER_CHUNK, len(values))):
            for i in range(values.shape[1]):
                row, given, target = values[image, i], gradient[image, i], of_y[image, i]
                for j in range(width):
                    value = _widen(row[j])
                    y = value * scales[j] + offsets[j]
                    below, bell = _normal(y)
                    slope = _widen(given[j]) * (below + y * bell * _DENSITY_AT_0)
                    target[j] = _narrow(slope, row[j])
                    of_chunk[j] += slope
                    products[j] += slope * (value - means[j])
        _add_pixels(of_chunk, sums[chunk, 0])
        _add_pixels(products, sums[chunk, 1])


@compiled
def differentiate_norm(of_y, values, scale, slope, offset, mean, places, of_x, first, last):
    """Writes into `of_x` the gradient of what is normalised, scale of_y - slope (values - mean) - offset.

    Where `places` is not empty it goes to the place of each maximum, and zero elsewhere.
    """
    channels = len(scale)
    width = values.shape[2]
    scales, slopes = _repeated(scale, width), _repeated(slope, width)
    offsets, means = _repeated(offset, width), _repeated(mean, width)
    of_row = np.empty(width, values.dtype)
    for image in range(first * IMAGES_PER_CHUNK, min(last * IMAGES_PER_CHUNK, len(values))):
        for i in range(values.shape[1]):
            row, given = values[image, i], of_y[image, i]
            target = of_row if len(places) else of_x[image, i]
            for j in range(width):
                value = scales[j] * _widen(given[j]) - slopes[j] * (_widen(row[j]) - means[j]) - offsets[j]
                target[j] = _narrow(value, row[j])
            if len(places):
                _spread(of_row, places[image, i], of_x[image, 2 * i], np.uint8(0), np.uint8(1), channels)
                _spread(of_row, places[image, i], of_x[image, 2 * i + 1], np.uint8(2), np.uint8(3), channels)
        if len(places):
            of_x[image, 2 * values.shape[1] :] = 0


@inlined
def _spread(of_row, places, target, left, right, channels):
    """The inverse of `_pool` for one of two rows [w c], whose pixels are the places `left` and `right`: each gradient
    [w // 2 c] at its place, and zero elsewhere."""
    for first in range(0, len(of_row), channels):
        given, of_place = of_row[first : first + channels], places[first : first + channels]
        one, other = target[2 * first : 2 * first + channels], target[2 * first + channels : 2 * first + 2 * channels]
        for k in range(channels):
            one[k] = _unless(of_place[k] != left, given[k])
        for k in range(channels):
            other[k] = _unless(of_place[k] != right, given[k])
    target[2 * len(of_row) :] = 0
