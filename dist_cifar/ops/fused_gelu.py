"""Max-pool, BatchNorm and GELU as one operation, and a convolution's bias and GELU as another, on CPUs.

Contract: after `fuse_gelu`, a module computes the same function in training, forward and backward: where it is
recognised to apply a norm without a scale, or a bias, and then GELU, these are one kernel for float32 and bfloat16 in
channels-last. All else, and the module's state, are as they were. Between the input and the output nothing is rounded
to bfloat16; in the backward pass the gradient of what GELU is given is, once. The result is a function of the arguments
alone, on every processor and for every number of threads.

The module knows nothing of this. It is recognised by what its classes state of their own `forward`:

- `pool_norm_gelu`: triples of names of a 2x2 max-pool or None, of a norm and of the GELU, which follow each other;
- `conv_gelu`: pairs of names of a convolution with a bias and of the GELU to which alone its output goes.

torch computes each of the steps by itself, and remembers each maximum by eight bytes. Source of the formulas: Hendrycks
and Gimpel, "Gaussian error linear units", 2016, and Ioffe and Szegedy, "Batch normalization", 2015.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from dist_cifar.ops.fused_batchnorm import identity, rows_of_images
from dist_cifar.ops.norm_kernels import (
    IMAGES_PER_CHUNK,
    apply_gelu,
    differentiate_gelu,
    differentiate_norm,
    pool_and_sum,
)

Array = npt.NDArray[Any]


def fuse_gelu(module: nn.Module) -> None:
    """Changes how `module`, which is on a CPU, computes its training passes from now on."""
    for owner in module.modules():
        # Of the class itself: a subclass may have another `forward`. What a network is too shallow for is not there.
        stated = vars(type(owner))
        for names in stated.get("pool_norm_gelu", ()):
            pool, norm, gelu = (getattr(owner, name, None) if name else None for name in names)
            if norm is not None and gelu is not None and _may_be_fused(pool, norm, gelu):
                layers = [layer for layer in (pool, norm, gelu) if layer is not None]
                _follow_one_another(layers, partial(_norm_gelu, layers, pool is not None, norm))
        for names in stated.get("conv_gelu", ()):
            conv, gelu = (getattr(owner, name) for name in names)
            if type(conv) is nn.Conv2d and conv.bias is not None and _is_exact_gelu(gelu):
                _follow_one_another([conv, gelu], partial(_conv_gelu, conv, gelu))


def concerns(module: nn.Module) -> bool:
    """Whether `fuse_gelu` finds something in `module` that states its form."""
    return any(vars(type(owner)).keys() & {"pool_norm_gelu", "conv_gelu"} for owner in module.modules())


def warm_up(dtype: torch.dtype) -> None:
    """Makes one small pass each way, which compiles the kernels or loads them from numba's cache."""
    images = torch.zeros(2, 8, 2, 2, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    norm = nn.BatchNorm2d(8)
    for pooled in (True, False):
        _fused_norm(norm, images, pooled).sum().backward()
    _BiasGELU.apply(images, norm.bias).sum().backward()


def _may_be_fused(pool: nn.Module | None, norm: nn.Module, gelu: nn.Module) -> bool:
    return (
        (pool is None or (type(pool) is nn.MaxPool2d and _is_2x2(pool)))
        and isinstance(norm, nn.BatchNorm2d)
        and type(norm).forward is nn.BatchNorm2d.forward
        and norm.weight is None
        and norm.bias is not None
        and norm.track_running_stats
        and bool(norm.momentum)
        and _is_exact_gelu(gelu)
    )


def _is_2x2(pool: nn.MaxPool2d) -> bool:
    settings = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, pool.return_indices)
    return settings == (2, 2, 0, 1, False, False)


def _is_exact_gelu(layer: nn.Module) -> bool:
    return type(layer) is nn.GELU and layer.approximate == "none"


def _follow_one_another(layers: list[nn.Module], forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Makes the first of `layers` compute what all of them do, and the others hand it on."""
    for layer in layers:
        layer.forward = identity  # of this layer alone
    layers[0].forward = forward


def _fits(images: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return (
        bias is not None
        and images.dtype in (torch.float32, torch.bfloat16)
        and bias.dtype == torch.float32
        and images.is_contiguous(memory_format=torch.channels_last)
    )


def _norm_gelu(layers: list[nn.Module], is_pooled: bool, norm: nn.BatchNorm2d, images: torch.Tensor) -> torch.Tensor:
    height, width = (side // 2 if is_pooled else side for side in images.shape[2:])
    # Else torch says that there is nothing to normalise, or to pool.
    if norm.training and _fits(images, norm.bias) and len(images) * height * width > 1:
        return _fused_norm(norm, images, is_pooled)
    for layer in layers:
        images = type(layer).forward(layer, images)
    return images


def _fused_norm(norm: nn.BatchNorm2d, images: torch.Tensor, is_pooled: bool) -> torch.Tensor:
    mean, variance, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
    assert mean is not None and variance is not None and norm.momentum is not None
    if count is not None:
        count.add_(1)
    return _NormGELU.apply(images, norm.bias, mean, variance, norm.momentum, norm.eps, is_pooled)


def _conv_gelu(conv: nn.Conv2d, gelu: nn.GELU, images: torch.Tensor) -> torch.Tensor:
    if conv.training and conv.padding_mode == "zeros" and _fits(images, conv.bias):
        place: Any = conv.stride, conv.padding, conv.dilation, conv.groups
        hidden = nn.functional.conv2d(images, conv.weight, None, *place)
        return _BiasGELU.apply(hidden.contiguous(memory_format=torch.channels_last), conv.bias)
    return nn.GELU.forward(gelu, nn.Conv2d.forward(conv, images))


class _NormGELU(torch.autograd.Function):
    """Maps images [n, c, h, w] and the norm's bias, float32 [c], to a tensor like the images, of half the sides where
    it pools."""

    @staticmethod
    def forward(
        ctx: Any,
        images: torch.Tensor,
        bias: torch.Tensor,
        running_mean: torch.Tensor,
        running_variance: torch.Tensor,
        momentum: float,
        epsilon: float,
        is_pooled: bool,
    ) -> torch.Tensor:
        count, channels, height, width = images.shape
        size = (count, channels, height // 2, width // 2) if is_pooled else images.shape
        values = _empty(images, size) if is_pooled else images
        places = _empty(images, size if is_pooled else (0, channels, 1, 1), torch.uint8)
        sums, side = _sums(count, channels), 2 if is_pooled else 1
        origin = images[0, :, :side, :side].float().amax((1, 2)).numpy()  # the first pixel that is normalised
        _in_threads(
            pool_and_sum,
            len(sums),
            rows_of_images(images),
            origin,
            rows_of_images(values),
            rows_of_images(places),
            sums,
        )
        pixels = values.numel() // channels
        with np.errstate(invalid="ignore"):  # what is not finite is seen by the strategy
            distance, square = sums.sum(0) / pixels
            mean, variance = origin + distance, np.maximum(square - distance**2, 0)
            inverse = 1 / np.sqrt(variance + epsilon)
        for running, now in ((running_mean, mean), (running_variance, variance * pixels / (pixels - 1))):
            array = running.numpy()
            array += momentum * (now - array)

        offset = bias.double().numpy() - mean * inverse
        ctx.constants = tuple(values.astype(np.float32) for values in (inverse, offset, mean))
        out = _empty(images, size)
        scale, offset, _ = ctx.constants
        _in_threads(apply_gelu, len(sums), rows_of_images(values), scale, offset, rows_of_images(out))
        ctx.size = images.shape
        ctx.save_for_backward(values, places)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, places = ctx.saved_tensors
        scale, offset, mean = ctx.constants
        sums, of_y = _sums(len(values), len(scale)), torch.empty_like(values)
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        _in_threads(
            differentiate_gelu,
            len(sums),
            rows_of_images(gradient),
            rows_of_images(values),
            scale,
            offset,
            mean,
            rows_of_images(of_y),
            sums,
        )
        of_bias, products = sums.sum(0)
        share = scale.astype(np.float64) * len(scale) / values.numel()
        slope, shift = (share * scale**2 * products).astype(np.float32), (share * of_bias).astype(np.float32)
        of_images = _empty(values, ctx.size) if len(places) else of_y
        arrays = (
            rows_of_images(of_y),
            rows_of_images(values),
            scale,
            slope,
            shift,
            mean,
            rows_of_images(places),
            rows_of_images(of_images),
        )
        _in_threads(differentiate_norm, len(sums), *arrays)
        return of_images, torch.from_numpy(of_bias).float(), None, None, None, None, None


class _BiasGELU(torch.autograd.Function):
    """Maps images [n, c, h, w] and a bias, float32 [c], to GELU(images + bias)."""

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(images)
        ctx.bias = bias.detach().clone().numpy()  # a copy: FSDP frees its memory, which it cannot once numpy has it
        ones = np.ones_like(ctx.bias)
        _in_threads(apply_gelu, _chunks(len(images)), rows_of_images(images), ones, ctx.bias, rows_of_images(out))
        ctx.save_for_backward(images)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        (images,) = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_images, sums = torch.empty_like(images), _sums(*images.shape[:2])
        ones, zeros = np.ones_like(ctx.bias), np.zeros_like(ctx.bias)
        arrays = (
            rows_of_images(gradient),
            rows_of_images(images),
            ones,
            ctx.bias,
            zeros,
            rows_of_images(of_images),
            sums,
        )
        _in_threads(differentiate_gelu, len(sums), *arrays)
        return of_images if ctx.needs_input_grad[0] else None, torch.from_numpy(sums[:, 0].sum(0)).float()


def _empty(like: torch.Tensor, size: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.empty(size, dtype=dtype or like.dtype, memory_format=torch.channels_last)


def _chunks(count: int) -> int:
    return -(-count // IMAGES_PER_CHUNK)


def _sums(count: int, channels: int) -> Array:
    return np.zeros((_chunks(count), 2, channels))


def _in_threads(kernel: Any, chunks: int, *arrays: Any) -> None:
    """Calls `kernel` with the arrays by as many threads as torch has: each for a range of the chunks."""
    threads = min(torch.get_num_threads(), chunks)
    bounds = [chunks * thread // threads for thread in range(threads + 1)]
    others = [_helpers(threads - 1).submit(kernel, *arrays, *chunk) for chunk in pairwise(bounds[1:])]
    kernel(*arrays, 0, bounds[1])
    for other in others:
        other.result()


@cache
def _helpers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="gelu")
