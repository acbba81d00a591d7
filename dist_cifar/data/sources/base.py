"""What a source of a data set provides.

Contract: what `read` returns depends on the content that `key` names and on nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from dist_cifar.config import DataConfig
from dist_cifar.data.arrays import Arrays


class Source(ABC):
    """Where the images and labels of a data set come from."""

    @abstractmethod
    def key(self, config: DataConfig, cache_dir: Path) -> str:
        """64 hexadecimal digits that name the content: equal keys mean equal arrays.

        Every process of a job calls it at every start. What is slow to compute can be kept with `cache.memoized`.
        Raises `DataError`.
        """

    @abstractmethod
    def read(self, config: DataConfig) -> Arrays:
        """Downloads, decodes or generates the data set. Raises `DataError`, and `ConfigError` for impossible settings.

        One process per file system calls it, and only if the cache does not hold the content.
        """

    def missing_download(self, config: DataConfig) -> str | None:
        """The address from which `read` would download; None if the files are here or nothing is downloaded."""
        return None


def root_path(config: DataConfig) -> Path:
    """`data.root`, whose `~` and variables were expanded when the config was read."""
    return Path(config.root)
