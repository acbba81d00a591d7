"""Counter-based random numbers: every draw is a function of (seed, stream, epoch, sample index) and of nothing else.

Contract: `random_words` returns the output of Philox4x32-10 for the counter (index, epoch, stream, block) under the key
`seed`. There is no state, so draws do not depend on rank, worker, batch or call order, and no global generator is
touched.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dist_cifar.ops.numba_jit import compiled

STREAM_AUGMENT = 1
"""Parameters of the training augmentation."""
STREAM_SPLIT = 2
"""The validation split."""
STREAM_SYNTHETIC = 3
"""The images of the synthetic data set."""

STREAM_PASS = 4
"""What a network draws in a pass of its training."""
STREAM_MIX = 5
"""Partners and shares of mixup and CutMix."""
STREAM_INITIAL = 6
"""The training images that a network takes its initial weights from."""

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10


def philox4x32(counter: npt.NDArray[np.uint32], key: tuple[int, int]) -> npt.NDArray[np.uint32]:
    """Applies Philox4x32-10 to each row.

    `counter`: uint32 [..., 4]; `key`: two numbers below 2**32. Returns uint32 of the shape of `counter`.
    """
    rows = np.ascontiguousarray(counter).reshape(-1, 4)
    return _philox4x32(rows, np.uint64(key[0]), np.uint64(key[1])).reshape(counter.shape)


@compiled
def _philox4x32(counter, first_key, second_key):
    out = np.empty_like(counter)
    for i in range(len(counter)):
        c0, c1 = np.uint64(counter[i, 0]), np.uint64(counter[i, 1])
        c2, c3 = np.uint64(counter[i, 2]), np.uint64(counter[i, 3])
        k0, k1 = first_key, second_key
        for _ in range(_ROUNDS):
            product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
            c0, c1 = (product1 >> _SHIFT) ^ c1 ^ k0, product1 & _LOW
            c2, c3 = (product0 >> _SHIFT) ^ c3 ^ k1, product0 & _LOW
            k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
        out[i, 0], out[i, 1], out[i, 2], out[i, 3] = c0, c1, c2, c3
    return out


def random_words(seed: int, stream: int, epoch: int, indices: npt.ArrayLike, words: int) -> npt.NDArray[np.uint32]:
    """Draws `words` random 32-bit words for each of `indices`: uint32 [len(indices), words].

    `seed` is below 2**64; `stream`, `epoch` and each index are below 2**32.
    """
    index = np.asarray(indices).astype(np.uint32)
    blocks = -(-words // 4)
    counter = np.empty((len(index), blocks, 4), np.uint32)
    counter[..., 0] = index[:, None]
    counter[..., 1] = epoch
    counter[..., 2] = stream
    counter[..., 3] = np.arange(blocks, dtype=np.uint32)
    return philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)).reshape(len(index), 4 * blocks)[:, :words]


def uniform(seed: int, stream: int, epoch: int, indices: npt.ArrayLike, draws: int) -> npt.NDArray[np.float64]:
    """Draws uniform numbers in [0, 1), in steps of 2**-32, `draws` for each of `indices`: float64 [indices, draws]."""
    return random_words(seed, stream, epoch, indices, draws) * np.float64(2.0**-32)
