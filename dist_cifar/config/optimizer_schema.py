"""The fields of the sections that say how the weights are changed: the optimizer, Muon, the schedule, the plateau.

Contract: that of `schema`, to which these sections belong.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from dist_cifar.config.marks import (
    MANY,
    Beta,
    Names,
    NonNegativeInt,
    Options,
    PositiveInt,
    Probability,
    Range,
    SmallFloat,
)


@dataclass(frozen=True, kw_only=True)
class GroupRule:
    """What holds for the parameters whose names match a pattern."""

    match: str
    """A pattern for names of parameters as a shell has them for files: `fc.*`, `*.bn?.bias`, `*`."""
    lr_scale: Annotated[float, Range(minimum=0, maximum=10_000)] = 1.0
    """Factor on the learning rate of these parameters."""
    decay_scale: Annotated[float, Range(minimum=0, maximum=10_000)] = 1.0
    """Factor on their weight decay."""
    epochs: Annotated[float, Range(above=0, maximum=MANY)] | None = None
    """These parameters are trained for so many epochs, in which their learning rate falls linearly to 0, and then
    frozen, so that their gradient costs nothing. null: for the whole run. Strategies `exact` and `ddp`."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer, its learning rate and the clipping of its gradients."""

    name: Annotated[str, Names(kind="optimizer", known=("adam", "adamw", "sgd", "muon"))] = "adam"
    """`adam` and `adamw`, of which `betas` and `eps` are the settings; `sgd` (`momentum`, `nesterov`,
    `decoupled_decay`); `muon` for filters (section `muon`), with another one for the rest; `torch.optim:RMSprop` or
    `my_optimizers:Lion`: a class of torch's kind, made from the parameters, `lr` and the options."""
    options: Options = field(default_factory=dict)
    """Arguments of an optimizer that is not of this package, e.g. `optimizer.options.alpha=0.9`."""
    lr: SmallFloat = 1e-3
    """Base learning rate: what a global batch of `lr_base_batch` samples gets."""
    lr_rule: Literal["auto", "sqrt", "linear", "none"] = "auto"
    """LR = lr x (global batch / lr_base_batch) to the power 1/2 (`sqrt`), 1 (`linear`) or 0 (`none`). `auto` is
    `linear` for `sgd` and `muon`, else `sqrt`."""
    lr_base_batch: PositiveInt = 128
    """The global batch for which `lr` was tuned."""
    warmup_epochs: Annotated[float, Range(minimum=0, maximum=MANY)] = 5.0
    """Epochs over which the learning rate rises linearly to its full value; not of the schedule `triangle`."""
    weight_decay: Annotated[float, Range(minimum=0, maximum=10_000)] = 1e-4
    """`adam` and `sgd` add this times the weights to the gradient, which is an L2 penalty. `adamw`, `sgd` with
    `decoupled_decay`, and `muon` for its filters multiply the weights by 1 - lr x weight_decay instead."""
    decay_norms_and_biases: bool = True
    """Whether parameters of one dimension, which are the biases and those of normalisations, decay too."""
    groups: tuple[GroupRule, ...] = ()
    """Rules for parameters by name, of which the first that matches holds, e.g. `[{match: fc.*, lr_scale: 2.0,
    decay_scale: 0.0}]`. Each must match a parameter."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""
    eps: SmallFloat = 1e-8
    """Adam's epsilon."""
    momentum: Beta = 0.9
    """SGD's momentum."""
    nesterov: bool = True
    """Whether SGD's momentum is Nesterov's."""
    decoupled_decay: bool = False
    """Whether SGD's weight decay acts on the weights alone, without momentum."""
    max_grad_norm: Annotated[float, Range(minimum=1e-6, maximum=1e20)] | None = 1.0
    """Gradients are scaled to this global L2 norm when theirs is larger; null switches it off."""
    non_finite: Literal["raise", "skip"] = "raise"
    """A step with a gradient that is not finite changes nothing, on any rank. Then `raise` ends the run at the next
    log or checkpoint, and `skip` continues."""
    max_skipped_steps: PositiveInt = 10
    """With `non_finite: skip`, more skipped steps than this end the run."""


Coefficient = Annotated[float, Range(minimum=-100, maximum=100)]


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """An average of the weights over the training, BatchNorm's statistics included. Strategies `exact` and `ddp`."""

    name: Literal["none", "ema", "lookahead"] = "none"
    """`ema`: what is evaluated, selected and exported is an exponential moving average of the weights; the training
    itself is unchanged. `lookahead`: every few steps the weights become their own slow average, which holds them more
    and more towards the end of the run."""
    every_steps: PositiveInt = 5
    """Steps from one update of the average to the next."""
    half_life_epochs: Annotated[float, Range(above=0, maximum=MANY)] = 1.0
    """`ema`: after so many epochs, the share of the older weights has halved."""
    start_epoch: Annotated[float, Range(minimum=0, maximum=MANY)] = 0.0
    """`ema`: epochs before it begins; until then the weights are evaluated as they are."""
    decay: Annotated[float, Range(minimum=0, maximum=1)] = 0.95
    """`lookahead`: at the end of the run the average keeps this share of itself a step."""


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """`optimizer.name: muon`: the momentum of each filter bank, a matrix [outputs, rest], is made nearly orthogonal.
    Parameters of other than four dimensions, such as biases, norms and the head, are left to another optimizer."""

    momentum: Beta = 0.6
    """Momentum of the filters."""
    nesterov: bool = True
    """Whether it is Nesterov's."""
    newton_schulz_steps: Annotated[int, Range(minimum=1, maximum=30)] = 3
    """Steps of the iteration that makes a matrix orthogonal. It computes in bf16 where `compute.precision` is bf16."""
    newton_schulz: tuple[Coefficient, Coefficient, Coefficient] = (3.4445, -4.7750, 2.0315)
    """The polynomial a x + b x^3 + c x^5 that a step applies to the singular values."""
    scale: Literal["none", "rows", "rms"] = "none"
    """Factor on the learning rate of a matrix: 1, the root of max(1, rows / columns), or 0.2 times the root of the
    larger of both, with which Adam's learning rate and decay fit."""
    renormalise_every_steps: NonNegativeInt = 1
    """Every so many steps each bank is first scaled to a norm of the root of its number of outputs; 0: never."""
    rest: Literal["sgd", "adamw"] = "sgd"
    """The optimizer of the other parameters, with the settings that it has in the section `optimizer`."""
    rest_lr_scale: Annotated[float, Range(minimum=0, maximum=10_000)] = 1.0
    """Factor on the learning rate of the other parameters."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate changes from step to step."""

    name: Annotated[str, Names(kind="schedule", known=("plateau", "constant", "cosine", "triangle", "multistep"))] = (
        "plateau"
    )
    """After a linear warm-up (`optimizer.warmup_epochs`): `plateau`, see `plateau.*`; `constant`; `cosine`: half a
    cosine down to `end`; `multistep`: times `gamma` after each of `milestone_epochs`. `triangle`, or one-cycle, is
    linear from `start` to 1 and on to `end`. `my_schedules:cosine`: a function of your own, which returns the learning
    rate as a function of the step."""
    options: Options = field(default_factory=dict)
    """Arguments of a function of your own."""
    start: Probability = 0.2
    """`triangle`: the share of the full learning rate in the first step."""
    peak: Annotated[float, Range(minimum=0, maximum=0.999999)] = 0.2
    """`triangle`: the share of the run after which the learning rate is full."""
    end: Probability = 0.0
    """`cosine` and `triangle`: the share of the full learning rate that the step after the last one would have."""
    milestone_epochs: tuple[Annotated[float, Range(minimum=0, maximum=MANY)], ...] = (50.0, 75.0)
    """`multistep`: the epochs after which the learning rate is multiplied by `gamma`."""
    gamma: Probability = 0.1
    """`multistep`: the factor at each milestone."""


@dataclass(frozen=True, kw_only=True)
class PlateauConfig:
    """ReduceLROnPlateau: the learning rate is reduced when the watched metric has stopped improving."""

    metric: Literal["loss", "accuracy"] = "loss"
    """Metric of the validation split that is watched."""
    factor: Annotated[float, Range(above=0, maximum=1)] = 0.5
    """What a reduction multiplies the learning rate by; 1 switches the plateau off."""
    patience_evaluations: NonNegativeInt = 5
    """Evaluations without improvement before the learning rate is reduced."""
    threshold: Annotated[float, Range(minimum=0, maximum=0.99)] = 1e-4
    """Relative change that counts as an improvement."""
    cooldown_evaluations: NonNegativeInt = 0
    """Evaluations after a reduction that are not counted."""
    min_lr: Annotated[float, Range(minimum=0, maximum=10_000)] = 0.0
    """The learning rate is never reduced below this."""
