"""The configuration: frozen dataclasses, read from YAML and `key=value` overrides, checked before anything starts."""

from dist_cifar.config.components import is_own, known_names, load_components, own_components, own_files
from dist_cifar.config.load import (
    checked,
    config_from_values,
    describe,
    flatten,
    key_hint,
    load_config,
    load_written_config,
    to_yaml,
)
from dist_cifar.config.marks import AtResume
from dist_cifar.config.optimizer_schema import (
    AverageConfig,
    GroupRule,
    MuonConfig,
    OptimizerConfig,
    PlateauConfig,
    ScheduleConfig,
)
from dist_cifar.config.paths import expand_path
from dist_cifar.config.resume import at_resume, batch_differences, differences, follows_length
from dist_cifar.config.schema import (
    AugmentConfig,
    BatchConfig,
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    EvalConfig,
    MixConfig,
    ModelConfig,
    ResolutionPhase,
    RunConfig,
    StrategyConfig,
    TrackingConfig,
    TrainConfig,
)
from dist_cifar.config.values import as_written

__all__ = [
    "AtResume",
    "AugmentConfig",
    "AverageConfig",
    "BatchConfig",
    "CheckpointConfig",
    "ComputeConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "GroupRule",
    "MixConfig",
    "ModelConfig",
    "MuonConfig",
    "OptimizerConfig",
    "PlateauConfig",
    "ResolutionPhase",
    "RunConfig",
    "ScheduleConfig",
    "StrategyConfig",
    "TrackingConfig",
    "TrainConfig",
    "as_written",
    "at_resume",
    "batch_differences",
    "checked",
    "config_from_values",
    "describe",
    "differences",
    "expand_path",
    "flatten",
    "follows_length",
    "is_own",
    "key_hint",
    "known_names",
    "load_components",
    "load_config",
    "load_written_config",
    "own_components",
    "own_files",
    "to_yaml",
]
