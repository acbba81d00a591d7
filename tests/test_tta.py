"""Test-time augmentation against a loop that is written by hand, on every number of ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from dist_cifar import tta
from dist_cifar.augment.image import ImageStats
from dist_cifar.config import EvalConfig
from dist_cifar.data.dataset import Dataset, Split
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.evaluate import Evaluator
from dist_cifar.state import Evaluation
from dist_cifar.tta import evaluation_of, final_evaluation, least_certain
from tests.small_runs import alone

MEAN, STD, COUNT, CLASSES = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 37, 5


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GELU(),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(512, CLASSES),
    )


def split() -> Split:
    rng = np.random.default_rng(2)
    return Split(
        images=rng.integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8), labels=rng.integers(0, CLASSES, COUNT)
    )


def found(communicator: Communicator, kind: str, share: float, batch_size: int = 5) -> Evaluation:
    dataset = Dataset(
        train=split(),
        test=split(),
        classes=tuple("abcde"),
        content_sha256="",
        stats=ImageStats(MEAN, STD),
        directory=None,
    )
    evaluator = Evaluator(
        model=network(),
        dataset=dataset,
        validation_indices=np.arange(3),
        batch_size=batch_size,
        communicator=communicator,
    )
    result = final_evaluation(evaluator, network().state_dict(), EvalConfig(tta=kind, tta_share=share))
    assert evaluator.model.training
    return result


def by_hand(kind: str, share: float) -> tuple[np.ndarray, np.ndarray]:
    """The logits without views and with them, of one image after the other, in float64."""
    model, images = network().double().eval(), split().images

    def f(image: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(image.copy())[None])[0].numpy()

    def mirrored(image: np.ndarray) -> np.ndarray:
        return (f(image) + f(image[:, :, ::-1])) / 2

    plain, viewed = np.empty((COUNT, CLASSES)), np.empty((COUNT, CLASSES))
    for i, pixels in enumerate(images):
        image = ((pixels / 255 - MEAN) / STD).transpose(2, 0, 1)
        around = np.pad(image, ((0, 0), (1, 1), (1, 1)), "reflect")
        plain[i], viewed[i] = f(image), mirrored(image)
        if kind == "mirror_translate":
            lower_right, upper_left = around[:, :32, :32], around[:, 2:, 2:]
            viewed[i] = viewed[i] / 2 + mirrored(lower_right) / 4 + mirrored(upper_left) / 4
    confidence = [max(np.exp(row) / np.exp(row).sum()) for row in plain]
    kept = sorted(range(COUNT), key=lambda i: (confidence[i], i))[int(share * COUNT) :]
    viewed[kept] = plain[kept]
    return plain, viewed


KINDS = [("mirror", 1.0), ("mirror_translate", 1.0), ("mirror_translate", 0.25), ("mirror", 0.0)]


@pytest.mark.parametrize(("kind", "share"), KINDS)
def test_equals_a_loop_by_hand_on_every_world_size(ranks, kind, share):
    by_world_size = [ranks.run(n, found, kind, share) for n in (1, 2, 3, 4)]
    results = [result for results in by_world_size for result in results]
    assert len({result.tta.logits.tobytes() for result in results}) == 1  # to the last bit
    assert len({(result.tta.loss, result.tta.accuracy, result.loss) for result in results}) == 1
    plain, viewed = by_hand(kind, share)
    np.testing.assert_allclose(results[0].logits, plain, atol=1e-5)
    np.testing.assert_allclose(results[0].tta.logits, viewed, atol=1e-5)
    labels = split().labels
    assert results[0].tta.accuracy == np.mean(viewed.argmax(1) == labels)
    losses = [math.log(np.exp(row).sum()) - row[label] for row, label in zip(viewed, labels, strict=True)]
    assert results[0].tta.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert (viewed != plain).any(1).sum() == int(share * COUNT)


def shares_of_a_rank(communicator: Communicator) -> Evaluation:
    """The mutant: each rank chooses among the images of its own."""
    original = tta.least_certain

    def own(logits: np.ndarray, share: float) -> np.ndarray:
        mine = np.arange(communicator.rank, len(logits), communicator.world_size)
        return mine[original(logits[mine], share)]

    tta.least_certain = own
    try:
        return found(communicator, "mirror_translate", 0.25)
    finally:
        tta.least_certain = original


def test_a_choice_among_the_images_of_a_rank_is_caught(ranks):
    (one,) = ranks.run(1, shares_of_a_rank)
    assert any(not np.array_equal(two.tta.logits, one.tta.logits) for two in ranks.run(2, shares_of_a_rank))


def test_a_shift_that_repeats_the_edge_is_caught(monkeypatch):
    """The mutant."""
    pad = tta.functional.pad
    monkeypatch.setattr(tta.functional, "pad", lambda images, sides, mode: pad(images, sides, "replicate"))
    result = found(alone(), "mirror_translate", 1.0)
    assert np.abs(result.tta.logits - by_hand("mirror_translate", 1.0)[1]).max() > 1e-3


def test_without_views_there_is_no_second_result():
    assert found(alone(), "none", 1.0).tta is None


def test_of_equal_confidence_the_lower_index_comes_first():
    logits = np.array([[0, 9], [1, 0], [0, 1], [0, 0], [1, 0]], np.float32)
    chosen = {share: least_certain(logits, share).tolist() for share in (0.0, 0.2, 0.4, 0.5, 0.8, 1.0)}
    assert chosen == {0.0: [], 0.2: [3], 0.4: [1, 3], 0.5: [1, 3], 0.8: [1, 2, 3, 4], 1.0: [0, 1, 2, 3, 4]}
    assert len(least_certain(np.zeros((100, 2), np.float32), 0.29)) == 29
    huge = np.array([[1e30, 0], [3e38, -3e38], [0, 0]], np.float32)
    assert least_certain(huge, 0.34).tolist() == [2]


def test_the_result_of_known_logits():
    logits = np.array([[3.0, 1.0, 0.0], [0.0, 1.0, 2.0]], np.float32)
    result = evaluation_of(logits, np.array([0, 1]))
    assert result.confusion.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]] and result.accuracy == 0.5
    expected = [math.log(math.exp(3) + math.e + 1) - 3, math.log(1 + math.e + math.exp(2)) - 1]
    assert result.loss == pytest.approx(sum(expected) / 2, rel=1e-6)
