"""The configuration: frozen dataclasses, read from YAML and `key=value` overrides, checked before anything starts.

Contract: `load_config(path, overrides)` returns a `Config` in which every value has its declared type and range, or
raises `ConfigError` with one line that names the path of the key, the value found and what to do. The defaults are the
recipe of `configs/cifar10_resnet18.yaml`. This module imports no torch.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from dist_cifar.errors import ConfigError, nearest, nearest_path


@dataclass(frozen=True)
class Range:
    """Closed or half-open bounds of a number; `None` is no bound."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            (self.minimum is None or number >= self.minimum)
            and (self.maximum is None or number <= self.maximum)
            and (self.above is None or number > self.above)
        )

    def __str__(self) -> str:
        bounds = ((">=", self.minimum), (">", self.above), ("<=", self.maximum))
        return " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)


PositiveInt = Annotated[int, Range(minimum=1)]
NonNegativeInt = Annotated[int, Range(minimum=0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(minimum=0)]
Probability = Annotated[float, Range(minimum=0, maximum=1)]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives and how its processes behave."""

    name: str = "cifar10_resnet18"
    """Name of the run; the stem of the config file unless it is set."""
    dir: str | None = None
    """Run directory: everything that the run writes, and all that a resume needs. Default `runs/<name>`."""
    seed: NonNegativeInt = 0
    """Seed of the weights, the order of the samples and the augmentation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of every rank; `auto` takes a GPU where there is one."""
    threads_per_rank: PositiveInt | None = None
    """CPU threads of one rank; by default the cores of the node divided by its ranks, and 1 in strategy `exact`: there
    the number must stay the same, because it changes how sums are rounded."""
    timeout_seconds: PositiveFloat = 60.0
    """How long a collective waits for the slowest rank before the job ends with an error."""
    log_every_steps: PositiveInt = 50
    """Steps between two rows of the log and of `metrics.jsonl`."""
    log_digests: bool = False
    """Write the SHA-256 of every tensor of the state after every step to `digests.jsonl`. Slow."""
    profile: bool = False
    """Time the phases of some steps after each start, print a table of them and write it, with a chrome trace of each
    rank, to `profile/` in the run directory."""
    straggler_factor: Annotated[float, Range(above=1)] = 1.5
    """The log names a rank that takes this many times the median rank's time before it can be waited for."""
    time_limit_seconds: PositiveFloat | None = None
    """Seconds after its start at which this job will be ended: it saves and stops before. SLURM's end time counts
    too, where the job is told it."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images."""

    source: Literal["cifar10", "cifar100", "folder", "synthetic"] = "cifar10"
    """`cifar10` and `cifar100`: the official python archives; `folder`: a folder or zip of `train/<class>/*` and
    `test/<class>/*` images; `synthetic`: generated shapes, for tests and the quickstart."""
    root: str = "data"
    """Where the archive is (or is downloaded to), or the folder or zip of `source: folder`."""
    url: str | None = None
    """Mirror of the official archive; its hash is checked all the same."""
    cache_dir: str | None = None
    """Where the decoded arrays are cached; default `$XDG_CACHE_HOME/dist_cifar` or `~/.cache/dist_cifar`."""
    stage_dir: str | None = None
    """Directory local to each node, `$SLURM_TMPDIR` or `/dev/shm` for two, to which one process of the node copies the
    decoded arrays, and from which all read them; null reads the cache itself. `$NAME` and `~` are expanded where the
    process runs. The copy is left there for the next job; clusters empty `$SLURM_TMPDIR` themselves."""
    validation_size: NonNegativeInt = 5000
    """Training images held out, stratified by class, for the plateau and for choosing the best checkpoint. With 0
    the test set takes that part, and the log and the summary say so."""
    synthetic_train_size: PositiveInt = 5000
    """Training images of `source: synthetic`, the validation images included."""
    synthetic_test_size: PositiveInt = 1000
    """Test images of `source: synthetic`."""
    device_augment: Literal["auto", "cpu", "device"] = "auto"
    """Where the training images are augmented, with the same bits: `device` on the GPU, which then holds them all;
    `cpu` in a thread of the rank; `auto` on the GPU where the rank has one and triton can be imported, else `cpu`."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """The training augmentation: a policy, and the strengths of its operations in the order in which they are applied.
    Zero switches an operation off. All fields below `flip_probability` belong to the policy `seed`."""

    policy: Literal["seed", "flip_crop", "none"] = "seed"
    """`seed`: the operations of all fields below; `flip_crop`: a random crop of 32x32 after padding by 4 in reflection,
    then the flip, and no other field counts; `none`: the images as they are, and no field counts."""
    flip_probability: Probability = 0.5
    """Horizontal flip; policies `seed` and `flip_crop`."""
    rotation_degrees: Annotated[float, Range(minimum=0, maximum=180)] = 20.0
    """Rotation by an angle drawn from [-rotation_degrees, rotation_degrees]; nearest neighbour, corners black."""
    brightness: NonNegativeFloat = 0.2
    """Brightness factor drawn from [max(0, 1 - brightness), 1 + brightness]. Brightness, contrast and saturation are
    applied in an order drawn for each image."""
    contrast: NonNegativeFloat = 0.2
    """Contrast factor, likewise."""
    saturation: NonNegativeFloat = 0.2
    """Saturation factor, likewise."""
    sharpness_factor: NonNegativeFloat = 2.0
    """Sharpness factor: 0 blurs, 1 changes nothing, 2 sharpens."""
    sharpness_probability: Probability = 0.2
    """Probability of the sharpness change."""
    erasing_probability: Probability = 0.75
    """Probability that a box of the normalised image is set to zero."""
    erasing_area: tuple[Probability, Probability] = (0.02, 0.33)
    """Range of the box's share of the image's area."""
    erasing_aspect: tuple[PositiveFloat, PositiveFloat] = (0.3, 3.3)
    """Range of the box's ratio of height to width."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network."""

    name: Literal["resnet18", "resnet34", "resnet50", "resnet20", "resnet32", "resnet44", "resnet56"] = "resnet18"
    """ResNet-18, -34, -50 with the CIFAR stem (3x3 first convolution, no max-pool), or He's CIFAR ResNets 20 to 56."""
    norm: Literal["batch", "group"] = "batch"
    """Normalisation: BatchNorm, or GroupNorm with 8 groups, which does not look at the other samples of a batch."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The samples of one optimizer step. Setting one of `global_size` and `per_rank_size` unsets the other."""

    global_size: PositiveInt | None = 1024
    """Samples of one step over all ranks; the world size must divide it."""
    per_rank_size: PositiveInt | None = None
    """Samples of one step on each rank: the global batch then grows with the world size."""
    max_micro_batch: PositiveInt | None = None
    """Most samples of one forward and backward pass; a rank's share of the batch that is larger, or a virtual rank's
    in strategy `exact`, is accumulated over passes of equal size."""
    virtual_ranks: PositiveInt = 8
    """Strategy `exact`: how many slices of the global batch are computed each by itself, a power of two that divides
    it. It decides the result, with the batch size; the world size divides it and decides nothing."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam, its learning rate and the clipping of its gradients."""

    lr: PositiveFloat = 1e-3
    """Base learning rate: what a global batch of `lr_base_batch` samples gets."""
    lr_rule: Literal["sqrt", "linear", "none"] = "sqrt"
    """LR = lr x (global batch / lr_base_batch) to the power 1/2 (`sqrt`, right for Adam), 1 (`linear`) or 0."""
    lr_base_batch: PositiveInt = 128
    """The global batch for which `lr` was tuned."""
    warmup_epochs: NonNegativeFloat = 5.0
    """Epochs over which the learning rate rises linearly to its full value."""
    weight_decay: NonNegativeFloat = 1e-4
    """L2 penalty that Adam adds to the gradient."""
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    clip_norm: PositiveFloat | None = 1.0
    """Gradients are scaled to this global L2 norm when theirs is larger; null switches it off."""


@dataclass(frozen=True, kw_only=True)
class PlateauConfig:
    """ReduceLROnPlateau: the learning rate is cut when the watched metric has stopped improving."""

    metric: Literal["loss", "accuracy"] = "loss"
    """Metric of the validation split that is watched."""
    factor: Annotated[float, Range(above=0, maximum=1)] = 0.5
    """What a cut multiplies the learning rate by; 1 switches the plateau off."""
    patience_evaluations: NonNegativeInt = 5
    """Evaluations without improvement that are let pass before a cut."""
    threshold: NonNegativeFloat = 1e-4
    """Relative change that counts as an improvement."""
    cooldown_evaluations: NonNegativeInt = 0
    """Evaluations after a cut that are not counted."""
    min_lr: NonNegativeFloat = 0.0
    """The learning rate is never cut below this."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and arithmetic of the training."""

    epochs: PositiveInt = 100
    """Passes over the training split."""
    max_steps: PositiveInt | None = None
    """Stop after this many steps even if the epochs are not complete."""
    strategy: Literal["exact", "ddp", "deepspeed", "fsdp"] = "exact"
    """How replicas are kept in step: `exact` gives the same weights, to the last bit, for every world size; `ddp` is
    Accelerate's DistributedDataParallel; `deepspeed` is DeepSpeed's ZeRO, an extra to install; `fsdp` is torch's
    `fully_shard`. A run may change its strategy at a resume."""
    zero_stage: Annotated[int, Range(minimum=0, maximum=3)] = 1
    """Strategy `deepspeed`: what is cut among the ranks. 0: nothing; 1: Adam's state; 2: the gradients too; 3: the
    parameters too."""
    precision: Literal["auto", "fp32", "bf16"] = "bf16"
    """`bf16` is autocast with fp32 weights and fp32 gradients; `auto` measures a layer in both at the first start and
    takes bf16 where it is faster. The run directory keeps what was chosen."""
    compile: Literal["auto", "on", "off"] = "auto"
    """`torch.compile` of the module before it is wrapped. `auto` is on for GPUs with triton, but not in
    strategy `exact`."""
    grad_compression: Literal["none", "bf16"] = "none"
    """Strategy `ddp`: `bf16` rounds gradients to half their size before they are sent."""
    label_smoothing: Annotated[float, Range(minimum=0, maximum=1)] = 0.0
    """Label smoothing of the training loss; evaluation has none."""
    non_finite: Literal["raise", "skip"] = "raise"
    """A step with a gradient that is not finite changes nothing, on any rank. Then `raise` ends the run at the next
    log or checkpoint, and `skip` goes on."""
    max_skipped_steps: PositiveInt = 10
    """With `non_finite: skip`, more skipped steps than this end the run."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on the validation split while training, and on the test set at the end."""

    every_epochs: PositiveInt = 1
    """Epochs between two evaluations; the end of the training is always evaluated."""
    batch_size: PositiveInt = 500
    """Samples of one forward pass. It does not depend on the world size, and so neither does the result."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints are written after every evaluation, when a signal stops the run, and as said here."""

    every_steps: PositiveInt | None = None
    """Steps between two checkpoints within an epoch; null writes none there."""
    keep_last: PositiveInt = 2
    """Newest checkpoints kept."""
    keep_best: PositiveInt = 1
    """Kept beside them: the newest of those that were the best so far when they were saved."""
    keep_every_steps: PositiveInt | None = None
    """Checkpoints of steps that are a multiple of this are never deleted; null deletes them like the others. It makes
    no checkpoint by itself."""
    on_write_error: Literal["raise", "warn"] = "raise"
    """When the disk is full or cannot be written: `raise` ends the run; `warn` says so and trains on, with the earlier
    checkpoints. The save with which a signal stops the run must succeed all the same."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """W&B and other trackers; `metrics.jsonl` and `summary.json` are always written."""

    also: tuple[
        Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio"], ...
    ] = ()
    """Other trackers, through Accelerate's; each is a package to install."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto` is `online` where wandb is installed and a key is configured, else `disabled`. An `online` run that
    cannot reach the server goes on offline."""
    wandb_project: str = "dist_cifar"
    """W&B project."""
    wandb_entity: str | None = None
    """W&B user or team; default as wandb decides."""
    wandb_group: str | None = None
    """W&B group of runs that belong together."""
    wandb_job_type: str | None = None
    """W&B job type, which tells runs of a group apart."""
    wandb_notes: str | None = None
    """W&B notes on the run."""
    wandb_tags: tuple[str, ...] = ()
    """W&B tags."""
    wandb_checkpoints: bool = False
    """At the end of the run, the best and the last checkpoint go to W&B as artifacts with the aliases `best` and
    `last`. The job ends when they are uploaded, or after ten minutes."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. Every section is a dataclass of its own."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    plateau: PlateauConfig = field(default_factory=PlateauConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


SECTIONS: dict[str, type] = {name: hint for name, hint in typing.get_type_hints(Config).items()}
_HINTS: dict[str, dict[str, Any]] = {
    name: typing.get_type_hints(section, include_extras=True) for name, section in SECTIONS.items()
}

CHANGEABLE_AT_RESUME = frozenset(
    {
        "run.name",
        "run.dir",
        "run.device",
        "run.threads_per_rank",
        "run.timeout_seconds",
        "run.log_every_steps",
        "run.log_digests",
        "run.profile",
        "run.straggler_factor",
        "run.time_limit_seconds",
        "data.root",
        "data.url",
        "data.cache_dir",
        "data.stage_dir",
        "data.device_augment",
        "train.epochs",
        "train.max_steps",
        "checkpoint.every_steps",
        "checkpoint.keep_last",
        "checkpoint.keep_best",
        "checkpoint.keep_every_steps",
        "checkpoint.on_write_error",
    }
    | {f"tracking.{name}" for name in _HINTS["tracking"]}
)
"""Keys that a resumed run may set otherwise: they say where and how long, not what is trained."""

ROUNDING_AT_RESUME = frozenset(
    {"train.strategy", "train.zero_stage", "train.compile", "train.grad_compression", "batch.virtual_ranks"}
)
"""Keys that say how the same training is computed. Outside of `exact` a resumed run may set them otherwise."""


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The defaults, then the YAML file at `path`, then each `key=value` of `overrides`.

    Raises `ConfigError` for a missing or unreadable file, an unknown key, a wrong type or an impossible value.
    """
    values: dict[str, Any] = {}
    if path is not None:
        _update(values, _read_yaml(Path(path)))
    _update(values, _parse_overrides(overrides))
    if path is not None:
        values.setdefault("run.name", Path(path).stem)
    return config_from_values(values)


def config_from_values(values: Mapping[str, Any]) -> Config:
    """A `Config` from dotted keys (`{"optimizer.lr": 1e-3}`), each value already of its type; the rest are defaults."""
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections[section][name] = value
    config = Config(**{name: SECTIONS[name](**fields) for name, fields in sections.items()})
    _check(config)
    if config.run.dir is None:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=f"runs/{config.run.name}"))
    return config


def flatten(config: Config) -> dict[str, Any]:
    """Dotted keys to values, in the order of the declaration; tuples as lists, ready for JSON and YAML."""
    return {
        f"{section}.{name}": list(value) if isinstance(value, tuple) else value
        for section, fields in dataclasses.asdict(config).items()
        for name, value in fields.items()
    }


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal `Config`."""
    lines: list[str] = []
    for key, value in flatten(config).items():
        section, _, name = key.partition(".")
        if f"{section}:" not in lines:
            lines.append(f"{section}:")
        lines.append(f"  {name}: {_show(value)}")
    return "\n".join(lines) + "\n"


def differences(old: Mapping[str, Any], config: Config) -> dict[str, str]:
    """`key: old -> new` of each decisive key in which `config` differs from the flattened config `old`, by key."""
    new = flatten(config)
    keys = [key for key in dict.fromkeys([*old, *new]) if key not in CHANGEABLE_AT_RESUME]
    return {
        key: f"{key}: {_show(old.get(key))} -> {_show(new.get(key))}" for key in keys if old.get(key) != new.get(key)
    }


def describe() -> list[tuple[str, str, str, str]]:
    """(key, type, default, docstring) of every field, in the order of the declaration."""
    docs = _field_docs()
    defaults = flatten(Config())
    return [
        (f"{section}.{name}", _type_name(hint), _show(defaults[f"{section}.{name}"]), docs[section][name])
        for section, hints in _HINTS.items()
        for name, hint in hints.items()
    ]


# --- reading -----------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml says nothing of its types
    """Safe YAML that reads `1e-3` as a number (as YAML 1.2 does) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConfigError(f"line {key_node.start_mark.line + 1}: key {key!r} is not a string; write a name")
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice; remove one")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{origin}: line {line}: not YAML: {error.problem}; mend the line") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{origin}: {' '.join(str(error).split())}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = nearest_path(path, Path("configs"))
        hint = f"did you mean {near}?" if near else "give a YAML file"
        raise ConfigError(f"--config {path}: no such file; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read ({error}); give a YAML file") from None
    tree = _parse_yaml(text, str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {_show(tree)}, not sections; write `section:` and `  key: value` below it")
    values: dict[str, Any] = {}
    for section, fields in tree.items():
        if section not in SECTIONS:
            raise ConfigError(f"{path}: {_unknown(section, SECTIONS)}")
        if fields is None:
            continue
        if not isinstance(fields, dict):
            raise ConfigError(f"{path}: {section}: found {_show(fields)}; write its keys below it, one a line")
        for name, value in fields.items():
            key = f"{section}.{name}"
            values[key] = _convert(_hint(key, str(path)), value, key, str(path))
    return values


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"argument {override!r}: not an option and not key=value; write e.g. train.epochs=3")
        hint = _hint(key, "command line")
        value = _parse_yaml(text, f"command line: {key}")
        if _accepts_text(hint) and not (value is None and _is_optional(hint)):
            value = text  # run.name=007 is a name, not a number
        if key in values:
            raise ConfigError(f"command line: {key} is given twice; give it once")
        values[key] = _convert(hint, value, key, "command line")
    return values


def _update(values: dict[str, Any], layer: dict[str, Any]) -> None:
    """Puts a layer over `values`. A layer that sets one of the two batch sizes unsets the other."""
    sizes = ("batch.global_size", "batch.per_rank_size")
    values.update(layer)
    for size, other in (sizes, sizes[::-1]):
        if layer.get(size) is not None and other not in layer:
            values[other] = None


def _hint(key: str, origin: str) -> Any:
    section, _, name = key.partition(".")
    if section in _HINTS and name in _HINTS[section]:
        return _HINTS[section][name]
    known = [f"{section}.{name}" for section, hints in _HINTS.items() for name in hints]
    raise ConfigError(f"{origin}: {_unknown(key, known)}")


def _unknown(key: str, known: typing.Iterable[str]) -> str:
    known = list(known)
    by_last_part = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    suggestion = _nearest(key, known) or (f"; did you mean {by_last_part[0]}?" if by_last_part else "")
    return f"{key}: unknown key{suggestion or ';'} `python -m dist_cifar train --help` lists them all"


def _nearest(word: str, known: typing.Iterable[str]) -> str:
    match = nearest(word, known)
    return f"; did you mean {match}?" if match else ""


# --- types -------------------------------------------------------------------------------------------------------


_SAME = {"gpu": "cuda", "float32": "fp32", "bfloat16": "bf16"}
"""Words of other programs; by its letters alone, `gpu` is next to `cpu`."""


def _convert(hint: Any, value: Any, key: str, origin: str) -> Any:
    """`value` as the type of `hint`, or `ConfigError`. An int is a float too; nothing else is turned into another."""
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(arguments[0], value, key, origin)
    if kind is Annotated:
        number = _convert(arguments[0], value, key, origin)
        if number not in arguments[1]:
            raise ConfigError(f"{origin}: {key}: must be {arguments[1]}, found {_show(value)}")
        return number
    if kind is Literal:
        if isinstance(value, bool) and "on" in arguments:
            value = "on" if value else "off"  # YAML 1.1 takes the bare words for true and false
        if value in arguments:
            return value
        hint = _nearest(_SAME.get(str(value), str(value)), arguments)
        raise ConfigError(f"{origin}: {key}: must be one of {', '.join(arguments)}, found {_show(value)}{hint}")
    if kind is tuple:
        many = arguments[-1] is Ellipsis
        if not isinstance(value, list | tuple) or (not many and len(value) != len(arguments)):
            wanted = "a list" if many else f"a list of {len(arguments)}"
            raise ConfigError(f"{origin}: {key}: must be {wanted}, found {_show(value)}; write e.g. [a, b]")
        hints = [arguments[0]] * len(value) if many else arguments
        return tuple(_convert(hint, item, key, origin) for hint, item in zip(hints, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise ConfigError(f"{origin}: {key}: must be {_type_name(hint)}, found {_show(value)}")
    return value


def _is_optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _accepts_text(hint: Any) -> bool:
    return hint is str or typing.get_origin(hint) is Literal or (_is_optional(hint) and str in typing.get_args(hint))


def _type_name(hint: Any) -> str:
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        return " or ".join(_type_name(argument) for argument in arguments)
    if kind is Annotated:
        return f"{_type_name(arguments[0])} {arguments[1]}"
    if kind is Literal:
        return " | ".join(arguments)
    if kind is tuple:
        inside = (
            f"{_type_name(arguments[0])}, ..."
            if arguments[-1] is Ellipsis
            else ", ".join(_type_name(argument) for argument in arguments)
        )
        return f"[{inside}]"
    return {bool: "true or false", int: "whole number", float: "number", str: "text", type(None): "null"}[hint]


def _show(value: Any) -> str:
    """A value as YAML would write it, on one line, so that what is printed can be typed."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _check(config: Config) -> None:
    """What no single field can say of itself."""
    batch, augment, data = config.batch, config.augment, config.data
    if (batch.global_size is None) == (batch.per_rank_size is None):
        both = "both" if batch.global_size is not None else "neither"
        raise ConfigError(
            f"batch: {both} of global_size and per_rank_size set ({_show(batch.global_size)},"
            f" {_show(batch.per_rank_size)}); set exactly one, the other null"
        )
    if config.train.strategy == "exact":
        if batch.global_size is None:
            raise ConfigError(
                "batch.per_rank_size: in train.strategy=exact nothing depends on the world size, the batch neither;"
                " set batch.global_size"
            )
        if batch.virtual_ranks & (batch.virtual_ranks - 1):
            raise ConfigError(f"batch.virtual_ranks: must be a power of two, found {batch.virtual_ranks}; write 8")
        if batch.global_size % batch.virtual_ranks:
            raise ConfigError(
                f"batch.global_size: {batch.global_size} samples cannot be shared equally by"
                f" batch.virtual_ranks={batch.virtual_ranks}; set a multiple of it"
            )
    for name in ("erasing_area", "erasing_aspect"):
        low, high = getattr(augment, name)
        if low > high:
            raise ConfigError(f"augment.{name}: must rise, found [{low}, {high}]; write [{high}, {low}]")
    if any(beta >= 1 for beta in config.optimizer.betas):
        raise ConfigError(f"optimizer.betas: must be < 1, found {_show(list(config.optimizer.betas))}")
    if data.source == "synthetic" and data.validation_size >= data.synthetic_train_size:
        raise ConfigError(
            f"data.validation_size: {data.validation_size} leaves no training image of"
            f" data.synthetic_train_size={data.synthetic_train_size}; make it smaller"
        )
    if not config.run.name or "/" in config.run.name:
        raise ConfigError(f"run.name: must be a name without '/', found {_show(config.run.name)}")


def _field_docs() -> dict[str, dict[str, str]]:
    """The docstring under each field: {section: {field: text}}."""
    by_class = {section.__name__: name for name, section in SECTIONS.items()}
    docs: dict[str, dict[str, str]] = {}
    for node in ast.parse(Path(__file__).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name in by_class:
            docs[by_class[node.name]] = {
                ast.unparse(statement.target): " ".join(ast.literal_eval(text.value).split())
                for statement, text in zip(node.body, node.body[1:], strict=False)
                if isinstance(statement, ast.AnnAssign) and isinstance(text, ast.Expr)
            }
    return docs
