"""How long the processes of a job wait for one another: every such time, and what must hold between them.

Contract: a `Timeouts` follows from `run.timeout_seconds` alone, so all ranks have the same one. Its asserts are the
order in which the waits have to end for the job to name the rank that failed.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeouts:
    """The times of a job, in seconds."""

    run_seconds: float
    """`run.timeout_seconds`: how long ranks wait to connect, and how long a collective may take."""

    # What follows from it.

    control_share: float = 0.9
    """The control group's share of it; the rest is for finding out which rank failed."""
    nccl_margin_seconds: float = 30.0
    """How much later than that NCCL gives up: its watchdog aborts the process before we can name the failed rank."""

    # What does not depend on it: how long one action takes at most, on machines and networks that are alive.

    setup_seconds: float = 3600.0
    """How long ranks wait for the one that downloads or decodes the data set for its node."""

    hold_seconds: float = 1.0
    """How often rank 0 tells the ranks that have connected to keep waiting."""
    connect_seconds: float = 1.0
    """How long an attempt to connect to rank 0 takes at most."""
    silence_seconds: float = 3.0
    """Peers that are silent for longer, on either side, are treated as foreign or hung."""

    poll_seconds: float = 0.5
    """How often a healthy rank looks for an alarm."""
    roll_call_seconds: float = 4.0
    """How long ranks have to answer the roll call; rank 0, which may host the store, stays for at most as long after
    the conclusion."""
    waiting_seconds: float = 1.0
    """A rank on a CPU that has stood in a collective for longer, when the roll is called, waits for other ranks."""
    together_seconds: float = 3.0
    """How long a rank with a `UserError` lets rank 0 raise it first: most such errors are raised by all together."""
    grace_seconds: float = 3.0
    """How long the main thread has, when another rank has raised an error, to raise the same one."""
    store_seconds: float = 3.0
    """A store that takes longer for one operation is gone, or its host is stopped."""
    report_seconds: float = 15.0
    """How long the main thread waits for the conclusion."""
    longest_pause_seconds: float = 7 * 86400.0
    """The timeout of gloo on CPUs once a `WaitClock` counts `control_seconds`, without pauses of the job."""

    def __post_init__(self) -> None:
        # The group whose errors we understand gives up first, and NCCL's watchdog last.
        assert self.control_seconds < self.run_seconds < self.nccl_seconds
        # A rank that waits hears from rank 0 before it takes it for hung, and has the time to connect to it.
        assert self.hold_seconds < self.silence_seconds and self.connect_seconds < self.silence_seconds
        # Nobody is called silent in the roll call before it can have seen the alarm and asked the store.
        assert self.poll_seconds + self.store_seconds < self.roll_call_seconds
        # It is seen to wait before the time to answer is over.
        assert self.poll_seconds + self.waiting_seconds < self.roll_call_seconds
        # A rank that lets rank 0 go first speaks up before the others call the roll.
        assert self.together_seconds < self.roll_call_seconds
        # The main thread outwaits everything that its watch does before it knows the conclusion and has told so.
        agreeing_seconds = self.together_seconds + self.roll_call_seconds + self.store_seconds
        assert agreeing_seconds + self.roll_call_seconds < self.report_seconds

    @property
    def control_seconds(self) -> float:
        """How long a collective of the control group may take."""
        return self.control_share * self.run_seconds

    @property
    def nccl_seconds(self) -> float:
        """How long a collective of NCCL may take."""
        return self.run_seconds + self.nccl_margin_seconds
