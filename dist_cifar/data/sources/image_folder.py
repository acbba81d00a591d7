"""A folder or zip of images: `train/<class>/<image>` and `test/<class>/<image>`, or one top folder with these two.

Contract: `read_folder` returns the arrays, images sorted by class name, then by file name, in code-point order, decoded
by `dist_cifar.data.decode`. Hidden files, `__MACOSX` and files outside the class folders are ignored; whatever else is
wrong is a `DataError`.

Nothing is unpacked to disk, so a name in a zip can lead nowhere; one that tries is refused all the same.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dist_cifar.augment.image import IMAGE_SHAPE
from dist_cifar.config import DataConfig
from dist_cifar.data import cache
from dist_cifar.data.arrays import Arrays
from dist_cifar.data.decode import decode_image
from dist_cifar.data.sources.base import Source, root_path
from dist_cifar.errors import DataError, nearest_path

logger = logging.getLogger(__name__)

SPLITS = ("train", "test")
_MAX_FILE_BYTES = 256_000_000
_LAYOUT = "data.root must hold train/<class>/<image> and test/<class>/<image>"

Layout = dict[str, dict[str, list[str]]]
"""File names by split and class, all sorted."""


class ImageFolder(Source):
    """The folder or zip `data.root`."""

    def key(self, config: DataConfig, cache_dir: Path) -> str:
        root = root_path(config)
        return cache.memoized(cache_dir, root, signature(root), lambda: content_key(root))

    def read(self, config: DataConfig) -> Arrays:
        return read_folder(root_path(config))


def signature(root: Path) -> str:
    """A text that changes when the content does, from names, sizes and modification times alone."""
    return _digest(root, _file_status)


def content_key(root: Path) -> str:
    """SHA-256 of the zip; of a folder, SHA-256 over its sorted relative names and the SHA-256 of each file."""
    return _digest(root, _file_sha256)


def read_folder(root: Path) -> Arrays:
    """Decodes the folder or zip `root`. Raises `DataError`, which names the file that is wrong."""
    with _opened(root) as (names, read):
        layout = find_layout(root, names)
        train, test = ([name for files in layout[split].values() for name in files] for split in SPLITS)
        logger.info(f"{root}: decoding {len(train) + len(test)} images of {len(layout['train'])} classes")
        return Arrays(
            train_images=_decode_all(root, train, read),
            train_labels=_labels(layout["train"]),
            test_images=_decode_all(root, test, read),
            test_labels=_labels(layout["test"]),
            classes=tuple(layout["train"]),
        )


# --- the layout --------------------------------------------------------------------------------------------------


def find_layout(root: Path, names: Iterable[str]) -> Layout:
    """The images among `names`, which are relative and separated by `/`; those that end in `/` are folders.

    `root` is for messages.
    """
    visible = sorted(name for name in set(names) if not _is_ignored(name))
    tops = sorted({name.split("/")[0] for name in visible if "/" in name})
    prefix = f"{tops[0]}/" if len(tops) == 1 and tops[0] not in SPLITS else ""
    in_class = re.compile(rf"{re.escape(prefix)}({'|'.join(SPLITS)})/([^/]+)/(.*)", re.DOTALL)
    layout: Layout = {split: defaultdict(list) for split in SPLITS}
    for match in filter(None, map(in_class.fullmatch, visible)):
        split, class_name, file = match.groups()
        if "/" in file:
            raise DataError(f"{root}: {match[0]} lies below a class folder; {_LAYOUT}")
        layout[split][class_name] += [match[0]] if file else []
    for split in SPLITS:
        if not layout[split]:
            found = sorted({name.removeprefix(prefix).split("/")[0] for name in visible} - {""})
            raise DataError(
                f"{root}: no {prefix}{split}/<class>/ in it, found {', '.join(found[:10]) or 'nothing'}; {_LAYOUT}"
            )
        for class_name, files in layout[split].items():
            if not files:
                raise DataError(f"{root}: {prefix}{split}/{class_name}/ is empty; add images or remove the folder")
    for split, other in (SPLITS, SPLITS[::-1]):
        one_sided = [class_name for class_name in layout[split] if class_name not in layout[other]]
        if one_sided:
            raise DataError(
                f"{root}: {', '.join(one_sided[:10])} in {prefix}{split}/ but not in {prefix}{other}/; give both the"
                " same class folders"
            )
    return {split: dict(sorted(layout[split].items())) for split in SPLITS}


def _is_ignored(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _labels(files_by_class: Mapping[str, Sequence[str]]) -> npt.NDArray[np.int64]:
    counts = [len(files) for files in files_by_class.values()]
    return np.repeat(np.arange(len(counts), dtype=np.int64), counts)


# --- files -------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(root: Path) -> Iterator[tuple[list[str], Callable[[str], bytes]]]:
    """The names in the folder or zip, and a function that reads one of them."""
    if root.is_dir():
        yield _folder_names(root), lambda name: _read_file(root / name)
        return
    try:
        archive = zipfile.ZipFile(root)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{root}: neither a folder nor a zip ({error}); {_LAYOUT}") from None
    with archive:
        for name in archive.namelist():
            if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or re.match("[A-Za-z]:", name):
                raise DataError(f"{root}: its member {name!r} points outside; make a new zip")
        yield archive.namelist(), lambda name: _read_member(archive, name)


def _read_file(path: Path) -> bytes:
    if not path.is_file() or path.stat().st_size > _MAX_FILE_BYTES:
        raise ValueError(f"not a file of at most {_MAX_FILE_BYTES} bytes")
    return path.read_bytes()


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    if archive.getinfo(name).file_size > _MAX_FILE_BYTES:  # zipfile reads no more than it declares
        raise ValueError(f"unpacks to more than {_MAX_FILE_BYTES} bytes")
    return archive.read(name)


def _folder_names(root: Path) -> list[str]:
    """Sorted relative names of files and, with a `/` at the end, folders."""
    names: list[str] = []
    level = [""]
    for _ in range(4):  # as deep as an image may lie, so a link that leads back up ends too
        found = []
        for folder in level:
            with os.scandir(root / folder) as entries:
                found += [f"{folder}{entry.name}{'/' if entry.is_dir() else ''}" for entry in entries]
        found = [name for name in found if not _is_ignored(name)]
        names += found
        level = [name for name in found if name.endswith("/")]
    return sorted(names)


def _digest(root: Path, of_file: Callable[[str], str]) -> str:
    """`of_file` of the zip, or SHA-256 over the names in the folder and `of_file` of each."""
    try:
        if not root.is_dir():
            return of_file(str(root))
        digest = hashlib.sha256()
        for name in _folder_names(root):
            parts = [name] if name.endswith("/") else [name, of_file(f"{root}/{name}")]
            digest.update(b"".join(os.fsencode(part) + b"\0" for part in parts))  # no name holds a zero byte
        return digest.hexdigest()
    except FileNotFoundError:
        near = nearest_path(root)
        raise DataError(
            f"{root}: there is no such file or folder; {f'did you mean {near}?' if near else _LAYOUT}"
        ) from None
    except OSError as error:
        raise DataError(f"{root}: cannot be read ({error}); {_LAYOUT}") from None


def _file_status(path: str) -> str:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait forever
        raise DataError(f"{path}: neither a file nor a folder; remove it")
    return f"{status.st_size} {status.st_mtime_ns}"


def _file_sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- images ------------------------------------------------------------------------------------------------------


def _decode_all(root: Path, names: Sequence[str], read: Callable[[str], bytes]) -> npt.NDArray[np.uint8]:
    images = np.empty((len(names), *IMAGE_SHAPE), np.uint8)
    for image, name in zip(images, names, strict=True):
        try:
            image[:] = decode_image(read(name))
        except Exception as error:  # a damaged zip makes its reader raise anything
            raise DataError(f"{root}: {name} is not a readable image ({error}); repair or remove it") from None
    return images
