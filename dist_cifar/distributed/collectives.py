"""The collectives that the trainer uses beside those of the strategy.

Contract: every method but the properties and `watch` is a collective: all ranks call it, in the same order. With one
rank each is the identity and no process group exists. Objects and small tensors go over a gloo group on the CPU, so no
call waits for a GPU unless it is given a GPU's tensor. Collectives are counted; `all_gather_object` notices if ranks
are not in the same one. When another rank is lost they raise what gloo or NCCL raise (`failures.is_lost_peer`), in time
for the job to end within its timeout.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dist_cifar.distributed.failure_detector import (
    Failure,
    FailureDetector,
    Position,
    odd_ranks,
    one_line,
    own_identity,
)
from dist_cifar.distributed.launch_env import DistEnv
from dist_cifar.distributed.rendezvous import open_store
from dist_cifar.errors import LaunchError, TrainingError, UserError

_SETUP_TIMEOUT_SECONDS = 3600.0
"""How long ranks wait for the one that downloads or decodes the data set for its node."""
_CONTROL_SHARE = 0.9
"""The control group's share of the timeout; the rest is for finding out which rank failed (see `failures`)."""
_NCCL_MARGIN_SECONDS = 30.0
"""How much later than the control group NCCL gives up: its watchdog aborts the process without a word of ours."""


class Communicator:
    """One job's ranks. `close` ends the process group."""

    def __init__(
        self, env: DistEnv, *, device: torch.device, timeout_seconds: float, store: dist.Store | None = None
    ) -> None:
        """Without `store` the ranks meet in one that rank 0 keeps (`meeting`). Raises `LaunchError` if they do not."""
        self.rank, self.world_size, self.device = env.rank, env.world_size, device
        self.identities = [own_identity()]
        self._position = Position()
        self._control: dist.ProcessGroup | None = None
        self._background: dist.Work | None = None
        self._env = env
        if env.world_size == 1:
            return
        os.environ.update(env.variables())  # Accelerate reads them
        control_timeout = datetime.timedelta(seconds=_CONTROL_SHARE * timeout_seconds)
        try:
            if store is None:
                store = open_store(env, timeout_seconds, setting="run.timeout_seconds")
                store.set_timeout(control_timeout)
            on_gpu = device.type == "cuda"
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=store,
                rank=env.rank,
                world_size=env.world_size,
                timeout=datetime.timedelta(seconds=timeout_seconds + _NCCL_MARGIN_SECONDS)
                if on_gpu
                else control_timeout,
                device_id=device if on_gpu else None,
            )
            control = dist.new_group(backend="gloo", timeout=control_timeout)
            assert isinstance(control, dist.ProcessGroup)
            self._control = control
            self.identities = self.all_gather_object(self.identities[0])
        except (RuntimeError, OSError) as error:
            raise LaunchError(
                f"launch: rank {env.rank} of {env.world_size} on {socket.gethostname()} cannot reach the others at"
                f" {env.master_addr} ({' '.join(str(error).split())[:200]}); look for one that ended, and whether"
                " nodes can reach each other"
            ) from error
        # A connection of its own: one that another thread waits in serves nobody else.
        self._failure_store = dist.PrefixStore("failures", store).clone()

    @property
    def step(self) -> int | None:
        """The step that the last vote was cast in; None before the first."""
        return self._position.step

    def watch(self, end: Callable[[Failure], None]) -> FailureDetector | None:
        """Not a collective: watches, from now on, for ranks that fail. None if this rank is alone.

        `end` must end this process; it is called on another thread if a rank has failed and the main thread is stuck.
        """
        if self._control is None:
            return None
        return FailureDetector(
            self._failure_store,
            rank=self.rank,
            identities=self.identities,
            position=lambda: self._position,
            broken=self._broken,
            end=end,
        )

    def _broken(self) -> str | None:
        """The message of a vote that has failed while the main thread was busy, or stuck in a GPU's collective."""
        work = self._background
        if work is not None and work.is_completed():
            try:
                work.wait()
            except RuntimeError as error:
                return one_line(error)
        return None

    def _enter(self, name: str, step: int | None = None) -> None:
        """Counts a collective."""
        position = self._position
        self._position = Position(count=position.count + 1, name=name, step=position.step if step is None else step)

    def barrier(self) -> None:
        """Waits, for up to an hour, until every rank is here; an error names the ranks that are not."""
        self._enter("barrier")
        if self._control is not None:
            dist.monitored_barrier(
                self._control, timeout=datetime.timedelta(seconds=_SETUP_TIMEOUT_SECONDS), wait_all_ranks=True
            )

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's tensor, in place, over the group of the tensor's device.

        Ranks meet before they add: gloo aborts the process in which sizes do not match, which need not be the one that
        went wrong, and a GPU's collective would wait for a missing rank without the control group's timeout.
        """
        self.all_gather_object(None, "sum")
        if self._control is not None:
            dist.all_reduce(tensor, group=self._control if tensor.device.type == "cpu" else None)
        return tensor

    def time_all_reduces(self, size_bytes: int, repeats: int) -> list[float]:
        """Seconds that each of `repeats` sums of a tensor of `size_bytes` takes this rank. A collective."""
        tensor = torch.zeros(size_bytes // 4, device=self.device)
        seconds = []
        for _ in range(repeats + 1):
            self.all_gather_object(None, "time all-reduces")
            started = time.perf_counter()
            dist.all_reduce(tensor, group=self._control if self.device.type == "cpu" else None)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - started)
        return seconds[1:]  # the first one opens connections

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """Part r of `sent` goes to rank r; part r of `received` is what rank r sent here. Both flat, in equal parts."""
        dist.all_to_all_single(received, sent)

    def all_gather(self, gathered: torch.Tensor, part: torch.Tensor) -> None:
        """Every rank's flat `part`, in the order of the ranks, into the flat `gathered`."""
        if gathered.device.type != "cpu":
            dist.all_gather_into_tensor(gathered, part)
            return
        # gloo's own gathers into new memory and copies that: messages take a third of its processor time.
        parts, messages = gathered.chunk(self.world_size), []
        for distance in range(1, self.world_size):
            target, source = (self.rank + distance) % self.world_size, (self.rank - distance) % self.world_size
            messages.append(dist.P2POp(dist.isend, part, target))
            messages.append(dist.P2POp(dist.irecv, parts[source], source))
        works = dist.batch_isend_irecv(messages)
        parts[self.rank].copy_(part)
        for work in works:
            work.wait()

    def all_gather_object(self, value: Any, name: str = "gather") -> list[Any]:
        """Every rank's `value` (anything that pickles), in the order of the ranks, on every rank.

        Raises `TrainingError`, on every rank, if they are not all in the collective `name`.
        """
        self._enter(name)
        if self._control is None:
            return [value]
        received: list[Any] = [None] * self.world_size
        dist.all_gather_object(received, (self._position, value), group=self._control)
        positions = [position for position, _ in received]
        self._refuse_odd("the order of the collectives", positions, positions)
        return [value for _, value in received]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` (anything that pickles) on every rank."""
        self._enter("broadcast")
        if self._control is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._control)
        return values[0]

    def run_on_rank0(self, function: Callable[[], Any]) -> Any:
        """What `function` returns on rank 0, on every rank; a `UserError` of it is raised on every rank."""
        outcome: tuple[Any, UserError | None] = (None, None)
        if self.rank == 0:
            try:
                outcome = function(), None
            except UserError as error:
                outcome = None, error
        value, refusal = self.broadcast(outcome)
        if refusal is not None:
            raise refusal
        return value

    def broadcast_tensors(self, tensors: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """Rank 0's CPU tensors on every rank; the other ranks' argument is not looked at."""
        if self._control is None:
            assert tensors is not None
            return dict(tensors)
        source = {name: tensor.contiguous() for name, tensor in (tensors or {}).items()} if self.rank == 0 else {}
        layout = self.broadcast([(name, tensor.shape, tensor.dtype) for name, tensor in source.items()])
        received = {}
        for name, shape, dtype in layout:
            tensor = source[name] if self.rank == 0 else torch.empty(shape, dtype=dtype)
            dist.broadcast(tensor.reshape(-1).view(torch.uint8), src=0, group=self._control)
            received[name] = tensor
        return received

    def assert_equal_across_ranks(self, what: str, value: Any) -> None:
        """Raises `TrainingError`, on every rank, if ranks hold different values (anything that JSON can write)."""
        texts = self.all_gather_object(json.dumps(value, sort_keys=True), what)
        self._refuse_odd(what, texts, texts)

    def assert_tensors_equal_across_ranks(
        self, what: str, tensors: Mapping[str, torch.Tensor], digest: Callable[[Mapping[str, torch.Tensor]], str]
    ) -> None:
        """The same for tensors, by their digest; the error names the first tensor that differs."""
        digests = self.all_gather_object(digest(tensors), what)
        if len(set(digests)) > 1:
            parts = self.all_gather_object(
                {name: digest({name: tensor}) for name, tensor in tensors.items()}, f"{what}, each"
            )
            name = next(name for name in parts[0] if len({part.get(name) for part in parts}) > 1)
            self._refuse_odd(f"{what} ({name}, by its SHA-256)", [part.get(name) for part in parts], digests)

    def _refuse_odd(self, what: str, found: Sequence[Any], judged: Sequence[Any]) -> None:
        """Raises `TrainingError` if `judged`, by rank, is not one value; `found` is what the message shows of each."""
        odd = odd_ranks(judged)
        if not odd:
            return
        if len(odd) == self.world_size:
            values = "; ".join(f"rank {rank} has {value}" for rank, value in enumerate(found))
            raise TrainingError(f"{what} differs between ranks, and no value is that of most: {values}")
        most = next(rank for rank in range(self.world_size) if rank not in odd)
        raise TrainingError(
            f"{what} differs between ranks: rank {odd[0]} has {found[odd[0]]}, most have {found[most]} (ranks that"
            f" differ from most: {odd}); the run cannot go on",
            rank=odd[0],
        )

    def require_process_group(self) -> None:
        """Makes the process group that some libraries want of a single rank too."""
        if not dist.is_initialized():
            os.environ.update(self._env.variables())
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

    def close(self) -> None:
        """Ends the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


class AsyncAnyReduce:
    """Ranks agree on yes-or-no questions: `start` before a step, `result` after it: the exchange hides behind it."""

    def __init__(self, communicator: Communicator, questions: int) -> None:
        self._communicator = communicator
        self._group = communicator._control
        self._flags = torch.zeros(questions)
        self._work: dist.Work | None = None

    def start(self, step: int, *answers: bool) -> None:
        """This rank's answers; `step` is the one that begins, counted from 1."""
        self._communicator._enter("the vote", step)
        self._flags.copy_(torch.tensor(answers))
        if self._group is not None:
            self._work = dist.all_reduce(self._flags, group=self._group, async_op=True)
            self._communicator._background = self._work

    def result(self) -> list[bool]:
        """For each question, whether any rank says yes; the same on every rank."""
        if self._work is not None:
            self._work.wait()
        return (self._flags > 0).tolist()
