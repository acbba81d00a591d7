"""Out-of-distribution test sets for CIFAR-10, in the files that their authors publish.

Contract: `read_test_sets` recognises a layout by its files and returns uint8 images with labels; arrays are
memory-mapped and nothing is unpickled. Layouts:

    cifar10.1_v4_data.npy, cifar10.1_v4_labels.npy   CIFAR-10.1 (Recht et al. 2018), v4, v6 or both
    labels.npy and <corruption>.npy                  CIFAR-10-C (Hendrycks & Dietterich 2019): severities 1 to 5, one
                                                     after the other, each the whole test split in its order
    test/<class>/<image> and train/<class>/<image>   as for data.source=folder: the images of test/, also in a zip
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_cifar.augment.image import require_images
from dist_cifar.config import DataConfig
from dist_cifar.data.dataset import Split, load_dataset
from dist_cifar.data.names import normal_form
from dist_cifar.errors import DataError, listed, nearest_path, one_line

logger = logging.getLogger(__name__)

SEVERITIES = 5
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""The classes of CIFAR-10 in the order of their labels, which CIFAR-10.1 and CIFAR-10-C use too."""
_LAYOUTS = "give a folder with cifar10.1_v6_data.npy, with CIFAR-10-C's labels.npy, or with train/ and test/"


def read_test_sets(root: Path, classes: Sequence[str], cache_dir: str | None) -> tuple[dict[str, Split], str | None]:
    """The sets in `root` by name: `cifar10.1_v6`, or `fog/3` for severity 3 of a corruption. Raises `DataError`.

    Beside them, the content hash of a folder or zip of images; None for published files.

    Logs a warning if the model's `classes` have other names than the labels of these files.
    """
    if not root.exists():
        near = nearest_path(root)
        hint = f"did you mean {near}?" if near else _LAYOUTS
        raise DataError(f"--data {root}: there is no such file or folder; {hint}")
    if root.is_dir():
        found = [path.name.removesuffix("_data.npy") for path in sorted(root.glob("cifar10.1_v*_data.npy"))]
        if (found or (root / "labels.npy").exists()) and tuple(classes) != CLASSES:
            logger.info(
                f"warning: {root} has the labels of CIFAR-10, and the model's classes are called"
                f" {', '.join(classes[:10])}; the accuracy means nothing unless they are the same in the same order"
            )
        if found:
            sets = {name: _split(root / f"{name}_data.npy", root / f"{name}_labels.npy", classes) for name in found}
            return sets, None
        if (root / "labels.npy").exists():
            return _corruptions(root, classes), None
    if root.suffix == ".npy":
        raise DataError(f"--data {root}: this is one file of several; give its folder, {root.parent}")
    try:
        dataset = load_dataset(DataConfig(source="folder", root=str(root), cache_dir=cache_dir))
    except DataError as error:
        raise DataError(f"--data {str(error).replace('data.root', '--data')}") from None
    require_classes(f"--data {root}", dataset.classes, classes)
    return {"test": dataset.test}, dataset.content_sha256


def require_classes(data: str, found: Sequence[str], classes: Sequence[str]) -> None:
    """Raises `DataError` unless the classes `found` in `data` are those of the model, by name and in order."""
    here, wanted = list(map(normal_form, found)), list(map(normal_form, classes))
    if here != wanted:
        lacking, unknown = ([name for name in a if name not in b] for a, b in ((wanted, here), (here, wanted)))
        differences = [
            f"{what} {listed(names)}"
            for what, names in (("it lacks", lacking), ("the model does not know", unknown))
            if names
        ]
        raise DataError(
            f"{data}: its classes are not those of the model: {'; '.join(differences) or 'their order differs'}"
        )


def _corruptions(root: Path, classes: Sequence[str]) -> dict[str, Split]:
    sets = {}
    for path in sorted(root.glob("*.npy")):
        if path.name == "labels.npy":
            continue
        whole = _split(path, root / "labels.npy", classes)
        if len(whole.labels) % SEVERITIES:
            raise DataError(f"{path}: {len(whole.labels)} images are not {SEVERITIES} severities of as many")
        size = len(whole.labels) // SEVERITIES
        for i in range(SEVERITIES):
            part = slice(i * size, (i + 1) * size)
            sets[f"{path.stem}/{i + 1}"] = Split(images=whole.images[part], labels=whole.labels[part])
    if not sets:
        raise DataError(f"{root}: labels.npy and no <corruption>.npy beside it; unpack CIFAR-10-C.tar there")
    return sets


def _split(images_path: Path, labels_path: Path, classes: Sequence[str]) -> Split:
    images, labels = np.ascontiguousarray(_array(images_path)), _array(labels_path)
    try:
        require_images(images)
    except ValueError as error:
        raise DataError(f"{images_path}: {error}") from None
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{labels_path}: {labels.dtype} {list(labels.shape)} are not the labels of {len(images)} images"
        )
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(classes):
        raise DataError(f"{labels_path}: labels are not all from 0 to {len(classes) - 1}")
    return Split(images=images, labels=labels.astype(np.int64))


def _array(path: Path) -> npt.NDArray[Any]:
    try:
        if not path.is_file():
            raise ValueError("no regular file")
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("an archive of arrays")
    except Exception as error:  # numpy raises anything for a file that is not one of its own
        raise DataError(f"{path}: cannot be read ({one_line(error)}); download it again") from None
    return array
