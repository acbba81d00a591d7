"""Images per second of the training augmentation, on one core: ours and four libraries, in one run.

Contract: every candidate gets the same uint8 images and gives float32 batches, normalised and erased, with its own
parameters for each image (the one that draws once for a batch is labelled). Strengths are those of `AugmentConfig`.
The time includes drawing the parameters. Candidates take turns within each round, so that a drift of the machine hits
them alike; a ratio is the median over rounds of the ratio within a round. Prints a table, writes JSON.

    python benchmarks/suite/augment.py --out benchmarks/results/augment.json

The libraries besides torchvision are optional (pip install -e '.[bench]'); one that is missing is left out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch and OpenCV start their threads
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2

from dist_cifar.augment import cpu
from dist_cifar.config import AugmentConfig
from dist_cifar.ops import numba_jit
from dist_cifar.run.provenance import hardware
from dist_cifar.tools.bench import BATCH, MEAN, STD, augmenter, images_per_second

CONFIG = AugmentConfig()
OURS, PEER = "dist_cifar", "torchvision PIL"

Candidate = Callable[[np.ndarray], torch.Tensor]


def ours(images: np.ndarray) -> Candidate:
    numba_jit.warm_up(cpu.warm_up, print)
    return augmenter(images, torch.float32)


def torchvision_pil(images: np.ndarray) -> Candidate:
    chain = transforms.Compose(
        [
            transforms.RandomHorizontalFlip(CONFIG.flip_probability),
            transforms.RandomRotation(CONFIG.rotation_degrees),
            transforms.ColorJitter(CONFIG.brightness, CONFIG.contrast, CONFIG.saturation),
            transforms.RandomAdjustSharpness(CONFIG.sharpness_factor, CONFIG.sharpness_probability),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
            transforms.RandomErasing(CONFIG.erasing_probability, CONFIG.erasing_area, CONFIG.erasing_aspect),
        ]
    )
    return lambda indices: torch.stack([chain(Image.fromarray(images[index])) for index in indices])


def _v2_chain() -> v2.Compose:
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(CONFIG.flip_probability),
            v2.RandomRotation(CONFIG.rotation_degrees),
            v2.ColorJitter(CONFIG.brightness, CONFIG.contrast, CONFIG.saturation),
            v2.RandomAdjustSharpness(CONFIG.sharpness_factor, CONFIG.sharpness_probability),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
            v2.RandomErasing(CONFIG.erasing_probability, CONFIG.erasing_area, CONFIG.erasing_aspect),
        ]
    )


def torchvision_v2(images: np.ndarray) -> Candidate:
    chain, tensors = _v2_chain(), torch.from_numpy(images).permute(0, 3, 1, 2)
    return lambda indices: torch.stack([chain(tensors[index]) for index in indices])


def torchvision_v2_batch(images: np.ndarray) -> Candidate:
    chain, tensors = _v2_chain(), torch.from_numpy(images).permute(0, 3, 1, 2)
    return lambda indices: chain(tensors[torch.from_numpy(indices)])


def kornia_batch(images: np.ndarray) -> Candidate:
    import kornia.augmentation as K

    factor = CONFIG.sharpness_factor
    chain = torch.nn.Sequential(
        K.RandomHorizontalFlip(p=CONFIG.flip_probability),
        K.RandomRotation(CONFIG.rotation_degrees, resample="nearest", p=1.0),
        K.ColorJitter(CONFIG.brightness, CONFIG.contrast, CONFIG.saturation, p=1.0),
        K.RandomSharpness((factor, factor), p=CONFIG.sharpness_probability),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        K.RandomErasing(CONFIG.erasing_area, CONFIG.erasing_aspect, p=CONFIG.erasing_probability),
    )
    tensors = torch.from_numpy(images).permute(0, 3, 1, 2)
    return lambda indices: chain(tensors[torch.from_numpy(indices)].float().div_(255))


def albumentations_each(images: np.ndarray) -> Candidate:
    import albumentations as A
    import cv2

    cv2.setNumThreads(0)
    chain = A.Compose(
        [
            A.HorizontalFlip(p=CONFIG.flip_probability),
            A.Rotate((-CONFIG.rotation_degrees, CONFIG.rotation_degrees), interpolation=cv2.INTER_NEAREST, p=1.0),
            A.ColorJitter(
                *[(1 - width, 1 + width) for width in (CONFIG.brightness, CONFIG.contrast, CONFIG.saturation)],
                hue=(0, 0),
                p=1.0,
            ),
            A.Sharpen(alpha=(0.5, 0.5), lightness=(1.0, 1.0), p=CONFIG.sharpness_probability),
            A.Normalize(MEAN, STD),
            A.Erasing(CONFIG.erasing_area, CONFIG.erasing_aspect, p=CONFIG.erasing_probability),
            A.ToTensorV2(),
        ]
    )
    return lambda indices: torch.stack([chain(image=images[index])["image"] for index in indices])


CANDIDATES: dict[str, Callable[[np.ndarray], Candidate]] = {
    OURS: ours,
    PEER: torchvision_pil,
    "torchvision v2": torchvision_v2,
    "torchvision v2, one draw a batch (weaker)": torchvision_v2_batch,
    "kornia": kornia_batch,
    "albumentations": albumentations_each,
}
PACKAGES = ("torch", "torchvision", "pillow", "numba", "numpy", "kornia", "albumentations")


def measure(rounds: int, seconds: float) -> dict[str, list[float]]:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (10_000, 32, 32, 3), dtype=np.uint8)
    batches = generator.permutation(len(images))[: len(images) // BATCH * BATCH].reshape(-1, BATCH)
    candidates = {}
    for name, build in CANDIDATES.items():
        try:
            candidates[name] = build(images)
        except ImportError as error:
            print(f"{name}: left out ({error})")
            continue
        assert candidates[name](batches[0]).shape == (BATCH, 3, 32, 32)
    rates: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            rates[name].append(images_per_second(candidate, batches, seconds))
    return rates


def summary(rates: dict[str, list[float]]) -> list[dict[str, str | float]]:
    return [
        {
            "name": name,
            "images_per_second_median": round(statistics.median(values)),
            "images_per_second_min": round(min(values)),
            "images_per_second_max": round(max(values)),
            "ours_over_this_median": round(
                statistics.median(mine / value for mine, value in zip(rates[OURS], values, strict=True)), 2
            ),
        }
        for name, values in rates.items()
    ]


def versions() -> dict[str, str]:
    installed = {distribution.name.lower(): distribution.version for distribution in importlib.metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="length of one measurement (default %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = round(os.getloadavg()[0], 2)
    rows = summary(measure(arguments.rounds, arguments.seconds))
    print(f"{hardware()}; one thread, batch {BATCH}, float32, {arguments.rounds} rounds of {arguments.seconds} s each")
    print(f"{'':42}{'images/s':>10}{'min':>10}{'max':>10}{'ours is':>10}")
    for name, median, low, high, ratio in (row.values() for row in rows):
        print(f"{name:42}{median:10,}{low:10,}{high:10,}{ratio:9.1f}x")
    if arguments.out:
        result = {
            "benchmark": "augment",
            "hardware": hardware(),
            "load_average_before": load,
            "threads": 1,
            "batch": BATCH,
            "rounds": arguments.rounds,
            "seconds_per_measurement": arguments.seconds,
            "versions": versions(),
            "results": rows,
        }
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
