"""The marks on the types of config fields: bounds, names, paths, and what a resumed run may do with a field."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, TypeVar


@dataclass(frozen=True, kw_only=True)
class Range:
    """Closed bounds of a number; with `above`, the lower one is open."""

    minimum: float | None = None
    maximum: float
    above: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            (self.minimum is None or number >= self.minimum)
            and number <= self.maximum
            and (self.above is None or number > self.above)
        )

    def __str__(self) -> str:
        bounds = ((">=", self.minimum), (">", self.above), ("<=", self.maximum))
        return " and ".join(
            f"{sign} {bound if isinstance(bound, int) else f'{bound:g}'}" for sign, bound in bounds if bound is not None
        )


class AtResume(Enum):
    """What a resumed run may do with a field."""

    DECIDES = "decides"
    """It must have the value that the run was started with."""
    ROUNDING = "rounding"
    """It changes how sums are rounded: outside of `exact` a resumed run may change it."""
    FREE = "free"
    """It may change."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """The names that a field takes: those of the package, registered ones, and `module:attribute`."""

    kind: str
    """One of `plugins.KINDS`."""
    known: tuple[str, ...]

    def __str__(self) -> str:
        return " | ".join((*self.known, "module:attribute"))


T = TypeVar("T")
Free = Annotated[T, AtResume.FREE]
Rounding = Annotated[T, AtResume.ROUNDING]


class PathKind(Enum):
    """Where the `~` and the variables in a path are expanded."""

    SHARED = "shared"
    """When the config is read: the config that is printed and saved has the path in full."""
    NODE = "node"
    """In the process that uses it, because each node may have another value."""


SharedPath = Annotated[str, PathKind.SHARED]
NodePath = Annotated[str, PathKind.NODE]

MANY = 10**9
"""More steps, epochs or samples than any run has, and few enough for 32 bits."""
PositiveInt = Annotated[int, Range(minimum=1, maximum=MANY)]
NonNegativeInt = Annotated[int, Range(minimum=0, maximum=MANY)]
Probability = Annotated[float, Range(minimum=0, maximum=1)]
Seconds = Annotated[float, Range(above=0, maximum=10**7)]
Factor = Annotated[float, Range(minimum=0, maximum=100)]
"""A strength of an operation on pixels: beyond it an image has no grey left."""
Beta = Annotated[float, Range(minimum=0, maximum=0.999999)]
"""A decay rate that is below 1 in 32 bits too."""
Aspect = Annotated[float, Range(minimum=1e-3, maximum=1000)]
Options = dict[str, Any]
"""Arguments by name for what a field `name` of the same section names."""
SmallFloat = Annotated[float, Range(minimum=1e-30, maximum=10_000)]
"""A number that is not zero in 32 bits, nor are its products with others."""
