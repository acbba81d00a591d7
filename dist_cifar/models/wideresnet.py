"""Wide ResNets: few, wide blocks in which norm and ReLU come before each convolution.

Contract: WRN-d-k has d = 6 n + 4 layers: a 3x3 convolution to 16 channels, three groups of n blocks of 16 k, 32 k and
64 k channels, then norm, ReLU, the mean over the pixels and a linear layer. No dropout.

Source: Zagoruyko and Komodakis, "Wide residual networks", BMVC 2016. The shortcut of a block that changes the number of
channels is a 1x1 convolution of what the block's first norm and ReLU return, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from dist_cifar.config import ModelConfig
from dist_cifar.errors import ConfigError
from dist_cifar.models.resnet import NORMS, Norm

DEFAULT_DEPTH = 28
"""The `depth` of a network whose config leaves it open."""


class WideBlock(nn.Module):
    """Norm, ReLU and a 3x3 convolution, twice, beside a shortcut."""

    norm_relu_pairs = (("bn1", "relu1"), ("bn2", "relu2"))
    """Norms whose output goes to the named ReLU alone, which is used for nothing else."""

    def __init__(self, inputs: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.bn1 = norm(inputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn2 = norm(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = None if inputs == width else nn.Conv2d(inputs, width, 1, stride, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float [n, inputs, h, w] to float [n, width, h / stride, w / stride]."""
        hidden = self.relu1(self.bn1(images))
        shortcut = images if self.shortcut is None else self.shortcut(hidden)
        return self.conv2(self.relu2(self.bn2(self.conv1(hidden)))) + shortcut


class WideResNet(nn.Module):
    """The network of this module."""

    norm_relu_pairs = (("bn", "relu"),)
    """Norms as in `WideBlock`."""

    def __init__(self, depth: int, widen_factor: int, *, num_classes: int, norm: Norm) -> None:
        super().__init__()
        blocks, channels = (depth - 4) // 6, 16
        self.conv = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        groups = []
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            width *= widen_factor
            first = WideBlock(channels, width, stride, norm)
            groups.append(nn.Sequential(first, *(WideBlock(width, width, 1, norm) for _ in range(blocks - 1))))
            channels = width
        self.group1, self.group2, self.group3 = groups
        self.bn = norm(channels)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float [n, 3, 32, 32] to logits [n, num_classes]."""
        hidden = self.group3(self.group2(self.group1(self.conv(images))))
        return self.fc(self.avgpool(self.relu(self.bn(hidden))).flatten(1))


def build_wideresnet(
    config: ModelConfig, *, num_classes: int, depth: int | None = None, widen_factor: int | None = None
) -> WideResNet:
    """Builds WRN-`depth`-`widen_factor`, of which the config has what is not given. Raises `ConfigError` for a depth
    that there is not."""
    depth = depth or config.depth or DEFAULT_DEPTH
    if depth < 10 or depth % 6 != 4:
        raise ConfigError(f"model.depth: must be 6 n + 4 for wideresnet (10, 16, 22, 28, 34, 40, ...), found {depth}")
    return WideResNet(depth, widen_factor or config.widen_factor, num_classes=num_classes, norm=NORMS[config.norm])


BUILDERS: dict[str, Callable[..., WideResNet]] = {
    "wideresnet": build_wideresnet,
    "wrn16_4": partial(build_wideresnet, depth=16, widen_factor=4),
    "wrn28_10": partial(build_wideresnet, depth=28, widen_factor=10),
    "wrn40_4": partial(build_wideresnet, depth=40, widen_factor=4),
}
"""The builder of every wide ResNet by its name."""
