"""Exact evaluation, sharded over ranks.

Contract: the split is cut into batches that do not depend on the world size, ranks take them in turn, every sample is
evaluated once and none is padded. Counts are exact; the loss is summed batch by batch in the order of the split, so
it does not depend on who computed which batch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dist_cifar.augment.kernel import normalize
from dist_cifar.data.dataset import Split
from dist_cifar.distributed.communicator import Communicator
from dist_cifar.metrics import Evaluation


def evaluate(
    module: nn.Module,
    split: Split,
    indices: npt.NDArray[np.int64],
    *,
    mean: npt.ArrayLike,
    std: npt.ArrayLike,
    num_classes: int,
    batch_size: int,
    communicator: Communicator,
) -> Evaluation:
    """Loss, confusion matrix and logits of `module` over `split` at `indices` (int64 [n]). A collective.

    The module is left in the mode, training or evaluation, in which it came.
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
                images = normalize(split.images, batches[i], mean, std).to(device)
                labels = torch.from_numpy(split.labels[batches[i]]).to(device)
                logits = module(images)
                all_logits[i * batch_size : i * batch_size + len(labels)] = logits
                losses[i] = cross_entropy(logits, labels, reduction="none").double().sum()
                confusion += torch.bincount(labels * num_classes + logits.argmax(1), minlength=num_classes**2)
    finally:
        module.train(was_training)
    for total in (losses, all_logits):  # each batch has one addend that is not zero: these sums are exact
        communicator.sum(total)
    communicator.sum(confusion)
    result = Evaluation(
        loss=sum(losses.tolist()) / len(indices),
        confusion=confusion.view(num_classes, num_classes).cpu().numpy(),
        logits=all_logits.cpu().numpy(),
    )
    assert result.count == len(indices), f"{result.count} samples evaluated, the split has {len(indices)}"
    return result
