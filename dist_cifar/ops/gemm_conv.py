"""Convolutions of few pixels and many channels as products of matrices, on CPUs.

Contract: after `replace_small_convs`, the convolutions of a module that have a small output compute the same function,
forward and backward, by `torch.matmul`; all others, and the module's state, are as they were. Sums are rounded in
another order, the same for every call with one shape and number of threads.

A library's kernels are made for large images: oneDNN's spend most of their time on the 4x4 pixels of a ResNet-18's last
stage on everything but arithmetic. Source: Chellapilla et al., "High performance convolutional neural networks for
document processing", 2006.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

_MOST_PIXELS = 16
"""The most pixels of an output: with more, the copies take longer than what they save."""
_LEAST_WEIGHTS = 2**16
"""The fewest channels in times channels out: with fewer there is little to save."""


def replace_small_convs(module: nn.Module) -> None:
    """Changes how `module`, which is on a CPU, computes its training passes from now on."""
    for layer in module.modules():
        # Not of a subclass, which may compute something else.
        if type(layer) is nn.Conv2d and _may_be_product(layer):
            layer.forward = partial(_forward, layer)  # type: ignore[method-assign]  # of this layer alone


def _may_be_product(layer: nn.Conv2d) -> bool:
    return (
        layer.in_channels * layer.out_channels >= _LEAST_WEIGHTS
        and (layer.groups, layer.dilation, layer.padding_mode) == (1, (1, 1), "zeros")
        and layer.kernel_size[0] == layer.kernel_size[1]
        and layer.stride[0] == layer.stride[1]
        and isinstance(layer.padding, tuple)
        and layer.padding[0] == layer.padding[1] < layer.kernel_size[0]
        and layer.bias is None
    )


def _forward(layer: nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
    """Computes the layer's output from [n, channels, height, width], in channels-last where it is a product."""
    kernel, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
    height, width = _output_sides(images, kernel, stride, padding)
    if height * width > _MOST_PIXELS:
        return nn.Conv2d.forward(layer, images)
    weight = layer.weight
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        images, weight = images.to(dtype), weight.to(dtype)
    return _Product.apply(images, weight, stride, padding)


class _Product(torch.autograd.Function):
    """Computes from images [n, c, h, w] and weight [d, c, k, k] the output [n, d, h', w'] of the same type."""

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, weight: torch.Tensor, stride: int, padding: int) -> torch.Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        matrix = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1).t()
        return _correlate(images, matrix, weight.shape[2], stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        images, weight = ctx.saved_tensors
        stride, padding = ctx.stride, ctx.padding
        outputs, inputs, kernel, _ = weight.shape
        rows = gradient.permute(0, 2, 3, 1).reshape(-1, outputs)
        of_weight = rows.t() @ _columns(images, kernel, stride, padding)
        of_weight = of_weight.view(outputs, kernel, kernel, inputs).permute(0, 3, 1, 2)
        if stride == 1:
            turned = reversed([weight[:, :, i, j] for i in range(kernel) for j in range(kernel)])
            of_images = _correlate(gradient, torch.cat(list(turned)), kernel, 1, kernel - 1 - padding)
        else:
            of_images = conv2d_input(images.shape, weight, gradient, stride, padding)
        return of_images, of_weight, None, None


def _correlate(images: torch.Tensor, matrix: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """Computes [n, d, h', w'] in channels-last from [n, c, h, w] and `matrix` [kernel kernel c, d]."""
    height, width = _output_sides(images, kernel, stride, padding)
    rows = _columns(images, kernel, stride, padding) @ matrix
    return rows.view(len(images), height, width, -1).permute(0, 3, 1, 2)


def _output_sides(images: torch.Tensor, kernel: int, stride: int, padding: int) -> tuple[int, int]:
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side in images.shape[2:])
    return height, width


def _columns(images: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """Collects the pixels that each output pixel sees: [n, c, h, w] to [n h' w', kernel kernel c]."""
    padded = nn.functional.pad(images.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    windows = padded.unfold(1, kernel, stride).unfold(2, kernel, stride)  # n, h', w', c, kernel, kernel
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, kernel * kernel * images.shape[1])
