"""Reads W&B's offline file, so that tests can see what would be uploaded.

The format is LevelDB's log: a 7-byte file header (":W&B", magic, version), then 32 KiB blocks of records, each with a
7-byte header: CRC-32 of type and data, length, type (1 whole; 2, 3, 4 the first, a middle and the last part of one). A
block's last bytes are padding where no header fits. A whole record is a `wandb_internal_pb2.Record`. What a killed
process wrote may end within a record.
"""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK_BYTES = 32 * 1024


def records(path: Path) -> list[Any]:
    data, position, part, found = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B", data[:7]
    while position + 7 <= len(data):
        if BLOCK_BYTES - position % BLOCK_BYTES < 7:
            position += BLOCK_BYTES - position % BLOCK_BYTES
            continue
        crc, length, kind = struct.unpack_from("<IHB", data, position)
        payload = data[position + 7 : position + 7 + length]
        if len(payload) < length:
            break
        assert crc == zlib.crc32(bytes([kind]) + payload), f"bad checksum at byte {position}"
        position += 7 + length
        part = payload if kind in (1, 2) else part + payload
        if kind in (1, 4):
            found.append(wandb_internal_pb2.Record.FromString(part))
    return found


def read(path: Path) -> dict[str, Any]:
    """`history` (a list of rows) and `numbers` (W&B's steps of them), `config`, `summary`, `run_id`, `sweep_id`,
    `group`, `metrics` (name to step metric), `artifacts` (a list of records) and `exit_code`."""
    run: dict[str, Any] = {"history": [], "numbers": [], "config": {}, "summary": {}, "metrics": {}, "artifacts": []}
    for record in records(path):
        match record.WhichOneof("record_type"):
            case "run":
                run |= {"run_id": record.run.run_id, "sweep_id": record.run.sweep_id, "group": record.run.run_group}
                run["config"].update(_items(record.run.config.update))
            case "config":
                run["config"].update(_items(record.config.update))
            case "history":
                run["history"].append(_items(record.history.item))
                run["numbers"].append(record.history.step.num)
            case "summary":
                run["summary"].update(_items(record.summary.update))
            case "metric":
                run["metrics"][record.metric.name or record.metric.glob_name] = record.metric.step_metric
            case "artifact":
                run["artifacts"].append(record.artifact)
            case "request" if record.request.WhichOneof("request_type") == "log_artifact":
                run["artifacts"].append(record.request.log_artifact.artifact)
            case "exit":
                run["exit_code"] = record.exit.exit_code
    return run


def _items(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
