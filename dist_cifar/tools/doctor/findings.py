"""Findings: what checks return, how they are graded, and their table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dist_cifar.errors import UserError

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of a check."""

    check: str
    state: str
    """`ok`, `warning` or `failed`."""
    found: str
    hint: str = ""
    """What to do about it; empty if it is ok."""


def ok(check: str, found: str) -> Finding:
    """A finding about which nothing is to be done."""
    return Finding(check=check, state="ok", found=found)


def warning(check: str, found: str, hint: str) -> Finding:
    """A finding with which the run works, but not as well as it could."""
    return Finding(check=check, state="warning", found=found, hint=hint)


def failed(check: str, found: str, hint: str) -> Finding:
    """A finding with which the run would not work."""
    return Finding(check=check, state="failed", found=found, hint=hint)


def graded(check: str, found: str, hint: str, value: float, warns_below: float, fails_below: float) -> Finding:
    """A finding graded by a value that should be large."""
    if value < fails_below:
        return failed(check, found, hint)
    return warning(check, found, hint) if value < warns_below else ok(check, found)


def attempt(check: str, function: Callable[[], Finding]) -> Finding:
    """The finding of `function`, or a failed one if it raises an error, whose message says what to do."""
    try:
        return function()
    except UserError as error:  # "what was found; what to do"
        found, _, hint = " ".join(str(error).split()).rpartition("; ")
        return failed(check, found, hint) if found else failed(check, hint, "fix what it names")
    except Exception as error:
        return failed(check, f"{type(error).__name__}: {' '.join(str(error).split())}"[:300], "fix what it names")


_STATES = ("ok", "warning", "failed")


def severity(finding: Finding) -> int:
    """A number that is larger for a worse finding."""
    return _STATES.index(finding.state)


def worst(findings: Sequence[Finding]) -> Finding:
    """The worst finding of one check, with the ranks that have it; the first rank's if all are ok."""
    found = max(findings, key=severity)
    ranks = [rank for rank, other in enumerate(findings) if other.state == found.state]
    if found.state == "ok" or len(findings) == 1:
        return found
    facts: dict[str, Any] = asdict(found) | {"found": f"rank {', '.join(map(str, ranks))}: {found.found}"}
    return Finding(**facts)


def table(findings: Sequence[Finding]) -> str:
    """The table of all findings."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:<8} {finding.check:<{width}}  {finding.found}")
        if finding.hint:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.hint}")
    count = {state: sum(finding.state == state for finding in findings) for state in _STATES}
    lines.append(f"{count['ok']} ok, {count['warning']} warning(s), {count['failed']} failed")
    return "\n".join(lines)


def size(count: float) -> str:
    """A number of bytes, readable."""
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / 2**20:,.0f} MiB"
