"""Networks of other packages by their names there: timm's and torchvision's, untrained.

Contract: a builder takes the options of the package's own, which raises for those that it does not know.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from dist_cifar.errors import ConfigError, did_you_mean


def timm(name: str, origin: str) -> Callable[..., nn.Module]:
    """The builder of timm's model `name`. Raises `ConfigError`, which begins with `origin`, if there is none."""
    package = importlib.import_module("timm")
    if not package.is_model(name):
        raise ConfigError(f"{origin}: timm has no model {name}{did_you_mean(name, package.list_models())}")

    def build(*, num_classes: int, **options: Any) -> nn.Module:
        model: nn.Module = package.create_model(name, pretrained=False, num_classes=num_classes, **options)
        return model

    return build


def torchvision(name: str, origin: str) -> Callable[..., nn.Module]:
    """The builder of torchvision's classification model `name`. Raises `ConfigError`, as `timm` does."""
    package = importlib.import_module("torchvision.models")
    known = package.list_models(module=package)
    if name not in known:
        raise ConfigError(f"{origin}: torchvision has no classification model {name}{did_you_mean(name, known)}")

    def build(*, num_classes: int, **options: Any) -> nn.Module:
        model: nn.Module = package.get_model(name, weights=None, num_classes=num_classes, **options)
        return model

    return build
