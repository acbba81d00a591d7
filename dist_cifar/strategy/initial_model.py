"""The network of a run with its weights before the first step, also where these depend on training images.

Contract: the weights are the same on every rank. What depends on images is computed on rank 0 alone, so that ranks
need not round alike, and reaches the others as bytes. On a resume the checkpoint's weights replace them all.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from dist_cifar import plugins
from dist_cifar.augment import cpu
from dist_cifar.config import Config, is_own
from dist_cifar.data.training_data import TrainingData
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.models import build_model, check_image_sizes
from dist_cifar.models.data_init import DataInitialized
from dist_cifar.ops.philox import STREAM_INITIAL, random_words


def build_initial_model(config: Config, data: TrainingData, communicator: Communicator) -> nn.Module:
    """Builds the network of `config` on the CPU, with its initial weights. A collective.

    Raises `ConfigError` where the network does not take the sizes of `augment.resolution`, or `initialize_from_data` of
    one from outside the package fails.
    """
    model = build_model(config.model, num_classes=len(data.dataset.classes), seed=config.run.seed)
    check_image_sizes(model, sorted({phase.size for phase in config.augment.resolution}))
    if not isinstance(model, DataInitialized):
        return model
    communicator.run_on_rank0(lambda: _initialize(model, config, data))
    model.load_state_dict(communicator.broadcast_tensors(model.state_dict()))
    return model


def _initialize(model: DataInitialized, config: Config, data: TrainingData) -> None:
    """Lets the model compute its weights from images; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        try:
            model.initialize_from_data(lambda count: training_images(data, count, seed=config.run.seed))
        except Exception as error:
            if not is_own(config, "model"):
                raise
            raise plugins.broken(f"model.name={config.model.name}", error, "initialize_from_data") from None


def training_images(data: TrainingData, count: int, *, seed: int) -> torch.Tensor:
    """The first `count` images of a shuffle of the training split, normalised: float32 [n, 3, 32, 32].

    The shuffle is a function of `seed` and of the images' places in the data set.
    """
    keys = random_words(seed, STREAM_INITIAL, 0, data.train_indices, 1)[:, 0]
    chosen = data.train_indices[np.argsort(keys, kind="stable")[:count]]
    return cpu.normalize(data.dataset.train.images, chosen, data.dataset.stats)
