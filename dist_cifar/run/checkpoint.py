"""Checkpoints on disk: written whole or not at all, verified to the last bit when read.

Contract: `CheckpointStore.begin_save` copies what is to be saved and returns; a thread writes the copy. Killed at any
instant, or out of disk space, it leaves every earlier checkpoint that retention keeps, and at most rubbish that the
next save deletes. One write is under way at a time, and no failure of it is lost: every method waits for it and raises
its error first. `load_newest` returns the newest checkpoint whose every byte is as it was written. It skips damaged
ones and logs them, and raises `CheckpointError` when there are only damaged ones, so that no run starts over by
accident.

    <directory>/step-00001234/model.safetensors    one file for each group of tensors
    <directory>/step-00001234/state.json           everything that is not a tensor
    <directory>/step-00001234/manifest.json        step, whether it was the best, size and SHA-256 of each file
    <directory>/latest, <directory>/best           the name of a directory, for people and scripts

Three rules make it safe. A directory is written under a temporary name, manifest last, synced and then renamed; it is
renamed back to a temporary name before anything in it is deleted. So whatever is called `step-...` is complete, or
damaged. No name is overwritten: a step that is saved again becomes `step-00001234-2`, and only then is the first one
deleted. Only the directories count: `latest` and `best` are written but never read. The names say which checkpoint is
newer, not a clock, neither the machine's nor the files'.

Tensors are stored as safetensors and the rest as JSON; nothing is ever unpickled. Tensors are stored contiguous: their
values return bit for bit, their memory format (channels_last) does not. The copy that `begin_save` makes has the layout
of the files, so that it is the only one: writing takes no more memory than what is written. This module knows nothing
of ranks: one process writes to a directory at a time, others may read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch

from dist_cifar.errors import CheckpointError
from dist_cifar.ops.transfer import download
from dist_cifar.run import atomic_io
from dist_cifar.run.run_files import Shape, by_name, is_count, is_flag, is_text, misfit

logger = logging.getLogger(__name__)

FORMAT = 2
"""Version of the layout and of `state.json`; a checkpoint of another version is not read."""
MANIFEST = "manifest.json"
STATE = "state.json"
SUFFIX = ".safetensors"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The types that can be saved, with their names in safetensors."""

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was read and verified."""

    step: int
    """Optimizer steps since the start of the run."""
    path: Path
    """The directory it was read from."""
    tensors: dict[str, dict[str, torch.Tensor]]
    """Tensors on the CPU, contiguous, by file stem (`model`, `optimizer`, ...) and name."""
    state: dict[str, Any]
    """The rest, as JSON returns it: tuples are lists, keys are strings, floats are exact (inf and nan too)."""


def weights_sha256(tensors: Tensors) -> str:
    """SHA-256 over names, dtypes, shapes and values (raw bytes, row-major), whatever the order of the mapping.

    Equal weights have equal digests on every device and in every memory format. It counts bits, not numbers: 0.0 and
    -0.0 differ, a NaN equals itself.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(download(tensors).items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in the directory `path`; `CheckpointError` if one byte or file of it is not as it was written."""
    manifest = _read_manifest(path)
    named = _position(path.name)
    if named != _NO_POSITION and named[0] != manifest["step"]:
        raise CheckpointError(f"{path}: its manifest is that of step {manifest['step']}")
    entries = manifest["files"]
    try:
        for name in set(entries).symmetric_difference(os.listdir(path)) - {MANIFEST}:
            raise CheckpointError(f"{path}: {name} is {'missing' if name in entries else 'not in the manifest'}")
        contents: dict[str, Any] = {}
        for name, entry in entries.items():
            if not (path / name).is_file():
                raise CheckpointError(f"{path}: {name} is not a regular file")
            size = os.path.getsize(path / name)
            if size != entry["bytes"]:
                raise CheckpointError(f"{path}: {name} has {size} bytes, its manifest says {entry['bytes']}")
            data = (path / name).read_bytes()  # once: what is hashed is what is parsed
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise CheckpointError(f"{path}: {name} does not have the SHA-256 of its manifest")
            contents[name.removesuffix(SUFFIX)] = _parse(path, name, data)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if STATE not in contents:
        raise CheckpointError(f"{path}: {STATE} is missing")
    state = contents.pop(STATE)
    return Checkpoint(step=manifest["step"], path=path, tensors=contents, state=state)


class CheckpointStore:
    """The checkpoints of one run. Creating it touches no file."""

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int,
        keep_best: int = 1,
        keep_every_steps: int | None = None,
        on_write_error: Literal["raise", "warn"] = "raise",
    ) -> None:
        """Keeps the checkpoints of the `keep_last` newest steps, of the newest `keep_best` of those that were saved as
        the best, and of every step that is a multiple of `keep_every_steps`.

        With `on_write_error="warn"` a save that the disk refuses is logged, not raised.
        """
        assert keep_last >= 1 and keep_best >= 1 and (keep_every_steps is None or keep_every_steps >= 1)
        self.directory = directory
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._keep_every_steps = keep_every_steps
        self._on_write_error = on_write_error
        self._bad: set[str] = set()  # names of damaged checkpoints, which do not count as kept
        self._thread: threading.Thread | None = None  # writes the latest save
        self._failure: BaseException | None = None  # the error of the latest save
        self._unraised: BaseException | None = None  # the error still to be raised; None if it was only logged
        self._began: float | None = None  # start of the write under way, on the monotonic clock
        self._write_seconds = 0.0  # duration of the last write that ended

    def begin_save(
        self, step: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any], *, best: bool = False
    ) -> None:
        """Begins to write the checkpoint of `step`, and then to delete those that are no longer kept.

        `tensors` maps file stems to tensors on any device, of the types in `DTYPES`; `state` is JSON. Both are copied
        before this returns. Waits for the write before it, and raises its error instead, as `wait` does.
        """
        self.wait()
        self._failure = None
        contents = {STATE: memoryview((json.dumps(dict(state), indent=1) + "\n").encode())}
        contents |= {stem + SUFFIX: _safetensors(group) for stem, group in tensors.items()}
        thread = threading.Thread(target=self._run, args=(step, contents, best), name="checkpoint", daemon=True)
        thread.start()
        self._thread = thread

    def wait(self, *, must_succeed: bool = False) -> None:
        """Waits for the write under way. Raises the error of the last one, once.

        `CheckpointError`: the disk is full or cannot be written, and every earlier checkpoint that is kept is still
        there. `must_succeed` raises it whatever the policy is, and even if it was raised before: when this returns, the
        latest save is on the disk.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error = self._failure if must_succeed else self._unraised
        self._unraised = None
        if error is not None:
            raise error

    @property
    def failed(self) -> bool:
        """Whether the next call will raise the error of a write. Never blocks."""
        return self._unraised is not None

    @property
    def is_writing(self) -> bool:
        """Whether a write is under way. Never blocks."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def write_seconds(self) -> float:
        """How long the last write took, or the one under way if that is longer already; 0 before the first.

        Deleting what is no longer kept counts, copying in `begin_save` does not. Never blocks.
        """
        began = self._began  # read once: the thread may be about to end
        under_way = 0.0 if began is None else time.monotonic() - began
        return max(self._write_seconds, under_way)

    def load_newest(self) -> Checkpoint | None:
        """The newest good checkpoint, or None if there is none at all, not even a damaged one.

        Logs the damaged ones that it skips; raises `CheckpointError` if none is good. Waits for the write under way, as
        `wait` does.
        """
        self.wait()
        return self._load(self._paths)

    def load_best(self) -> Checkpoint | None:
        """The newest good checkpoint that was saved as the best, or None if none was; otherwise as `load_newest`."""
        self.wait()
        return self._load(lambda: [path for path in self._paths() if _may_be_best(path)])

    def best_and_last(self) -> dict[str, Path]:
        """The directories of the newest checkpoint that was saved as the best (`best`) and of the newest (`last`)."""
        self.wait()
        newest = list(_by_step(path for path in self._paths() if path.name not in self._bad).values())
        found = {"best": [path for path in newest if _says_best(path)], "last": newest}
        return {name: paths[0] for name, paths in found.items() if paths}

    def _load(self, candidates: Callable[[], list[Path]]) -> Checkpoint | None:
        """The first good one of the candidates, which are listed anew when one of them has vanished: the run that
        writes them deletes what it no longer keeps."""
        found: dict[Path, CheckpointError] = {}
        for _ in range(_LISTINGS):
            vanished = False
            for path in (path for path in candidates() if path not in found):
                try:
                    checkpoint = read_checkpoint(path)
                except CheckpointError as error:
                    vanished = not os.path.lexists(path)
                    if vanished:
                        break
                    self._bad.add(path.name)
                    found[path] = error
                    kind = "unreadable" if isinstance(error.__cause__, OSError) else "damaged"
                    logger.info(f"{kind} checkpoint skipped: {error}")
                    continue
                self._bad.discard(path.name)
                if found:
                    logger.info(f"falling back to {path}")
                return checkpoint
            if not vanished:
                break
        else:
            raise CheckpointError(f"{self.directory}: checkpoints are deleted as fast as they are read; try again")
        if found:
            raise CheckpointError(
                f"{self.directory}: no checkpoint is good: {'; '.join(map(str, found.values()))}. Restore one from a"
                " copy, or move the directory away to start from the beginning"
            )
        return None

    def _run(self, step: int, contents: Mapping[str, memoryview], best: bool) -> None:
        """The work of the thread, which keeps whatever is raised for the caller."""
        began = self._began = time.monotonic()
        try:
            try:
                self._commit(step, contents, best)
            except (OSError, CheckpointError) as error:
                self._failure = CheckpointError(_explain(self.directory, step, contents, error))
                if self._on_write_error == "raise":
                    raise self._failure from error
                logger.info(f"checkpoint.on_write_error=warn: {self._failure}")
        except BaseException as error:
            self._failure = self._unraised = error
        finally:
            self._write_seconds, self._began = time.monotonic() - began, None

    def _commit(self, step: int, contents: Mapping[str, memoryview], best: bool) -> None:
        atomic_io.make_dirs(self.directory)
        self._sweep()
        path = self._write(step, contents, best)
        atomic_io.write_atomic(self.directory / "latest", path.name + "\n")
        if best:
            atomic_io.write_atomic(self.directory / "best", path.name + "\n")
        self._retain(path)

    def _write(self, step: int, contents: Mapping[str, memoryview], best: bool) -> Path:
        path = self._free_path(step)
        temporary = self._temporary(path)
        try:
            atomic_io.make_dirs(temporary)
            entries = {}
            for name, data in contents.items():
                atomic_io.write_file(temporary / name, data)
                entries[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            manifest = {"format": FORMAT, "step": step, "best": best, "files": entries}
            atomic_io.write_file(temporary / MANIFEST, _seal(manifest))
            atomic_io.fsync_dir(temporary)
            atomic_io.move(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                atomic_io.remove_tree(temporary)
            raise
        self._bad.discard(path.name)
        return path

    def _free_path(self, step: int) -> Path:
        """A name for `step` that is not in use and sorts after all others of that step."""
        revisions = [_position(path.name)[1] for path in self._paths() if _position(path.name)[0] == step]
        revision = max(revisions, default=0) + 1
        return self.directory / (f"step-{step:08d}" + (f"-{revision}" if revision > 1 else ""))

    def _retain(self, saved: Path) -> None:
        """Deletes what no rule keeps. Rules count steps: of a step that was saved twice only the newest is kept.

        Steps later than the one just saved are from before a fallback. They are left alone until the run has passed
        them, and do not count, so that they cannot push out what it has saved since.
        """
        passed = [path for path in self._paths() if _position(path.name) <= _position(saved.name)]
        good = [path for path in passed if path.name not in self._bad]
        newest, best = _by_step(good), _by_step(path for path in good if _says_best(path))
        kept = {*list(newest.values())[: self._keep_last], *list(best.values())[: self._keep_best]}
        if self._keep_every_steps is not None:
            kept |= {path for step, path in newest.items() if step % self._keep_every_steps == 0}
        for path in reversed(passed):
            if path not in kept:
                self._delete(path)

    def _delete(self, path: Path) -> None:
        """Deletes a checkpoint; a crash never leaves a part of it under its name."""
        temporary = self._temporary(path)
        atomic_io.move(path, temporary)
        atomic_io.remove_tree(temporary)

    def _temporary(self, path: Path) -> Path:
        """A name that no checkpoint has and that no killed writer can have left."""
        return self.directory / f".tmp-{path.name}-{secrets.token_hex(4)}"

    def _sweep(self) -> None:
        """Deletes what killed writers left."""
        for path in self.directory.glob(".tmp-*"):
            atomic_io.remove_tree(path)

    def _paths(self) -> list[Path]:
        """Every directory with the name of a checkpoint, newest first."""
        try:
            names = [name for name in os.listdir(self.directory) if _position(name) != _NO_POSITION]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(
                f"{self.directory}: cannot be read ({error}); name another directory or fix its permissions"
            ) from error
        return [self.directory / name for name in sorted(names, key=_position, reverse=True)]


# --- the parts of a checkpoint -----------------------------------------------------------------------------------


_NO_POSITION = (-1, 0)
_LISTINGS = 100
"""How often the checkpoints of a run that is writing are listed, because the one to be read is gone."""


def is_checkpoint_name(name: str) -> bool:
    """Whether a checkpoint's directory may have this name."""
    return _position(name) != _NO_POSITION


def _position(name: str) -> tuple[int, int]:
    """(step, revision) of a checkpoint's directory, which order them; `_NO_POSITION` for any other name."""
    match = re.fullmatch(r"step-([0-9]{8,})(?:-([0-9]+))?", name)
    return (int(match[1]), int(match[2] or 1)) if match else _NO_POSITION


def _by_step(paths: Iterable[Path]) -> dict[int, Path]:
    """Step to its first path, in the order of `paths`."""
    first: dict[int, Path] = {}
    for path in paths:
        first.setdefault(_position(path.name)[0], path)
    return first


def _safetensors(tensors: Tensors) -> memoryview:
    """The content of a safetensors file with the values that the tensors have now, each row-major.

    8 bytes length of the header, the header as JSON padded to a multiple of 8, the data: as specified in
    https://github.com/huggingface/safetensors#format. The training waits for this copy. `safetensors.torch.save` (0.8)
    holds two copies at a time and takes three times as long, for a ResNet-18 with Adam's state on one CPU thread.
    """
    ordered = sorted(download(tensors).items(), key=lambda item: -item[1].dtype.itemsize)  # so each one is aligned
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    content = np.empty(8 + len(header) + end, dtype=np.uint8)
    content[: 8 + len(header)] = np.frombuffer(len(header).to_bytes(8, "little") + header, dtype=np.uint8)
    data = torch.from_numpy(content[8 + len(header) :])
    for name, tensor in ordered:
        start, end = entries[name]["data_offsets"]
        data[start:end].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
    return content.data


def _parse(path: Path, name: str, data: bytes) -> Any:
    try:
        return json.loads(data) if name == STATE else safetensors.torch.load(data)
    except (safetensors.SafetensorError, RuntimeError, ValueError, TypeError, LookupError, MemoryError) as error:
        raise CheckpointError(
            f"{path}: {name} has the SHA-256 of its manifest, but is not what it should be ({error})"
        ) from error


def _seal(content: Mapping[str, Any]) -> bytes:
    """The text of a manifest: the content and a SHA-256 over it."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**content, "sha256": digest}, indent=1, sort_keys=True) + "\n").encode()


_FILE: Shape = {"bytes": is_count, "sha256": is_text}
_MANIFEST: Shape = {
    "step": is_count,
    "best": is_flag,
    "files": by_name(lambda entry: isinstance(entry, dict) and misfit(entry, _FILE) is None),
}


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        data = (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: {MANIFEST} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    try:
        content = json.loads(data)
        del content["sha256"]
        sealed = _seal(content)
    except (ValueError, TypeError, LookupError, RecursionError):
        sealed = None
    if sealed != data:
        raise CheckpointError(f"{path}: {MANIFEST} is damaged: it does not match the SHA-256 in it")
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: has format {content.get('format')}, this version reads {FORMAT}")
    wrong = misfit(content, _MANIFEST)
    if wrong:
        raise CheckpointError(f"{path}: {MANIFEST} is not one of this version ({wrong})")
    return content


def _says_best(path: Path) -> bool:
    try:
        return _read_manifest(path)["best"]
    except CheckpointError:
        return False


def _may_be_best(path: Path) -> bool:
    """Whether a checkpoint was saved as the best, or cannot be asked: reading it says what is wrong."""
    try:
        return _read_manifest(path)["best"]
    except CheckpointError:
        return True


def _explain(directory: Path, step: int, contents: Mapping[str, memoryview], error: Exception) -> str:
    needed = sum(len(data) for data in contents.values())
    free = ""
    with contextlib.suppress(OSError):
        free = f", {shutil.disk_usage(directory).free / 1e6:.1f} MB free"
    return (
        f"{directory}: cannot save step {step} ({needed / 1e6:.1f} MB needed{free}): {error};"
        " free space or make the directory writable; earlier checkpoints are kept, and the same command resumes from"
        " them"
    )
