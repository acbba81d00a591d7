"""Numbers as a person reads them."""

from __future__ import annotations


def number(value: float, *, percent: bool = False) -> str:
    """At most four digits: 0.25, 1e-4, 12,000."""
    if percent:
        return f"{100 * value:.4g}%"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0 < abs(value) < 1e-2:
        digits, power = f"{value:.3e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.4g}"


def pixels(position: float) -> str:
    """A position in an SVG."""
    return f"{position:.1f}"


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage."""
    return f"{share:.{digits}%}"


def thousands(count: int) -> str:
    """A whole number with commas."""
    return f"{count:,}"


def small_share(share: float) -> str:
    """A share that may be too small for one decimal of a percentage."""
    return f"{share:.1%}" if share >= 0.001 else "below 0.1%"


def duration(seconds: float) -> str:
    """Human-readable duration."""
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {int(seconds % 60)} s" if minutes else f"{seconds:.0f} s"
