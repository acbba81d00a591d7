"""W&B's private parts that this package uses, all in one place.

Contract: W&B has no public way to tell which rows its files hold, to mark a file as synced, or to look for a key
without a prompt. pyproject.toml bounds the version: `wandb>=0.31,<0.32`. `tests/tracking/test_wandb_private.py` fails
where a version changes what is used here. But for `mark_as_synced`, nothing is changed on disk.

A file of W&B is LevelDB's log (https://github.com/google/leveldb/blob/main/doc/log_format.md) of protocol buffers,
behind a header of 7 bytes that begins with ":W&B". A record has the CRC-32 of its type and data, its length and its
type, with which a record that does not fit into a block of 32 KiB is put together.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

_BLOCK_BYTES = 32 * 1024
_FILE_HEADER_BYTES = 7
_HEADER = struct.Struct("<IHB")
_WHOLE, _FIRST, _LAST = 1, 2, 4


def row_count(run_dir: Path, run_id: str) -> int:
    """The number after the last row of the W&B run `run_id` in the files of the run directory.

    It reads what a killed process left: W&B writes its file every 15 seconds, and rows that it was given and had not
    written by then are not counted.
    """
    from wandb.proto import wandb_internal_pb2 as messages

    last = -1
    for path in (run_dir / "wandb").glob(f"*run-*/run-{run_id}.wandb"):
        for data in _records(path.read_bytes()):
            record = messages.Record.FromString(data)  # type: ignore[attr-defined]  # made when it is imported
            if record.HasField("history"):
                last = max(last, record.history.step.num)
    return last + 1


def _records(data: bytes) -> Iterator[bytes]:
    """Yields the records up to the first that is not whole."""
    position, parts = _FILE_HEADER_BYTES, b""
    while True:
        left = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left < _HEADER.size:  # padding: no header fits
            position += left
        if position + _HEADER.size > len(data):
            return
        checksum, length, kind = _HEADER.unpack_from(data, position)
        start = position + _HEADER.size
        position = start + length
        if zlib.crc32(data[start - 1 : position]) != checksum:  # the type is the byte before the data
            return
        parts = data[start:position] if kind in (_WHOLE, _FIRST) else parts + data[start:position]
        if kind in (_WHOLE, _LAST):
            yield parts


def mark_as_synced(run_dir: Path, run_id: str) -> None:
    """Lets `wandb sync` pass over the offline parts of a run whose rows the server has."""
    for path in (run_dir / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"):
        path.with_name(f"{path.name}.synced").touch()


def has_key(base_url: str) -> bool:
    """Whether wandb itself finds a key for the server, without asking a person or the network."""
    from wandb.sdk.lib import wbauth

    key = wbauth.authenticate_session(host=base_url, source="dist_cifar", prompt=False, update_session=False)
    return key is not None
