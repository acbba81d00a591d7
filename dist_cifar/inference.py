"""Loads a trained model from its run directory or a checkpoint, and runs it on images.

Contract: the model computes as the run's own evaluation did (weights, normalisation, precision), so an evaluation on
the run's test split gives the number of its summary.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dist_cifar import plugins
from dist_cifar.augment.cpu import normalize
from dist_cifar.augment.image import ImageStats
from dist_cifar.config import Config, config_from_values, is_own, known_names
from dist_cifar.data.decode import decode_image, read_file, read_stream, why_unreadable
from dist_cifar.data.names import is_ignored
from dist_cifar.errors import CheckpointError, ConfigError, listed, nearest_path, one_line
from dist_cifar.models import build_model
from dist_cifar.ops.precision import set_precision
from dist_cifar.run.checkpoint import (
    MANIFEST,
    Checkpoint,
    CheckpointStore,
    is_checkpoint_name,
    read_checkpoint,
    weights_sha256,
)
from dist_cifar.run.checkpoint_state import foreign, require_state
from dist_cifar.run.predictions import softmax
from dist_cifar.run.run_dir import RunDir, is_run, latest_run, require_run
from dist_cifar.run.run_files import read_bytes
from dist_cifar.tta import ViewAverage

logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")

BATCH_IMAGES = 256
"""Images that go through the model at a time."""


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """The model of a checkpoint, in evaluation mode."""

    module: nn.Module
    """float32 [n, 3, 32, 32], normalised, to logits float32 [n, classes]; in evaluation mode."""
    device: torch.device
    classes: tuple[str, ...]
    stats: ImageStats
    """Statistics of the training images."""
    config: Config
    """The run's config."""
    checkpoint: Path
    step: int
    sha256: str
    """`weights_sha256` of the weights."""
    data_sha256: str
    """Content hash of the data set of the run."""
    is_changed: bool
    """Whether a file of the network, one from outside the package, is another than the one that the run had."""

    def probabilities(self, images: npt.NDArray[np.uint8], *, tta: bool = False) -> npt.NDArray[np.float32]:
        """Probabilities, float32 [n, classes], of images, uint8 [n, 32, 32, 3].

        With `tta` the logits of each image and of its mirror image are averaged before, as by `eval.tta: mirror`.
        """
        module = ViewAverage(self.module, translate=False) if tta else self.module
        rows = []
        with torch.inference_mode():
            for start in range(0, len(images), BATCH_IMAGES):
                batch = images[start : start + BATCH_IMAGES]
                inputs = normalize(np.ascontiguousarray(batch), np.arange(len(batch)), self.stats)
                rows.append(softmax(module(inputs.to(self.device)).float().cpu().numpy()))
        return np.concatenate(rows)


class WithPreprocessing(nn.Module):
    """A model that takes pixels: it normalises them, then applies the module."""

    def __init__(self, module: nn.Module, stats: ImageStats) -> None:
        super().__init__()
        self._module = module
        self._mean: torch.Tensor
        self._std: torch.Tensor
        self.register_buffer("_mean", torch.tensor(stats.mean).view(1, 3, 1, 1))
        self.register_buffer("_std", torch.tensor(stats.std).view(1, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 32, 32, 3], RGB, to logits float32 [n, classes]."""
        scaled = images.permute(0, 3, 1, 2).float() / 255
        return self._module((scaled - self._mean) / self._std)


# --- loading -----------------------------------------------------------------------------------------------------


def load_classifier(path: Path | None, device: torch.device) -> Classifier:
    """Loads the model of the run directory `path` that `eval.select` names (the newest where none was chosen), or that
    of a checkpoint.

    Without `path`, it takes the run below `runs/` that was written to last. Raises `CheckpointError` or `ConfigError`.
    """
    path = latest_run(Path("runs")) if path is None else path
    checkpoint = _of_run(path) if is_run(path) else _named(path)
    config, classes, stats, model = _rebuild(checkpoint)
    changed = _changed_files(config, checkpoint.state.get("own_files") or {})
    if changed:
        logger.warning(f"warning: {listed(changed)} changed since the run: the model may compute something else")
    model = model.to(device).to(memory_format=torch.channels_last).eval()
    set_precision(model, config.compute.precision, device)
    return Classifier(
        module=model,
        device=device,
        classes=classes,
        stats=stats,
        config=config,
        checkpoint=checkpoint.path,
        step=checkpoint.step,
        sha256=weights_sha256(checkpoint.tensors["model"]),
        data_sha256=str(checkpoint.state["data_sha256"]),
        is_changed=bool(changed),
    )


def _changed_files(config: Config, trained_with: Mapping[str, str]) -> list[str]:
    """The files, or packages, of a network from outside that are others than those that the run was trained with."""
    if not is_own(config, "model"):
        return []
    now = plugins.files_of("model", config.model.name)
    return [name for name, known in now.items() if trained_with.get(name, known) != known]


def _rebuild(checkpoint: Checkpoint) -> tuple[Config, tuple[str, ...], ImageStats, nn.Module]:
    """The config, the classes, the statistics and the model of a checkpoint. Raises `CheckpointError`, and
    `ConfigError` where a network from outside the package is not found."""
    state = require_state(checkpoint)
    name = str(state["config"].get("model.name"))
    if plugins.is_reference(name):
        plugins.find("model", "model.name", name)
    elif name not in known_names("model", "name") and name not in plugins.registered_names("model"):
        raise ConfigError(f"model.name={name}: is not registered in this process; register it before, as the run did")
    try:
        config = config_from_values(state["config"])
        classes, stats = tuple(state["classes"]), ImageStats(mean=tuple(state["mean"]), std=tuple(state["std"]))
        model = build_model(config.model, num_classes=len(classes), seed=config.run.seed)
        model.load_state_dict(checkpoint.tensors["model"])
    except Exception as error:  # what a config or tensors of another version raise is not known
        raise foreign(checkpoint, one_line(error)) from None
    return config, classes, stats, model


def _named(path: Path) -> Checkpoint:
    try:
        return read_checkpoint(_directory_of(path))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; restore it from a copy, or take another of this run") from None


def _directory_of(path: Path) -> Path:
    """The directory of the checkpoint `path`, which may be the file `best` or `latest` that names one.

    Raises `ConfigError` if it is neither.
    """
    folder = path
    if path.name in ("best", "latest") and path.is_file():
        named = (read_bytes(path) or b"").decode(errors="replace").strip()
        if not is_checkpoint_name(named):
            raise CheckpointError(
                f"{path}: does not name a checkpoint; give the run directory, or one in {path.parent}"
            )
        folder = path.parent / named
    if (folder / MANIFEST).exists():
        return folder
    near = path.parent if (path.parent / MANIFEST).exists() else None
    if path.parent.name == "checkpoints":
        near = nearest_path(path)
    if near is None:
        require_run(path)
    raise ConfigError(f"{path}: this is no checkpoint; did you mean {near}?")


def _of_run(path: Path) -> Checkpoint:
    store = CheckpointStore(
        RunDir(path).checkpoints,
        keep_last=1,
        keep_best=1,
        keep_every_steps=None,
        on_write_error="raise",
    )
    config = RunDir(path).previous_config()
    newest = store.load_newest() if config is None or config.eval.select == "last" else None
    select = config.eval.select if config else newest and require_state(newest)["config"].get("eval.select")
    checkpoint = newest if select == "last" else store.load_best() or newest or store.load_newest()
    if checkpoint is None:
        raise CheckpointError(f"{path}: this run has not saved a checkpoint yet; wait for its first evaluation")
    return checkpoint


# --- predicting --------------------------------------------------------------------------------------------------


def load_images(
    sources: Sequence[str], stdin: Callable[[], IO[bytes]] | None = None
) -> Iterator[tuple[str, npt.NDArray[np.uint8] | str]]:
    """Yields each picture's name with its pixels, uint8 [32, 32, 3], or with the reason why it cannot be read.

    A source is a file, a folder, of which every file counts but hidden ones and those that systems leave, or with
    `stdin` also `-`: the bytes of one picture from what that returns. Pictures are decoded as those of a training are.
    Of a folder only regular files are read; a source may also be a pipe.
    """
    for source in sources:
        path = Path(source)
        try:
            if source == "-" and stdin is not None:
                yield "-", _pixels(partial(read_stream, stdin()))
            elif not source:
                yield "an empty name", "give a picture, a folder of them, or -"
            elif os.path.isdir(path):
                yield from _folder_images(source)
            elif os.path.isfile(path):
                yield source, _pixels(partial(read_file, path))
            elif os.path.exists(path):
                yield source, _pixels(partial(_read_pipe, path))
            else:
                yield source, _why_missing(path)
        except OSError as error:
            yield source, f"cannot be read ({error.strerror})"


def _folder_images(source: str) -> Iterator[tuple[str, npt.NDArray[np.uint8] | str]]:
    unlisted: list[OSError] = []
    found = [Path(top) / name for top, _, names in os.walk(source, onerror=unlisted.append) for name in names]
    visible = sorted(file for file in found if not is_ignored(file.relative_to(source).as_posix()))
    for error in unlisted:
        yield str(error.filename), f"cannot be listed ({error.strerror})"
    if not visible and not unlisted:
        yield source, "the folder holds no file; give pictures"
    for file in visible:
        yield str(file), _pixels(partial(read_file, file))


def _read_pipe(path: Path) -> bytes:
    if not stat.S_ISFIFO(os.stat(path).st_mode):
        raise ValueError("neither a file nor a pipe")
    with path.open("rb") as file:
        return read_stream(file)


def _why_missing(path: Path) -> str:
    if path.is_symlink():
        return f"it is {why_unreadable(path, FileNotFoundError())}"
    near = nearest_path(path)
    return f"there is no such file; {f'did you mean {near}?' if near else 'give a picture, a folder of them, or -'}"


def _pixels(read: Callable[[], bytes]) -> npt.NDArray[np.uint8] | str:
    try:
        return decode_image(read())
    except ValueError as error:
        return f"not a readable picture ({error})"


def top_k(probabilities: npt.NDArray[np.float32], classes: Sequence[str], top: int) -> list[tuple[str, float]]:
    """The `top` most probable classes of one picture, [classes], the first the most probable."""
    order = np.argsort(-probabilities, kind="stable")[:top]
    return [(classes[i], float(probabilities[i])) for i in order]


def batched(items: Iterable[_Item], size: int = BATCH_IMAGES) -> Iterator[list[_Item]]:
    """Yields the items in lists of at most `size`."""
    batch: list[_Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
