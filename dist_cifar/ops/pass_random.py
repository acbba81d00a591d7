"""Random numbers that a network draws while it is trained, such as those of dropout.

Contract: before each forward pass torch's generators are seeded by (seed, step, place of the pass in the global batch),
so what a layer draws from them depends neither on the number of ranks nor on when the run was interrupted.
"""

from __future__ import annotations

import torch

from dist_cifar.ops.philox import STREAM_PASS, random_words


def seed_pass(seed: int, step: int, place: int) -> None:
    """Seeds torch's generators, those of every device, for the pass `place` of `step`, both counted from 0."""
    low, high = random_words(seed, STREAM_PASS, step, [place], 2)[0]
    torch.manual_seed(int(high) << 32 | int(low))
