"""YAML as people write configs: text to plain values, and plain values to text.

Contract: `parse_yaml` returns dicts with text as keys, lists, text, numbers, booleans and None, or raises `ConfigError`
with the line of what is refused, for any text. Numbers are decimal, as YAML 1.2 has them: `010` is ten and `1e-3` a
number, while `0x40` and `1:30`, which YAML 1.1 takes for 64 and 90, are text. Tags, aliases and `<<` are refused, and
so is what is nested more deeply than any config: a few lines with them can stand for gigabytes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from dist_cifar.errors import ConfigError, printable

MAX_BYTES = 2**17
"""A config has some thousand bytes. A file that is larger is something else, or a device without an end."""
_MAX_DEPTH = 20
_INT = re.compile(r"^[-+]?[0-9]+(?:_[0-9]+)*$")
_FLOAT = re.compile(
    r"^[-+]?(?:[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$"
    r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)
_BOOL = re.compile(r"^(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$")
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_TAG = "tag:yaml.org,2002:"
_RESOLVERS = (
    ("bool", _BOOL, list("yYnNtTfFoO")),
    ("null", _NULL, ["~", "n", "N", ""]),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml says nothing of its types
    """Safe YAML that reads what the module's contract says."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # yaml's own name and type
    _depth = 0

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level >= _MAX_DEPTH:  # the scanner reads far ahead, ever more slowly
            raise _too_deep(self.line)
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _refused(event, f"*{event.anchor} stands for a value elsewhere, which is not read here; write it out")
        if event.tag not in (None, f"{_TAG}str"):
            raise _refused(event, f"the tag {_short(event.tag)} is not read; write the value alone")
        if event.tag is not None and not isinstance(event, yaml.ScalarEvent):
            raise _refused(event, "text is no list and no section; write the value alone")
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _too_deep(event.start_mark.line)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _refused(key_node, f"key {_short(repr(key))} is not a string; write a name")
            if key == "<<":
                raise _refused(key_node, "<< is not read; write out what it would add")
            if key in seen:
                raise _refused(key_node, f"key {_short(repr(key))} is given twice; remove one")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        """A whole number, also one that begins with zeros."""
        if len(node.value) > 1000:
            raise _refused(node, f"a number of {len(node.value)} digits; write one that fits")
        return int(node.value.replace("_", ""))


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # yaml says nothing of its types
    """Safe YAML in which text that either version of YAML takes for something else is in quotes."""


for _name, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first)
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_decimal)


def parse_yaml(text: str, origin: str) -> Any:
    """The value of a YAML document. Raises `ConfigError`, whose line begins with `origin`."""
    try:
        return yaml.load(text, _Loader)  # a subclass of SafeLoader
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{origin}: line {line}: not YAML: {error.problem}; fix the line") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{origin}: line {line}: holds the character U+{error.character:04X}; remove it") from None
    except (ValueError, OverflowError) as error:  # an escape for a character that there is not
        raise ConfigError(f"{origin}: not YAML: {' '.join(str(error).split())}; fix it") from None


def read_text(path: Path) -> str:
    """The text of a config file, which may be a pipe. Raises `OSError`, or `ConfigError` for what is no text."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except ValueError:  # a zero byte in the name
        raise ConfigError(f"--config {show(str(path))}: no file can have this name; give a YAML file") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"--config {path}: cannot be read (more than {MAX_BYTES:,} bytes); give a YAML file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"--config {path}: cannot be read (line {line}: byte 0x{content[error.start]:02x} is not UTF-8); save it as"
            " UTF-8"
        ) from None


def show(value: Any) -> str:
    """A value as YAML would write it, on one line, so that what is printed can be typed."""
    text: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def brief(value: Any) -> str:
    """A value as `show` writes it, cut to what a line of an error can hold, with nothing that a terminal obeys."""
    text = show(value[:200] if isinstance(value, list | str) else value)
    return _short(printable(" ".join(text.split())))


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refused(where: Any, why: str) -> ConfigError:
    return ConfigError(f"line {where.start_mark.line + 1}: {why}")


def _too_deep(line: int) -> ConfigError:
    return ConfigError(
        f"line {line + 1}: a config is not nested so deeply; write `section:` and `  key: value` below it"
    )
