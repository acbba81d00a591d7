"""What a network is that takes a part of its initial weights from training images.

Contract: any `torch.nn.Module` that has the method, also one from outside the package, is such a network. The method is
called once, before the first step, on one rank; the others get the weights as bytes, and a checkpoint holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch

TrainingImages = Callable[[int], torch.Tensor]
"""Called as `images(count)`: float32 [n, 3, 32, 32], normalised and not augmented, where n is `count` or, if there are
fewer, the number of training images. They are drawn from the training split (what is held out is not among them)
without replacement, and are the same in every call, but for their number."""


@runtime_checkable
class DataInitialized(Protocol):
    """A network whose initial weights depend on the training images."""

    def initialize_from_data(self, images: TrainingImages) -> None:
        """Sets the weights, on the CPU. Random numbers may be drawn from torch's global generator, which is seeded."""
        ...
