"""BatchNorm, the shortcut and ReLU as one operation that passes over memory twice each way, on CPUs.

Contract: after `fuse_batchnorm_relu`, a module computes the same function in training, forward and backward: where it
is recognised to apply BatchNorm, then or not a shortcut, then ReLU, these are one kernel for float32 and bfloat16 in
channels-last where torch has one thread. All else, and the module's state, are as they were. Statistics are summed in
float32 over at most `_BLOCK` rows of pixels and in float64 above, and nothing is rounded to bfloat16 between the input
and the output. The result is a function of the arguments alone, on every processor.

The module knows nothing of this. It is recognised by what its classes state of their own `forward`:

- `residual_layers`: pairs of names of a convolution and a norm; the layers are applied in turn, ReLU follows each, and
  the shortcut (`downsample` of the input, or the input where that is None) is added before the last ReLU;
- `norm_relu_pairs`: pairs of names of a norm and of the ReLU to which alone its output goes.

torch computes each of the steps by itself, and in bfloat16 its kernels are far slower than the memory: in a ResNet-20
they take as long as the convolutions. Source of the formulas: Ioffe and Szegedy, "Batch normalization", 2015.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba.core import types
from numba.extending import intrinsic
from torch import nn
from torch.autograd.function import once_differentiable

from dist_cifar.ops.numba_jit import compiled, inlined

_BLOCK = 64
"""The number of rows that are summed in float32."""


def fuse_batchnorm_relu(module: nn.Module) -> None:
    """Changes how `module`, which is on a CPU, computes its training passes from now on."""
    for owner in module.modules():
        # Of the class itself: a subclass may have another `forward`.
        stated = vars(type(owner))
        layers = [(getattr(owner, conv), getattr(owner, norm)) for conv, norm in stated.get("residual_layers", ())]
        if layers and all(_may_be_fused(norm) for _, norm in layers):
            for _, norm in layers:
                fuse_layer(norm)
            owner.forward = partial(_residual_forward, owner, layers)
        for norm_name, relu_name in stated.get("norm_relu_pairs", ()):
            norm, relu = getattr(owner, norm_name), getattr(owner, relu_name)
            if _may_be_fused(norm):
                fuse_layer(norm)
                relu.forward = _identity


def _may_be_fused(layer: nn.Module) -> bool:
    return type(layer) is nn.BatchNorm2d and layer.affine and layer.track_running_stats and bool(layer.momentum)


def fuse_layer(layer: nn.BatchNorm2d) -> None:
    """Makes `layer` add a shortcut, where it is called with one, and apply ReLU."""
    layer.forward = partial(_forward, layer)  # type: ignore[method-assign]  # of this layer alone


def is_single_threaded() -> bool:
    """Whether torch has one thread; with several threads torch's own kernels are fast enough."""
    return torch.get_num_threads() == 1


def warm_up(dtype: torch.dtype) -> None:
    """Makes one small pass each way, which compiles the kernels or loads them from numba's cache."""
    images = torch.zeros(2, 8, 1, 1, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    layer = nn.BatchNorm2d(8)
    _fused(layer, images, None).sum().backward()


def _residual_forward(block: Any, layers: list[tuple[nn.Conv2d, nn.BatchNorm2d]], images: torch.Tensor) -> torch.Tensor:
    """The forward pass of a residual block whose norms are fused with what follows them."""
    hidden = images
    for convolution, norm in layers[:-1]:
        hidden = norm(convolution(hidden))
    shortcut = images if block.downsample is None else block.downsample(images)
    convolution, norm = layers[-1]
    return norm(convolution(hidden), shortcut)


def _identity(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def _forward(layer: nn.BatchNorm2d, images: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
    fits = (
        layer.training
        and is_single_threaded()
        and images.dtype in (torch.float32, torch.bfloat16)
        and layer.weight.dtype == torch.float32
        and images.is_contiguous(memory_format=torch.channels_last)
        and images.numel() > images.shape[1]  # else torch says that there is nothing to normalise
        and (shortcut is None or (shortcut.dtype, shortcut.shape) == (images.dtype, images.shape))
    )
    return _fused(layer, images, shortcut) if fits else plain(layer, images, shortcut)


def plain(layer: nn.BatchNorm2d, images: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
    """Computes the same by torch's operations, one after the other."""
    hidden = nn.BatchNorm2d.forward(layer, images)
    if shortcut is not None:
        hidden += shortcut
    return nn.functional.relu(hidden, inplace=True)


def _fused(layer: nn.BatchNorm2d, images: torch.Tensor, shortcut: torch.Tensor | None) -> torch.Tensor:
    mean, variance, count = layer.running_mean, layer.running_var, layer.num_batches_tracked
    assert mean is not None and variance is not None and count is not None and layer.momentum is not None
    count.add_(1)
    return _Fused.apply(images, shortcut, layer.weight, layer.bias, mean, variance, layer.momentum, layer.eps)


class _Fused(torch.autograd.Function):
    """Maps images [n, c, h, w], a shortcut like them or None, and float32 [c] to a tensor like the images."""

    @staticmethod
    def forward(
        ctx: Any,
        images: torch.Tensor,
        shortcut: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor,
        running_mean: torch.Tensor,
        running_variance: torch.Tensor,
        momentum: float,
        epsilon: float,
    ) -> torch.Tensor:
        out = torch.empty_like(images, memory_format=torch.channels_last)
        statistics = weight.new_empty(3, len(weight))
        ctx.has_shortcut = shortcut is not None
        added = shortcut.contiguous(memory_format=torch.channels_last) if shortcut is not None else images[:0]
        running = running_mean.numpy(), running_variance.numpy()
        affine = torch.stack((weight, bias)).numpy()  # a copy: FSDP frees its memory, which it cannot once numpy has it
        _normalize(_rows(images), _rows(added), affine, *running, momentum, epsilon, statistics.numpy(), _rows(out))
        ctx.save_for_backward(images, out, statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, out, statistics = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_images, of_affine = torch.empty_like(images), torch.empty_like(statistics[:2])
        of_shortcut = torch.empty_like(images if ctx.has_shortcut else images[:0])
        rows = (_rows(tensor) for tensor in (gradient, out, images, of_shortcut, of_images))
        _differentiate(*rows, statistics.numpy(), of_affine.numpy())
        return of_images, of_shortcut if ctx.has_shortcut else None, *of_affine, None, None, None, None


def _rows(images: torch.Tensor) -> npt.NDArray[Any]:
    """Views [n, c, h, w] in channels-last as rows of pixels [n h, w c]: float32, or uint16 for the bits of bfloat16."""
    count, channels, height, width = images.shape
    rows = images.detach().permute(0, 2, 3, 1).view(count * height, width * channels)
    return (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()


# --- compiled ----------------------------------------------------------------------------------------------------


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
def _normalize(x, shortcut, affine, running_mean, running_variance, momentum, epsilon, statistics, out):
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
def _differentiate(gradient, out, x, of_shortcut, of_x, statistics, of_affine):
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
