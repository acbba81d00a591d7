"""A data set that a function from outside the package returns as arrays.

Contract: the function is called once by every process of a job, and what it returns is checked: the key of the data is
their content, so a change is noticed wherever it comes from. The arrays go through the cache like all others, so the
ranks of a node share one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_cifar import plugins
from dist_cifar.augment.image import IMAGE_SHAPE
from dist_cifar.config import DataConfig
from dist_cifar.data.arrays import Arrays, content_sha256
from dist_cifar.data.names import why_unusable
from dist_cifar.data.sources.base import Source
from dist_cifar.errors import DataError, printable

_NAMES = ("train_images", "train_labels", "test_images", "test_labels", "classes")


class FunctionSource(Source):
    """A function, called with `data.options`, that returns what `checked` takes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._arrays: Arrays | None = None

    def key(self, config: DataConfig, cache_dir: Path) -> str:
        return content_sha256(self._load(config))

    def read(self, config: DataConfig) -> Arrays:
        return self._load(config)

    def _load(self, config: DataConfig) -> Arrays:
        if self._arrays is None:
            origin = f"data.source={config.source}"
            try:
                returned = self._function(**config.options)
            except Exception as error:
                raise plugins.broken(origin, error, "loading the data") from None
            self._arrays = checked(returned, origin)
        return self._arrays


def checked(returned: Any, origin: str) -> Arrays:
    """The arrays that a function has returned: a mapping of the five names of `Arrays`, or the five in their order.

    Raises `DataError`, which begins with `origin`, where they are not what `Arrays` says.
    """
    if isinstance(returned, Mapping):
        missing = [name for name in _NAMES if name not in returned]
        if missing:
            raise DataError(f"{origin}: returns no {missing[0]}; it must return {', '.join(_NAMES)}")
        returned = [returned[name] for name in _NAMES]
    if isinstance(returned, Arrays):
        returned = [getattr(returned, name) for name in _NAMES]
    if not isinstance(returned, Sequence) or len(returned) != len(_NAMES):
        raise DataError(f"{origin}: returns {type(returned).__name__}; it must return {', '.join(_NAMES)}")
    train_images, train_labels, test_images, test_labels, classes = returned
    classes = tuple(map(str, classes))
    for name in classes:
        unusable = why_unusable(name)
        if unusable:
            raise DataError(f"{origin}: {printable(name)!r} cannot be a class: {unusable}")
    if not classes or len(set(classes)) != len(classes):
        raise DataError(f"{origin}: returns the classes {list(classes)[:10]}; they must be names, each once")
    return Arrays(
        train_images=_images(train_images, "train_images", origin),
        train_labels=_labels(train_labels, len(train_images), len(classes), "train_labels", origin),
        test_images=_images(test_images, "test_images", origin),
        test_labels=_labels(test_labels, len(test_images), len(classes), "test_labels", origin),
        classes=classes,
    )


def _images(images: Any, name: str, origin: str) -> npt.NDArray[np.uint8]:
    array = np.asarray(images)
    if array.dtype != np.uint8 or array.shape[1:] != IMAGE_SHAPE or len(array) == 0:
        side = IMAGE_SHAPE[0]
        raise DataError(
            f"{origin}: {name} is {array.dtype} {list(array.shape)}; it must be uint8 [n, {side}, {side}, 3], n > 0"
        )
    return np.ascontiguousarray(array)


def _labels(labels: Any, images: int, classes: int, name: str, origin: str) -> npt.NDArray[np.int64]:
    array = np.asarray(labels)
    if not np.issubdtype(array.dtype, np.integer) or array.shape != (images,):
        raise DataError(f"{origin}: {name} is {array.dtype} {list(array.shape)}; it must be whole numbers [{images}]")
    if array.min() < 0 or array.max() >= classes:
        raise DataError(
            f"{origin}: {name} holds {array.min()} to {array.max()}; labels are places among the {classes} classes,"
            f" from 0 to {classes - 1}"
        )
    return array.astype(np.int64)
