"""Renders the page from its templates, style sheet and scripts, and writes it.

Contract: one self-contained file; templates escape what they are given, and a name that a template misspells is an
error. Jinja2 is imported when a page is made: a training that has just started does not wait for it.
"""

from __future__ import annotations

import functools
import importlib.resources
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_cifar.errors import ConfigError
from dist_cifar.run.atomic_io import write_output
from dist_cifar.run.run_dir import RunDir
from dist_cifar.run.run_files import read_bytes
from dist_cifar.tools.report import comparison, formats, sections
from dist_cifar.tools.report.charts import curves
from dist_cifar.tools.report.drawing import line_chart
from dist_cifar.tools.report.read import Run, read_run
from dist_cifar.tools.report.timeline import timeline

if TYPE_CHECKING:
    import jinja2

logger = logging.getLogger(__name__)

PACKAGE = "dist_cifar.tools.report"
OWN_MARK = b"<footer>dist_cifar, "
"""Part of every page."""
NAME = "report.html"
"""Name of the page about several runs, in the current directory."""


def write_report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the page about the runs at `paths`; returns its path."""
    if out is None:
        out = RunDir(paths[0]).report if len(paths) == 1 else Path(NAME)
        if out.exists() and OWN_MARK not in (read_bytes(out) or b""):
            raise ConfigError(f"{out}: is not a report, and would be overwritten; name a file with --out")
    runs = [read_run(path) for path in paths]
    for note in (note for run in runs for note in run.notes):
        logger.warning(note)
    write_output(out, render(runs))
    return out


def render(runs: Sequence[Run], *, refresh_seconds: float | None = None) -> str:
    """The page; with `refresh_seconds`, one that polls its server and shows what has changed."""
    names = _distinct_names(runs)
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            title=f"{names[0]}: {runs[0].state}" if len(runs) == 1 else f"{len(runs)} runs",
            runs=[_view(run, name) for run, name in zip(runs, names, strict=True)],
            charts=[line_chart(chart) for chart in curves(runs, names)],
            results=[comparison.result_cells(runs[0], run) for run in runs],
            config_differences=comparison.config_differences(runs),
            refresh_milliseconds=None if refresh_seconds is None else round(1000 * refresh_seconds),
            made=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        )
    )


def _view(run: Run, name: str) -> dict[str, Any]:
    """What the templates show of one run."""
    found = run.predictions if run.summary else None
    return {
        "name": name,
        "run": run,
        "cards": sections.headline_cards(run),
        "classes": None if found is None else sections.classes(run),
        "predictions": found,
        "mistakes": [] if found is None else sections.worst_mistakes(found),
        "wrong_count": 0 if found is None else int((found.predicted != found.labels).sum()),
        "calibration": None if found is None else sections.calibration(found),
        "augmentation": None if found is None else sections.augmentation_sheet(found),
        "profile": sections.profile_rows(run),
        "timeline": timeline(run),
        "settings": sections.settings(run),
    }


def _distinct_names(runs: Sequence[Run]) -> list[str]:
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


@functools.cache
def environment() -> jinja2.Environment:
    """The templates, with the functions and filters that they use."""
    import jinja2
    from markupsafe import Markup

    made = jinja2.Environment(
        loader=jinja2.PackageLoader(PACKAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def inline(name: str) -> Markup:
        """A file of `static/`, as it is: it is ours, and has nothing that would end its element."""
        return Markup((importlib.resources.files(PACKAGE) / "static" / name).read_text(encoding="utf-8"))

    made.globals["inline"] = inline
    made.filters |= {
        "pixels": formats.pixels,
        "percent": formats.percent,
        "small_share": formats.small_share,
        "thousands": formats.thousands,
    }
    return made
