"""Augmentations of one's own: noise, and torchvision's TrivialAugment.

    dist-cifar train --config configs/quickstart.yaml augment.transform=examples.own_augmentation:noise

The function gets one uint8 image [32, 32, 3] and a generator that belongs to the image and the epoch, and returns such
an image; the operations of `augment.policy` follow. It runs in processes of its own, in which the generators of Python,
numpy and torch are seeded for each image: whatever it draws from, the result does not depend on the number of ranks.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def noise(image: npt.NDArray[np.uint8], generator: np.random.Generator, strength: float = 8.0) -> npt.NDArray[np.uint8]:
    """Adds normal noise with a standard deviation of `strength` levels of 255."""
    return (image + generator.normal(0, strength, image.shape)).clip(0, 255).astype(np.uint8)


def trivial_augment(image: npt.NDArray[np.uint8], generator: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Applies torchvision's TrivialAugmentWide, which draws from torch's generator."""
    import torch
    from torchvision.transforms import v2

    tensor = torch.from_numpy(image).permute(2, 0, 1)
    return v2.TrivialAugmentWide()(tensor).permute(1, 2, 0).numpy()
