"""The collectives that the trainer uses in addition to those of the strategy.

Contract: every method but the properties, `watch`, `reading` and `require_process_group` is a collective: all ranks
call it, in the same order. With one rank each is the identity and no process group exists. Objects and small tensors go
over a gloo group on the CPU, the control group, so no call waits for a GPU unless it is given a GPU's tensor.
Collectives are counted, and `all_gather_object` notices if ranks are not in the same one. When another rank is gone
they raise what gloo or NCCL raise (`failure_detector.is_lost_peer`). When one hangs they do so within the job's
timeout; after `watch`, on CPUs, the failure detector ends the job instead, which does not count the time in which the
job is suspended.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dist_cifar.distributed.agreement import Facts, compare_through, require_same
from dist_cifar.distributed.dissemination import gather_known, start_shift, wait_for
from dist_cifar.distributed.failure_detector import (
    Failure,
    FailureDetector,
    Position,
    describe_error,
    odd_ranks,
)
from dist_cifar.distributed.launch_env import DistEnv
from dist_cifar.distributed.processes import own_identity
from dist_cifar.distributed.rendezvous import open_store
from dist_cifar.distributed.timeouts import Timeouts
from dist_cifar.distributed.wait_clock import WaitClock
from dist_cifar.errors import LaunchError, TrainingError, UserError


@dataclass(frozen=True, kw_only=True)
class Group:
    """Some ranks that exchange tensors, seen from one of them."""

    ranks: list[int]
    """In the order in which they exchange."""
    place: int
    """Where this rank is in it."""
    handle: dist.ProcessGroup | None
    """None for all ranks."""


class Communicator:
    """The ranks of one job. `close` ends the process group."""

    def __init__(
        self,
        env: DistEnv,
        *,
        device: torch.device,
        timeout_seconds: float,
        facts: Facts | None = None,
        store: dist.Store | None = None,
        met: Callable[[], None] = lambda: None,
    ) -> None:
        """Without `store` the ranks connect to one that rank 0 hosts (`rendezvous`), and `met` is called when all have.

        `timeout_seconds` is `run.timeout_seconds`. `facts` must be the same on all ranks. Raises `LaunchError` if not
        all ranks connect, or if they are not to run the same thing.
        """
        self.rank, self.world_size, self.device = env.rank, env.world_size, device
        self.identities = [own_identity()]
        self._position = Position()
        self._control: dist.ProcessGroup | None = None
        self._background: Future[Any] | None = None
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="shift")
        self._clock: WaitClock | None = None
        self._reads: WaitClock | None = None
        self._read: object = None
        """Stands for the read of the device that is under way; None where none is."""
        self._env, self._timeouts = env, Timeouts(run_seconds=timeout_seconds)
        if env.world_size == 1:
            return
        os.environ.update(env.variables(gpu=device.index))  # Accelerate reads them
        control_timeout = datetime.timedelta(seconds=self._timeouts.control_seconds)
        self._group_timeout = self._message_timeout = control_timeout
        if device.type == "cuda":
            self._group_timeout = datetime.timedelta(seconds=self._timeouts.nccl_seconds)
        try:
            if store is None:
                store = open_store(env, self._timeouts, setting="run.timeout_seconds")
                store.set_timeout(control_timeout)
                met()
            self._compare_start(store, facts or {})
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=store,
                rank=env.rank,
                world_size=env.world_size,
                timeout=self._group_timeout,
                device_id=device if device.type == "cuda" else None,
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
        # A connection of its own: while one thread waits in a connection, no other thread is served by it.
        self._failure_store = dist.PrefixStore("failures", store).clone()

    def _compare_start(self, store: dist.Store, facts: Facts) -> None:
        """Raises `LaunchError` if the ranks' facts or kinds of devices differ, or two ranks have one GPU.

        Through the store, because ranks on GPUs and ranks on CPUs make no process group.
        """
        compare_through(store, {"run.device": self.device.type, **facts}, rank=self.rank, world_size=self.world_size)
        if self.device.type == "cuda":
            gpu = str(torch.cuda.get_device_properties(self.device).uuid)
            if store.add(f"gpu/{gpu}", 1) > 1:
                raise LaunchError(
                    f"launch: rank {self.rank} would share its GPU (number {self.device.index} for it, {gpu}) with"
                    " another rank of this job; start one rank for each GPU, or give each rank one of its own in"
                    " CUDA_VISIBLE_DEVICES"
                )

    @property
    def step(self) -> int | None:
        """The step that this rank is in; None before the first one."""
        return self._position.step

    def watch(self, end: Callable[[Failure], None]) -> FailureDetector | None:
        """Starts to watch for ranks that fail; returns None if this rank is the only one. Not a collective.

        `end` must end this process; it is called on another thread if a rank has failed and the main thread is stuck.
        """
        if self._control is None:
            return None
        tick_seconds = 2 * self._timeouts.poll_seconds
        self._reads = WaitClock(threading.get_ident(), tick_seconds=tick_seconds)
        if self.device.type == "cpu":  # NCCL's watchdog counts all time, and gloo has to give up before it
            self._clock = WaitClock(threading.get_ident(), tick_seconds=tick_seconds)
            self._group_timeout = datetime.timedelta(seconds=self._timeouts.longest_pause_seconds)
            self._message_timeout = self._group_timeout
            for group in (self._control, dist.group.WORLD):
                backend: Any = group._get_backend(self.device)  # type: ignore[union-attr]
                backend = getattr(backend, "wrapped_pg", backend)  # with TORCH_DISTRIBUTED_DEBUG=DETAIL
                backend._set_default_timeout(self._group_timeout)
        return FailureDetector(
            self._failure_store,
            rank=self.rank,
            identities=self.identities,
            position=lambda: self._position,
            broken=self._broken,
            end=end,
            timeouts=self._timeouts,
        )

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A `with` block that waits for what the device computes: if that never ends, the failure detector says so."""
        self._read = object()
        try:
            yield
        finally:
            self._read = None

    def _broken(self, is_roll_call: bool) -> str | None:
        """The message of a collective that has waited too long, or that has failed in the background while the main
        thread was busy, or stuck in one of the GPU's. When the roll is called, one that just waits has failed too."""
        work = self._background
        if work is not None and work.done():
            error = work.exception()
            if error is not None:
                return describe_error(error)
            work = None
        read = self._reads.look(None, self._read)[1] if self._reads is not None else 0.0
        if read > self._timeouts.control_seconds:
            return f"it has waited {read:.3g} s for what its device computes in step {self.step}"
        if self._clock is None:
            return None
        # A barrier has its own timeout.
        at = None if self._position.name == "barrier" else self._position
        waited, background = self._clock.look(at, work)
        limit = self._timeouts.control_seconds
        if background > limit or waited > (min(limit, self._timeouts.waiting_seconds) if is_roll_call else limit):
            return f"it has waited {max(waited, background):.3g} s for the other ranks in {self._position}"
        return None

    def _enter(self, name: str, step: int | None = None) -> None:
        """Counts a collective; with `step`, the rank is in that step from now on."""
        position = self._position
        self._position = Position(count=position.count + 1, name=name, step=position.step if step is None else step)

    def barrier(self) -> None:
        """Waits, for up to an hour, until every rank has come here; an error names the ranks that have not."""
        self._enter("barrier")
        if self._control is not None:
            dist.monitored_barrier(
                self._control, timeout=datetime.timedelta(seconds=self._timeouts.setup_seconds), wait_all_ranks=True
            )

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums the ranks' tensors in place, over the group of their device; returns `tensor`.

        The control group checks first that all ranks are here: gloo aborts the process in which sizes do not match,
        which need not be the one that went wrong, and a GPU's collective would wait for a missing rank without the
        control group's timeout.
        """
        self.all_gather_object(None, "sum")
        if self._control is not None:
            dist.all_reduce(tensor, group=self._control if tensor.device.type == "cpu" else None)
        return tensor

    def start_shift(self, received: torch.Tensor, sent: torch.Tensor, distance: int, name: str, *, step: int) -> None:
        """Begins to send a CPU tensor to the rank `distance` places further on, and to receive one from the rank as far
        back, in the background; `wait_for_shift` ends it.

        It is the collective `name` of `step`. While the main thread is busy, the failure detector looks at whether it
        has failed.
        """
        self._enter(name, step)
        if self._control is None:
            return
        works = start_shift(received, sent, distance, self.rank, self.world_size, self._control)
        # Of a message gloo learns that it has failed when somebody waits for it.
        self._background = self._waiter.submit(wait_for, works, self._message_timeout)

    def wait_for_shift(self) -> None:
        """Waits for the end of what `start_shift` has begun. Raises what went wrong."""
        if self._background is not None:
            self._background.result()

    def time_all_reduces(self, size_bytes: int, repeats: int) -> list[float]:
        """The seconds that each of `repeats` all-reduces of a tensor of `size_bytes` takes this rank."""
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

    def group(self, groups: Sequence[Sequence[int]]) -> Group:
        """Makes groups of ranks, of which every rank is in one, and returns this rank's."""
        self._enter("group")
        own = next(list(ranks) for ranks in groups if self.rank in ranks)
        handle = None
        if len(groups) > 1 and self._control is not None:
            for ranks in groups:  # all ranks make all groups
                made = dist.new_group(list(ranks), timeout=self._group_timeout)
                if self.rank in ranks:
                    assert isinstance(made, dist.ProcessGroup)
                    handle = made
        return Group(ranks=own, place=own.index(self.rank), handle=handle)

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor, counts: list[int], group: Group) -> None:
        """Sends part i of `sent` to the rank at place i of the group, and receives part i of `received` from it. Both
        are flat; every part that it sends has `counts[i]` elements."""
        own = [counts[group.place]] * len(group.ranks)
        dist.all_to_all_single(received, sent, counts, own, group=group.handle)

    def all_gather(self, gathered: torch.Tensor, part: torch.Tensor, group: Group) -> None:
        """Gathers the flat `part` of every rank of the group, in their order, into the flat `gathered`."""
        if gathered.device.type != "cpu":
            dist.all_gather_into_tensor(gathered, part, group=group.handle)
            return
        # gloo's own all-gather gathers into new memory and copies that: messages take a third of its processor time.
        parts, messages, size = gathered.chunk(len(group.ranks)), [], len(group.ranks)
        for distance in range(1, size):
            target, source = (group.place + distance) % size, (group.place - distance) % size
            messages.append(dist.P2POp(dist.isend, part, group.ranks[target], group.handle))
            messages.append(dist.P2POp(dist.irecv, parts[source], group.ranks[source], group.handle))
        works = dist.batch_isend_irecv(messages)
        parts[group.place].copy_(part)
        wait_for(works, self._group_timeout)

    def all_gather_object(self, value: Any, name: str = "gather") -> list[Any]:
        """Returns every rank's `value` (anything that pickles), in the order of the ranks, on every rank.

        Raises `TrainingError`, on every rank, if not all of them are in the collective `name`.
        """
        self._enter(name)
        if self._control is None:
            return [value]
        own = self._position, value
        known = gather_known(own, self.rank, self.world_size, self._control, self._message_timeout)
        positions = [position for position, _ in known]
        self._assert_no_odd_ranks("the order of the collectives", positions, positions)
        return [value for _, value in known]

    def broadcast(self, value: Any) -> Any:
        """Returns rank 0's `value` (anything that pickles) on every rank."""
        self._enter("broadcast")
        if self._control is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._control)
        return values[0]

    def run_on_rank0(self, function: Callable[[], Any]) -> Any:
        """Calls `function` on rank 0 and returns its result on every rank, or raises its `UserError` on every rank."""
        outcome: tuple[Any, UserError | None] = (None, None)
        if self.rank == 0:
            try:
                outcome = function(), None
            except UserError as raised:
                outcome = None, raised
        value, error = self.broadcast(outcome)
        if error is not None:
            raise error
        return value

    def broadcast_tensors(self, tensors: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """Returns rank 0's CPU tensors on every rank; the other ranks' argument is ignored."""
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
        self._assert_no_odd_ranks(what, texts, texts)

    def require_same(self, facts: Facts) -> None:
        """Raises `LaunchError`, on every rank, if the ranks' `facts` differ."""
        require_same(self.all_gather_object(dict(facts), "compare"))

    def assert_tensors_equal_across_ranks(
        self, what: str, tensors: Mapping[str, torch.Tensor], digest: Callable[[Mapping[str, torch.Tensor]], str]
    ) -> None:
        """Does the same for tensors, compared by their digest; the error names the first tensor that differs."""
        digests = self.all_gather_object(digest(tensors), what)
        if len(set(digests)) > 1:
            parts = self.all_gather_object(
                {name: digest({name: tensor}) for name, tensor in tensors.items()}, f"{what}, each"
            )
            name = next(name for name in parts[0] if len({part.get(name) for part in parts}) > 1)
            self._assert_no_odd_ranks(f"{what} ({name}, by its SHA-256)", [part.get(name) for part in parts], digests)

    def _assert_no_odd_ranks(self, what: str, found: Sequence[Any], compared: Sequence[Any]) -> None:
        """Raises `TrainingError` if the ranks' values of `compared` differ; the message shows those of `found`."""
        odd = odd_ranks(compared)
        if not odd:
            return
        if len(odd) == self.world_size:
            values = "; ".join(f"rank {rank} has {value}" for rank, value in enumerate(found))
            raise TrainingError(f"{what} differs between ranks, and no value is that of most: {values}")
        most = next(rank for rank in range(self.world_size) if rank not in odd)
        raise TrainingError(
            f"{what} differs between ranks: rank {odd[0]} has {found[odd[0]]}, most have {found[most]} (ranks that"
            f" differ from most: {odd}); the run cannot continue",
            rank=odd[0],
        )

    def require_process_group(self) -> None:
        """Makes a process group of this rank alone, which some libraries need, unless there is one."""
        if not dist.is_initialized():
            os.environ.update(self._env.variables(gpu=self.device.index))
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

    def close(self) -> None:
        """Ends the process group."""
        self._waiter.shutdown()
        if dist.is_initialized():
            dist.destroy_process_group()
