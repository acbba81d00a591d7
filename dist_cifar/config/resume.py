"""What a resumed run may change, read from the marks on the fields of `schema`.

Contract: pure functions of two configs. A config is compared flattened, as a checkpoint holds it.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Annotated, Any

from dist_cifar.config.components import is_own
from dist_cifar.config.load import flatten, with_current_keys
from dist_cifar.config.marks import AtResume
from dist_cifar.config.schema import HINTS, Config
from dist_cifar.config.yaml_text import brief
from dist_cifar.plugins import find


def at_resume(key: str) -> AtResume:
    """What a resumed run may do with `key`, e.g. `train.epochs`. A key that is not known decides."""
    section, _, name = key.partition(".")
    hint = HINTS.get(section, {}).get(name)
    marks = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
    return next((mark for mark in marks if isinstance(mark, AtResume)), AtResume.DECIDES)


LENGTH = ("train.epochs", "train.max_steps")
_FOLLOW_LENGTH = ("cosine", "triangle")


def follows_length(config: Config) -> bool:
    """Whether a step depends on the length of the run, whose fields then decide the result.

    A schedule from outside the package may, unless it has an attribute `follows_length = False`.
    """
    name = config.schedule.name
    own = find("schedule", "schedule.name", name) if is_own(config, "schedule") else None
    return (
        name in _FOLLOW_LENGTH
        or (own is not None and getattr(own, "follows_length", True))
        or config.average.name == "lookahead"
        or (config.mix.name != "none" and config.mix.off_last_epochs > 0)
        or bool(config.augment.resolution)
    )


def differences(old: Mapping[str, Any], config: Config) -> dict[str, str]:
    """`key: old -> new` of each key that is not free and has another value in `config` than in the flattened `old`."""
    old, new = with_current_keys(old), flatten(config)
    decides = LENGTH if follows_length(config) else ()
    keys = [key for key in dict.fromkeys([*old, *new]) if key in decides or at_resume(key) is not AtResume.FREE]
    return {
        key: f"{key}: {brief(old.get(key))} -> {brief(new.get(key))}" for key in keys if old.get(key) != new.get(key)
    }


def batch_differences(
    found: Mapping[str, str], old: Mapping[str, Any], config: Config, *, old_ranks: int, ranks: int
) -> dict[str, str]:
    """`found` of `differences`, with the global batch in place of the two fields that may set it.

    With `batch.per_rank_size` it follows from the number of ranks, and with another one a step is another place in the
    data.
    """
    before, now = _global_batch(with_current_keys(old), old_ranks), _global_batch(flatten(config), ranks)
    fields = ("batch.global_size", "batch.per_rank_size")
    others = {key: text for key, text in found.items() if key not in fields}
    if before == now:
        return others
    if len(others) < len(found):
        return dict(found)
    text = f"global batch: {before} -> {now} (ranks: {old_ranks} -> {ranks}; batch.global_size={before} keeps it)"
    return others | {"batch.per_rank_size": text}


def _global_batch(values: Mapping[str, Any], ranks: int) -> int:
    """The samples of one step on so many ranks; 0 if the config does not say."""
    return values.get("batch.global_size") or (values.get("batch.per_rank_size") or 0) * ranks
