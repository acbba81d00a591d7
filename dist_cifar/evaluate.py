"""Exact evaluation, sharded over ranks.

Contract: the split is divided into batches that do not depend on the world size, ranks take them in turn, every sample
is evaluated once and none is padded. Counts are exact; the loss is summed batch by batch in the order of the split, so
it does not depend on which rank computed which batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dist_cifar.augment.cpu import normalize
from dist_cifar.augment.image import ImageStats
from dist_cifar.config import Config
from dist_cifar.data.dataset import Dataset, Split
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.ops.precision import set_precision
from dist_cifar.state import Evaluation


class Evaluator:
    """Evaluates weights on the validation split while a run trains, and on the test split at its end."""

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        validation_indices: npt.NDArray[np.int64],
        *,
        batch_size: int,
        communicator: Communicator,
    ) -> None:
        """Weights to evaluate are loaded into `model`. Without validation images, it validates on the test split."""
        self._model, self._dataset = model, dataset
        self._batch_size, self._communicator = batch_size, communicator
        self._test = dataset.test, np.arange(len(dataset.test.labels))
        self.selects_on_test = len(validation_indices) == 0
        """Whether the best model is chosen on the test split."""
        self._validation = self._test if self.selects_on_test else (dataset.train, validation_indices)
        self.validation_size = len(self._validation[1])

    @property
    def parameter_count(self) -> int:
        """Number of the model's parameters."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    @property
    def split_name(self) -> str:
        """Name of the split on which the best model is chosen."""
        return "test" if self.selects_on_test else "validation"

    def load_state_dict(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Loads weights without evaluating them. Raises `RuntimeError` if they are another model's."""
        self._model.load_state_dict(weights)

    def validate(self, weights: Mapping[str, torch.Tensor]) -> Evaluation:
        """The result of `weights` on the split on which the best model is chosen. A collective."""
        return self._evaluate(weights, *self._validation)

    def test(self, weights: Mapping[str, torch.Tensor]) -> Evaluation:
        """The result of `weights` on the test split. A collective."""
        return self._evaluate(weights, *self._test)

    def _evaluate(
        self, weights: Mapping[str, torch.Tensor], split: Split, indices: npt.NDArray[np.int64]
    ) -> Evaluation:
        self.load_state_dict(weights)
        return evaluate(
            self._model,
            split,
            indices,
            stats=self._dataset.stats,
            num_classes=len(self._dataset.classes),
            batch_size=self._batch_size,
            communicator=self._communicator,
        )


def build_evaluator(
    model: nn.Module,
    config: Config,
    dataset: Dataset,
    validation_indices: npt.NDArray[np.int64],
    communicator: Communicator,
) -> Evaluator:
    """An evaluator with a copy of `model`: a strategy may shard the model, whose passes then need all ranks at once."""
    device = communicator.device
    eval_model = copy.deepcopy(model).to(device).to(memory_format=torch.channels_last)
    set_precision(eval_model, config.compute.precision, device)
    return Evaluator(
        eval_model, dataset, validation_indices, batch_size=config.eval.batch_size, communicator=communicator
    )


def evaluate(
    module: nn.Module,
    split: Split,
    indices: npt.NDArray[np.int64],
    *,
    stats: ImageStats,
    num_classes: int,
    batch_size: int,
    communicator: Communicator,
) -> Evaluation:
    """Loss, confusion matrix and logits of `module` on the images `indices` (int64 [n]) of `split`. A collective.

    The module returns to the mode, training or evaluation, that it was in.
    """
    device = communicator.device
    batches = np.split(indices, range(batch_size, len(indices), batch_size))
    losses = torch.zeros(len(batches), dtype=torch.float64, device=device)
    all_logits = torch.zeros(len(indices), num_classes, device=device)
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            for i in range(communicator.rank, len(batches), communicator.world_size):
                images = normalize(split.images, batches[i], stats).to(device)
                labels = torch.from_numpy(split.labels[batches[i]]).to(device)
                logits = module(images)
                all_logits[i * batch_size : i * batch_size + len(labels)] = logits
                losses[i] = cross_entropy(logits, labels, reduction="none").double().sum()
                confusion += torch.bincount(labels * num_classes + logits.argmax(1), minlength=num_classes**2)
    finally:
        module.train(was_training)
    for total in (losses, all_logits):  # each batch has one addend that is not zero: these sums are exact
        communicator.all_reduce_sum(total)
    communicator.all_reduce_sum(confusion)
    result = Evaluation(
        loss=sum(losses.tolist()) / len(indices),
        confusion=confusion.view(num_classes, num_classes).cpu().numpy(),
        logits=all_logits.cpu().numpy(),
    )
    assert result.count == len(indices), f"{result.count} samples evaluated, the split has {len(indices)}"
    return result
