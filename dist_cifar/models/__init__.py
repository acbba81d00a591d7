"""The networks by name. A new family is a file beside `resnet.py`, with builders that are entered in `MODELS`.

Nothing here knows of ranks, devices, the training, or of how `dist_cifar.ops` makes a network faster.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from dist_cifar.config import ModelConfig
from dist_cifar.models import resnet

ModelBuilder = Callable[..., nn.Module]
"""Called as `build(config: ModelConfig, *, num_classes: int)`: makes a network from float32 [n, 3, 32, 32] to logits
float32 [n, num_classes], on the CPU, and draws its weights from torch's global generator."""

MODELS: dict[str, ModelBuilder] = {**resnet.BUILDERS}
"""The builder of every network by its name."""


def build_model(config: ModelConfig, *, num_classes: int, seed: int) -> nn.Module:
    """Builds the network of `config` on the CPU: float32 [n, 3, 32, 32] to logits float32 [n, num_classes].

    The weights are the same for the same arguments, on every rank and whatever the global generator holds, which is
    left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[config.name](config, num_classes=num_classes)
