"""Writes docs/configuration.md from the config's dataclasses: `python docs/configuration.py`."""

from __future__ import annotations

from pathlib import Path

from dist_cifar.config import describe

HEAD = """# Configuration

Every field of a config, with its type and default; this page is written by `docs/configuration.py` from
`dist_cifar/config.py`. In a YAML file a section holds its fields; on the command line a field is `section.field=value`.
`python -m dist_cifar train --print-config` prints what would run."""


def page() -> str:
    """The whole page."""
    lines, section = [HEAD], ""
    for key, kind, default, text in describe():
        first, _, name = key.partition(".")
        if first != section:
            section = first
            lines += ["", f"## {section}", "", "| field | type | default | meaning |", "|---|---|---|---|"]
        cells = (f"`{name}`", kind, f"`{default}`", text)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page())
