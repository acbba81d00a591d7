"""Applies augmentation parameters through torchvision's functional operations on PIL images: slow, and right.

Contract: this defines what the augmentation computes. Every operation works on uint8 and rounds as PIL rounds, in the
order crop, flip, rotation, jitter, sharpness; then come the area average, ToTensor, Normalize and boxes set to zero.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torchvision.transforms import functional as F

from dist_cifar.augment.image import IMAGE_SIZE, ImageStats
from dist_cifar.augment.params import MAX_CROP_PADDING, AugmentParams, erased_boxes

_JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)


def augment_pixels(images: npt.NDArray[np.uint8], params: AugmentParams) -> npt.NDArray[np.uint8]:
    """The images after crop, flip, rotation, jitter and sharpness: uint8 [n, 32, 32, 3] to the same shape."""
    out = np.empty_like(images)
    for i, pixels in enumerate(images):
        image = Image.fromarray(pixels)
        down, right = params.shift[i].tolist()
        image = F.pad(image, MAX_CROP_PADDING, padding_mode="reflect")
        image = F.crop(image, MAX_CROP_PADDING + down, MAX_CROP_PADDING + right, IMAGE_SIZE, IMAGE_SIZE)
        if params.flip[i]:
            image = F.hflip(image)
        image = F.rotate(image, float(params.angle[i]))
        for operation in params.order[i]:
            image = _JITTER[operation](image, float(params.factors[i, operation]))
        out[i] = F.adjust_sharpness(image, float(params.sharpness[i]))
    return out


def area_average(pixels: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.float32]:
    """One image shrunk: uint8 [32, 32, 3] to float32 [size, size, 3] in [0, 255].

    Each pixel is cut into size x size equal ones, of which 32 x 32 make one of the result. No sum is rounded, nor is
    the mean.
    """
    cut = pixels.repeat(size, axis=0).repeat(size, axis=1)
    blocks = cut.reshape(size, IMAGE_SIZE, size, IMAGE_SIZE, 3)
    return blocks.mean(axis=(1, 3), dtype=np.float64).astype(np.float32)


def augment(images: npt.NDArray[np.uint8], params: AugmentParams, stats: ImageStats) -> torch.Tensor:
    """The network's input: uint8 [n, 32, 32, 3] to float32 [n, 3, r, r] in channels-last memory format."""
    pixels, size = augment_pixels(images, params), params.size
    batch = torch.empty((len(images), 3, size, size)).to(memory_format=torch.channels_last)
    for i, boxes in enumerate(erased_boxes(params).tolist()):
        shrunk = area_average(pixels[i], size) if size != IMAGE_SIZE else None
        unit = F.to_tensor(pixels[i]) if shrunk is None else torch.from_numpy(shrunk).permute(2, 0, 1).div(255)
        image = F.normalize(unit, list(stats.mean), list(stats.std))
        for top, left, bottom, right in boxes:
            image = F.erase(image, top, left, bottom - top, right - left, torch.tensor(0.0), inplace=True)
        batch[i] = image
    return batch
