"""The sources of data sets, by the names that `data.source` accepts.

A new one is a file here and a line below; one from outside the package is named in the config.
"""

from __future__ import annotations

from dist_cifar import plugins
from dist_cifar.config import DataConfig
from dist_cifar.data.sources.base import Source
from dist_cifar.data.sources.cifar import CIFAR10, CIFAR100, CifarArchive
from dist_cifar.data.sources.function import FunctionSource
from dist_cifar.data.sources.image_folder import ImageFolder
from dist_cifar.data.sources.synthetic import Synthetic

SOURCES: dict[str, Source] = {
    "cifar10": CifarArchive(CIFAR10),
    "cifar100": CifarArchive(CIFAR100),
    "folder": ImageFolder(),
    "synthetic": Synthetic(),
}


def source_of(config: DataConfig) -> Source:
    """The source that `data.source` names: one of the package's, a function or a class of the user's own."""
    if config.source in SOURCES:
        return SOURCES[config.source]
    found = plugins.find("data_source", "data.source", config.source)
    if isinstance(found, type) and issubclass(found, Source):
        own: Source = found(**config.options)
        return own
    return FunctionSource(found)
