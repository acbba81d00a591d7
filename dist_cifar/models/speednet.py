"""A small network that trains fast: a whitening layer, three groups of convolutions, and a head without bias.

Contract: the input is float32 [n, 3, r, r] with r >= 16, the output logits [n, num_classes]. Weights are drawn by name
(`dist_cifar.models.by_name`), but for the filters of the first layer: these are computed from training images, and are
not trained.

    whiten    2x2 convolution without padding to 24 channels, with a bias; GELU
    groups    three times: 3x3 convolution; 2x2 max-pool; norm; GELU; then `depth` - 1 times 3x3 convolution; norm; GELU
    head      maximum over all pixels; linear layer; divided by 9

With `depth` 3 the first activation of a group is added before its last GELU. 3x3 convolutions have no bias, and keep
the size. A norm is BatchNorm whose scale is 1 and whose bias is trained.

Source: Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024 (airbench94 has `depth` 2, airbench96 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from dist_cifar.config import ModelConfig
from dist_cifar.errors import ConfigError
from dist_cifar.models.by_name import generator_for, new_key
from dist_cifar.models.data_init import TrainingImages

WHITENING_IMAGES = 5000
"""Training images from which the filters of the first layer are computed."""
DEFAULT_DEPTH = 2
"""The `depth` of a network whose config leaves it open."""
_KERNEL = 2
"""Height and width of the patches that are whitened."""
_PATCH = 3 * _KERNEL**2
"""Numbers in a patch."""
_NORM_EPS = 1e-12
_LOGIT_DIVISOR = 9.0
_CHUNK = 250
"""Images whose patches are in memory at the same time."""


class UnscaledBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with a scale of 1, which is not a parameter, and a trained bias."""

    def __init__(self, channels: int, *, momentum: float) -> None:
        """`momentum` is torch's: the share of the new statistics in the running ones."""
        super().__init__(channels, eps=_NORM_EPS, momentum=momentum)
        self.register_parameter("weight", None)


class Group(nn.Module):
    """Convolutions, of which the first one is followed by a 2x2 max-pool; see the module."""

    pool_norm_gelu = (("pool", "norm1", "gelu1"), (None, "norm2", "gelu2"))
    """What follows each other, for `dist_cifar.ops.fused_gelu`."""

    def __init__(self, inputs: int, width: int, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.pool = nn.MaxPool2d(2)
        momentum = 0.1 if depth >= 3 else 0.4
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.norm1 = UnscaledBatchNorm2d(width, momentum=momentum)
        self.gelu1 = nn.GELU()
        for number in range(2, depth + 1):
            self.add_module(f"conv{number}", nn.Conv2d(width, width, 3, padding=1, bias=False))
            self.add_module(f"norm{number}", UnscaledBatchNorm2d(width, momentum=momentum))
            self.add_module(f"gelu{number}", nn.GELU())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float [n, inputs, h, w] to float [n, width, h // 2, w // 2]."""
        hidden = first = self.gelu1(self.norm1(self.pool(self.conv1(images))))
        for number in range(2, self.depth + 1):
            hidden = getattr(self, f"norm{number}")(getattr(self, f"conv{number}")(hidden))
            hidden = getattr(self, f"gelu{number}")(hidden + first if number == 3 else hidden)
        return hidden


class SpeedNet(nn.Module):
    """The network of this module."""

    conv_gelu = (("whiten", "gelu"),)
    """What follows each other, for `dist_cifar.ops.fused_gelu`."""

    def __init__(self, widths: Sequence[int], depth: int, *, whitening_eps: float, num_classes: int) -> None:
        """`widths` are the channels of the three groups."""
        super().__init__()
        key = new_key()
        self.whitening_eps = whitening_eps
        self.whiten = nn.Conv2d(3, 2 * _PATCH, _KERNEL)
        self.gelu = nn.GELU()
        inputs = (2 * _PATCH, *widths[:-1])
        self.groups = nn.Sequential(*(Group(n, width, depth) for n, width in zip(inputs, widths, strict=True)))
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:  # biases begin at 0
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator_for(key, name))
            else:
                nn.init.zeros_(parameter)
            if name.startswith("groups.") and parameter.dim() == 4:
                pass_inputs_on(parameter)
        self.whiten.weight.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float [n, 3, r, r] to logits [n, num_classes]."""
        hidden = self.groups(self.gelu(self.whiten(images)))
        hidden = nn.functional.max_pool2d(hidden, hidden.shape[2:])
        return self.head(hidden.flatten(1)) / _LOGIT_DIVISOR

    def initialize_from_data(self, images: TrainingImages) -> None:
        """Computes the filters of the first layer from `WHITENING_IMAGES` images."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # their number changes how sums are rounded
        try:
            filters = whitening_filters(patch_covariance(images(WHITENING_IMAGES)), self.whitening_eps)
        finally:
            torch.set_num_threads(threads)
        with torch.no_grad():
            self.whiten.weight.copy_(filters)


def pass_inputs_on(weight: torch.Tensor) -> None:
    """Makes filter j of `weight` [outputs, inputs, k, k] return channel j of the input, for each j that both have."""
    outputs, inputs, height, width = weight.shape
    with torch.no_grad():
        for j in range(min(outputs, inputs)):
            weight[j] = 0
            weight[j, j, height // 2, width // 2] = 1


def patch_covariance(images: torch.Tensor) -> torch.Tensor:
    """The mean of p p^T over all 2x2 patches p of `images`, float32 [n, 3, h, w]: float64 [12, 12].

    A patch is ordered as a filter is: by channel, row, column.
    """
    total = torch.zeros(_PATCH, _PATCH, dtype=torch.float64)
    count = 0
    for chunk in images.split(_CHUNK):
        patches = nn.functional.unfold(chunk, _KERNEL).double()
        total += (patches @ patches.mT).sum(0)
        count += len(patches) * patches.shape[2]
    return total / count


def whitening_filters(covariance: torch.Tensor, eps: float) -> torch.Tensor:
    """Filters float32 [24, 3, 2, 2] whose first half gives patches of `covariance`, float64 [12, 12], the identity as
    their covariance; the second half is the first one with the other sign.

    Filter j is v / sqrt(l + `eps`), where l is the j-th largest eigenvalue and v its eigenvector, whose component of
    the largest magnitude is positive.
    """
    values, vectors = torch.linalg.eigh(covariance)
    values, rows = values.flip(0).clamp(min=0), vectors.flip(1).T
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    filters = rows * largest.sign() / torch.sqrt(values + eps)[:, None]
    return torch.cat([filters, -filters]).float().view(2 * _PATCH, 3, _KERNEL, _KERNEL)


def build_speednet(config: ModelConfig, *, num_classes: int) -> SpeedNet:
    """Builds the network of `config`. Raises `ConfigError` for settings that it does not have."""
    depth = DEFAULT_DEPTH if config.depth is None else config.depth
    if not 1 <= depth <= 3:
        raise ConfigError(f"model.depth: must be 1, 2 or 3 for speednet, found {depth}")
    return SpeedNet(config.widths, depth, whitening_eps=config.whitening_eps, num_classes=num_classes)
