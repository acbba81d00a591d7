"""What the peers' programs share: the images, their augmentation, the model, and the marks at the end of every step.

Contract: `benchmarks/suite/peers.py` says in the variable PEERS_JOB what is to be run. The images are in memory with
the interface of torchvision's CIFAR10 class, so that nobody decodes files; order and strengths of the augmentation are
those of `AugmentConfig`. A loop asks `mark()` after every step whether it is over; a mark is two clock readings in a
list, which is written once, at the end. Nothing here counts as code of a peer.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torch.utils.data.dataloader import _BaseDataLoaderIter
from torchvision import transforms

from dist_cifar.config import AugmentConfig, ModelConfig, OptimizerConfig
from dist_cifar.models import build_model

AUGMENT, ADAM = AugmentConfig(), OptimizerConfig()
CLIP_NORM = ADAM.max_grad_norm
EPOCHS = 100
"""More than anybody gets to."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of one peer."""

    model: str
    ranks: int
    batch: int
    """Images of one step on each rank."""
    steps: int
    tuned: bool
    """bf16 autocast, channels-last and fused Adam, added by hand to what the peer documents."""
    workers: int
    """`num_workers` of each rank's DataLoader."""
    data: str
    """Directory with images.npy, labels.npy and statistics.json."""
    out: str
    """Directory for the marks, `<rank>.json`, and for what the peer itself writes."""

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.tuned else torch.contiguous_format


JOB = Job(**json.loads(os.environ["PEERS_JOB"]))
STATISTICS = json.loads(Path(JOB.data, "statistics.json").read_text(encoding="utf-8"))


class Images(Dataset):
    """The training images: uint8 [n, 32, 32, 3] in memory, one PIL image at a time through `transform`."""

    def __init__(self, transform: Callable[[Image.Image], Any]) -> None:
        self.data = np.load(Path(JOB.data, "images.npy"))
        self.targets = np.load(Path(JOB.data, "labels.npy")).tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


def pil_transforms() -> list[Callable[[Image.Image], Image.Image]]:
    """The part of the augmentation that works on PIL images."""
    return [
        transforms.RandomHorizontalFlip(AUGMENT.flip_probability),
        transforms.RandomRotation(AUGMENT.rotation_degrees),
        transforms.ColorJitter(AUGMENT.brightness, AUGMENT.contrast, AUGMENT.saturation),
        transforms.RandomAdjustSharpness(AUGMENT.sharpness_factor, AUGMENT.sharpness_probability),
    ]


def train_transform() -> Callable[[Image.Image], torch.Tensor]:
    """The whole augmentation of one image, to float32 [3, 32, 32]."""
    return transforms.Compose(
        [
            *pil_transforms(),
            transforms.ToTensor(),
            transforms.Normalize(STATISTICS["mean"], STATISTICS["std"]),
            transforms.RandomErasing(AUGMENT.erasing_probability, AUGMENT.erasing_area, AUGMENT.erasing_aspect),
        ]
    )


def network() -> torch.nn.Module:
    """The project's own network."""
    return build_model(ModelConfig(name=JOB.model), num_classes=10, seed=0)


def adam_options(*, may_fuse: bool = True) -> dict[str, Any]:
    """Arguments of torch's Adam; `tuned` takes the fused one where it may."""
    options = {"lr": ADAM.lr, "betas": ADAM.betas, "eps": ADAM.eps, "weight_decay": ADAM.weight_decay}
    return options | ({"fused": True} if JOB.tuned and may_fuse else {})


# --- the clock ---------------------------------------------------------------------------------------------------

_marks: list[tuple[float, float]] = []
_waited_seconds = 0.0


def timed(loader: Iterable[Any]) -> Iterator[Any]:
    """The batches of `loader`; the time until it hands one over is counted as waiting."""
    global _waited_seconds
    batches = iter(loader)
    while True:
        start = time.monotonic()
        batch = next(batches, None)
        _waited_seconds += time.monotonic() - start
        if batch is None:
            return
        yield batch


def time_all_loaders() -> None:
    """As `timed`, for a trainer that iterates by itself: counts the time in `next` of any DataLoader."""
    take_next = _BaseDataLoaderIter.__next__

    def next_batch(self: _BaseDataLoaderIter) -> Any:
        global _waited_seconds
        start = time.monotonic()
        try:
            return take_next(self)
        finally:
            _waited_seconds += time.monotonic() - start

    _BaseDataLoaderIter.__next__ = next_batch


def mark() -> bool:
    """Notes the end of a step; True after the last one."""
    _marks.append((time.monotonic(), _waited_seconds))
    if len(_marks) < JOB.steps:
        return False
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    result = {"marks": _marks, "threads": torch.get_num_threads()}
    Path(JOB.out, f"{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    return True
