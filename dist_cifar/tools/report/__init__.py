"""The report: one HTML page about a run, or about several, compared.

Contract: what is shown comes from run directories alone (no data set, no checkpoint), and the page needs no network and
no other file. A run may be anywhere between its first second and its end; what it has not written yet is
left out. Everything that comes from a file is escaped.

`read` reads run directories, `charts` chooses the curves and `drawing` lays them out, `sections`, `timeline` and
`comparison` compute what the other parts of the page show, and `page` hands it all to the templates.
"""

from dist_cifar.tools.report.page import render, write_report
from dist_cifar.tools.report.read import Run, read_run
from dist_cifar.tools.report.tracker import ReportTracker

__all__ = ["ReportTracker", "Run", "read_run", "render", "write_report"]
