"""`load_model`: a trained model, to use in a program or a notebook.

Contract: it computes as the run's own evaluation did, as `dist-cifar predict`, `evaluate` and `export` do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import nn

from dist_cifar.api.run_result import RunResult
from dist_cifar.augment.image import IMAGE_SHAPE
from dist_cifar.data.decode import pixels_of
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.distributed.device import choose_device
from dist_cifar.distributed.launch_env import DistEnv
from dist_cifar.errors import ConfigError, DataError, listed
from dist_cifar.inference import Classifier, batched, load_classifier, load_images, top_k
from dist_cifar.tools import evaluation, export

Picture: TypeAlias = "str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8]"
"""A file or a folder of files, an image of Pillow's, or pixels, uint8 [32, 32, 3] or [n, 32, 32, 3]."""


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """The model that a run tested (`eval.select`), in evaluation mode."""

    classifier: Classifier
    """The checkpoint: its config, its path, its step and the hash of its weights."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the logits."""
        return self.classifier.classes

    @property
    def module(self) -> nn.Module:
        """float32 [n, 3, 32, 32], normalised, to logits float32 [n, classes], on the device that was chosen."""
        return self.classifier.module

    def predict(
        self, images: Picture | Sequence[Picture], *, top: int | None = None, tta: bool = False
    ) -> list[list[tuple[str, float]]]:
        """The classes of each image with their probabilities, the most probable first; with `top` only
        that many.

        Images are paths, images of Pillow's or pixels, one or a sequence of them. Files and Pillow's images may have
        any format and size and are decoded as those of a training are; pixels are uint8 [32, 32, 3] or
        [n, 32, 32, 3]. `tta` averages each image with its mirror image. Raises `DataError` for what is no image.
        """
        if top is not None and (type(top) is not int or top < 1):
            raise ConfigError(f"predict: top={top!r}; give a whole number, 1 or more, or None for all classes")
        many = [images] if isinstance(images, str | os.PathLike | Image.Image | np.ndarray) else images
        found: list[list[tuple[str, float]]] = []
        for batch in batched(_all_pixels(many)):
            for probabilities in self.classifier.probabilities(np.stack(batch), tta=tta):
                found.append(top_k(probabilities, self.classes, top or len(self.classes)))
        return found

    def evaluate(self, data: str | os.PathLike[str] | None = None, *, tta: bool = False) -> dict[str, dict[str, Any]]:
        """The accuracy on the run's test split, as `test`, or on the test sets at the path `data`, each by its name.

        Each result has `accuracy` and its 95% `accuracy_interval`, `loss`, `count` and `class_accuracy`, by class. The
        path is a folder or zip as for `data.source=folder`, or holds the files of CIFAR-10.1 or CIFAR-10-C. Raises
        `DataError`.
        """
        classifier = self.classifier
        splits, _ = evaluation.test_sets(classifier, None if data is None else Path(data))
        if data is None:
            splits = dict(zip(["test"], splits.values(), strict=True))
        alone = Communicator(DistEnv(), device=classifier.device, timeout_seconds=classifier.config.run.timeout_seconds)
        return {name: evaluation.measure(classifier, split, alone, tta=tta) for name, split in splits.items()}

    def export(self, to: str = "torch", out: str | os.PathLike[str] | None = None) -> Path:
        """Writes the model as a graph, `torch` (`torch.export`) or `onnx`, and a model card, and returns its path.

        The graph takes pixels, uint8 [n, 32, 32, 3], and has the normalisation inside; it has been compared with the
        model. `out` is the folder, by default `export` in the run directory. Raises `ConfigError` or `CheckpointError`.
        """
        if to not in ("torch", "onnx"):
            raise ConfigError(f"export: to={to!r} is unknown; give torch or onnx")
        folder = export.default_directory(self.classifier) if out is None else Path(out)
        return export.export(self.classifier, to, folder).path

    def __repr__(self) -> str:
        classifier = self.classifier
        return f"<TrainedModel: {classifier.config.model.name}, {len(self.classes)} classes, {classifier.checkpoint}>"


def load_model(run: str | os.PathLike[str] | RunResult, *, device: str = "auto") -> TrainedModel:
    """Loads the model that a run tested: a `RunResult`, a run directory, or one of its checkpoints.

    `device` is `auto`, `cpu` or `cuda`, as `run.device` of a config. Raises `ConfigError` for what is no run, and
    `CheckpointError` for a checkpoint that cannot be trusted.

    Example:

        import dist_cifar

        model = dist_cifar.load_model("runs/quickstart")
        print(model.predict("photo.png", top=1))
        print(model.evaluate()["test"]["accuracy"])
        print(model.export(to="torch"))
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"load_model: device={device!r} is unknown; give auto, cpu or cuda")
    path = run.run_dir if isinstance(run, RunResult) else Path(run)
    return TrainedModel(classifier=load_classifier(path, choose_device(device, DistEnv())))


def _all_pixels(images: Sequence[Picture]) -> Iterator[npt.NDArray[np.uint8]]:
    """Yields the pixels, uint8 [32, 32, 3], of each image. Raises `DataError`, which lists those that are none."""
    wrong: list[str] = []
    for index, image in enumerate(images):
        name = f"image {index}"
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.shape[-3:] != IMAGE_SHAPE or image.ndim not in (3, 4):
                wrong.append(f"{name}: must be uint8 [32, 32, 3] or [n, 32, 32, 3], found {image.dtype} {image.shape}")
            else:
                yield from image.reshape(-1, *IMAGE_SHAPE)
        elif isinstance(image, Image.Image):
            try:
                yield pixels_of(image)
            except ValueError as error:
                wrong.append(f"{name}: {error}")
        elif isinstance(image, str | os.PathLike):
            for path, found in load_images([os.fspath(image)]):
                if isinstance(found, str):
                    wrong.append(f"{path}: {found}")
                else:
                    yield found
        else:
            wrong.append(f"{name}: a {type(image).__name__} is no image")
    if wrong:
        raise DataError(f"predict: {listed(wrong)}")
