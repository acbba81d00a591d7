"""The compiled pass over each image of a batch, which `cpu` calls; it checks no bounds itself.

Contract: every operation of PIL on uint8 is a real formula that is clipped and truncated. Its terms are whole numbers
below 2**24, which float32 holds exactly, so the pass keeps each channel as a plane of whole float32 numbers; where
PIL's formula itself rounds (the blend), the same float32 operations stand in the same order. An area average is a sum
of whole numbers below 2**18 over a power of two, so float32 holds it and every partial sum exactly too. The compiler
must not contract a product and a sum into one rounding: numba does not unless `fastmath` is set.
"""

from __future__ import annotations

import math

import numpy as np
from numba.core import types
from numba.extending import intrinsic

from dist_cifar.augment.image import IMAGE_SIZE
from dist_cifar.ops.numba_jit import compiled, inlined

# numba freezes these into its disk cache and looks at no other file for changes: none may be imported.
_SIDE = 32
assert _SIDE == IMAGE_SIZE
_PIXELS = _SIDE * _SIDE
_RED, _GREEN, _BLUE = 0, _PIXELS, 2 * _PIXELS
_BRIGHTNESS, _CONTRAST = 0, 1
_ZERO, _HALF, _ONE, _FOUR, _WHITE = (np.float32(value) for value in (0, 0.5, 1, 4, 255))
_RED_SHARE, _GREEN_SHARE, _BLUE_SHARE = (np.float32(weight / 65536) for weight in (19595, 38470, 7471))
_THIRTEENTH = np.float32(1 / 13)
_UNIT_HIGH = np.float32(1 / 255)
_UNIT_LOW = np.float32(1 / 255 - float(_UNIT_HIGH))
_I = np.int32  # numba widens the sum of two int32 to int64, which halves the lanes; hence the many casts


@intrinsic
def _fma(typing_context, factor, other, term):
    """Computes factor * other + term with one rounding, which LLVM writes as one instruction where the CPU has it."""

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@inlined
def _times_inverse(number, high, low):
    """Computes number / divisor from high + low, the inverse of the divisor; few numbers if any have a wrong last bit.

    Brisebarre, Muller and Raina, "Accelerating correctly rounded floating-point division when the divisor is known in
    advance", 2004.
    """
    return _fma(number, high, number * low)


@inlined
def _divide(number, divisor, high, low):
    """Computes number / divisor to the last bit: a quotient next to the right one, and a step that rounds it correctly.

    Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990.
    """
    quotient = _times_inverse(number, high, low)
    return _fma(_fma(-quotient, divisor, number), high, quotient)


@inlined
def _truncate(number):
    return np.float32(_I(number))


@inlined
def _blend(degenerate, value, alpha):
    """PIL's blend: from `degenerate` (alpha 0) over `value` (alpha 1) and beyond, clipped, then truncated."""
    mixed = degenerate + alpha * (value - degenerate)
    mixed = mixed if mixed > _ZERO else _ZERO
    return _truncate(mixed if mixed < _WHITE else _WHITE)


@inlined
def _luma(red, green, blue):
    """PIL's conversion to grey. Exact: the weights are whole numbers of 2**-16, and the sum has 24 bits."""
    return _I(_fma(red, _RED_SHARE, _fma(green, _GREEN_SHARE, _fma(blue, _BLUE_SHARE, _HALF))))


@inlined
def _unpack(words, packed):
    """The pixels of an image, one a word: three words hold four pixels. The top byte is left as it comes."""
    for k in range(_PIXELS // 4):
        first, second, third = words[3 * k], words[3 * k + 1], words[3 * k + 2]
        packed[4 * k] = first
        packed[4 * k + 1] = (first >> 24) | (second << 8)
        packed[4 * k + 2] = (second >> 16) | (third << 16)
        packed[4 * k + 3] = third >> 8
    packed[_PIXELS] = 0


@inlined
def _crop(packed, down, right, cropped):
    """Moves the image up and left by `down` and `right` pixels; what comes in is the image reflected at its border."""
    last = _I(_SIDE - 1)
    for y in range(_SIDE):
        row = _I(last - abs(_I(last - abs(_I(_I(y) + down)))))
        for x in range(_SIDE):
            column = _I(last - abs(_I(last - abs(_I(_I(x) + right)))))
            cropped[_SIDE * y + x] = packed[_SIDE * row + column]
    for p in range(_PIXELS):
        packed[p] = cropped[p]


@inlined
def _locate(flip, angle, source):
    """For each pixel the number of the pixel it comes from, _PIXELS if that lies outside.

    PIL's nearest neighbour: the inverse rotation about the centre in 16.16 fixed point, advanced from pixel to pixel.
    For 0, 90, 180 and 270 degrees, which PIL does by copying, the coordinates are exact and give the same pixels.
    """
    radians = -(angle % 360.0) * (math.pi / 180.0)
    cos, sin = np.rint(math.cos(radians) * 1e15) / 1e15, np.rint(math.sin(radians) * 1e15) / 1e15
    centre = _SIDE / 2
    left = cos * -centre + sin * -centre + centre
    top = -sin * -centre + cos * -centre + centre
    cos_step, sin_step, back_step = _fixed(cos), _fixed(sin), _fixed(-sin)
    x_start, y_start = _fixed(left + cos * 0.5 + sin * 0.5), _fixed(top + -sin * 0.5 + cos * 0.5)
    mirror = _I(_SIDE - 1 if flip else 0)  # 31 - x is x ^ 31
    for y in range(_SIDE):
        for x in range(_SIDE):
            from_x = _I(_I(x_start + _I(_I(x) * cos_step)) >> _I(16))
            from_y = _I(_I(y_start + _I(_I(x) * back_step)) >> _I(16))
            inside = _I(_I(from_x | from_y) & _I(-_SIDE)) == _I(0)
            source[_SIDE * y + x] = np.uint16(_I(_I(from_y << _I(5)) | _I(from_x ^ mirror)) if inside else _I(_PIXELS))
        x_start, y_start = _I(x_start + sin_step), _I(y_start + cos_step)


@inlined
def _fixed(number):
    return _I(math.floor(number * 65536.0 + 0.5))


@inlined
def _split(packed, planes):
    for p in range(_PIXELS):
        planes[_RED + p] = np.float32(_I(packed[p] & 255))
        planes[_GREEN + p] = np.float32(_I((packed[p] >> 8) & 255))
        planes[_BLUE + p] = np.float32(_I((packed[p] >> 16) & 255))


@inlined
def _brighten(planes, alpha):
    for p in range(3 * _PIXELS):
        brighter = alpha * planes[p]  # a blend with black
        planes[p] = _truncate(brighter if brighter < _WHITE else _WHITE)


@inlined
def _change_contrast(planes, alpha):
    total = _I(0)
    for p in range(_PIXELS):
        total = _I(total + _luma(planes[_RED + p], planes[_GREEN + p], planes[_BLUE + p]))
    mean = np.float32((total + _PIXELS // 2) // _PIXELS)
    for p in range(3 * _PIXELS):
        planes[p] = _blend(mean, planes[p], alpha)


@inlined
def _saturate(planes, alpha):
    for p in range(_PIXELS):
        red, green, blue = planes[_RED + p], planes[_GREEN + p], planes[_BLUE + p]
        grey = np.float32(_luma(red, green, blue))
        planes[_RED + p] = _blend(grey, red, alpha)
        planes[_GREEN + p] = _blend(grey, green, alpha)
        planes[_BLUE + p] = _blend(grey, blue, alpha)


@inlined
def _sharpen(planes, sums, alpha):
    """Blend with the 3x3 mean that weighs the centre five times; the outermost ring stays.

    The mean is rounded half up; thirteenths never lie so near a half that the order of the sum matters.
    """
    for p in range(1, 3 * _PIXELS - 1):
        sums[p] = planes[p - 1] + planes[p] + planes[p + 1]
    for channel in range(3):
        for p in range(channel * _PIXELS + _SIDE, (channel + 1) * _PIXELS - _SIDE):
            value = planes[p]
            total = sums[p - _SIDE] + sums[p] + sums[p + _SIDE] + _FOUR * value
            smooth = _truncate(total * _THIRTEENTH + _HALF)
            on_ring = (p + 1) & (_SIDE - 2) == 0
            planes[p] = _blend(value if on_ring else smooth, value, alpha)


@inlined
def _standardize(planes, scales, row):
    """ToTensor and Normalize into a row of interleaved channels, without divisions, which are slow."""
    red_mean, red_std, red_high, red_low = scales[0]
    green_mean, green_std, green_high, green_low = scales[1]
    blue_mean, blue_std, blue_high, blue_low = scales[2]
    for p in range(_PIXELS):
        red, green, blue = planes[_RED + p], planes[_GREEN + p], planes[_BLUE + p]
        red = _times_inverse(red, _UNIT_HIGH, _UNIT_LOW) - red_mean
        green = _times_inverse(green, _UNIT_HIGH, _UNIT_LOW) - green_mean
        blue = _times_inverse(blue, _UNIT_HIGH, _UNIT_LOW) - blue_mean
        row[3 * p] = _divide(red, red_std, red_high, red_low)
        row[3 * p + 1] = _divide(green, green_std, green_high, green_low)
        row[3 * p + 2] = _divide(blue, blue_std, blue_high, blue_low)


@inlined
def _average(planes, strips, first, weights):
    """Shrinks planes [3, 32, 32] in place to [3, r, r] at their front, down the columns first, then along the rows.

    Pixel j of r is the sum of the pixels from `first[j]` on, times `weights[j]`: see `resolution.area_weights`.
    """
    size, taps = len(first), weights.shape[1]
    for row in range(3 * size):
        channel, y = row // size, row % size
        strip, origin = row * _SIDE, channel * _PIXELS + first[y] * _SIDE
        for x in range(_SIDE):
            strips[strip + x] = weights[y, 0] * planes[origin + x]
        for k in range(1, taps):
            origin += _SIDE
            for x in range(_SIDE):
                strips[strip + x] += weights[y, k] * planes[origin + x]
    for row in range(3 * size):
        for x in range(size):
            origin = row * _SIDE + first[x]
            total = _ZERO
            for k in range(taps):
                total += weights[x, k] * strips[origin + k]
            planes[row * size + x] = total


@inlined
def _standardize_averages(planes, pixels, scales, row):
    """Does what `_standardize` does for planes of `pixels` numbers that need not be whole."""
    for channel in range(3):
        mean, std, high, low = scales[channel]
        for p in range(pixels):
            unit = _divide(planes[channel * pixels + p], _WHITE, _UNIT_HIGH, _UNIT_LOW)
            row[3 * p + channel] = _divide(unit - mean, std, high, low)


@inlined
def _erase(top, left, height, width, side, row):
    first, last = _scaled(left, side), _scaled(left + width, side)
    for y in range(_scaled(top, side), _scaled(top + height, side)):
        row[3 * (side * y + first) : 3 * (side * y + last)] = 0


@inlined
def _scaled(edge, side):
    """A place between the pixels of 32 as the nearest between those of `side`, the upper of two."""
    return (edge * side + _SIDE // 2) // _SIDE


@inlined
def _round(row, out):
    """float32 to the bits of the nearest bfloat16, the even one of two."""
    bits = row.view(np.uint32)
    for k in range(len(out)):
        out[k] = (bits[k] + np.uint32(0x7FFF) + ((bits[k] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@compiled
def augment_batch(
    images, rows, shift, flip, angle, order, factors, sharpness, box, cutout, first, weights, scales, out, rounded
):
    """Augments the images `rows` into `out` [n, r * r * 3], or as bfloat16 into `rounded` unless that is empty.

    `images`: uint32 [N, 768]; `first` [r] and `weights` [r, taps]: see `resolution.area_weights`.
    """
    packed = np.empty(_PIXELS + 1, np.uint32)
    source = np.empty(_PIXELS, np.uint16)
    moved = np.empty(_PIXELS, np.uint32)
    planes = np.empty(3 * _PIXELS, np.float32)
    sums = np.empty(3 * _PIXELS, np.float32)
    side = len(first)
    for i in range(len(rows)):
        _unpack(images[rows[i]], packed)
        if shift[i, 0] != 0 or shift[i, 1] != 0:
            _crop(packed, _I(shift[i, 0]), _I(shift[i, 1]), moved)
        _locate(flip[i], angle[i], source)
        for p in range(_PIXELS):  # apart from `_split`, which has a faster vector form while this has none
            moved[p] = packed[source[p]]
        _split(moved, planes)
        for k in range(3):
            operation = order[i, k]
            alpha = np.float32(factors[i, operation])
            if alpha == _ONE:
                continue
            if operation == _BRIGHTNESS:
                _brighten(planes, alpha)
            elif operation == _CONTRAST:
                _change_contrast(planes, alpha)
            else:
                _saturate(planes, alpha)
        alpha = np.float32(sharpness[i])
        if alpha != _ONE:
            _sharpen(planes, sums, alpha)
        row = sums if len(rounded) else out[i]
        if side == _SIDE:
            _standardize(planes, scales, row)
        else:
            _average(planes, sums, first, weights)
            _standardize_averages(planes, side * side, scales, row)
        _erase(box[i, 0], box[i, 1], box[i, 2], box[i, 3], side, row)
        _erase(cutout[i, 0], cutout[i, 1], cutout[i, 2], cutout[i, 3], side, row)
        if len(rounded):
            _round(row, rounded[i])


@compiled
def normalize_batch(images, rows, scales, out, rounded):
    """Normalises the images `rows`, otherwise as `augment_batch` does."""
    packed = np.empty(_PIXELS + 1, np.uint32)
    planes = np.empty(3 * _PIXELS, np.float32)
    scratch = np.empty(3 * _PIXELS, np.float32)
    for i in range(len(rows)):
        _unpack(images[rows[i]], packed)
        _split(packed, planes)
        row = scratch if len(rounded) else out[i]
        _standardize(planes, scales, row)
        if len(rounded):
            _round(row, rounded[i])
