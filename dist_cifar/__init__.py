"""Train the same CIFAR-10 model on any number of GPUs, at the speed of the hardware, and prove it.

Importing the package imports no torch: each name imports what it needs when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dist_cifar.api.launching import launch as launch
    from dist_cifar.api.run_result import RunResult as RunResult
    from dist_cifar.api.trained_model import TrainedModel as TrainedModel
    from dist_cifar.api.trained_model import load_model as load_model
    from dist_cifar.api.training import train as train
    from dist_cifar.config import Config as Config
    from dist_cifar.config import load_config as load_config
    from dist_cifar.data.sources.base import Source as Source
    from dist_cifar.errors import RankError as RankError
    from dist_cifar.errors import UserError as UserError
    from dist_cifar.optim.base import Optimizer as Optimizer
    from dist_cifar.optim.lr_schedule import LRSchedule as LRSchedule
    from dist_cifar.plugins import register_augmentation as register_augmentation
    from dist_cifar.plugins import register_data_source as register_data_source
    from dist_cifar.plugins import register_model as register_model
    from dist_cifar.plugins import register_optimizer as register_optimizer
    from dist_cifar.plugins import register_schedule as register_schedule
    from dist_cifar.plugins import register_strategy as register_strategy
    from dist_cifar.plugins import register_tracker as register_tracker
    from dist_cifar.strategy.base import Strategy as Strategy
    from dist_cifar.tracking.base import Tracker as Tracker
    from dist_cifar.trainer import Trainer as Trainer
else:
    _MODULES = {
        "Config": "config",
        "LRSchedule": "optim.lr_schedule",
        "Optimizer": "optim.base",
        "RankError": "errors",
        "RunResult": "api.run_result",
        "Source": "data.sources.base",
        "Strategy": "strategy.base",
        "Tracker": "tracking.base",
        "TrainedModel": "api.trained_model",
        "Trainer": "trainer",
        "UserError": "errors",
        "launch": "api.launching",
        "load_config": "config",
        "load_model": "api.trained_model",
        "register_augmentation": "plugins",
        "register_data_source": "plugins",
        "register_model": "plugins",
        "register_optimizer": "plugins",
        "register_schedule": "plugins",
        "register_strategy": "plugins",
        "register_tracker": "plugins",
        "train": "api.training",
    }
    """The module of each public name, which is imported when the name is first used."""

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        return found

    def __dir__():
        return sorted({*globals(), *_MODULES})


__all__ = [
    "Config",
    "LRSchedule",
    "Optimizer",
    "RankError",
    "RunResult",
    "Source",
    "Strategy",
    "Tracker",
    "TrainedModel",
    "Trainer",
    "UserError",
    "launch",
    "load_config",
    "load_model",
    "register_augmentation",
    "register_data_source",
    "register_model",
    "register_optimizer",
    "register_schedule",
    "register_strategy",
    "register_tracker",
    "train",
]
