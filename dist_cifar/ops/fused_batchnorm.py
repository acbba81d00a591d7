"""BatchNorm, the shortcut and ReLU as one operation that passes over memory twice each way, on CPUs.

Contract: after `fuse_batchnorm_relu`, a module computes the same function in training, forward and backward: where it
is recognised to apply BatchNorm, then or not a shortcut, then ReLU, these are one kernel for float32 and bfloat16 in
channels-last where torch has one thread. All else, and the module's state, are as they were. Statistics are summed in
float32 over few rows of pixels and in float64 above, and nothing is rounded to bfloat16 between the input
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

import numpy.typing as npt
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from dist_cifar.ops.norm_kernels import differentiate, normalize


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
                relu.forward = identity


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


def identity(hidden: torch.Tensor) -> torch.Tensor:
    """What a layer computes whose work another one does."""
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
    assert mean is not None and variance is not None and layer.momentum is not None
    if count is not None:
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
        normalize(_rows(images), _rows(added), affine, *running, momentum, epsilon, statistics.numpy(), _rows(out))
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
        differentiate(*rows, statistics.numpy(), of_affine.numpy())
        return of_images, of_shortcut if ctx.has_shortcut else None, *of_affine, None, None, None, None


def _rows(images: torch.Tensor) -> npt.NDArray[Any]:
    """As `rows_of_images`, but [n h, w c]."""
    rows = rows_of_images(images)
    return rows.reshape(-1, rows.shape[2])


def rows_of_images(images: torch.Tensor) -> npt.NDArray[Any]:
    """Views [n, c, h, w] in channels-last as [n, h, w c]: its own numbers, or uint16 for the bits of bfloat16."""
    count, channels, height, width = images.shape
    rows = images.detach().permute(0, 2, 3, 1).view(count, height, width * channels)
    return (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()
