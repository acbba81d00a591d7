"""What is verified: the trials, the config that they train, and which agent starts which rank.

Contract: pure functions, but for `this_agent`.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from dist_cifar.config import Config, config_from_values, flatten
from dist_cifar.distributed.device import sees_only_its_own, visible_gpus
from dist_cifar.distributed.launch_env import DistEnv
from dist_cifar.errors import ConfigError, LaunchError
from dist_cifar.strategy import bitwise_strategy

# --- what is run -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The part of a trial that one set of ranks does."""

    world_size: int
    until_step: int
    """The step after which the ranks are killed."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run."""

    name: str
    segments: tuple[Segment, ...]

    @property
    def directory(self) -> str:
        """The name of its run directory."""
        return f"world-size-{self.segments[0].world_size}" if len(self.segments) == 1 else "chain"


def parse_world_sizes(text: str, virtual_ranks: int) -> list[int]:
    """Parses a list such as `1,2,3`. Raises `ConfigError` unless it is one of numbers up to `virtual_ranks`."""
    try:
        sizes = [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"--world-sizes: {text!r} is not a list of whole numbers; write e.g. 1,2,3") from None
    for size in sizes:
        if not 1 <= size <= virtual_ranks:
            raise ConfigError(
                f"--world-sizes: {size} was given; strategy.virtual_ranks={virtual_ranks} allows 1 to {virtual_ranks}"
            )
        if sizes.count(size) > 1:
            raise ConfigError(f"--world-sizes: {size} is given twice; give it once")
    return sizes


def plan_trials(world_sizes: Sequence[int], steps: int) -> list[Trial]:
    """A trial for each world size, in their order, and the chain: largest to smallest, and back to the largest.

    The chain's segments have about equal shares of the steps and end between two checkpoints. Raises `ConfigError` if
    there are too few steps for every segment to leave a checkpoint and to do steps that the others do not.
    """
    chain = [*sorted(world_sizes, reverse=True), max(world_sizes)]
    arrows = " -> ".join(map(str, chain))
    if steps < 2 * len(chain):
        raise ConfigError(f"--steps: {steps} steps are too few for the chain {arrows}; write at least {2 * len(chain)}")
    every = checkpoint_every_steps(len(world_sizes), steps)
    stops = [steps * (i + 1) // len(chain) for i in range(len(chain))]
    stops = [stop + 1 if every > 1 and stop % every == 0 and stop < steps else stop for stop in stops]
    segments = tuple(Segment(world_size=size, until_step=stop) for size, stop in zip(chain, stops, strict=True))
    single = [
        Trial(name=f"world size {size}", segments=(Segment(world_size=size, until_step=steps),)) for size in world_sizes
    ]
    return [*single, Trial(name=f"chain {arrows}", segments=segments)]


def checkpoint_every_steps(world_sizes: int, steps: int) -> int:
    """Steps between two checkpoints: fewer than a segment of the chain has, so that each segment leaves one.

    `world_sizes` is their number; the chain has one segment more.
    """
    return max(1, steps // (world_sizes + 2))


def verified_config(config: Config) -> Config:
    """`config` as it is trained here: in the bitwise strategy, without an end, with digests and without trackers.

    Raises `ConfigError` if it cannot be trained in that strategy.
    """
    return config_from_values(
        flatten(config)
        | {
            "strategy.name": bitwise_strategy(),
            "train.epochs": 10**6,  # it is killed: an end would evaluate the test set
            "train.max_steps": None,
            "run.log_digests": True,
            "run.time_limit_seconds": None,
            "checkpoint.keep_last": 1,
            "tracking.wandb": "disabled",
            "tracking.also": [],
        }
    )


# --- where it is run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Agent:
    """What a process of `verify` offers to the ranks that it starts."""

    pool: str
    """Names the set of GPUs that it sees: those of its host, or its own one where SLURM shows each task only that."""
    gpus: int
    """How many GPUs it sees; 0 when ranks compute on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a rank runs."""

    agent: int
    local_rank: int
    """The rank's number among those of the same pool."""
    local_world_size: int


def place_ranks(world_size: int, agents: Sequence[Agent]) -> list[Placement]:
    """Where each rank runs: on an agent of its own while there are enough, else agents start several ranks each.

    Raises `LaunchError` where GPUs are missing.
    """
    taken = [rank if world_size <= len(agents) else rank * len(agents) // world_size for rank in range(world_size)]
    pools = [agents[agent].pool for agent in taken]
    sizes = Counter(pools)
    for agent in taken:
        pool, gpus = agents[agent].pool, agents[agent].gpus
        if 0 < gpus < sizes[pool]:
            raise LaunchError(
                f"launch: world size {world_size} has {sizes[pool]} ranks on {pool}, which has {gpus} GPUs; start"
                " verify through a launcher on more nodes (torchrun, srun), leave the world size out of --world-sizes,"
                " or set run.device=cpu"
            )
    return [
        Placement(agent=agent, local_rank=pools[:rank].count(pools[rank]), local_world_size=sizes[pools[rank]])
        for rank, agent in enumerate(taken)
    ]


def default_world_sizes(virtual_ranks: int, agents: Sequence[Agent]) -> list[int]:
    """The number of agents, and powers of two up to it, or to 4 if that is more: those that the config and the GPUs
    allow."""
    most, sizes = max(len(agents), 4), []
    for size in sorted({2**i for i in range(most.bit_length())} | {len(agents)}):
        if size <= virtual_ranks:
            with suppress(LaunchError):
                place_ranks(size, agents)
                sizes.append(size)
    return sizes


def this_agent(config: Config, env: DistEnv) -> Agent:
    """The agent that the calling process is. Imports torch if ranks may compute on GPUs, to count them."""
    gpus, host = visible_gpus(config.run.device), socket.gethostname()
    return Agent(pool=f"{host} (task {env.rank})" if sees_only_its_own(env, gpus) else host, gpus=gpus)
