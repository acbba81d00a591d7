"""Chooses the backend that augments: the CPU's kernel or the GPU's.

Contract: the bits do not depend on the backend. triton is imported only where a GPU may augment.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import numpy.typing as npt
import torch

from dist_cifar.augment import cpu
from dist_cifar.augment.image import IMAGE_SIZE, ImageStats
from dist_cifar.augment.params import AugmentParams, sample_params
from dist_cifar.config import AugmentConfig
from dist_cifar.errors import ConfigError

logger = logging.getLogger(__name__)

_CHECKED_IMAGES = 128
_CHECKED = (AugmentConfig(), AugmentConfig(policy="flip_crop", cutout_size=12))
Augmenter = Callable[[npt.NDArray[np.int64], AugmentParams], torch.Tensor]
"""From indices and their parameters to the network's input, float32 [n, 3, r, r] in channels-last memory format."""


def augments_on_device(setting: str, device: torch.device) -> bool:
    """Whether a run on `device` augments there, by `augment.backend`. Raises `ConfigError` if it cannot."""
    if setting == "cpu" or (setting == "auto" and device.type != "cuda"):
        return False
    if device.type != "cuda":
        raise ConfigError(
            "augment.backend: device was set and this run is on the CPU; set augment.backend=auto, or give the"
            " run a GPU"
        )
    try:
        importlib.import_module("triton")
    except ImportError as error:
        if setting == "auto":
            return False
        raise ConfigError(
            f"augment.backend: device was set and triton cannot be imported ({error}); install triton, or set"
            " augment.backend=cpu"
        ) from None
    return True


def augmenter(
    setting: str,
    images: npt.NDArray[np.uint8],
    stats: ImageStats,
    *,
    device: torch.device,
    sizes: Sequence[int] = (IMAGE_SIZE,),
) -> Augmenter:
    """The function that augments `images`, uint8 [N, 32, 32, 3], on the backend that `augment.backend` names.

    A GPU is first compared with the CPU on a few images of each of `sizes`, those that the run has. If the
    bits differ, `auto` falls back to the CPU and logs that, and `device` raises `ConfigError`.
    """

    def on_cpu(indices: npt.NDArray[np.int64], params: AugmentParams) -> torch.Tensor:
        return cpu.augment(images, indices, params, stats)

    if not augments_on_device(setting, device):
        return on_cpu
    try:
        from dist_cifar.augment.triton_gpu import DeviceAugmenter

        on_device = DeviceAugmenter(images, stats, device)
        reason = (
            None if gives_same_bits(on_device, on_cpu, len(images), sizes) else "it does not give the bits of the CPU"
        )
    except Exception as error:  # a compiler and a driver may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if reason is None:
        return on_device
    if setting == "auto":
        logger.info(f"augmentation on the CPU, because its kernel on {device} fails: {reason}")
        return on_cpu
    raise ConfigError(f"augment.backend: device was set and its kernel fails: {reason}; set augment.backend=cpu")


def gives_same_bits(first: Augmenter, second: Augmenter, count: int, sizes: Sequence[int]) -> bool:
    """Whether two augmenters of `count` images agree on some of them, of all `sizes` and under every operation."""
    indices = np.arange(min(count, _CHECKED_IMAGES))
    for size, config in product(sizes, _CHECKED):
        params = sample_params(config, seed=0, epoch=0, indices=indices, size=size)
        found, expected = (augment(indices, params).cpu().view(torch.int32) for augment in (first, second))
        if not torch.equal(found, expected):
            return False
    return True
