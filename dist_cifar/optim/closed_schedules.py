"""The shares of the full learning rate that schedules give a step, as closed functions of it.

Contract: pure functions in float64 of a step, counted from 0, and the lengths given; nothing is accumulated from step
to step. A share is within 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def cosine(step: int, *, warmup_steps: int, total_steps: int, end: float) -> float:
    """Half a cosine from 1 after the warm-up to `end` at `total_steps`, one step after the last one; before it, 1.

    end + (1 - end) (1 + cos(pi (t - w) / (T - w))) / 2. Source: Loshchilov and Hutter, "SGDR", ICLR 2017, one cycle.
    """
    if step < warmup_steps:
        return 1.0
    done = (step - warmup_steps) / (total_steps - warmup_steps)
    return end + (1 - end) * (1 + math.cos(math.pi * done)) / 2


def triangle(step: int, *, total_steps: int, start: float, peak: float, end: float) -> float:
    """Linear from `start` to 1 at the share `peak` of the run, then linear to `end` at `total_steps`.

    Source: Smith and Topin, "Super-convergence", 2017, with one cycle and no momentum.
    """
    top = peak * total_steps
    if step < top:
        return start + (1 - start) * step / top
    return 1 + (end - 1) * (step - top) / (total_steps - top)


def multistep(step: int, *, milestone_steps: Sequence[float], gamma: float) -> float:
    """`gamma` to the power of the number of milestones up to `step`. Source: He et al., CVPR 2016, section 4.2."""
    return gamma ** sum(milestone <= step for milestone in milestone_steps)
