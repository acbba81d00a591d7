"""Every field that a user can set: its type, range, default, meaning, and whether a resumed run may change it.

Contract: the defaults are the recipe of `configs/cifar10_resnet18.yaml`. A field decides the result of a run, and so
must stay what it was when the run is resumed, unless its type is marked `Free` (it says where, how long or how it is
reported) or `Rounding` (it says how the same training is computed: strategies other than `exact` may resume with
another value). Every number has bounds, which are what the code can hold: `values.convert` checks them, and a test that
no number is without.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from dist_cifar.config.marks import (
    MANY,
    Aspect,
    Factor,
    Free,
    Names,
    NodePath,
    NonNegativeInt,
    Options,
    PositiveInt,
    Probability,
    Range,
    Rounding,
    Seconds,
    SharedPath,
)
from dist_cifar.config.optimizer_schema import AverageConfig, MuonConfig, OptimizerConfig, PlateauConfig, ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives and how its processes behave."""

    name: Free[str] = "cifar10_resnet18"
    """Name of the run; the stem of the config file unless it is set."""
    dir: Free[SharedPath | None] = None
    """Run directory: everything that the run writes, and all that a resume needs. Default `runs/<name>`.
    `~` and `$NAME` are expanded, here and in the other paths."""
    seed: Annotated[int, Range(minimum=0, maximum=2**63 - 1)] = 0
    """Seed of the weights, the order of the samples and the augmentation."""
    device: Free[Literal["auto", "cpu", "cuda"]] = "auto"
    """Device of every rank; `auto` takes a GPU where there is one."""
    threads_per_rank: Free[Annotated[int, Range(minimum=1, maximum=1024)] | None] = None
    """CPU threads of one rank; by default the cores of the node divided by its ranks, and 1 in strategy `exact`: there
    the number must stay the same, because it changes how sums are rounded."""
    timeout_seconds: Free[Seconds] = 60.0
    """How long a collective waits for the slowest rank before the job ends with an error."""
    log_every_steps: Free[PositiveInt] = 50
    """Steps between two rows of the log and of `metrics.jsonl`."""
    log_digests: Free[bool] = False
    """Write the SHA-256 of every tensor of the state after every step to `digests.jsonl`. Slow."""
    profile: Free[bool] = False
    """Time the phases of some steps after each start, print them as a table and write it, with a Chrome trace of each
    rank, to `profile/` in the run directory."""
    straggler_factor: Free[Annotated[float, Range(above=1, maximum=10**6)]] = 1.5
    """A rank whose own work takes this many times as long as the median rank's is reported as a straggler."""
    time_limit_seconds: Free[Annotated[float, Range(above=0, maximum=MANY)] | None] = None
    """Seconds after its start at which this job is ended from outside: the run is saved and stopped before that. The
    end time that SLURM sets in `SLURM_JOB_END_TIME` counts too."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images."""

    source: Annotated[str, Names(kind="data_source", known=("cifar10", "cifar100", "folder", "synthetic"))] = "cifar10"
    """`cifar10` and `cifar100`: the official python archives; `folder`: a folder or zip of `train/<class>/*` and
    `test/<class>/*` images; `synthetic`: generated shapes, for tests and the quickstart; `my_data:load`: a function of
    your own that returns the arrays."""
    options: Options = field(default_factory=dict)
    """Arguments of a function of your own."""
    root: Free[SharedPath] = "data"
    """Where the archive is (or is downloaded to), or the folder or zip of `source: folder`."""
    url: Free[str | None] = None
    """Mirror of the official archive, whose hash is checked like the original's."""
    cache_dir: Free[SharedPath | None] = None
    """Where the decoded arrays are cached; default `$XDG_CACHE_HOME/dist_cifar` or `~/.cache/dist_cifar`."""
    stage_dir: Free[NodePath | None] = None
    """Directory local to each node, such as `$SLURM_TMPDIR` or `/dev/shm`, to which one process of the node copies the
    decoded arrays, and from which all read them; null reads the cache itself. `$NAME` and `~` are expanded where the
    process runs. The copy is left there for the next job; clusters empty `$SLURM_TMPDIR` themselves."""
    validation_size: NonNegativeInt = 5000
    """Training images held out, stratified by class, for the plateau and for choosing the best checkpoint. With 0
    the test set is used for both, and the log and the summary say so."""
    synthetic_train_size: Annotated[int, Range(minimum=1, maximum=10**6)] = 5000
    """Training images of `source: synthetic`, the validation images included."""
    synthetic_test_size: Annotated[int, Range(minimum=1, maximum=10**6)] = 1000
    """Test images of `source: synthetic`."""


@dataclass(frozen=True, kw_only=True)
class ResolutionPhase:
    """The size of the training images in the first part of a run."""

    until: Annotated[float, Range(above=0, maximum=1)]
    """The end of this part, as a fraction of the steps of the run."""
    size: Annotated[int, Range(minimum=4, maximum=32)]
    """Height and width in pixels."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """The training augmentation: a policy, and the strengths of its operations in the order in which they are applied.
    Zero switches an operation off. The fields from `rotation_degrees` to `erasing_aspect` belong to the policy
    `default`."""

    policy: Literal["default", "flip_crop", "none"] = "default"
    """`default`: the operations of all fields below; `flip_crop`: the crop, the flip and the cutout; `none`: no
    operation, only the size of `resolution`."""
    backend: Free[Literal["auto", "cpu", "device"]] = "auto"
    """Where the training images are augmented, with the same bits: `device` on the GPU, which then holds them all;
    `cpu` in a thread of the rank; `auto` on the GPU where the rank has one and triton can be imported, else `cpu`."""
    transform: Annotated[str, Names(kind="augmentation", known=())] | None = None
    """`my_augment:fn`: a function of your own, called as `fn(image, generator)` with one uint8 [32, 32, 3] image and a
    `numpy.random.Generator` of its own, before the policy's operations."""
    transform_options: Options = field(default_factory=dict)
    """Further arguments of that function, by name."""
    transform_workers: Free[Annotated[int, Range(minimum=1, maximum=256)]] = 1
    """Processes of each rank that call the function; their number does not change the result."""
    crop_padding: Annotated[int, Range(minimum=0, maximum=8)] | None = None
    """Pixels by which the border is padded by reflection, before a random place of 32x32 is cut out; null is 4 in the
    policy `flip_crop` and 0, no crop, in `default`."""
    flip: Literal["random", "alternating"] = "random"
    """Horizontal flip: `random`, with `flip_probability`; `alternating`, half of the images in the first epoch, the
    other half in the second, and so on in turn."""
    flip_probability: Probability = 0.5
    """Probability of the flip `random`."""
    rotation_degrees: Annotated[float, Range(minimum=0, maximum=180)] = 20.0
    """Rotation by an angle drawn from [-rotation_degrees, rotation_degrees]; nearest neighbour, corners black."""
    brightness: Factor = 0.2
    """Brightness factor drawn from [max(0, 1 - brightness), 1 + brightness]. Brightness, contrast and saturation are
    applied in an order drawn for each image."""
    contrast: Factor = 0.2
    """Contrast factor, likewise."""
    saturation: Factor = 0.2
    """Saturation factor, likewise."""
    sharpness_factor: Factor = 2.0
    """Sharpness factor: 0 blurs, 1 changes nothing, 2 sharpens."""
    sharpness_probability: Probability = 0.2
    """Probability of the sharpness change."""
    erasing_probability: Probability = 0.75
    """Probability that a box of the normalised image is set to zero."""
    erasing_area: tuple[Probability, Probability] = (0.02, 0.33)
    """Range of the box's share of the image's area."""
    erasing_aspect: tuple[Aspect, Aspect] = (0.3, 3.3)
    """Range of the box's ratio of height to width."""
    cutout_size: Annotated[int, Range(minimum=0, maximum=32)] = 0
    """Side in pixels of a square of the normalised image, at a random place inside it, that is set to zero; policies
    `default` and `flip_crop`."""
    resolution: tuple[ResolutionPhase, ...] = ()
    """Sizes of the training images before the last part of the run, which has 32 pixels, e.g. `[{until: 0.25, size:
    20}, {until: 0.5, size: 24}]`. Images are averaged over areas just before they are normalised; boxes shrink with
    them. A network must take these sizes. Evaluation has 32 pixels."""


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """Training on pairs of images of the global batch and on both of their labels."""

    name: Literal["none", "mixup", "cutmix"] = "none"
    """`mixup`: the weighted sum of two images; `cutmix`: an image with a box of another one."""
    alpha: Annotated[float, Range(minimum=0.001, maximum=4)] = 1.0
    """The share of the first image is drawn from Beta(alpha, alpha) for each step: about a half for large values, near
    0 or 1 for small ones."""
    off_last_epochs: Annotated[float, Range(minimum=0, maximum=MANY)] = 0.0
    """Epochs at the end of the run without mixing."""


Width = Annotated[int, Range(minimum=1, maximum=2**16)]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network."""

    name: Annotated[
        str,
        Names(
            kind="model",
            known=(
                *("resnet18", "resnet34", "resnet50", "resnet8", "resnet20", "resnet32", "resnet44", "resnet56"),
                *("wrn16_4", "wrn28_10", "wrn40_4", "wideresnet", "speednet"),
            ),
        ),
    ] = "resnet18"
    """ResNet-18, -34, -50 with the CIFAR stem (3x3 first convolution, no max-pool), or He's CIFAR ResNets 8 to 56;
    `wrn16_4`, `wrn28_10`, `wrn40_4`: wide ResNets, and `wideresnet` one of any `depth` and `widen_factor`; `speednet`:
    the small network of airbench, which trains fastest; `my_models:Net`: a class or function of your own; `timm:NAME`
    and `torchvision:NAME`: one of those packages."""
    options: Options = field(default_factory=dict)
    """Arguments of a network that is from outside this package, e.g. `model.options.width=256`."""
    norm: Literal["batch", "group"] = "batch"
    """Normalisation of the ResNets of this package: BatchNorm, or GroupNorm with 8 groups, which does not depend on the
    other samples of a batch."""
    depth: PositiveInt | None = None
    """`wideresnet`: its layers, 6 n + 4, by default 28. `speednet`: the convolutions of each of its groups, 1 to 3, by
    default 2; with 3 the first activation of a group is added before its last one."""
    widen_factor: Annotated[int, Range(minimum=1, maximum=128)] = 10
    """`wideresnet`: its three groups have 16, 32 and 64 times as many channels as this."""
    widths: tuple[Width, Width, Width] = (64, 256, 256)
    """`speednet`: the channels of its three groups."""
    whitening_eps: Annotated[float, Range(minimum=1e-12, maximum=100)] = 5e-4
    """`speednet`: what is added to the variances by which its first layer divides. The filters of that layer whiten
    patches of 5,000 training images, and are not trained."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The samples of one optimizer step. Setting one of `global_size` and `per_rank_size` unsets the other."""

    global_size: PositiveInt | None = 1024
    """Samples of one step over all ranks: in `exact` a multiple of `strategy.virtual_ranks`, in `deepspeed` of the
    world size."""
    per_rank_size: PositiveInt | None = None
    """Samples of one step on each rank: the global batch then grows with the world size. Not in `exact`."""
    max_micro_batch: PositiveInt | None = None
    """Most samples of one forward and backward pass. A larger share of a rank, or of a virtual rank in strategy
    `exact`, is accumulated over passes of equal size."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and loss of the training."""

    epochs: Free[Annotated[float, Range(above=0, maximum=MANY)]] = 100.0
    """Epochs over the training split, in whole global batches: the images that are left over are dropped, different
    ones in each epoch. With a fraction, the last step is the one that completes it. Not free if a step depends on the
    length of the run, as with a cosine or a triangle (docs/runs.md)."""
    max_steps: Free[PositiveInt | None] = None
    """Stop after this many steps even if the epochs are not complete. Fixed at resume whenever
    `epochs` is."""
    patience_evaluations: Free[PositiveInt | None] = None
    """End the run early, as done, when so many evaluations in a row have not improved on the best accuracy."""
    label_smoothing: Annotated[float, Range(minimum=0, maximum=1)] = 0.0
    """Label smoothing of the training loss; evaluation has none."""


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """How the replicas of the model are kept equal."""

    name: Rounding[Annotated[str, Names(kind="strategy", known=("exact", "ddp", "deepspeed", "fsdp"))]] = "exact"
    """`exact` gives the same weights, to the last bit, for every world size; `ddp` is Accelerate's
    DistributedDataParallel; `deepspeed` is DeepSpeed's ZeRO, an extra to install; `fsdp` is torch's `fully_shard`. A
    run may be resumed with another strategy. `my_strategies:Mine`: a class of your own."""
    virtual_ranks: Rounding[Annotated[int, Range(minimum=1, maximum=2**16)]] = 8
    """Strategy `exact`: the number of slices of the global batch, each computed by itself; it divides the batch. It
    changes the result, as the batch size does. Any number of ranks up to it shares them, and does not affect the
    result."""
    exchange: Free[Literal["auto", "flat"]] = "auto"
    """Strategy `exact`: `auto` exchanges within hosts first and then between them, in groups of at most eight, where
    ranks are placed so that it can. That sends a fraction of the bytes between hosts, and fewer messages; `flat` does
    not. The bits are the same."""
    grad_compression: Rounding[Literal["none", "bf16"]] = "none"
    """Strategy `ddp`: `bf16` rounds gradients to half their size before they are sent."""
    zero_stage: Rounding[Annotated[int, Range(minimum=0, maximum=3)]] = 1
    """Strategy `deepspeed`: what is sharded over the ranks. 0: nothing; 1: the optimizer's state; 2: the gradients too;
    3: the parameters too."""


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """The arithmetic of a forward and backward pass."""

    precision: Literal["auto", "fp32", "bf16"] = "bf16"
    """`bf16` is autocast with fp32 weights and fp32 gradients; `auto` takes bf16 where the GPU or the
    processor has instructions for it. The run directory keeps what was chosen at the first start."""
    compile: Rounding[Literal["auto", "on", "off"]] = "auto"
    """`torch.compile` of the module before it is wrapped. `auto` is on for GPUs with triton in strategy
    `ddp`."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on the validation split while training, and on the test set at the end."""

    every_epochs: PositiveInt = 1
    """Epochs between two evaluations; the end of the training is always evaluated."""
    select: Literal["best", "last"] = "best"
    """The weights that are tested at the end and read by `predict` and `export`: those with the best accuracy on the
    validation split, or the last ones, which is right for a schedule that ends with a small learning rate."""
    batch_size: PositiveInt = 500
    """Samples of one forward pass, for every world size: the result does not depend on the number of ranks."""
    tta: Free[Literal["none", "mirror", "mirror_translate"]] = "none"
    """Test-time augmentation of the final evaluation, whose result is given beside the plain one: the mean of the
    logits of an image and its mirror image, or of six views, among which are those shifted by one pixel to the lower
    right and to the upper left."""
    tta_share: Free[Probability] = 1.0
    """`tta`: the share of the test images, the least certain first, whose views are averaged; the others keep their
    plain logits."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints are written after every evaluation, when a signal stops the run, and as set here."""

    every_steps: Free[PositiveInt | None] = None
    """Steps between two checkpoints within an epoch; null writes none there."""
    every_seconds: Free[Seconds | None] = None
    """Seconds between two checkpoints, wherever in an epoch; null does not look at the time. With it, an evaluation is
    followed by a checkpoint only if its weights are the best so far: that saves writing where epochs are short."""
    keep_last: Free[PositiveInt] = 2
    """How many of the newest checkpoints to keep."""
    keep_best: Free[PositiveInt] = 1
    """How many best-so-far checkpoints to keep in addition."""
    keep_every_steps: Free[PositiveInt | None] = None
    """Checkpoints of steps that are a multiple of this are never deleted; null deletes them like the others. This alone
    writes no checkpoint."""
    on_write_error: Free[Literal["raise", "warn"]] = "raise"
    """When the disk is full or cannot be written: `raise` ends the run; `warn` logs a warning and keeps training, with
    the earlier checkpoints. The checkpoint with which a signal stops the run must succeed in either case."""


TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio")
"""Accelerate's trackers."""
TrackerName = Annotated[str, Names(kind="tracker", known=TRACKERS)]


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """W&B and other trackers; `metrics.jsonl` and `summary.json` are always written."""

    also: Free[tuple[TrackerName, ...]] = ()
    """Other trackers, by way of Accelerate; each is a package to install. `my_trackers:Slack`: a class of your own."""
    wandb: Free[Literal["auto", "online", "offline", "disabled"]] = "auto"
    """`auto` is `online` where wandb is installed and a key is configured, else `disabled`. An `online` run that
    cannot reach the server continues offline."""
    wandb_project: Free[str] = "dist_cifar"
    """W&B project."""
    wandb_entity: Free[str | None] = None
    """W&B user or team; by default the one that wandb chooses."""
    wandb_group: Free[str | None] = None
    """W&B group of runs that belong together."""
    wandb_job_type: Free[str | None] = None
    """W&B job type, which distinguishes the runs of a group."""
    wandb_notes: Free[str | None] = None
    """W&B notes on the run."""
    wandb_tags: Free[tuple[str, ...]] = ()
    """W&B tags."""
    wandb_checkpoints: Free[bool] = False
    """At the end of the run, upload the best and the last checkpoint to W&B as artifacts with the aliases `best` and
    `last`. The job ends when they are uploaded, or after ten minutes."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. Every section is a dataclass of its own."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    muon: MuonConfig = field(default_factory=MuonConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    plateau: PlateauConfig = field(default_factory=PlateauConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


SECTIONS: dict[str, type] = dict(typing.get_type_hints(Config))
"""The dataclass of each section."""
HINTS: dict[str, dict[str, Any]] = {
    name: typing.get_type_hints(section, include_extras=True) for name, section in SECTIONS.items()
}
"""`{section: {field: annotated type}}`."""
