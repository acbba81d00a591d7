"""From the global batch to a rank's forward and backward passes.

Contract: `plan_batches` is a pure function of the config, the world size and the size of the training split. The batch
that `TrainingBatches` makes for a step is a function of (config, data set, step) and of this rank's slice.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dist_cifar.augment.backend import Augmenter, augmenter
from dist_cifar.augment.params import sample_params
from dist_cifar.config import AugmentConfig, BatchConfig, Config, TrainConfig
from dist_cifar.data.dataset import Dataset, Split, load_dataset, validation_split
from dist_cifar.data.prefetch import Batch, prefetch
from dist_cifar.data.sampler import GlobalBatchSampler
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How a global batch is divided, and how many there are."""

    global_size: int
    """Samples of one step over all ranks."""
    per_rank_size: int
    """Samples of one step on one rank."""
    virtual_ranks: int
    """Slices of the global batch, each of which is computed by itself: a fixed number, or one on each rank."""
    micro_batches: int
    """Forward and backward passes of one step on one rank."""
    passes: int
    """Forward and backward passes of one virtual rank."""
    steps_per_epoch: int
    """Whole global batches in the training split; the samples left over are dropped, others each epoch."""
    total_steps: int
    """Steps of the whole run."""

    @property
    def micro_size(self) -> int:
        """Samples of one forward and backward pass."""
        return self.per_rank_size // self.micro_batches


def plan_batches(batch: BatchConfig, train: TrainConfig, *, slices: int, world_size: int, train_size: int) -> BatchPlan:
    """The plan for `train_size` samples on `world_size` ranks, the global batch cut into `slices` equal parts.

    `slices` is a multiple of the world size (`dist_cifar.strategy.slice_count`). Raises `ConfigError` where the global
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
    total_steps = steps_per_epoch * train.epochs
    return BatchPlan(
        global_size=global_size,
        per_rank_size=global_size // world_size,
        virtual_ranks=slices,
        micro_batches=slices // world_size * passes,
        passes=passes,
        steps_per_epoch=steps_per_epoch,
        total_steps=min(total_steps, train.max_steps or total_steps),
    )


class TrainingBatches:
    """This rank's share of every global batch, augmented."""

    def __init__(
        self,
        split: Split,
        indices: npt.NDArray[np.int64],
        *,
        plan: BatchPlan,
        sampler: GlobalBatchSampler,
        augment: Augmenter,
        config: AugmentConfig,
        seed: int,
    ) -> None:
        """`indices` are the images of `split` that are trained on, to which the positions of `sampler` refer."""
        self._split, self._indices = split, indices
        self._plan, self._sampler = plan, sampler
        self._augment, self._config, self._seed = augment, config, seed

    def make(self, step: int) -> Batch:
        """The share of the global batch of `step`."""
        indices = self._indices[self._sampler.batch(step)]
        epoch = step // self._plan.steps_per_epoch
        params = sample_params(self._config, seed=self._seed, epoch=epoch, indices=indices)
        labels = torch.from_numpy(self._split.labels[indices])
        return Batch(inputs=self._augment(indices, params), labels=labels)

    def stream(self, first_step: int, device: torch.device) -> Generator[Batch, None, None]:
        """The batches from `first_step` to the end of the run, on `device`, prepared ahead of the caller."""
        return prefetch(self.make, range(first_step, self._plan.total_steps), device)


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What a run trains and validates on."""

    dataset: Dataset
    train_indices: npt.NDArray[np.int64]
    """Images of the training split that are trained on."""
    validation_indices: npt.NDArray[np.int64]
    """Images of the training split that are held out."""
    plan: BatchPlan
    batches: TrainingBatches


def build_training_data(config: Config, communicator: Communicator, *, slices: int) -> TrainingData:
    """Loads the data set, which must be the same on every rank, and plans its batches. A collective."""
    device, rank, world_size = communicator.device, communicator.rank, communicator.world_size
    dataset = load_dataset(config.data)
    communicator.barrier()
    communicator.assert_equal_across_ranks("the data set's hash", dataset.content_sha256)
    train_indices, validation_indices = validation_split(dataset.train.labels, config.data.validation_size)
    plan = plan_batches(config.batch, config.train, slices=slices, world_size=world_size, train_size=len(train_indices))
    batches = TrainingBatches(
        dataset.train,
        train_indices,
        plan=plan,
        sampler=GlobalBatchSampler(len(train_indices), plan, rank=rank, world_size=world_size, seed=config.run.seed),
        augment=augmenter(config.augment.backend, dataset.train.images, dataset.mean, dataset.std, device=device),
        config=config.augment,
        seed=config.run.seed,
    )
    return TrainingData(
        dataset=dataset,
        train_indices=train_indices,
        validation_indices=validation_indices,
        plan=plan,
        batches=batches,
    )


def evaluation_due(plan: BatchPlan, every_epochs: int, step: int) -> bool:
    """Whether the model is evaluated after `step` steps: when the schedule is due, and at the end of the run."""
    return step == plan.total_steps or schedule_due(plan, every_epochs, step)


def schedule_due(plan: BatchPlan, every_epochs: int, step: int) -> bool:
    """Whether the schedule is told of the evaluation after `step` steps: not of one that only ends the run.

    So a run that is made longer is the run that was meant to be so long.
    """
    return step % (every_epochs * plan.steps_per_epoch) == 0
