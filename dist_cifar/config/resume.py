"""What a resumed run may change, read from the marks on the fields of `schema`.

Contract: pure functions of two configs. A config is compared flattened, as a checkpoint holds it.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Annotated, Any

from dist_cifar.config.load import flatten, with_current_keys
from dist_cifar.config.schema import HINTS, AtResume, Config
from dist_cifar.config.yaml_text import brief


def at_resume(key: str) -> AtResume:
    """What a resumed run may do with `key`, e.g. `train.epochs`. A key that is not known decides."""
    section, _, name = key.partition(".")
    hint = HINTS.get(section, {}).get(name)
    marks = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
    return next((mark for mark in marks if isinstance(mark, AtResume)), AtResume.DECIDES)


def differences(old: Mapping[str, Any], config: Config) -> dict[str, str]:
    """`key: old -> new` of each key that is not free and has another value in `config` than in the flattened `old`."""
    old, new = with_current_keys(old), flatten(config)
    keys = [key for key in dict.fromkeys([*old, *new]) if at_resume(key) is not AtResume.FREE]
    return {
        key: f"{key}: {brief(old.get(key))} -> {brief(new.get(key))}" for key in keys if old.get(key) != new.get(key)
    }
