"""Sharded evaluation against a plain loop over every sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dist_cifar.augment.image import ImageStats
from dist_cifar.data.dataset import Split
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.evaluate import evaluate
from dist_cifar.state import Evaluation

CLASSES, MEAN, STD = 10, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def inputs(size: int) -> tuple[nn.Module, Split, np.ndarray]:
    rng = np.random.default_rng(size)
    split = Split(
        images=rng.integers(0, 256, (size + 50, 32, 32, 3), dtype=np.uint8), labels=rng.integers(0, CLASSES, size + 50)
    )
    torch.manual_seed(size)
    module = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, CLASSES), nn.Dropout(0.5))
    return module, split, np.sort(rng.permutation(size + 50)[:size])


def sharded(communicator: Communicator, size: int, batch_size: int, padded: bool = False) -> Evaluation:
    module, split, indices = inputs(size)
    if padded:  # what DistributedSampler does to share the samples equally
        indices = np.resize(indices, -(-len(indices) // communicator.world_size) * communicator.world_size)
    result = evaluate(
        module,
        split,
        indices,
        stats=ImageStats(MEAN, STD),
        num_classes=CLASSES,
        batch_size=batch_size,
        communicator=communicator,
    )
    assert module.training
    return result


def plain_loop(size: int) -> tuple[float, np.ndarray]:
    module, split, indices = inputs(size)
    module.eval()
    loss, confusion = 0.0, np.zeros((CLASSES, CLASSES), np.int64)
    pixels = torch.from_numpy(split.images[indices]).permute(0, 3, 1, 2).double() / 255
    images = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        logits = module.double()(images)
    for row, label in zip(logits.log_softmax(1), split.labels[indices], strict=True):
        loss -= row[label].item()
        confusion[label, row.argmax().item()] += 1
    return loss / size, confusion


def agrees(results: list[Evaluation], size: int) -> bool:
    loss, confusion = plain_loop(size)
    return all(
        result.count == size
        and np.array_equal(result.confusion, confusion)
        and result.accuracy == np.trace(confusion) / size
        and abs(result.loss - loss) < 1e-6
        for result in results
    )


@pytest.mark.parametrize(("size", "batch_size"), [(37, 5), (37, 500), (10_000, 500)])
def test_equals_a_plain_loop_on_every_world_size(ranks, size, batch_size):
    by_world_size = [ranks.run(n, sharded, size, batch_size) for n in (1, 2, 3, 4)]
    assert all(agrees(results, size) for results in by_world_size)
    assert len({result.loss for results in by_world_size for result in results}) == 1  # to the last bit


def keeping(communicator: Communicator) -> tuple[Evaluation, Evaluation]:
    """Of another module, evaluated after the first: as if anew, and with the images that were kept."""
    module, split, indices = inputs(37)
    kept: dict[int, torch.Tensor] = {}
    arguments = {"stats": ImageStats(MEAN, STD), "num_classes": CLASSES, "batch_size": 5, "communicator": communicator}
    evaluate(module, split, indices, **arguments, kept=kept)
    assert list(kept) == list(range(communicator.rank, 8, communicator.world_size))
    torch.nn.init.ones_(module[2].weight)
    anew = evaluate(module, split, indices, **arguments)
    blank = Split(images=np.zeros_like(split.images), labels=split.labels)
    return anew, evaluate(module, blank, indices, **arguments, kept=kept)


def test_images_that_are_kept_give_the_same_result(ranks):
    for anew, again in [*ranks.run(1, keeping), *ranks.run(3, keeping)]:
        assert anew.loss == again.loss and np.array_equal(anew.logits, again.logits)


def test_padding_is_caught(ranks):
    assert not agrees(ranks.run(3, sharded, 37, 5, True), 37)


def test_per_class_accuracy():
    result = Evaluation(
        loss=0.0, confusion=np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]]), logits=np.zeros((6, 3), np.float32)
    )
    assert result.class_accuracy == [0.75, 1.0, None]
    assert result.accuracy == 5 / 6
