"""Builds what a run trains and validates on, from the config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from dist_cifar.augment import cpu
from dist_cifar.augment.backend import augmenter, augments_on_device
from dist_cifar.augment.params import AugmentParams
from dist_cifar.augment.resolution import sizes
from dist_cifar.augment.transform import OwnTransform
from dist_cifar.config import Config
from dist_cifar.data.batching import BatchPlan, TrainingBatches, plan_batches
from dist_cifar.data.dataset import Dataset, load_dataset, validation_split
from dist_cifar.data.mixing import MixedBatches
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

    `slices`: see `plan_batches`. Raises `ConfigError` where `augment.backend` cannot be had, before images are decoded.
    """
    augments_on_device(config.augment.backend, communicator.device)
    rank, world_size = communicator.rank, communicator.world_size
    with at_once():  # decoding may take minutes
        dataset = load_dataset(config.data)
        communicator.barrier()
    communicator.require_same({"the SHA-256 of the images in data.root": dataset.content_sha256})
    train_indices, validation_indices = validation_split(
        dataset.train.labels, config.data.validation_size, dataset.classes
    )
    plan = plan_batches(
        config.batch, config.train, slices=slices, rank=rank, world_size=world_size, train_size=len(train_indices)
    )
    augment, close = _augmentation(config, dataset, communicator.device)
    kind: Callable[..., TrainingBatches] = TrainingBatches
    if config.mix.name != "none":
        kind = partial(MixedBatches, mix=config.mix, classes=len(dataset.classes))
    batches = kind(
        split=dataset.train,
        indices=train_indices,
        plan=plan,
        sampler=GlobalBatchSampler(len(train_indices), plan, rank=rank, world_size=world_size, seed=config.run.seed),
        augment=augment,
        augment_config=config.augment,
        seed=config.run.seed,
        close=close,
    )
    return TrainingData(
        dataset=dataset,
        train_indices=train_indices,
        validation_indices=validation_indices,
        plan=plan,
        batches=batches,
    )


def _augmentation(
    config: Config, dataset: Dataset, device: torch.device
) -> tuple[Callable[[int, npt.NDArray[np.int64], AugmentParams], torch.Tensor], Callable[[], None]]:
    """`TrainingBatches.augment` and `close` of a run."""
    images, stats, setting = dataset.train.images, dataset.stats, config.augment
    if setting.transform is None:
        augment = augmenter(setting.backend, images, stats, device=device, sizes=sizes(setting.resolution))
        return lambda epoch, indices, params: augment(indices, params), lambda: None
    transform = OwnTransform(
        setting.transform, setting.transform_options, seed=config.run.seed, workers=setting.transform_workers
    )

    def transform_and_augment(epoch: int, indices: npt.NDArray[np.int64], params: AugmentParams) -> torch.Tensor:
        changed = transform(images[indices], epoch, indices)
        return cpu.augment(changed, np.arange(len(changed)), params, stats)

    return transform_and_augment, transform.close
