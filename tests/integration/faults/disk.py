"""Damage to what is on the disk, and a small disk.

Contract: `small_disk` gives a file system of its own, or skips the test where nobody may mount one. `contents` tells
two states of a directory apart to the last byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def flip_bit(path: Path) -> None:
    """One in the middle of the file; in that of tensors of float32 the last bit of a number."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else 0
    if start == len(data):  # no tensors
        start = 0
    data[start + (len(data) - start) // 8 * 4] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    """The last byte is missing."""
    data = path.read_bytes()
    path.write_bytes(data[:-1])


def contents(directory: Path) -> dict[str, str]:
    """The SHA-256 of every file, and each directory, by relative path; but for the lock, which says who came last."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "/"
        for path in directory.rglob("*")
        if path.name != ".lock"
    }


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """A file system of `size` at `path`."""
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def remount(path: Path, option: str) -> None:
    """Makes a small disk read only (`ro`) or not (`rw`)."""
    subprocess.run(["mount", "-o", f"remount,{option}", path], check=True)
