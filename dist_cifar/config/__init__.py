"""The configuration: frozen dataclasses, read from YAML and `key=value` overrides, checked before anything starts."""

from dist_cifar.config.load import checked, config_from_values, describe, flatten, key_hint, load_config, to_yaml
from dist_cifar.config.paths import expand_path
from dist_cifar.config.resume import at_resume, batch_differences, differences
from dist_cifar.config.schema import (
    AtResume,
    AugmentConfig,
    BatchConfig,
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    PlateauConfig,
    RunConfig,
    StrategyConfig,
    TrackingConfig,
    TrainConfig,
)

__all__ = [
    "AtResume",
    "AugmentConfig",
    "BatchConfig",
    "CheckpointConfig",
    "ComputeConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PlateauConfig",
    "RunConfig",
    "StrategyConfig",
    "TrackingConfig",
    "TrainConfig",
    "at_resume",
    "batch_differences",
    "checked",
    "config_from_values",
    "describe",
    "differences",
    "expand_path",
    "flatten",
    "key_hint",
    "load_config",
    "to_yaml",
]
