"""The order of the samples, the same for every world size.

Contract: global batch t of epoch e is `permutation(seed, e)[t*B : (t+1)*B]`, where the permutation is the one of
`torch.utils.data.DistributedSampler`. Each rank takes a contiguous slice, so with any world size the ranks together
have the same samples in the same order. The position of a run is one number, the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, DistributedSampler

if TYPE_CHECKING:
    from dist_cifar.data.batching import BatchPlan


class GlobalBatchSampler(DistributedSampler[int]):
    """Positions in a training split of `size` samples, batch by batch, for one rank.

    Iterating yields one epoch's positions of this rank one by one, as DistributedSampler does, so that it can also be
    given to a DataLoader with `batch_size=plan.per_rank_size`; `set_epoch` chooses the epoch.
    """

    def __init__(self, size: int, plan: BatchPlan, *, rank: int, world_size: int, seed: int) -> None:
        super().__init__(cast("Dataset[int]", range(size)), world_size, rank, shuffle=True, seed=seed, drop_last=True)
        self._size = size
        self.plan = plan
        self.num_samples = plan.steps_per_epoch * plan.per_rank_size
        self.total_size = plan.steps_per_epoch * plan.global_size
        self._permuted: tuple[int, npt.NDArray[np.int64]] | None = None

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.plan.steps_per_epoch
        for step in range(first, first + self.plan.steps_per_epoch):
            yield from self.batch(step).tolist()

    def batch(self, step: int, *, shift: int = 0) -> npt.NDArray[np.int64]:
        """This rank's slice of the global batch of `step`: int64 [per_rank_size].

        With `shift`, the samples that are so many places further in the global batch, which begins again at its end.
        """
        epoch, position = divmod(step, self.plan.steps_per_epoch)
        batch = self._permutation(epoch)[position * self.plan.global_size :][: self.plan.global_size]
        places = np.arange(self.plan.per_rank_size) + self.plan.start + shift
        return batch[places % self.plan.global_size]

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._permuted is None or self._permuted[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._permuted = epoch, torch.randperm(self._size, generator=generator).numpy()
        return self._permuted[1]
