"""A data set for commands, made in no time."""

from __future__ import annotations

from pathlib import Path

SMALL = ["data.source=synthetic", "data.synthetic_train_size=60", "data.synthetic_test_size=20"]
SMALL += ["data.validation_size=10"]


def arguments(root: Path) -> list[str]:
    return ["data.root=" + str(root / "data"), "data.cache_dir=" + str(root / "cache")]
