"""The networks: ResNets for 32x32 images. Nothing here knows of ranks, devices or the training.

Contract: `build_model(config, num_classes=..., seed=...)` gives the same weights for the same arguments, on every
rank and whatever the global generator holds, and leaves that generator as it was. Names and weights of ResNet-18, -34
and -50 are torchvision's for the same seed, but for the stem. torchvision is not imported: that would take longer than
all else before the first step, torch itself excepted.

Sources: He et al., "Deep residual learning for image recognition", CVPR 2016 (section 4.2 for the CIFAR ResNets);
torchvision.models.resnet, whose bottleneck has its stride in the 3x3 convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from dist_cifar.config import ModelConfig

_GROUPS = 8
"""Groups of GroupNorm; divides every channel count of these networks."""


class BatchNormReLU(nn.BatchNorm2d):
    """BatchNorm; plus `shortcut`, of the same shape, where there is one; then ReLU."""

    def forward(self, input: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        return _add_and_rectify(super().forward(input), shortcut)


class GroupNormReLU(nn.GroupNorm):
    """As `BatchNormReLU`."""

    def forward(self, input: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        return _add_and_rectify(super().forward(input), shortcut)


def _add_and_rectify(hidden: torch.Tensor, shortcut: torch.Tensor | None) -> torch.Tensor:
    """In place."""
    if shortcut is not None:
        hidden += shortcut
    return nn.functional.relu(hidden, inplace=True)


class Norms(NamedTuple):
    """Makers of normalisations for a number of channels."""

    alone: Callable[[int], nn.Module]
    with_relu: Callable[[int], nn.Module]
    """Called with a hidden tensor and, or not, a shortcut, as `BatchNormReLU`."""


_NORMS = {
    "batch": Norms(nn.BatchNorm2d, BatchNormReLU),
    "group": Norms(partial(nn.GroupNorm, _GROUPS), partial(GroupNormReLU, _GROUPS)),
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is the identity if `downsample` is None."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None, norms: Norms) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = norms.with_relu(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = norms.with_relu(width)
        self.downsample = downsample

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.bn1(self.conv1(images))
        shortcut = images if self.downsample is None else self.downsample(images)
        return self.bn2(self.conv2(hidden), shortcut)


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1 to four times the width, beside a shortcut as in `BasicBlock`."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None, norms: Norms) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = norms.with_relu(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = norms.with_relu(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = norms.with_relu(width * self.expansion)
        self.downsample = downsample

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.bn1(self.conv1(images))
        hidden = self.bn2(self.conv2(hidden))
        shortcut = images if self.downsample is None else self.downsample(images)
        return self.bn3(self.conv3(hidden), shortcut)


Block = type[BasicBlock] | type[Bottleneck]
Shortcut = Callable[[int, int, int, Norms], nn.Module]
"""Makes from (inputs, outputs, stride, norms) what stands beside the first block of a stage that changes its shape."""

_WIDE: dict[str, tuple[Block, tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}
"""Blocks of each of the four stages."""
_NARROW_DEPTHS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}
"""Blocks of each of the three stages: depth = 6 n + 2."""


class _ZeroPadded(nn.Module):
    """Option A of the paper: every second pixel, and zeros for the new channels."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.new_channels = new_channels

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        before = self.new_channels // 2
        # Every second pixel as a pooling: unlike that of a slice, its gradient keeps the memory format.
        pixels = nn.functional.avg_pool2d(hidden, kernel_size=1, stride=2)
        return nn.functional.pad(pixels, (0, 0, 0, 0, before, self.new_channels - before))


def _projection(inputs: int, outputs: int, stride: int, norms: Norms) -> nn.Module:
    """Option B of the paper."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norms.alone(outputs))


def _stage(
    block: Block, blocks: int, *, inputs: int, width: int, stride: int, shortcut: Shortcut, norms: Norms
) -> nn.Sequential:
    outputs = width * block.expansion
    changes = stride != 1 or inputs != outputs
    first = block(inputs, width, stride, shortcut(inputs, outputs, stride, norms) if changes else None, norms)
    return nn.Sequential(first, *(block(outputs, width, 1, None, norms) for _ in range(blocks - 1)))


class ResNet(nn.Module):
    """A stem, stages of blocks (the sides of the image halve and the width doubles from each to the next), the mean
    over the pixels and a linear layer."""

    def __init__(
        self,
        block: Block,
        blocks: Sequence[int],
        *,
        stem: nn.Conv2d,
        shortcut: Shortcut,
        num_classes: int,
        norms: Norms,
    ) -> None:
        """`blocks` of each stage, the first of which is as wide as the stem."""
        super().__init__()
        width = channels = stem.out_channels
        self.conv1 = stem
        self.bn1 = norms.with_relu(width)
        self.stages = [f"layer{number}" for number in range(1, len(blocks) + 1)]
        for number, (name, count) in enumerate(zip(self.stages, blocks, strict=True)):
            stride = 2 if number else 1
            self.add_module(
                name,
                _stage(block, count, inputs=channels, width=width, stride=stride, shortcut=shortcut, norms=norms),
            )
            width, channels = 2 * width, width * block.expansion
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                _draw(module)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float [n, 3, 32, 32] to logits [n, num_classes]."""
        hidden = self.bn1(self.conv1(images))
        for name in self.stages:
            hidden = getattr(self, name)(hidden)
        return self.fc(self.avgpool(hidden).flatten(1))


def _draw(convolution: nn.Conv2d) -> None:
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")


def build_model(config: ModelConfig, *, num_classes: int, seed: int) -> nn.Module:
    """The network of `config` on the CPU: float32 [n, 3, 32, 32] to logits float32 [n, num_classes]."""
    norms = _NORMS[config.norm]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.name in _NARROW_DEPTHS:
            return ResNet(
                BasicBlock,
                [_NARROW_DEPTHS[config.name]] * 3,
                stem=nn.Conv2d(3, 16, 3, padding=1, bias=False),
                shortcut=lambda inputs, outputs, *_: _ZeroPadded(outputs - inputs),
                num_classes=num_classes,
                norms=norms,
            )
        block, blocks = _WIDE[config.name]
        # The weights are drawn with torchvision's stem in its place, so that they are torchvision's.
        theirs = nn.Conv2d(3, 64, 7, bias=False)
        model = ResNet(block, blocks, stem=theirs, shortcut=_projection, num_classes=num_classes, norms=norms)
        # The stem for 32x32 images: torchvision's would shrink them to 8x8 before the first block.
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        _draw(model.conv1)
        return model
