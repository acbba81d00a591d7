"""The cache of decoded data sets: built once per file system, memory-mapped by every process.

Contract: `load_or_build` returns the arrays of a content key. Where they are missing or damaged one process builds
them, under a lock, while the others wait. An entry is a directory that appears by a rename once its files are on the
disk: whatever is killed when, there is a whole entry or none. A good entry is read without a lock, and from a read-only
directory too. A reader checks its structure (sizes, types, label range) and not every byte.

`remembered` keeps what is slow to find out about a file, its hash for one, for as long as the file looks the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_cifar.data.arrays import Arrays, channel_statistics, content_sha256
from dist_cifar.data.file_lock import exclusive
from dist_cifar.errors import DataError

FORMAT_VERSION = 1
"""To be raised when the files of an entry change, or when a source decodes the same content to other bytes."""

_META = "meta.json"
_DTYPES = {"train_images": np.uint8, "train_labels": np.int64, "test_images": np.uint8, "test_labels": np.int64}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A cached data set, its images memory-mapped, and what was computed from it."""

    directory: Path
    """Where its files are."""
    key: str
    arrays: Arrays
    content_sha256: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def cache_directory(configured: str | None) -> Path:
    """`data.cache_dir`, else `$XDG_CACHE_HOME/dist_cifar`, else `~/.cache/dist_cifar`."""
    try:
        if configured is not None:
            return Path(configured).expanduser()
        base = os.environ.get("XDG_CACHE_HOME", "")
        # A relative path there is invalid and to be ignored (XDG Base Directory Specification 0.8).
        return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "dist_cifar"
    except RuntimeError:
        raise DataError("there is no home directory to keep the cache in; set data.cache_dir to a directory") from None


def load_or_build(cache_dir: Path, name: str, key: str, build: Callable[[], Arrays]) -> Entry:
    """The entry of the content `key` (hexadecimal); `name` tells people what it is.

    `build` is called by one process per file system, and only where there is no good entry. Raises `DataError` if the
    entry cannot be written, and whatever `build` raises.
    """
    directory = entry_directory(cache_dir, name, key)
    entry = read_entry(directory, key)
    if entry is not None:
        return entry
    with exclusive(directory.with_suffix(".lock"), key="data.cache_dir"):
        entry = read_entry(directory, key)
        if entry is None:
            arrays = build()
            mean, std = channel_statistics(arrays.train_images)
            sha256 = content_sha256(arrays)
            try:
                write_entry(
                    Entry(directory=directory, key=key, arrays=arrays, content_sha256=sha256, mean=mean, std=std)
                )
            except OSError as error:
                raise DataError(
                    f"{cache_dir}: the decoded images cannot be written there ({error}); make room, or set"
                    " data.cache_dir to another directory"
                ) from None
            entry = read_entry(directory, key)
    if entry is None:
        raise DataError(f"{directory}: does not read back as written; set data.cache_dir to another disk")
    return entry


def entry_directory(cache_dir: Path, name: str, key: str) -> Path:
    """Where the entry of the content `key` is, if there is one."""
    return cache_dir / f"{name}-{key[:32]}-v{FORMAT_VERSION}"


def remembered(cache_dir: Path, path: Path, signature: str, find_out: Callable[[], str]) -> str:
    """What `find_out` once returned for `path` while it had this `signature`; else asks again, and notes the answer."""
    note = cache_dir / "index" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["signature"] == signature and isinstance(known["answer"], str):
            return known["answer"]
    answer = find_out()
    # A note that cannot be kept costs time, nothing else: a read-only cache is still a cache.
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"path": str(path), "signature": signature, "answer": answer}), "utf-8")
        temporary.replace(note)
    return answer


def read_entry(directory: Path, key: str) -> Entry | None:
    """The entry, or None where there is none that is whole."""
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
            mean=tuple(meta["mean"]),
            std=tuple(meta["std"]),
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
        images.shape == (len(labels), 32, 32, 3)
        and len(labels) > 0
        and 0 <= labels.min() <= labels.max() < len(arrays.classes)
        for images, labels in (
            (arrays.train_images, arrays.train_labels),
            (arrays.test_images, arrays.test_labels),
        )
    )


def write_entry(entry: Entry) -> None:
    """Writes the entry beside its directory, then renames it into place.

    The caller holds the lock, so one temporary name will do. Raises `OSError`, and then leaves nothing.
    """
    directory, temporary = entry.directory, entry.directory.with_suffix(".tmp")
    if temporary.exists():  # left by a process that was killed
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        sizes = {}
        for name in _DTYPES:
            path = temporary / f"{name}.npy"
            with path.open("wb") as file:
                np.save(file, getattr(entry.arrays, name), allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            sizes[path.name] = path.stat().st_size
        meta = {
            "key": entry.key,
            "classes": entry.arrays.classes,
            "content_sha256": entry.content_sha256,
            "mean": entry.mean,
            "std": entry.std,
            "bytes": sizes,
        }
        with (temporary / _META).open("w", encoding="utf-8") as file:
            json.dump(meta, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync_directory(temporary)
        if directory.exists():  # a damaged entry
            shutil.rmtree(directory)
        temporary.rename(directory)
        _sync_directory(directory.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk, above all
        raise


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
