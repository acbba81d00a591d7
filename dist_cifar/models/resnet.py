"""ResNets for 32x32 images: He's narrow ones for CIFAR, and torchvision's wide ones with a stem for small images.

Contract: names and weights of ResNet-18, -34 and -50 are torchvision's for the same seed, but for the stem. torchvision
is not imported: that would take longer than all else before the first step, torch itself excepted.

Sources: He et al., "Deep residual learning for image recognition", CVPR 2016 (section 4.2 for the CIFAR ResNets);
torchvision.models.resnet, whose bottleneck has its stride in the 3x3 convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from dist_cifar.config import ModelConfig

Norm = Callable[[int], nn.Module]
"""Makes the normalisation of a number of channels."""
Shortcut = Callable[[int, int, int, Norm], nn.Module]
"""Makes from (inputs, outputs, stride, norm) what stands beside the first block of a stage that changes its shape."""

_GROUPS = 8
"""Groups of GroupNorm; divides every channel count of these networks."""
NORMS: dict[str, Norm] = {"batch": nn.BatchNorm2d, "group": partial(nn.GroupNorm, _GROUPS)}
"""The maker of each normalisation by its name in `model.norm`."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is the identity if `downsample` is None."""

    expansion = 1
    residual_layers = (("conv1", "bn1"), ("conv2", "bn2"))
    """The convolution and the norm of each layer. ReLU follows each; before the last ReLU the shortcut is added."""

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = norm(width)
        self.downsample = downsample

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float [n, inputs, h, w] to float [n, width, h / stride, w / stride]."""
        hidden = self.relu(self.bn1(self.conv1(images)))
        shortcut = images if self.downsample is None else self.downsample(images)
        hidden = self.bn2(self.conv2(hidden))
        hidden += shortcut
        return self.relu(hidden)


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1 to four times the width, beside a shortcut as in `BasicBlock`."""

    expansion = 4
    residual_layers = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))
    """The layers as in `BasicBlock`."""

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = norm(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float [n, inputs, h, w] to float [n, 4 width, h / stride, w / stride]."""
        hidden = self.relu(self.bn1(self.conv1(images)))
        hidden = self.relu(self.bn2(self.conv2(hidden)))
        shortcut = images if self.downsample is None else self.downsample(images)
        hidden = self.bn3(self.conv3(hidden))
        hidden += shortcut
        return self.relu(hidden)


Block = type[BasicBlock] | type[Bottleneck]


class ZeroPadded(nn.Module):
    """The shortcut of option A of the paper: every second pixel, and zeros for the new channels."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.new_channels = new_channels

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """float [n, c, h, w] to float [n, c + new_channels, h / 2, w / 2]."""
        before = self.new_channels // 2
        # Every second pixel as a pooling: unlike that of a slice, its gradient keeps the memory format.
        pixels = nn.functional.avg_pool2d(hidden, kernel_size=1, stride=2)
        return nn.functional.pad(pixels, (0, 0, 0, 0, before, self.new_channels - before))


def _zero_padded(inputs: int, outputs: int, stride: int, norm: Norm) -> nn.Module:
    """Makes the shortcut of option A of the paper, which has no weights."""
    return ZeroPadded(outputs - inputs)


def _projection(inputs: int, outputs: int, stride: int, norm: Norm) -> nn.Module:
    """Makes the shortcut of option B of the paper."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))


def _stage(
    block: Block, blocks: int, *, inputs: int, width: int, stride: int, shortcut: Shortcut, norm: Norm
) -> nn.Sequential:
    outputs = width * block.expansion
    changes = stride != 1 or inputs != outputs
    first = block(inputs, width, stride, shortcut(inputs, outputs, stride, norm) if changes else None, norm)
    return nn.Sequential(first, *(block(outputs, width, 1, None, norm) for _ in range(blocks - 1)))


class ResNet(nn.Module):
    """A stem, stages of blocks (the sides of the image halve and the width doubles from each to the next), the mean
    over the pixels and a linear layer."""

    norm_relu_pairs = (("bn1", "relu"),)
    """Norms whose output goes to the named ReLU alone, which is used for nothing else."""

    def __init__(
        self,
        block: Block,
        blocks: Sequence[int],
        *,
        stem: nn.Conv2d,
        shortcut: Shortcut,
        num_classes: int,
        norm: Norm,
    ) -> None:
        """`blocks` of each stage, the first of which is as wide as the stem."""
        super().__init__()
        width = channels = stem.out_channels
        self.conv1 = stem
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.stages = [f"layer{number}" for number in range(1, len(blocks) + 1)]
        for number, (name, count) in enumerate(zip(self.stages, blocks, strict=True)):
            stride = 2 if number else 1
            self.add_module(
                name, _stage(block, count, inputs=channels, width=width, stride=stride, shortcut=shortcut, norm=norm)
            )
            width, channels = 2 * width, width * block.expansion
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                _draw(module)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float [n, 3, 32, 32] to logits [n, num_classes]."""
        hidden = self.relu(self.bn1(self.conv1(images)))
        for name in self.stages:
            hidden = getattr(self, name)(hidden)
        return self.fc(self.avgpool(hidden).flatten(1))


def _draw(convolution: nn.Conv2d) -> None:
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")


def build_narrow(config: ModelConfig, *, num_classes: int, blocks: int) -> ResNet:
    """Builds one of He's CIFAR ResNets: three stages of `blocks` blocks, so 6 `blocks` + 2 layers."""
    return ResNet(
        BasicBlock,
        [blocks] * 3,
        stem=nn.Conv2d(3, 16, 3, padding=1, bias=False),
        shortcut=_zero_padded,
        num_classes=num_classes,
        norm=NORMS[config.norm],
    )


def build_wide(config: ModelConfig, *, num_classes: int, block: Block, blocks: Sequence[int]) -> ResNet:
    """Builds one of torchvision's ResNets with the CIFAR stem (3x3 first convolution, no max-pool)."""
    # The weights are drawn with torchvision's stem in its place, so that they are torchvision's.
    theirs = nn.Conv2d(3, 64, 7, bias=False)
    model = ResNet(block, blocks, stem=theirs, shortcut=_projection, num_classes=num_classes, norm=NORMS[config.norm])
    # The stem for 32x32 images: torchvision's would shrink them to 8x8 before the first block.
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    _draw(model.conv1)
    return model


BUILDERS: dict[str, Callable[..., ResNet]] = {
    "resnet8": partial(build_narrow, blocks=1),
    "resnet20": partial(build_narrow, blocks=3),
    "resnet32": partial(build_narrow, blocks=5),
    "resnet44": partial(build_narrow, blocks=7),
    "resnet56": partial(build_narrow, blocks=9),
    "resnet18": partial(build_wide, block=BasicBlock, blocks=(2, 2, 2, 2)),
    "resnet34": partial(build_wide, block=BasicBlock, blocks=(3, 4, 6, 3)),
    "resnet50": partial(build_wide, block=Bottleneck, blocks=(3, 4, 6, 3)),
}
"""The builder of every ResNet by its name."""
