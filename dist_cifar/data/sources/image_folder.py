"""A folder or zip of images: `train/<class>/<image>` and `test/<class>/<image>`, or one top folder with these two.

Contract: `read_folder` returns the arrays, images sorted by class name, then by file name, in code-point order, decoded
by `dist_cifar.data.decode`. Names are compared in one normal form. Hidden files, those that systems leave, and files
outside the class folders are ignored; whatever else is wrong is a `DataError` that lists all of it.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dist_cifar.augment.image import IMAGE_SHAPE
from dist_cifar.config import DataConfig
from dist_cifar.data import cache, decode
from dist_cifar.data.arrays import Arrays
from dist_cifar.data.image_tree import LAYOUT, SPLITS, ImageTree, is_folder, opened
from dist_cifar.data.names import is_ignored, normal_form, shown, why_unusable
from dist_cifar.data.sources.base import Source, root_path
from dist_cifar.errors import DataError, one_line

logger = logging.getLogger(__name__)

_LISTED = 10
"""How many faults an error lists; it counts the others."""

FilesByClass = dict[str, list[str]]
"""File names by class, both sorted."""


class ImageFolder(Source):
    """The folder or zip `data.root`."""

    def key(self, config: DataConfig, cache_dir: Path) -> str:
        root = root_path(config)
        content = cache.memoized(cache_dir, root, signature(root, cache_dir), lambda: content_key(root))
        return hashlib.sha256(f"{decode.VERSION} {content}".encode()).hexdigest()

    def read(self, config: DataConfig) -> Arrays:
        root = root_path(config)
        before = signature(root)
        arrays = read_folder(root)
        if signature(root) != before:
            raise DataError(f"{root}: changed while it was read; wait until it is written, and start again")
        return arrays


def signature(root: Path, cache_dir: Path | None = None) -> str:
    """A text that changes when the content does, without reading it: from names and from what `stat` tells of files.

    Raises `DataError` where `cache_dir` lies among the images, which would change with every start.
    """
    if not is_folder(root):
        return _file_status(str(root))
    with opened(root) as tree:
        layout = find_layout(root, tree.names)
        if cache_dir is not None:
            _require_outside(cache_dir, root, layout.prefix)
        return _digest(layout, lambda name: _file_status(f"{root}/{name}"))


def content_key(root: Path) -> str:
    """SHA-256 of the zip; of a folder, SHA-256 over its sorted relative names and the SHA-256 of each file.

    Raises `DataError` for a folder with faults.
    """
    try:
        if not is_folder(root):
            return _file_sha256(str(root))
        with opened(root) as tree:
            layout = find_layout(root, tree.names)
            if not layout.faults + tree.faults:
                logger.info(f"{root}: hashing the images, which is done again only where a file has changed")
                return _digest(layout, lambda name: _file_sha256(f"{root}/{name}"))
    except OSError as error:
        found = f"{root}: cannot be read ({error})"
    else:
        found = f"{root}: changed while it was read"
    read_folder(root)  # it raises an error that lists this fault with all others
    raise DataError(f"{found}; start again")


def read_folder(root: Path) -> Arrays:
    """Decodes the folder or zip `root`. Raises `DataError`, which lists the files that are wrong."""
    with opened(root) as tree:
        layout = find_layout(root, tree.names)
        train, test = ([name for names in layout.splits[split].values() for name in names] for split in SPLITS)
        logger.info(f"{root}: decoding {len(train) + len(test)} images of {len(layout.splits['train'])} classes")
        faults = tree.faults + layout.faults
        arrays = Arrays(
            train_images=_decode_all(tree, train, faults),
            train_labels=_labels(layout.splits["train"]),
            test_images=_decode_all(tree, test, faults),
            test_labels=_labels(layout.splits["test"]),
            classes=tuple(layout.splits["train"]),
        )
    if faults:
        count = "" if len(faults) == 1 else f"{len(faults)} faults: "
        listed = shown("; ".join(faults[:_LISTED]))
        more = f"; and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        raise DataError(f"{root}: {count}{listed}{more}; repair or remove what is named")
    return arrays


# --- the layout --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The images of a folder or zip."""

    splits: Mapping[str, FilesByClass]
    """By split."""
    prefix: str
    """The top folder of both splits, with a `/` at the end; empty without one."""
    faults: list[str]
    """What is wrong with its folders, each as `<name> <what is wrong with it>`."""


def find_layout(root: Path, names: Iterable[str]) -> Layout:
    """The images among `names`, which are relative and separated by `/`; those that end in `/` are folders.

    `root` is for messages. Raises `DataError` where there are no class folders.
    """
    visible = sorted({name for name in names if not is_ignored(name)}, key=lambda name: (normal_form(name), name))
    prefix = _prefix(visible)
    splits: dict[str, FilesByClass] = {split: {} for split in SPLITS}
    faults = []
    for name in visible:
        split, _, rest = name.removeprefix(prefix).partition("/")
        class_name, slash, file = rest.partition("/")
        if not name.startswith(prefix) or split not in SPLITS or not slash:
            continue
        files = splits[split].setdefault(normal_form(class_name), [])
        if "/" in file:
            faults.append(f"{name} lies below a class folder")
        elif file:
            files.append(name)
    for split in SPLITS:
        if not splits[split]:
            found = sorted({name.removeprefix(prefix).split("/")[0] for name in visible} - {""})
            listed = shown(", ".join(found[:10])) or "nothing"
            raise DataError(f"{root}: no {shown(prefix)}{split}/<class>/ in it, found {listed}; {LAYOUT}")
    faults += _class_faults(prefix, splits)
    return Layout(splits={split: dict(sorted(splits[split].items())) for split in SPLITS}, prefix=prefix, faults=faults)


def _prefix(visible: Sequence[str]) -> str:
    """The one folder that holds the splits, or the only folder there is; empty for the root itself."""
    paths = [name.split("/") for name in visible if "/" in name]
    tops = {path[0] for path in paths}
    if tops & set(SPLITS):
        return ""
    holding = {path[0] for path in paths if len(path) > 2 and path[1] in SPLITS} or tops
    return f"{holding.pop()}/" if len(holding) == 1 else ""


def _class_faults(prefix: str, splits: Mapping[str, FilesByClass]) -> Iterator[str]:
    for split, other in (SPLITS, SPLITS[::-1]):
        for class_name, files in splits[split].items():
            folder = f"{prefix}{split}/{class_name}/"
            if class_name not in splits[other]:
                yield f"{folder} has no counterpart in {prefix}{other}/"
            elif not files:
                yield f"{folder} is empty"
            unusable = why_unusable(class_name)
            if unusable:
                yield f"{folder} cannot be a class: {unusable}"


def _require_outside(cache_dir: Path, root: Path, prefix: str) -> None:
    for split in SPLITS:
        folder, inner = (root / prefix / split).resolve(), cache_dir.resolve()
        if inner.is_relative_to(folder) and not any(map(is_ignored, inner.relative_to(folder).parts)):
            raise DataError(
                f"data.cache_dir={cache_dir}: lies among the images of data.root={root}; set it to a folder elsewhere"
            )


def _labels(files_by_class: Mapping[str, Sequence[str]]) -> npt.NDArray[np.int64]:
    counts = [len(files) for files in files_by_class.values()]
    return np.repeat(np.arange(len(counts), dtype=np.int64), counts)


# --- keys --------------------------------------------------------------------------------------------------------


def _digest(layout: Layout, of_file: Callable[[str], str]) -> str:
    """SHA-256 over the names of classes and files, and `of_file` of each file."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for class_name, files in layout.splits[split].items():
            parts = [split, class_name, *(part for name in files for part in (name, of_file(name)))]
            digest.update(
                b"".join(part.encode(errors="surrogatepass") + b"\0" for part in parts)
            )  # no name holds a zero byte
    return digest.hexdigest()


def _file_status(path: str) -> str:
    """What changes with a file's content: also where a tool has restored its time, as `cp -p` and unzip do."""
    try:
        status = os.stat(path)
    except OSError as error:
        return str(error.errno)
    return f"{status.st_mode} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def _file_sha256(path: str) -> str:
    if not os.path.isfile(path):  # reading a pipe would wait forever
        raise FileNotFoundError(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- images ------------------------------------------------------------------------------------------------------


def _decode_all(tree: ImageTree, names: Sequence[str], faults: list[str]) -> npt.NDArray[np.uint8]:
    """The images of `names`; what cannot be used is added to `faults`."""
    images = np.zeros((len(names), *IMAGE_SHAPE), np.uint8)
    for image, name in zip(images, names, strict=True):
        try:
            image[:] = decode.decode_image(tree.read(name))
        except Exception as error:  # a damaged zip makes its reader raise anything
            faults.append(f"{name} is not a readable image ({one_line(error)})")
    return images
