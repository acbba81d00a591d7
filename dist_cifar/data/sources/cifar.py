"""The official python archives of CIFAR-10 and CIFAR-100: found or downloaded, verified, decoded.

Contract: `read_archive` returns the arrays of a verified archive or raises `DataError`. Nothing is opened before its
hash matches, nothing is unpacked to disk, and the pickles inside are read by an unpickler that can make numpy arrays
and nothing else.

Source: A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009,
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import io
import logging
import os
import pickle
import tarfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dist_cifar.augment.image import IMAGE_SIZE
from dist_cifar.config import DataConfig
from dist_cifar.data.arrays import Arrays
from dist_cifar.data.cache_lock import only_writer
from dist_cifar.data.sources.base import Source, root_path
from dist_cifar.errors import ConfigError, DataError
from dist_cifar.run import atomic_io

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 30.0
_md5 = functools.partial(hashlib.md5, usedforsecurity=False)  # or a FIPS build refuses it


@dataclass(frozen=True, kw_only=True)
class ArchiveSpec:
    """The known facts of an official archive."""

    name: str
    url: str
    filename: str
    size_bytes: int
    md5: str
    sha256: str
    folder: str
    """The one folder in the archive."""
    train_md5: Mapping[str, str]
    """The training files in that folder, in order, and their MD5."""
    test_md5: Mapping[str, str]
    """The test files, likewise."""
    meta_md5: Mapping[str, str]
    """The file with the class names, likewise."""
    label_key: str
    """The key of the labels in the pickles."""
    classes_key: str
    """The key of the class names, likewise."""

    @property
    def file_md5(self) -> dict[str, str]:
        """All files that are needed, and their MD5."""
        return {**self.train_md5, **self.test_md5, **self.meta_md5}


CIFAR10 = ArchiveSpec(
    name="CIFAR-10",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    filename="cifar-10-python.tar.gz",
    size_bytes=170498071,
    md5="c58f30108f718f92721af3b95e74349a",
    sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    folder="cifar-10-batches-py",
    train_md5={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    test_md5={"test_batch": "40351d587109b95175f43aff81a1287e"},
    meta_md5={"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
    label_key="labels",
    classes_key="label_names",
)

CIFAR100 = ArchiveSpec(
    name="CIFAR-100",
    url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    filename="cifar-100-python.tar.gz",
    size_bytes=169001437,
    md5="eb9058c3a382ffc7106e4002c42a8d85",
    sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    folder="cifar-100-python",
    train_md5={"train": "16019d7e3df5f24257cddd939b257f8d"},
    test_md5={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    meta_md5={"meta": "7973b15100ade9c7d40fb424638fde48"},
    label_key="fine_labels",
    classes_key="fine_label_names",
)


class CifarArchive(Source):
    """An official archive at or in `data.root`, or downloaded to it."""

    def __init__(self, spec: ArchiveSpec) -> None:
        self.spec = spec

    def key(self, config: DataConfig, cache_dir: Path) -> str:
        return self.spec.sha256

    def read(self, config: DataConfig) -> Arrays:
        return read_archive(self.spec, root_path(config), config.url)

    def missing_download(self, config: DataConfig) -> str | None:
        root, spec = root_path(config), self.spec
        is_here = root.is_file() or (root / spec.filename).exists() or (root / spec.folder).is_dir()
        return None if is_here else config.url or spec.url


def read_archive(spec: ArchiveSpec, root: Path, url: str | None) -> Arrays:
    """The arrays of the archive at or in `root`, of its unpacked folder there, or of a download from `url`.

    `url` is a mirror, or None for the official address. A download is kept in `root`.
    """
    if root.is_file():
        return _read_verified(spec, root)
    target = root / spec.filename
    if not target.exists():
        if (root / spec.folder).is_dir():
            return _read_unpacked(spec, root / spec.folder)
        with only_writer(target.with_name(f"{target.name}.lock"), key="data.root", doing="downloading the images"):
            if not target.exists():
                _download(spec, url or spec.url, target)
    return _read_verified(spec, target)


# --- finding -----------------------------------------------------------------------------------------------------


def _download(spec: ArchiveSpec, url: str, target: Path) -> None:
    """Downloads to a temporary name beside `target`; only what is verified gets its name. The caller holds the lock."""
    _check_url(url)
    partial = target.with_name(f"{target.name}.part")
    logger.info(f"{spec.name}: downloading {url} ({spec.size_bytes / 1e6:.0f} MB) to {target}")
    try:
        with partial.open("w+b") as file:
            received = reported_quarters = 0
            for chunk in _receive(url, target):
                file.write(chunk)
                received += len(chunk)
                if received > spec.size_bytes:
                    break  # whatever this is, it must not fill the disk
                if received * 4 // spec.size_bytes > reported_quarters and received < spec.size_bytes:
                    reported_quarters = received * 4 // spec.size_bytes
                    logger.info(f"{spec.name}: {received / 1e6:.0f} of {spec.size_bytes / 1e6:.0f} MB")
            difference = _difference(spec, file)
            if difference:
                raise DataError(
                    f"{url}: {difference}; the download was removed; try again, or set data.url to another mirror"
                )
            file.flush()
            os.fsync(file.fileno())
        atomic_io.move(partial, target)
    except OSError as error:
        raise DataError(
            f"{target}: cannot be written ({error}); make room, or set data.root to another folder"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def _check_url(url: str) -> None:
    """Raises `ConfigError` for a `data.url` that is not a plain http, https or file address.

    A password has no place in a config, which is printed and saved; so the message does not repeat the address.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        plain = parts.scheme in ("http", "https", "file") and "@" not in parts.netloc
    except ValueError:
        plain = False
    if not plain:
        raise ConfigError("data.url: must be an http, https or file address without user name or password")


def _receive(url: str, target: Path) -> Iterator[bytes]:
    """The chunks of `url`; whatever the network does becomes a `DataError`."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            while chunk := response.read(_CHUNK_BYTES):
                yield chunk
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        reason = str(error).removeprefix("<urlopen error ").removesuffix(">")
        raise DataError(
            f"{url}: cannot be downloaded ({reason}); put the file at {target} yourself, or set data.source=folder for"
            " a folder or zip of images, or data.source=synthetic for generated ones"
        ) from None


def _difference(spec: ArchiveSpec, file: BufferedIOBase) -> str | None:
    """How the file differs from the archive that it should be; None if it does not."""
    size = file.seek(0, io.SEEK_END)
    if size != spec.size_bytes:
        return f"has {size} bytes, {spec.name} has {spec.size_bytes}"
    # The official page publishes the MD5; the SHA-256 cannot be forged.
    for name, new, expected in (("md5", _md5, spec.md5), ("sha256", hashlib.sha256, spec.sha256)):
        file.seek(0)
        found = hashlib.file_digest(file, new).hexdigest()
        if found != expected:
            return f"has the {name} {found}, {spec.name} has {expected}"
    return None


# --- reading -----------------------------------------------------------------------------------------------------
# What is read below has the hash of its specification, so it is known to the last byte: nothing else is checked.


def _read_verified(spec: ArchiveSpec, path: Path) -> Arrays:
    try:
        with path.open("rb") as file:
            difference = _difference(spec, file)
            if difference:
                raise DataError(
                    f"{path}: {difference}; move it away to have it downloaded again, or set data.root to another"
                    " folder"
                )
            file.seek(0)
            return _decode(spec, _members(spec, file))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); set data.root to where {spec.filename} is") from None


def _members(spec: ArchiveSpec, file: BinaryIO) -> dict[str, bytes]:
    """The contents of the files that are needed, by name without the folder. Nothing touches the disk."""
    wanted = {f"{spec.folder}/{name}": name for name in spec.file_md5}
    files = {}
    with tarfile.open(fileobj=file, mode="r:gz") as archive:
        for member in archive:  # in their order: going back would decompress everything again
            if member.name in wanted:
                content = archive.extractfile(member)
                assert content is not None  # it is a regular file
                files[wanted[member.name]] = content.read()
    return files


def _read_unpacked(spec: ArchiveSpec, folder: Path) -> Arrays:
    """The arrays of an archive that something else has unpacked, verified file by file."""
    files = {}
    for name, expected in spec.file_md5.items():
        path = folder / name
        advice = f"move {folder} away to have {spec.name} downloaded, or set data.root to another folder"
        try:
            files[name] = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error}); {advice}") from None
        found = _md5(files[name]).hexdigest()
        if found != expected:
            raise DataError(f"{path}: has the md5 {found}, {spec.name} has {expected}; {advice}")
    return _decode(spec, files)


def _decode(spec: ArchiveSpec, files: Mapping[str, bytes]) -> Arrays:
    """The arrays in the pickles `files`, by name."""
    trees = {name: _Unpickler(io.BytesIO(data), encoding="latin1").load() for name, data in files.items()}

    def images(names: Iterable[str]) -> npt.NDArray[np.uint8]:
        planes = np.concatenate([trees[name]["data"] for name in names]).reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE)
        return np.ascontiguousarray(planes.transpose(0, 2, 3, 1))

    def labels(names: Iterable[str]) -> npt.NDArray[np.int64]:
        return np.concatenate([np.array(trees[name][spec.label_key], np.int64) for name in names])

    (meta,) = spec.meta_md5
    return Arrays(
        train_images=images(spec.train_md5),
        train_labels=labels(spec.train_md5),
        test_images=images(spec.test_md5),
        test_labels=labels(spec.test_md5),
        classes=tuple(trees[meta][spec.classes_key]),
    )


def _latin1(text: str, encoding: str) -> bytes:
    """`_codecs.encode` as pickles of bytes call it; other codecs are other modules."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Makes numpy arrays and plain values. Any other name in the pickle, and so any call, is an error."""

    _reconstruct = np.empty(0).__reduce__()[0]
    _allowed: Mapping[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,  # before numpy 2
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in self._allowed:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return self._allowed[module_name, global_name]
