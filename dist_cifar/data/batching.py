"""Divides the global batch among ranks and passes, and makes this rank's batches.

Contract: `plan_batches` is a pure function of the config, the world size and the size of the training split. The batch
that `TrainingBatches` makes for a step is a function of (config, data set, step) and of this rank's slice, never of the
time or of the batches before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dist_cifar.augment.params import AugmentParams, sample_params
from dist_cifar.augment.resolution import size_at
from dist_cifar.config import AugmentConfig, BatchConfig, TrainConfig, as_written
from dist_cifar.data.dataset import Split
from dist_cifar.data.prefetch import Batch, prefetch
from dist_cifar.data.sampler import GlobalBatchSampler
from dist_cifar.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How a global batch is divided, and how many of them a run has."""

    global_size: int
    """Samples of one step over all ranks."""
    start: int
    """The place in the global batch of this rank's first sample."""
    micro_sizes: tuple[int, ...]
    """Samples of each forward and backward pass of one step on this rank."""
    virtual_ranks: int
    """Slices of the global batch, each computed by itself: a fixed number of equal ones, or one on each rank."""
    slices: range
    """This rank's."""
    passes: int
    """Forward and backward passes of one virtual rank."""
    steps_per_epoch: int
    """Whole global batches in the training split. The samples left over are dropped; each epoch drops others."""
    total_steps: int
    """Steps of the whole run."""

    @property
    def per_rank_size(self) -> int:
        """Samples of one step on this rank."""
        return sum(self.micro_sizes)

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes of one step on this rank."""
        return len(self.micro_sizes)

    @property
    def first_pass(self) -> int:
        """The number of this rank's first pass among those of all ranks."""
        return self.slices.start * self.passes

    @property
    def weights(self) -> tuple[float, ...]:
        """What the loss of each pass is multiplied by, so that the mean over all passes of all ranks is the mean over
        the samples: 1 where all passes have as many."""
        all_passes = self.virtual_ranks * self.passes
        return tuple(size * all_passes / self.global_size for size in self.micro_sizes)


def share(part: int, *, parts: int, count: int) -> range:
    """The numbers of 0 to `count` - 1 that one of `parts` gets, each as many as the others or one more."""
    return range(part * count // parts, (part + 1) * count // parts)


def plan_batches(
    batch: BatchConfig, train: TrainConfig, *, slices: int, rank: int, world_size: int, train_size: int
) -> BatchPlan:
    """The plan of a rank for `train_size` samples on `world_size` ranks, with the global batch divided into `slices`.

    There are at least as many slices as ranks, and as many samples (`dist_cifar.strategy.slice_count`). Raises
    `ConfigError` if the global batch is larger than the training split.
    """
    global_size = batch.global_size or (batch.per_rank_size or 0) * world_size
    steps_per_epoch = train_size // global_size
    if steps_per_epoch == 0:
        raise ConfigError(
            f"batch: one global batch is {global_size} samples, the training split has {train_size}; make it smaller"
        )
    own = share(rank, parts=world_size, count=slices)
    of_slices = [share(number, parts=slices, count=global_size) for number in range(slices)]
    passes = _passes(sorted({len(samples) for samples in of_slices}), batch.max_micro_batch)
    sizes = (len(share(i, parts=passes, count=len(of_slices[n]))) for n in own for i in range(passes))
    total_steps = math.ceil(steps_per_epoch * as_written(train.epochs))
    return BatchPlan(
        global_size=global_size,
        start=of_slices[own.start].start,
        micro_sizes=tuple(sizes),
        virtual_ranks=slices,
        slices=own,
        passes=passes,
        steps_per_epoch=steps_per_epoch,
        total_steps=min(total_steps, train.max_steps or total_steps),
    )


def _passes(slice_sizes: list[int], limit: int | None) -> int:
    """How many passes a slice takes, of at most `limit` samples: equal ones where all slices have one size."""
    largest = slice_sizes[-1]
    least = -(-largest // min(limit or largest, largest))
    if len(slice_sizes) > 1:
        return min(least, slice_sizes[0])
    return next(n for n in range(least, largest + 1) if largest % n == 0)


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
