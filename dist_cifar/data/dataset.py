"""The data set of a run, from any source: uint8 images that are memory-mapped from a file, and integer labels.

Contract: `load_dataset` gives every process the same arrays, whichever of them had to download or decode; what it
returns depends on the content of the source alone. This module imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dist_cifar.augment.image import ImageStats
from dist_cifar.config import DataConfig, expand_path
from dist_cifar.data import cache, node_staging
from dist_cifar.data.ownership import private_in
from dist_cifar.data.sources import source_of
from dist_cifar.errors import ConfigError, counted, listed
from dist_cifar.ops import philox

_SPLIT_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Split:
    """The training or the test images."""

    images: npt.NDArray[np.uint8]
    """[n, 32, 32, 3], C-contiguous, memory-mapped, read-only."""
    labels: npt.NDArray[np.int64]
    """[n], indices into `Dataset.classes`."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A whole data set."""

    train: Split
    """The training images, those held out for validation included."""
    test: Split
    classes: tuple[str, ...]
    """Class names, in the order of the labels."""
    content_sha256: str
    """SHA-256 over class names, pixels and labels: equal for equal data, whether from an archive, zip or folder."""
    stats: ImageStats
    """Statistics of the training images, those held out included."""
    directory: Path
    """Where the arrays are on the disk."""


def load_dataset(config: DataConfig) -> Dataset:
    """The data set that `config` names; every process of a job may call it at once.

    Logs a line before whatever takes long. Raises `DataError`, and `ConfigError` for an impossible `data.url` or
    `data.stage_dir`.
    """
    stage_dir = None if config.stage_dir is None else Path(expand_path(config.stage_dir, "data.stage_dir", os.environ))
    cache_dir, source = _cache_dir(config), source_of(config)
    name = config.source.replace(":", "-").replace("/", "-")
    entry = cache.load_or_build(cache_dir, name, source.key(config, cache_dir), lambda: source.read(config))
    if stage_dir is not None:
        entry = node_staging.staged(entry, stage_dir)
    arrays = entry.arrays
    return Dataset(
        train=Split(images=arrays.train_images, labels=arrays.train_labels),
        test=Split(images=arrays.test_images, labels=arrays.test_labels),
        classes=arrays.classes,
        content_sha256=entry.content_sha256,
        stats=entry.stats,
        directory=entry.directory,
    )


def _cache_dir(config: DataConfig) -> Path:
    return private_in(cache.cache_directory(config.cache_dir), "data.cache_dir")


def missing_download(config: DataConfig) -> str | None:
    """The address from which `load_dataset` would download the data set; None if it is here or is not downloaded."""
    source = source_of(config)
    url = source.missing_download(config)
    if url is None:
        return None
    cache_dir = _cache_dir(config)
    key = source.key(config, cache_dir)
    is_cached = cache.read_entry(cache.entry_directory(cache_dir, config.source, key), key) is not None
    return None if is_cached else url


def validation_split(
    labels: npt.NDArray[np.int64], size: int, names: Sequence[str]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Sorted indices of the training and of the `size` validation images among `labels`: int64 each.

    `names` are those of the classes, for messages.

    Each class gives its share of `size`, rounded up or down. The choice is a function of `labels` and `size`, not of
    the run's seed, so that runs with different seeds can be compared. Raises `ConfigError` if a class would have no
    training image left.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if size >= len(labels):
        raise ConfigError(
            f"data.validation_size: {size} leaves no training image, there are {len(labels)}; make it smaller"
        )
    shares, remainders = np.divmod(size * counts, len(labels))
    largest = np.argsort(-remainders, kind="stable")[: size - shares.sum()]
    shares[largest] += 1
    chance = philox.random_words(_SPLIT_SEED, philox.STREAM_SPLIT, 0, np.arange(len(labels)), 1)[:, 0]
    held_out = np.zeros(len(labels), bool)
    emptied = sorted(
        (int(count), names[label])
        for label, count, share in zip(classes, counts, shares, strict=True)
        if share == count
    )
    if emptied:
        named = listed([f"{name} ({counted(count, 'image')})" for count, name in emptied])
        raise ConfigError(f"data.validation_size: {size} leaves no training image of class {named}; make it smaller")
    for label, share in zip(classes, shares, strict=True):
        members = np.flatnonzero(labels == label)
        held_out[members[np.argsort(chance[members], kind="stable")[:share]]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
