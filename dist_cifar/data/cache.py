"""The cache of decoded data sets: built once per file system, memory-mapped by every process.

Contract: `load_or_build` returns the arrays of a content key. Where they are missing or damaged one process builds
them, under a lock, while the others wait. An entry is a directory that appears by a rename once its files are on the
disk: a process that is killed at any time leaves a whole entry or none. A good entry is read without a lock, and from a
read-only directory too. A reader checks its structure (sizes, types, label range) and not every byte; an entry that
other users could have changed is refused.

`memoized` keeps what is slow to compute about a file, such as its hash, for as long as the file looks the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_cifar.augment.image import ImageStats, are_images
from dist_cifar.data.arrays import Arrays, channel_statistics, content_sha256
from dist_cifar.data.cache_lock import only_writer
from dist_cifar.data.ownership import FOLDER_MODE, close_to_all, require_trusted
from dist_cifar.errors import DataError
from dist_cifar.run import atomic_io

FORMAT_VERSION = 1
"""Increase it when the files of an entry change, or when a source decodes the same content to other bytes."""

_META = "meta.json"
_DTYPES = {"train_images": np.uint8, "train_labels": np.int64, "test_images": np.uint8, "test_labels": np.int64}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A cached data set, its images memory-mapped, and what was computed from it."""

    directory: Path
    """Where the files are."""
    key: str
    arrays: Arrays
    content_sha256: str
    stats: ImageStats
    """Statistics of the training images."""


def cache_directory(configured: str | None) -> Path:
    """`data.cache_dir`, else `$XDG_CACHE_HOME/dist_cifar`, else `~/.cache/dist_cifar`."""
    if configured is not None:
        return Path(configured)
    try:
        base = os.environ.get("XDG_CACHE_HOME", "")
        # A relative path there is invalid and to be ignored (XDG Base Directory Specification 0.8).
        return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "dist_cifar"
    except RuntimeError:
        raise DataError("there is no home directory to keep the cache in; set data.cache_dir to a directory") from None


def load_or_build(cache_dir: Path, name: str, key: str, build: Callable[[], Arrays]) -> Entry:
    """The entry of the content `key` (hexadecimal); `name` is for people who look at the directory.

    `build` is called by one process per file system, and only where there is no good entry. Raises `DataError` if the
    entry cannot be written, and whatever `build` raises.
    """
    directory = entry_directory(cache_dir, name, key)
    entry = _read_trusted(directory, key)
    if entry is not None:
        return entry
    with only_writer(directory.with_suffix(".lock"), key="data.cache_dir", doing="reading the images"):
        entry = _read_trusted(directory, key)
        if entry is None:
            arrays = build()
            built = Entry(
                directory=directory,
                key=key,
                arrays=arrays,
                content_sha256=content_sha256(arrays),
                stats=channel_statistics(arrays.train_images),
            )
            try:
                write_entry(built)
            except OSError as error:
                raise DataError(
                    f"{cache_dir}: the decoded images cannot be written there ({error}); make room, or set"
                    " data.cache_dir to another directory"
                ) from None
            entry = read_entry(directory, key)
    if entry is None:
        raise DataError(f"{directory}: does not read back as written; set data.cache_dir to another disk")
    return entry


def _read_trusted(directory: Path, key: str) -> Entry | None:
    require_trusted(directory, "data.cache_dir")
    return read_entry(directory, key)


def entry_directory(cache_dir: Path, name: str, key: str) -> Path:
    """The directory of the entry of the content `key`, which may not exist."""
    return cache_dir / f"{name}-{key[:32]}-v{FORMAT_VERSION}"


def memoized(cache_dir: Path, path: Path, signature: str, compute: Callable[[], str]) -> str:
    """What `compute` once returned for `path` while it had this `signature`; else computes it again and keeps it."""
    note = cache_dir / "index" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["signature"] == signature and isinstance(known["answer"], str):
            return known["answer"]
    answer = compute()
    # A note that cannot be kept costs time, nothing else: a read-only cache is still a cache.
    with contextlib.suppress(OSError):
        note.parent.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        text = json.dumps({"path": str(path), "signature": signature, "answer": answer})
        atomic_io.write_atomic(note, text)
    return answer


def read_entry(directory: Path, key: str) -> Entry | None:
    """The entry, or None where there is no whole one."""
    try:
        meta = json.loads((directory / _META).read_text(encoding="utf-8"))
        arrays = Arrays(
            **{name: _read_array(directory / f"{name}.npy", dtype, meta["bytes"]) for name, dtype in _DTYPES.items()},
            classes=tuple(meta["classes"]),
        )
        entry = Entry(
            directory=directory,
            key=meta["key"],
            arrays=arrays,
            content_sha256=meta["content_sha256"],
            stats=ImageStats(mean=tuple(meta["mean"]), std=tuple(meta["std"])),
        )
        return entry if entry.key == key and _is_sound(arrays) else None
    except (OSError, ValueError, KeyError, TypeError, EOFError):  # a damaged entry is a missing entry
        return None


def _read_array(path: Path, dtype: type, sizes: dict[str, int]) -> npt.NDArray[Any]:
    if path.stat().st_size != sizes[path.name]:
        raise ValueError(f"{path}: truncated")
    array = np.load(path, mmap_mode="r")
    if array.dtype != dtype or not array.flags.c_contiguous:
        raise ValueError(f"{path}: wrong layout")
    return array if array.ndim == 4 else np.array(array)  # labels are small: in memory


def _is_sound(arrays: Arrays) -> bool:
    return all(
        are_images(images)
        and len(images) == len(labels) > 0
        and 0 <= labels.min() <= labels.max() < len(arrays.classes)
        for images, labels in (
            (arrays.train_images, arrays.train_labels),
            (arrays.test_images, arrays.test_labels),
        )
    )


def write_entry(entry: Entry) -> None:
    """Writes the entry beside its directory, then renames it into place; a damaged one there is removed first.

    The caller holds the lock, so one temporary name will do. Raises `OSError`, and then leaves nothing.
    """
    directory, temporary = entry.directory, entry.directory.with_suffix(".tmp")
    for leftover in (directory, temporary):  # damaged, or left by a process that was killed
        if leftover.exists():
            atomic_io.remove_tree(leftover)
    try:
        temporary.mkdir(mode=FOLDER_MODE)
        arrays = {f"{name}.npy": getattr(entry.arrays, name) for name in _DTYPES}
        sizes = {name: _write_array(temporary / name, array) for name, array in arrays.items()}
        meta = {
            "key": entry.key,
            "classes": entry.arrays.classes,
            "content_sha256": entry.content_sha256,
            "mean": entry.stats.mean,
            "std": entry.stats.std,
            "bytes": sizes,
        }
        atomic_io.write_file(temporary / _META, json.dumps(meta, indent=1).encode())
        close_to_all(temporary)
        atomic_io.fsync_dir(temporary)
        atomic_io.move(temporary, directory)
    except BaseException:
        with contextlib.suppress(OSError):
            atomic_io.remove_tree(temporary)  # on a full disk, above all
        raise


def _write_array(path: Path, array: npt.NDArray[Any]) -> int:
    """Writes what `np.save` would, without another copy of the array in memory; returns the number of bytes."""
    header, array = io.BytesIO(), np.ascontiguousarray(array)
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    data = array.reshape(-1).view(np.uint8)
    atomic_io.write_file(path, header.getvalue(), data.data)
    return header.tell() + data.nbytes
