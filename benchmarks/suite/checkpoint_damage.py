"""Is a damaged checkpoint ever loaded? Random damage to checkpoints of a real model, each kind in turn.

    python benchmarks/suite/checkpoint_damage.py --out benchmarks/results/checkpoint_damage.json

Contract: three checkpoints of a ResNet-20 with its Adam state lie in a directory. Each trial restores them, damages
them in one of the ways of `KINDS`, and draws again where that changed no byte. The damage is detected if
`read_checkpoint` refuses every directory that is no longer as it was saved, and `load_newest` names each one it passes
over; the fallback is right if `load_newest` returns the newest checkpoint that is whole, with every bit of its tensors
and its state. What only a forger would do is left out: a manifest that is sealed again after the change is a
checkpoint like any other. So is a directory that is gone as a whole, of which nothing is left to be found damaged.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dist_cifar.config import ModelConfig
from dist_cifar.errors import CheckpointError
from dist_cifar.models import build_model
from dist_cifar.run import checkpoint
from dist_cifar.run.provenance import hardware, versions
from dist_cifar.tracking.console import LineHandler

STEPS = (10, 20, 30)
Saved = tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]
"""Tensors and state of one checkpoint."""


# --- ways to damage ----------------------------------------------------------------------------------------------


def some_file(dice: random.Random, root: Path) -> Path:
    """A file of the newest checkpoint."""
    return dice.choice(sorted(newest(root).iterdir()))


def newest(root: Path) -> Path:
    return root / f"step-{STEPS[-1]:08d}"


def older(dice: random.Random, root: Path) -> Path:
    return root / f"step-{dice.choice(STEPS[:-1]):08d}"


def flip_bits(dice: random.Random, root: Path) -> None:
    path = some_file(dice, root)
    data = bytearray(path.read_bytes())
    for _ in range(dice.choice((1, 1, 1, 2, 8))):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


def truncate(dice: random.Random, root: Path) -> None:
    path = some_file(dice, root)
    os.truncate(path, dice.choice((0, dice.randrange(path.stat().st_size), path.stat().st_size - 1)))


def extend(dice: random.Random, root: Path) -> None:
    with some_file(dice, root).open("ab") as file:
        file.write(dice.choice((bytes, dice.randbytes))(dice.choice((1, 8, 4096))))


def overwrite(content: Callable[[random.Random, bytes], bytes]) -> Callable[[random.Random, Path], None]:
    """Damage that puts `content(dice, range)` in place of a range of a file: a few bytes, a sector, or any range."""

    def damage(dice: random.Random, root: Path) -> None:
        path = some_file(dice, root)
        data = bytearray(path.read_bytes())
        start = dice.randrange(len(data))
        end = min(len(data), start + dice.choice((1, 8, 512, 4096, 1 + dice.randrange(len(data)))))
        data[start:end] = content(dice, bytes(data[start:end]))
        path.write_bytes(data)

    return damage


def delete_file(dice: random.Random, root: Path) -> None:
    some_file(dice, root).unlink()


def add_file(dice: random.Random, root: Path) -> None:
    name = dice.choice(("model2.safetensors", ".hidden", "state.json.bak", "manifest.json~", "notes"))
    (newest(root) / name).write_bytes(dice.randbytes(dice.choice((0, 100))))


def rename_file(dice: random.Random, root: Path) -> None:
    path = some_file(dice, root)
    path.rename(path.with_name(f"{dice.randrange(100)}{path.name}"))


def exchange_files(dice: random.Random, root: Path) -> None:
    """Two files of the newest checkpoint have each other's names."""
    one, other = dice.sample(sorted(newest(root).iterdir()), 2)
    exchange(one, other)


def exchange_with_older(dice: random.Random, root: Path) -> None:
    """A file of the newest checkpoint and that of the same name in an older one change places: both are damaged."""
    path = some_file(dice, root)
    exchange(path, older(dice, root) / path.name)


def exchange(one: Path, other: Path) -> None:
    aside = one.parent.parent / "aside"
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def copy_from_older(dice: random.Random, root: Path) -> None:
    path = some_file(dice, root)
    shutil.copyfile(older(dice, root) / path.name, path)


def link_to_older(dice: random.Random, root: Path) -> None:
    path = some_file(dice, root)
    path.unlink()
    path.symlink_to(older(dice, root) / path.name)


def directory_for_file(dice: random.Random, root: Path) -> None:
    path = some_file(dice, root)
    path.unlink()
    path.mkdir()


def rename_directory(dice: random.Random, root: Path) -> None:
    """The newest checkpoint has the name of another step, earlier or later."""
    newest(root).rename(root / f"step-{dice.choice((25, 31, 123456789)):08d}")


def duplicate_directory(dice: random.Random, root: Path) -> None:
    """An older checkpoint lies there again under a later name."""
    shutil.copytree(older(dice, root), root / dice.choice(("step-00000040", "step-00000030-2", "step-00000030-10")))


def exchange_directories(dice: random.Random, root: Path) -> None:
    exchange(newest(root), older(dice, root))


def edit_manifest(dice: random.Random, root: Path) -> None:
    """One value is edited, and the seal is left as it was."""
    path = newest(root) / "manifest.json"
    manifest = json.loads(path.read_bytes())
    name = dice.choice(sorted(manifest["files"]))
    entry = manifest["files"][name]
    how = dice.choice(("step", "best", "format", "bytes", "sha256", "seal", "remove", "add", "rename"))
    if how == "step":
        manifest["step"] += dice.choice((-10, 1, 10))
    elif how == "best":
        manifest["best"] = not manifest["best"]
    elif how == "format":
        manifest["format"] += 1
    elif how == "bytes":
        entry["bytes"] += dice.choice((-1, 1))
    elif how == "sha256":
        entry["sha256"] = sha256(dice.randbytes(8)).hexdigest()
    elif how == "seal":
        manifest["sha256"] = sha256(dice.randbytes(8)).hexdigest()
    elif how == "remove":
        del manifest["files"][name]
    elif how == "add":
        manifest["files"]["extra.safetensors"] = entry
    else:
        manifest["files"][f"x{name}"] = manifest["files"].pop(name)
    write_manifest(path, manifest)


def edit_file_and_manifest(dice: random.Random, root: Path) -> None:
    """A file is changed and its size and hash in the manifest are made to fit, but not the manifest's own seal."""
    path = dice.choice([path for path in sorted(newest(root).iterdir()) if path.name != "manifest.json"])
    data = bytearray(path.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    data += bytes(dice.choice((0, 8)))
    path.write_bytes(data)
    manifest = json.loads((newest(root) / "manifest.json").read_bytes())
    manifest["files"][path.name] = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    write_manifest(newest(root) / "manifest.json", manifest)


def other_manifest(dice: random.Random, root: Path) -> None:
    """A manifest that is other JSON, or none, or the same content in another layout."""
    path = newest(root) / "manifest.json"
    same = json.dumps(json.loads(path.read_bytes()))
    contents = ("null", "[]", "{}", "0", "[" * 100_000, '{"sha256": 1}', '{"sha256": "", "files": {}}', "\0", same)
    path.write_text(dice.choice(contents), encoding="utf-8")


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")


KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    "bits flipped": flip_bits,
    "truncated": truncate,
    "extended": extend,
    "range zeroed": overwrite(lambda dice, old: bytes(len(old))),
    "range of noise": overwrite(lambda dice, old: dice.randbytes(len(old))),
    "range removed": overwrite(lambda dice, old: b""),
    "range repeated": overwrite(lambda dice, old: old + old),
    "file deleted": delete_file,
    "file added": add_file,
    "file renamed": rename_file,
    "files exchanged within a checkpoint": exchange_files,
    "files exchanged between checkpoints": exchange_with_older,
    "file of another checkpoint": copy_from_older,
    "link to a file of another checkpoint": link_to_older,
    "directory in place of a file": directory_for_file,
    "directory renamed": rename_directory,
    "directory duplicated": duplicate_directory,
    "directories exchanged": exchange_directories,
    "manifest edited, old seal": edit_manifest,
    "file edited, manifest fits, old seal": edit_file_and_manifest,
    "other manifest": other_manifest,
}


# --- trials ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What became of one damage."""

    detected: bool
    """Each damaged directory is refused, and each that stood before the fallback is named as skipped."""
    fell_back: bool
    """The newest whole checkpoint was loaded, with every bit."""


class Range:
    """Three checkpoints to shoot at. `code` is the module `dist_cifar.run.checkpoint`, or a mutant of it."""

    def __init__(self, code: ModuleType, root: Path, make: Callable[[int], Saved]) -> None:
        """Saves what `make(step)` returns for each of `STEPS`, below the directory `root`."""
        self._code = code
        self._pristine, self._shot_at = root / "pristine", root / "shot at"
        self._expected: dict[int, tuple[dict[str, str], dict[str, Any]]] = {}
        store = code.CheckpointStore(self._pristine, keep_last=len(STEPS))
        for step in STEPS:
            tensors, state = make(step)
            store.begin_save(step, tensors, state, best=True)
            store.wait()
            self._expected[step] = (_digests(tensors), state)
        self._whole = _contents(self._pristine)
        self.checkpoint_bytes = sum(len(data) for data in self._whole[newest(self._pristine).name].values())

    def shoot(self, kind: str, dice: random.Random) -> Verdict:
        """One trial; returns only after a damage that changed something."""
        while True:
            shutil.rmtree(self._shot_at, ignore_errors=True)
            shutil.copytree(self._pristine, self._shot_at)
            KINDS[kind](dice, self._shot_at)
            present = _contents(self._shot_at)
            damaged = {name for name, content in present.items() if content != self._whole.get(name)}
            if damaged:
                break
        refused = {name for name in damaged if self._refuses(self._shot_at / name)}
        whole = max(present.keys() - damaged, key=age)
        before = {name for name in damaged if age(name) > age(whole)}
        said: list[str] = []
        handler = LineHandler(said.append)
        self._code.logger.addHandler(handler)
        self._code.logger.setLevel(logging.INFO)
        try:
            loaded = self._code.CheckpointStore(self._shot_at, keep_last=1).load_newest()
        except CheckpointError:
            return Verdict(detected=refused == damaged, fell_back=False)
        finally:
            self._code.logger.removeHandler(handler)
        skipped = [line for line in said if "checkpoint skipped" in line]
        named = all(any(f"{name}:" in line for line in skipped) for name in before)
        right = loaded.path.name == whole and (_digests(loaded.tensors), loaded.state) == self._expected[loaded.step]
        return Verdict(detected=refused == damaged and named and len(skipped) == len(before), fell_back=right)

    def _refuses(self, path: Path) -> bool:
        try:
            self._code.read_checkpoint(path)
        except CheckpointError:
            return True
        return False


def age(name: str) -> list[int]:
    """Step and, from the second save of a step on, revision: what is larger is newer."""
    return [int(number) for number in name.split("-")[1:]]


def _digests(tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, str]:
    return {stem: checkpoint.weights_sha256(group) for stem, group in tensors.items()}


def _contents(root: Path) -> dict[str, dict[str, bytes | None]]:
    """Each checkpoint's directory to its files' contents; None is what is no regular file."""
    return {
        path.name: {
            file.name: file.read_bytes() if file.is_file() and not file.is_symlink() else None
            for file in path.iterdir()
        }
        for path in root.glob("step-*")
    }


def resnet20(step: int) -> Saved:
    """A model and an optimizer after an optimizer step on noise, and what the trainer saves beside them."""
    model = build_model(ModelConfig(name="resnet20"), num_classes=10, seed=step)
    optimizer = torch.optim.Adam(model.parameters())
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(step))
    model(images).square().sum().backward()
    optimizer.step()
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = {
        f"{names[parameter]}.{moment}": value
        for parameter, state in optimizer.state.items()
        for moment, value in state.items()
    }
    buffers = torch.cat([buffer.reshape(-1) for buffer in model.buffers() if buffer.is_floating_point()])
    tensors = {
        "model": dict(model.state_dict()),
        "optimizer": moments,
        "ranks": {"buffers": buffers.repeat(4, 1)},
    }
    return tensors, {"progress": {"step": step, "best": -1.5 / step}, "versions": versions()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=2000, help="damages tried (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the damages (default %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    load, dice = round(os.getloadavg()[0], 2), random.Random(options.seed)
    rows = {kind: {"kind": kind, "n": 0, "detected": 0, "fell_back": 0} for kind in KINDS}
    with tempfile.TemporaryDirectory() as scratch:
        targets = Range(checkpoint, Path(scratch), resnet20)
        for trial in range(options.trials):
            row = rows[list(KINDS)[trial % len(KINDS)]]
            verdict = targets.shoot(row["kind"], dice)
            row["n"] += 1
            row["detected"] += verdict.detected
            row["fell_back"] += verdict.fell_back
    totals = {name: sum(row[name] for row in rows.values()) for name in ("n", "detected", "fell_back")}
    print(
        f"{hardware()}; ResNet-20 and Adam, {targets.checkpoint_bytes / 1e6:.1f} MB a checkpoint, seed {options.seed}"
    )
    for row in [*rows.values(), {"kind": "all", **totals}]:
        print(f"{row['kind']:40}{row['n']:>6}  detected {row['detected']:>6}  fell back {row['fell_back']:>6}")
    if options.out:
        result = {
            "benchmark": "checkpoint_damage",
            "hardware": hardware(),
            "load_average_before": load,
            "model": "resnet20",
            "checkpoint_bytes": targets.checkpoint_bytes,
            "checkpoints": len(STEPS),
            "seed": options.seed,
            **totals,
            "versions": versions(),
            "results": list(rows.values()),
        }
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
