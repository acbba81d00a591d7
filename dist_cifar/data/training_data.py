"""Builds what a run trains and validates on, from the config."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_cifar.augment.backend import augmenter
from dist_cifar.config import Config
from dist_cifar.data.batching import BatchPlan, TrainingBatches, plan_batches
from dist_cifar.data.dataset import Dataset, load_dataset, validation_split
from dist_cifar.data.sampler import GlobalBatchSampler
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.stopping import at_once


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The data set of a run, what is held out of it, and its batches."""

    dataset: Dataset
    train_indices: npt.NDArray[np.int64]
    """Images of `dataset.train` to train on."""
    validation_indices: npt.NDArray[np.int64]
    """Images of `dataset.train` that are held out."""
    plan: BatchPlan
    batches: TrainingBatches


def build_training_data(config: Config, communicator: Communicator, *, slices: int) -> TrainingData:
    """Loads the data set, which must be the same on every rank, and plans its batches. A collective.

    `slices`: see `plan_batches`.
    """
    rank, world_size = communicator.rank, communicator.world_size
    with at_once():  # decoding may take minutes
        dataset = load_dataset(config.data)
        communicator.barrier()
    communicator.require_same({"the SHA-256 of the images in data.root": dataset.content_sha256})
    train_indices, validation_indices = validation_split(
        dataset.train.labels, config.data.validation_size, dataset.classes
    )
    plan = plan_batches(config.batch, config.train, slices=slices, world_size=world_size, train_size=len(train_indices))
    batches = TrainingBatches(
        split=dataset.train,
        indices=train_indices,
        plan=plan,
        sampler=GlobalBatchSampler(len(train_indices), plan, rank=rank, world_size=world_size, seed=config.run.seed),
        augment=augmenter(config.augment.backend, dataset.train.images, dataset.stats, device=communicator.device),
        augment_config=config.augment,
        seed=config.run.seed,
    )
    return TrainingData(
        dataset=dataset,
        train_indices=train_indices,
        validation_indices=validation_indices,
        plan=plan,
        batches=batches,
    )
