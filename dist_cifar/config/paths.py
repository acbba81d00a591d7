"""Paths in a config: `~` and the variables of the environment in them.

Contract: `expand_path` is a pure function of the text and the environment. What has no value is an error, never a
folder whose name begins with `$` or `~`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from dist_cifar.errors import ConfigError

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def expand_path(text: str, key: str, environ: Mapping[str, str]) -> str:
    """`text` with `$NAME`, `${NAME}` and a leading `~` or `~user` expanded. Raises `ConfigError`, which names `key`.

    What a variable holds is not expanded again.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        found = environ.get(name)
        if not found:
            raise ConfigError(
                f"{key}: {text} was set and the environment has no {name}; set that variable (where each rank runs), or"
                " write the path out"
            )
        return found

    expanded = _VARIABLE.sub(value, text)
    if not text.startswith("~"):
        return expanded
    user, slash, rest = expanded.partition("/")
    home = environ.get("HOME", "") if user == "~" and "HOME" in environ else os.path.expanduser(user)
    if not os.path.isabs(home):
        raise ConfigError(f"{key}: {text} was set and there is no such home; write the path out")
    return home.rstrip("/") + slash + rest or "/"


def has_variables(text: str) -> bool:
    """Whether `expand_path` would change the text again."""
    return bool(_VARIABLE.search(text)) or text.startswith("~")
