"""How much of a run is in the files that W&B has written.

Contract: `row_count` reads what a killed process left: W&B writes its file in pieces, now and then, and rows that it
was given and had not yet written are not counted. Nothing is changed.

The file is LevelDB's log (https://github.com/google/leveldb/blob/main/doc/log_format.md) of protocol buffers, behind a
header of 7 bytes that begins with ":W&B". A record has the CRC-32 of its type and data, its length and its type, with
which a record that does not fit into a block of 32 KiB is put together.
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
    """The number after the last row of the W&B run `run_id` in the files of the run directory."""
    from wandb.proto import wandb_internal_pb2 as messages

    last = -1
    for path in (run_dir / "wandb").glob(f"*run-*/run-{run_id}.wandb"):
        for data in _records(path.read_bytes()):
            record = messages.Record.FromString(data)  # type: ignore[attr-defined]  # made when it is imported
            if record.HasField("history"):
                last = max(last, record.history.step.num)
    return last + 1


def _records(data: bytes) -> Iterator[bytes]:
    """The records up to the first that is not whole."""
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
