"""Applies augmentation parameters through torchvision's functional operations on PIL images: slow, and right.

Contract: this defines what the augmentation computes. Every operation works on uint8 and rounds as PIL rounds, in the
order crop, flip, rotation, jitter, sharpness; then ToTensor, Normalize and a box set to zero.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torchvision.transforms import functional as F

from dist_cifar.augment.image import IMAGE_SIZE, ImageStats
from dist_cifar.augment.params import CROP_PADDING, AugmentParams

_JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)


def augment_pixels(images: npt.NDArray[np.uint8], params: AugmentParams) -> npt.NDArray[np.uint8]:
    """The images after crop, flip, rotation, jitter and sharpness: uint8 [n, 32, 32, 3] to the same shape."""
    out = np.empty_like(images)
    for i, pixels in enumerate(images):
        image = Image.fromarray(pixels)
        down, right = params.shift[i].tolist()
        image = F.pad(image, CROP_PADDING, padding_mode="reflect")
        image = F.crop(image, CROP_PADDING + down, CROP_PADDING + right, IMAGE_SIZE, IMAGE_SIZE)
        if params.flip[i]:
            image = F.hflip(image)
        image = F.rotate(image, float(params.angle[i]))
        for operation in params.order[i]:
            image = _JITTER[operation](image, float(params.factors[i, operation]))
        out[i] = F.adjust_sharpness(image, float(params.sharpness[i]))
    return out


def augment(images: npt.NDArray[np.uint8], params: AugmentParams, stats: ImageStats) -> torch.Tensor:
    """The network's input: uint8 [n, 32, 32, 3] to float32 [n, 3, 32, 32] in channels-last memory format."""
    pixels = augment_pixels(images, params)
    batch = torch.empty((len(images), 3, *images.shape[1:3])).to(memory_format=torch.channels_last)
    for i, (top, left, height, width) in enumerate(params.box.tolist()):
        image = F.normalize(F.to_tensor(pixels[i]), list(stats.mean), list(stats.std))
        batch[i] = F.erase(image, top, left, height, width, torch.tensor(0.0), inplace=True)
    return batch
