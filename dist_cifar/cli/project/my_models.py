"""A network of your own, found by its name from the folder in which you start:

dist-cifar train --config configs/quickstart.yaml model.name=my_models:Net model.options.width=64
"""

import torch
from torch import nn


class Net(nn.Module):
    """Three convolutions, each of which halves the image, and a linear layer.

    The arguments behind `num_classes` are what `model.options.NAME=VALUE` sets.
    """

    def __init__(self, *, num_classes: int, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps float32 [n, 3, 32, 32] to logits [n, num_classes]."""
        return self.head(self.body(images).mean((2, 3)))
