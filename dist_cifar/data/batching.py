"""Divides the global batch among ranks and passes, and makes this rank's batches.

Contract: `plan_batches` is a pure function of the config, the world size and the size of the training split. The batch
that `TrainingBatches` makes for a step is a function of (config, data set, step) and of this rank's slice, never of the
time or of the batches before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch

from dist_cifar.augment.params import AugmentParams, sample_params
from dist_cifar.augment.resolution import size_at
from dist_cifar.config import AugmentConfig, BatchConfig, TrainConfig
from dist_cifar.data.dataset import Split
from dist_cifar.data.prefetch import Batch, prefetch
from dist_cifar.data.sampler import GlobalBatchSampler
from dist_cifar.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How a global batch is divided, and how many of them a run has."""

    global_size: int
    """Samples of one step over all ranks."""
    per_rank_size: int
    """Samples of one step on one rank."""
    virtual_ranks: int
    """Equal slices of the global batch, each computed by itself: a fixed number, or one on each rank."""
    micro_batches: int
    """Forward and backward passes of one step on one rank."""
    passes: int
    """Forward and backward passes of one virtual rank."""
    steps_per_epoch: int
    """Whole global batches in the training split. The samples left over are dropped; each epoch drops others."""
    total_steps: int
    """Steps of the whole run."""

    @property
    def micro_size(self) -> int:
        """Samples of one forward and backward pass."""
        return self.per_rank_size // self.micro_batches


def plan_batches(batch: BatchConfig, train: TrainConfig, *, slices: int, world_size: int, train_size: int) -> BatchPlan:
    """The plan for `train_size` samples on `world_size` ranks, with the global batch divided into equal `slices`.

    `slices` is a multiple of the world size (`dist_cifar.strategy.slice_count`). Raises `ConfigError` if the global
    batch is larger than the training split.
    """
    global_size = batch.global_size or (batch.per_rank_size or 0) * world_size
    steps_per_epoch = train_size // global_size
    if steps_per_epoch == 0:
        raise ConfigError(
            f"batch: one global batch is {global_size} samples, the training split has {train_size}; make it smaller"
        )
    slice_size = global_size // slices
    limit = min(batch.max_micro_batch or slice_size, slice_size)
    passes = next(n for n in range(1, slice_size + 1) if slice_size % n == 0 and slice_size // n <= limit)
    total_steps = math.ceil(steps_per_epoch * Fraction(str(train.epochs)))  # 0.1 is a tenth, which no float is
    return BatchPlan(
        global_size=global_size,
        per_rank_size=global_size // world_size,
        virtual_ranks=slices,
        micro_batches=slices // world_size * passes,
        passes=passes,
        steps_per_epoch=steps_per_epoch,
        total_steps=min(total_steps, train.max_steps or total_steps),
    )


@dataclass(kw_only=True, eq=False)
class TrainingBatches:
    """This rank's share of each global batch, augmented."""

    split: Split
    indices: npt.NDArray[np.int64]
    """Images of `split` to train on; the positions of `sampler` point into them."""
    plan: BatchPlan
    sampler: GlobalBatchSampler
    augment: Callable[[int, npt.NDArray[np.int64], AugmentParams], torch.Tensor]
    """From the epoch, indices into `split` and their parameters to the network's input, float32 [n, 3, r, r]."""
    augment_config: AugmentConfig
    seed: int
    close: Callable[[], None] = lambda: None
    """Ends what `augment` has started."""

    def make(self, step: int) -> Batch:
        """This rank's share of the global batch of `step`, on the device that augments."""
        return self.batch_of(step, self.sampler.batch(step))

    def batch_of(self, step: int, positions: npt.NDArray[np.int64]) -> Batch:
        """The samples at these positions of the training split, int64 [n], as they are in `step`."""
        epoch, indices = step // self.plan.steps_per_epoch, self.indices[positions]
        size = size_at(self.augment_config.resolution, step, self.plan.total_steps)
        params = sample_params(self.augment_config, seed=self.seed, epoch=epoch, indices=indices, size=size)
        inputs = self.augment(epoch, indices, params)
        return Batch(inputs=inputs, labels=torch.from_numpy(self.split.labels[indices]))

    def stream(self, first_step: int, device: torch.device) -> Generator[Batch, None, None]:
        """The batches from `first_step` to the end of the run, on `device`, prepared ahead in a thread."""
        try:
            yield from prefetch(self.make, range(first_step, self.plan.total_steps), device)
        finally:
            self.close()
