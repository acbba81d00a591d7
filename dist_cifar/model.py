"""The networks: ResNets for 32x32 images. Nothing here knows of ranks, devices or the training.

Contract: `build_model(config, num_classes=..., seed=...)` gives the same weights for the same arguments, on every
rank and whatever the global generator holds, and leaves that generator as it was.

Sources: He et al., "Deep residual learning for image recognition", CVPR 2016 (section 4.2 for the CIFAR ResNets);
the blocks are torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torchvision.models import resnet
from torchvision.models.resnet import BasicBlock

from dist_cifar.config import ModelConfig

_GROUPS = 8
"""Groups of GroupNorm; divides every channel count of these networks."""
_WIDE = {"resnet18": resnet.resnet18, "resnet34": resnet.resnet34, "resnet50": resnet.resnet50}
_NARROW_DEPTHS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}
"""Blocks of each of the three stages: depth = 6 n + 2."""

Norm = Callable[[int], nn.Module]


class CifarResNet(nn.Module):
    """He's CIFAR ResNet: a 3x3 stem, three stages of 16, 32 and 64 channels, identity shortcuts without weights."""

    def __init__(self, blocks: int, num_classes: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = norm(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(16, 16, blocks, norm)
        self.layer2 = _stage(16, 32, blocks, norm)
        self.layer3 = _stage(32, 64, blocks, norm)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float [n, 3, 32, 32] to logits [n, num_classes]."""
        hidden = self.relu(self.bn1(self.conv1(images)))
        hidden = self.layer3(self.layer2(self.layer1(hidden)))
        return self.fc(self.avgpool(hidden).flatten(1))


class _Shortcut(nn.Module):
    """Option A of the paper: every second pixel, and zeros for the new channels."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.new_channels = new_channels

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        before = self.new_channels // 2
        return nn.functional.pad(hidden[:, :, ::2, ::2], (0, 0, 0, 0, before, self.new_channels - before))


def _stage(inputs: int, outputs: int, blocks: int, norm: Norm) -> nn.Sequential:
    grows = inputs != outputs
    first = BasicBlock(
        inputs,
        outputs,
        stride=2 if grows else 1,
        downsample=_Shortcut(outputs - inputs) if grows else None,
        norm_layer=norm,
    )
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, norm_layer=norm) for _ in range(blocks - 1)))


def build_model(config: ModelConfig, *, num_classes: int, seed: int) -> nn.Module:
    """The network of `config` on the CPU: float32 [n, 3, 32, 32] to logits float32 [n, num_classes]."""
    norm: Norm = nn.BatchNorm2d if config.norm == "batch" else partial(nn.GroupNorm, _GROUPS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.name in _NARROW_DEPTHS:
            return CifarResNet(_NARROW_DEPTHS[config.name], num_classes, norm)
        model = _WIDE[config.name](num_classes=num_classes, norm_layer=norm)
        # The stem for 32x32 images: torchvision's would shrink them to 8x8 before the first block.
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
        return model
