"""Messages between ranks that are 1, 2, 4, ... places apart, by which all know what each does after log2(ranks) rounds.

Contract: every rank of the control group makes the same calls in the same order. `start_shift` begins an exchange, and
`wait_for` ends it. Errors are gloo's.
"""

from __future__ import annotations

import datetime
import pickle
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

_SHIFT_TAG, _GATHER_TAG = 1, 2
"""Keep messages that are under way in the background apart from those of `gather_known`."""


def start_shift(
    received: torch.Tensor,
    sent: torch.Tensor,
    distance: int,
    rank: int,
    world_size: int,
    group: dist.ProcessGroup | None,
    tag: int = _SHIFT_TAG,
) -> list[dist.Work]:
    """Begins to send to the rank `distance` places further on, and to receive from the one as far back."""
    to, source = (rank + distance) % world_size, (rank - distance) % world_size
    works = dist.isend(sent, to, group=group, tag=tag), dist.irecv(received, source, group=group, tag=tag)
    return [work for work in works if work is not None]


def wait_for(works: Sequence[dist.Work], timeout: datetime.timedelta) -> None:
    """Waits until all of it is done, for so long: a message does not know the timeout that its group got later."""
    for work in works:
        work.wait(timeout)


def gather_known(
    value: Any, rank: int, world_size: int, group: dist.ProcessGroup, timeout: datetime.timedelta
) -> list[Any]:
    """Every rank's `value` (anything that pickles), in the order of the ranks.

    Each rank sends all that it knows, first to the next one: 2 log2(ranks) messages, where gloo's own all-gather passes
    each value through all ranks. Source: Bruck et al., "Efficient algorithms for all-to-all communications in multiport
    message-passing systems", 1997.
    """
    known, distance = {rank: value}, 1

    def exchange(received: torch.Tensor, sent: torch.Tensor) -> torch.Tensor:
        wait_for(start_shift(received, sent, distance, rank, world_size, group, _GATHER_TAG), timeout)
        return received

    while distance < world_size:
        data = pickle.dumps(known)
        size = exchange(torch.empty(1, dtype=torch.int64), torch.tensor([len(data)]))
        sent = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        received = exchange(torch.empty(int(size), dtype=torch.uint8), sent)
        known |= pickle.loads(received.numpy().tobytes())
        distance *= 2
    return [known[other] for other in range(world_size)]
