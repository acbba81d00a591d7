"""The acceptance test of a cluster: do all world sizes, and a run that is killed and resumed, produce identical bits?

Contract: `verify` trains the first steps of a config in a bitwise strategy, once at each world size, and once more as a
chain of world sizes: after each segment of the chain every rank is killed by SIGKILL, and others resume from the last
checkpoint. Every rank is a fresh process of the front door `train`. What each step of each run writes to
`digests.jsonl` is compared with the first run. `verify` returns 0 if every bit is equal, and raises `TrainingError`
with the first step and the tensors that differ; no rank outlives it. It imports torch only where it must: under a
launcher, and to count GPUs.

A *trial* is one run; a *segment* is the part of it that one set of ranks does. An *agent* is a process of `verify`: the
one that a person has started, or one of the N that a launcher has. Agents start the ranks as their children. Agent 0 is
the coordinator and the others follow its orders, over a `KeyValueStore`; all know the same trials, so they only have to
be told when each segment begins and ends.
"""

from dist_cifar.tools.verify.runner import verify

__all__ = ["verify"]
