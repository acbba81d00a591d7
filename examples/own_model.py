"""Networks of one's own: a small vision transformer and a ConvMixer.

    dist-cifar train --ranks 2 --config configs/quickstart.yaml model.name=examples.own_model:ViT optimizer.lr=1e-3

A network is built as `Net(num_classes=..., **options)` and maps float32 [n, 3, 32, 32] to logits [n, num_classes]. What
it draws from torch's generators while it is trained, as dropout does, is the same on every number of ranks.

Sources: Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021; Trockman and Kolter, "Patches are all you
need?", 2022.
"""

from __future__ import annotations

import torch
from torch import nn


class ViT(nn.Module):
    """A vision transformer over patches of 4x4 pixels, without BatchNorm."""

    def __init__(
        self, num_classes: int, width: int = 64, depth: int = 2, heads: int = 2, patch: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.places = nn.Parameter(0.02 * torch.randn(1, (32 // patch) ** 2, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.places
        return self.head(self.blocks(tokens).mean(dim=1))


class Residual(nn.Sequential):
    """Layers beside a shortcut."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images + super().forward(images)


def conv_mixer(*, num_classes: int, width: int = 64, depth: int = 4, kernel: int = 5, patch: int = 2) -> nn.Module:
    """A ConvMixer: depthwise convolutions mix places, convolutions of 1x1 mix channels."""

    def activated(convolution: nn.Conv2d) -> list[nn.Module]:
        return [convolution, nn.GELU(), nn.BatchNorm2d(width)]

    blocks: list[nn.Module] = []
    for _ in range(depth):
        depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        blocks += [Residual(*activated(depthwise)), *activated(nn.Conv2d(width, width, 1))]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)]
    return nn.Sequential(*activated(nn.Conv2d(3, width, patch, patch)), *blocks, *head)
