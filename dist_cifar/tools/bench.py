"""Measures the augmentation on the user's own machine: `dist-cifar bench`. The scripts of `benchmarks/` use it too.

Contract: a rate counts everything that the trainer does for a batch on the CPU: sampling the parameters, gathering,
augmenting, normalising. It is measured in the calling thread, in windows that take turns, so that a drift of the
machine affects all alike; the spread is shown with the median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from dist_cifar.augment import cpu, params
from dist_cifar.augment.image import ImageStats
from dist_cifar.config import AugmentConfig
from dist_cifar.data.sources.synthetic import synthetic_split
from dist_cifar.ops import numba_jit
from dist_cifar.run.provenance import hardware

BATCH = 256
"""How many images one call augments."""
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Statistics of CIFAR-10's training images, in units of [0, 1]; the speed does not depend on them."""
GPU_IMAGES_PER_SECOND = 70_000
"""The rate that one GPU is assumed to need: about that at which an H100 trains a ResNet-18 on images of 32x32."""

_IMAGES = 20 * BATCH
_WINDOWS = 7


def bench_augment(*, window_seconds: float = 0.25) -> None:
    """Measures the default policy at its default strengths and prints how many GPUs one core can feed."""
    numba_jit.warm_up(cpu.warm_up)
    images, _ = synthetic_split(0, _IMAGES)
    batches = np.random.default_rng(0).permutation(_IMAGES).reshape(-1, BATCH)
    candidates = {"float32": augmenter(images, torch.float32), "bfloat16": augmenter(images, torch.bfloat16)}
    rates: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(_WINDOWS):
        for name, candidate in candidates.items():
            rates[name].append(images_per_second(candidate, batches, window_seconds))
    print(augment_report(rates, window_seconds))


def augment_report(rates: Mapping[str, Sequence[float]], window_seconds: float) -> str:
    """The rates of each output type, in images/s, as the text that the user sees."""
    windows = {len(values) for values in rates.values()}
    lines = [
        f"augmentation: default policy and strengths, sampling included; batch {BATCH}, one thread",
        f"machine:      {hardware()}; generated images; {max(windows)} windows of {window_seconds:g} s each",
        "",
        f"{'output':10}{'images/s':>12}{'min':>12}{'max':>12}{'GPUs fed':>12}",
    ]
    for name, values in rates.items():
        median = statistics.median(values)
        numbers = "".join(f"{value:12,.0f}" for value in (median, min(values), max(values)))
        lines.append(f"{name:10}{numbers}{median / GPU_IMAGES_PER_SECOND:12.1f}")
    return "\n".join(
        [
            *lines,
            "",
            f"GPUs fed: images/s (median) of this one core over {GPU_IMAGES_PER_SECOND:,} a GPU, about what an H100",
            "takes to train a ResNet-18. That rate is an assumption; it was not measured here.",
        ]
    )


def augmenter(images: npt.NDArray[np.uint8], dtype: torch.dtype) -> Callable[[npt.NDArray[np.int64]], torch.Tensor]:
    """Returns a function that prepares `BATCH` of the images, by their indices, as `dtype` in memory of its own."""
    config = AugmentConfig()
    out = torch.empty((BATCH, 3, 32, 32), dtype=dtype, memory_format=torch.channels_last)

    def batch(indices: npt.NDArray[np.int64]) -> torch.Tensor:
        drawn = params.sample_params(config, seed=0, epoch=0, indices=indices)
        return cpu.augment(images, indices, drawn, ImageStats(MEAN, STD), out)

    return batch


def images_per_second(
    candidate: Callable[[npt.NDArray[np.int64]], torch.Tensor], batches: npt.NDArray[np.int64], seconds: float
) -> float:
    """The rate of `candidate` over the rows of `batches` (int64 [any, BATCH]), in turn until the time is up."""
    done, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        candidate(batches[done % len(batches)])
        done += 1
    return done * BATCH / elapsed
