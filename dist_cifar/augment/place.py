"""Decides whether the CPU or a GPU augments, and gives the function that does.

Contract: the bits do not depend on the place. triton is imported only where a GPU may augment.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from dist_cifar.augment import kernel
from dist_cifar.augment.policy import AugmentParams
from dist_cifar.errors import ConfigError

Augmenter = Callable[[npt.NDArray[np.int64], AugmentParams], torch.Tensor]
"""Indices and the parameters of each to the network's input, float32 [n, 3, 32, 32] in channels-last memory format."""


def augments_on_device(setting: str, device: torch.device) -> bool:
    """Whether a run on `device` augments there, by `data.device_augment`. Raises `ConfigError` if it cannot."""
    if setting == "cpu" or (setting == "auto" and device.type != "cuda"):
        return False
    if device.type != "cuda":
        raise ConfigError(
            "data.device_augment: device was set and this run is on the CPU; set data.device_augment=auto, or give the"
            " run a GPU"
        )
    try:
        importlib.import_module("triton")
    except ImportError as error:
        if setting == "auto":
            return False
        raise ConfigError(
            f"data.device_augment: device was set and triton cannot be imported ({error}); install triton, or set"
            " data.device_augment=cpu"
        ) from None
    return True


def augmenter(
    images: npt.NDArray[np.uint8], mean: npt.ArrayLike, std: npt.ArrayLike, *, on_device: torch.device | None
) -> Augmenter:
    """Augments `images`, uint8 [N, 32, 32, 3], as `kernel.augment`: on the device `on_device`, on the CPU if None."""
    if on_device is None:
        return lambda indices, params: kernel.augment(images, indices, params, mean, std)
    from dist_cifar.augment.device import DeviceAugmenter

    return DeviceAugmenter(images, mean, std, on_device)
