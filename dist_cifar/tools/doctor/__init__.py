"""Looks for what would waste GPU hours, before they are spent: on one process, or on every rank of a job.

Contract: `doctor` makes every check that it can, whatever another one has found, and leaves nothing behind but the data
set's cache. A finding is `ok`, `warning` (slower, or less safe) or `failed` (the run would fail), and says what to do
about the latter two. `doctor` returns 1 if anything has failed. Every rank looks at its own process and host; rank 0
prints what they have found.

Each check is a function that returns a `Finding`; an exception that it raises is a failed finding too. Checks that need
other ranks are called on all of them, in the same order, and exchange their findings before the next one begins.
"""

from dist_cifar.tools.doctor.runner import doctor

__all__ = ["doctor"]
