"""What a job leaves idle on its machines, and how many ranks would use it.

Contract: a pure function of what was counted. Rank 0 counts on its own node and takes the others to be like it.
"""

from __future__ import annotations

from dist_cifar.errors import counted


def idle_line(
    unit: str, *, available: int, used: int, ranks: int, ranks_here: int, shared: int, equally: bool, limit: str
) -> str | None:
    """What is idle on this node, and what to do about it; None where nothing is that another rank could use.

    `unit` is `core` or `GPU`; `used` of the `available` ones are. `ranks_here` of the job's `ranks` run on this node.
    What a step consists of is `shared` pieces, which errors call `limit`. With `equally` the number of ranks divides
    it; else the rank that has the most pieces decides how long a step takes.
    """
    if available - used < ranks_here:  # less than one for each rank is the rest of a division
        return None
    room = available // max(1, used // ranks_here) * ranks // ranks_here
    counts = [count for count in range(1, min(room, shared) + 1) if not equally or shared % count == 0]
    best = min(counts, key=lambda count: -(-shared // count))  # of equal ones the first one, with the fewest ranks
    idle = f"{available - used} of {counted(available, unit)}"
    if best <= ranks:
        return f"{idle}; {counted(ranks, 'rank')} are the most here for {limit}"
    alone = f": dist-cifar train --ranks {best}" if ranks == ranks_here else ""
    return f"{idle}; {best} ranks would use more of them{alone}"
