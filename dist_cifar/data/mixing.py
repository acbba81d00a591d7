"""Mixup and CutMix: a batch of mixed pairs of images, the same on every number of ranks and without communication.

Contract: the partner of each sample is the one `shift` places further in the global batch, and `shift` and the share
are functions of (seed, epoch, step) alone. A rank augments the partners of its samples itself, as their own ranks do.

Sources: Zhang, Cisse, Dauphin and Lopez-Paz, "mixup: beyond empirical risk minimization", ICLR 2018; Yun et al.,
"CutMix: regularization strategy to train strong classifiers with localizable features", ICCV 2019.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import one_hot

from dist_cifar.config import MixConfig
from dist_cifar.data.batching import TrainingBatches
from dist_cifar.data.prefetch import Batch
from dist_cifar.ops.philox import STREAM_MIX, uniform


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How the samples of one step are mixed."""

    shift: int
    """Places in the global batch from a sample to its partner, in [1, B - 1]."""
    share: float
    """The weight of a sample against its partner, in [0, 1], drawn from Beta(alpha, alpha)."""
    centre: tuple[float, float]
    """CutMix: the middle of the box as shares of height and width, in [0, 1)."""


def draw_mix(alpha: float, *, seed: int, epoch: int, position: int, global_size: int) -> Mix:
    """The mix of the step that is number `position` in its epoch, of `global_size` samples, at least 2."""
    draws = 4
    while True:
        draws *= 2
        numbers = uniform(seed, STREAM_MIX, epoch, [position], draws)[0].tolist()
        share = _beta(alpha, numbers[3:])
        if share is not None:
            shift = 1 + math.floor(numbers[0] * (global_size - 1))
            return Mix(shift=shift, share=share, centre=(numbers[1], numbers[2]))


def _beta(alpha: float, numbers: list[float]) -> float | None:
    """A draw from Beta(alpha, alpha) by Johnk's algorithm, or None if it needs more uniform `numbers`.

    Source: Johnk, "Erzeugung von betaverteilten und gammaverteilten Zufallszahlen", Metrika 1964.
    """
    for first, second in zip(numbers[::2], numbers[1::2], strict=False):
        x, y = first ** (1 / alpha), second ** (1 / alpha)
        if 0 < x + y <= 1:
            return x / (x + y)
    return None


def box_of(mix: Mix, size: int) -> tuple[slice, slice]:
    """Rows and columns of the box that CutMix takes from the partner of an image of `size` pixels a side.

    It has the share 1 - `mix.share` of the image before what lies outside is cut off.
    """
    half = size * math.sqrt(1 - mix.share) / 2
    edges = []
    for place in mix.centre:
        middle = math.floor(place * size)
        edges.append(slice(max(0, round(middle - half)), min(size, round(middle + half))))
    return edges[0], edges[1]


@dataclass(kw_only=True, eq=False)
class MixedBatches(TrainingBatches):
    """This rank's share of each global batch, augmented and mixed."""

    mix: MixConfig
    classes: int

    def make(self, step: int) -> Batch:
        """As of `TrainingBatches`; in mixed batches labels are the shares of the classes, float32 [n, classes]."""
        own = super().make(step)
        if step >= self.plan.total_steps - round(self.mix.off_last_epochs * self.plan.steps_per_epoch):
            return own
        epoch, position = divmod(step, self.plan.steps_per_epoch)
        mix = draw_mix(
            self.mix.alpha, seed=self.seed, epoch=epoch, position=position, global_size=self.plan.global_size
        )
        partners = self.batch_of(step, self.sampler.batch(step, shift=mix.shift))
        inputs, share = (_mixup if self.mix.name == "mixup" else _cutmix)(own.inputs, partners.inputs, mix)
        first, second = (one_hot(batch.labels, self.classes).float() for batch in (own, partners))
        return Batch(inputs=inputs, labels=share * first + (1 - share) * second)


def _mixup(own: torch.Tensor, partners: torch.Tensor, mix: Mix) -> tuple[torch.Tensor, float]:
    # Each product and the sum are rounded by themselves: the bits do not depend on how many images are in a tensor.
    return own.mul_(mix.share).add_(partners.mul_(1 - mix.share)), mix.share


def _cutmix(own: torch.Tensor, partners: torch.Tensor, mix: Mix) -> tuple[torch.Tensor, float]:
    size = own.shape[-1]
    rows, columns = box_of(mix, size)
    own[:, :, rows, columns] = partners[:, :, rows, columns]
    return own, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / size**2
