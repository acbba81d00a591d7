"""Exact evaluation, sharded over ranks.

Contract: the split is divided into batches that do not depend on the world size, ranks take them in turn, every sample
is evaluated once and none is padded. Counts are exact; the loss is summed batch by batch in the order of the split, so
it does not depend on which rank computed which batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dist_cifar.augment.cpu import normalize
from dist_cifar.augment.image import ImageStats
from dist_cifar.data.dataset import Dataset, Split
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.ops.transfer import download
from dist_cifar.state import Evaluation

_MOST_KEPT = 20_000
"""Images of all ranks, of 12 KiB each."""


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates weights on the validation split while a run trains, and on the test split at its end."""

    model: nn.Module
    """Takes the weights to evaluate: a module of its own, since a strategy may shard the one that it trains."""
    dataset: Dataset
    validation_indices: npt.NDArray[np.int64]
    """Images of the training split that are held out; without any, it validates on the test split."""
    batch_size: int
    communicator: Communicator
    kept: dict[int, torch.Tensor] = field(default_factory=dict)
    """The images of the validation split that a GPU keeps: see `evaluate`."""

    @property
    def selects_on_test(self) -> bool:
        """Whether the best model is chosen on the test split."""
        return len(self.validation_indices) == 0

    @property
    def parameter_count(self) -> int:
        """Number of the model's parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def split_name(self) -> str:
        """Name of the split on which the best model is chosen."""
        return "test" if self.selects_on_test else "validation"

    def validate(self, weights: Mapping[str, torch.Tensor]) -> Evaluation:
        """The result of `weights` on the split on which the best model is chosen. A collective."""
        split, indices = self._test_split
        if not self.selects_on_test:
            split, indices = self.dataset.train, self.validation_indices
        keeps = self.communicator.device.type != "cpu" and len(indices) <= _MOST_KEPT
        return self._evaluate(weights, split, indices, kept=self.kept if keeps else None)

    def test(self, weights: Mapping[str, torch.Tensor]) -> Evaluation:
        """The result of `weights` on the test split. A collective."""
        return self._evaluate(weights, *self._test_split)

    @property
    def _test_split(self) -> tuple[Split, npt.NDArray[np.int64]]:
        return self.dataset.test, np.arange(len(self.dataset.test.labels))

    def _evaluate(
        self,
        weights: Mapping[str, torch.Tensor],
        split: Split,
        indices: npt.NDArray[np.int64],
        kept: dict[int, torch.Tensor] | None = None,
    ) -> Evaluation:
        self.model.load_state_dict(weights)
        return evaluate(
            self.model,
            split,
            indices,
            stats=self.dataset.stats,
            num_classes=len(self.dataset.classes),
            batch_size=self.batch_size,
            communicator=self.communicator,
            kept=kept,
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
    kept: dict[int, torch.Tensor] | None = None,
) -> Evaluation:
    """Loss, confusion matrix and logits of `module` on the images `indices` (int64 [n]) of `split`. A collective.

    `kept` remembers this rank's images as the module takes them, float32 [batch, 3, 32, 32] by the number of their
    batch, from one call to the next with the same `split`, `indices` and `batch_size`.

    The module returns to the mode, training or evaluation, that it was in.
    """
    device = communicator.device
    batches = np.split(indices, range(batch_size, len(indices), batch_size))
    losses = torch.zeros(len(batches), dtype=torch.float64, device=device)
    all_logits = torch.zeros(len(indices), num_classes, device=device)
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
    cells: list[torch.Tensor] = []
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            for i in range(communicator.rank, len(batches), communicator.world_size):
                images = kept.get(i) if kept is not None else None
                if images is None:
                    images = normalize(split.images, batches[i], stats).to(device)
                if kept is not None:
                    kept[i] = images
                labels = torch.from_numpy(split.labels[batches[i]]).to(device)
                logits = module(images)
                all_logits[i * batch_size : i * batch_size + len(labels)] = logits
                losses[i] = cross_entropy(logits, labels, reduction="none").double().sum()
                cells.append(labels * num_classes + logits.argmax(1))
            if cells:  # at once: a GPU's host waits for each count
                confusion += torch.bincount(torch.cat(cells), minlength=num_classes**2)
    finally:
        module.train(was_training)
    for total in (losses, all_logits):  # each batch has one addend that is not zero: these sums are exact
        communicator.all_reduce_sum(total)
    communicator.all_reduce_sum(confusion)
    found = download({"losses": losses, "confusion": confusion, "logits": all_logits})
    result = Evaluation(
        loss=sum(found["losses"].tolist()) / len(indices),
        confusion=found["confusion"].view(num_classes, num_classes).numpy(),
        logits=found["logits"].numpy(),
    )
    assert result.count == len(indices), f"{result.count} samples evaluated, the split has {len(indices)}"
    return result
