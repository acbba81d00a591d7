"""The collectives that the trainer uses beside those of the strategy.

Contract: every method but the properties is a collective: all ranks call it, in the same order. With one rank each is
the identity and no process group exists. Objects and small tensors go over a gloo group on the CPU, so no call waits
for a GPU unless it is given a GPU's tensor.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from dist_cifar.distributed.env import DistEnv
from dist_cifar.errors import LaunchError, TrainingError, UserError

_SETUP_TIMEOUT_SECONDS = 3600.0
"""How long ranks wait for the one that downloads or decodes the data set for its node."""


class Communicator:
    """One job's ranks. `close` ends the process group if this object started it."""

    def __init__(self, env: DistEnv, *, device: torch.device, timeout_seconds: float) -> None:
        self.rank, self.world_size, self.device = env.rank, env.world_size, device
        self._owner = False
        self._control: dist.ProcessGroup | None = None
        if env.world_size == 1:
            return
        timeout = datetime.timedelta(seconds=timeout_seconds)
        if not dist.is_initialized():
            os.environ.update(env.variables())  # Accelerate and env:// read them
            backend = "nccl" if device.type == "cuda" else "gloo"
            device_id = device if device.type == "cuda" else None
            try:
                dist.init_process_group(backend, timeout=timeout, device_id=device_id)
            except (RuntimeError, OSError) as error:
                raise LaunchError(
                    f"launch: rank {env.rank} of {env.world_size} on {socket.gethostname()} cannot reach the others at"
                    f" {env.master_addr}:{env.master_port} ({' '.join(str(error).split())[:200]}); is the address"
                    " right and the port free?"
                ) from error
            self._owner = True
        if dist.get_world_size() != env.world_size or dist.get_rank() != env.rank:
            raise LaunchError(
                f"launch: the launcher says rank {env.rank} of {env.world_size}, the process group says rank"
                f" {dist.get_rank()} of {dist.get_world_size()}"
            )
        self._control = dist.new_group(backend="gloo", timeout=timeout)

    def wait_for_all(self) -> None:
        """Waits, for up to an hour, until every rank is here; an error names the ranks that are not."""
        if self._control is not None:
            dist.monitored_barrier(
                self._control, timeout=datetime.timedelta(seconds=_SETUP_TIMEOUT_SECONDS), wait_all_ranks=True
            )

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's tensor, in place, over the group of the tensor's device."""
        if self._control is not None:
            dist.all_reduce(tensor, group=self._control if tensor.device.type == "cpu" else None)
        return tensor

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

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (anything that pickles), in the order of the ranks, on every rank."""
        if self._control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` (anything that pickles) on every rank."""
        if self._control is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._control)
        return values[0]

    def on_first_rank(self, function: Callable[[], Any]) -> Any:
        """What `function` returns on rank 0, on every rank; a `UserError` of it is raised on every rank."""
        outcome: tuple[Any, UserError | None] = (None, None)
        if self.rank == 0:
            try:
                outcome = function(), None
            except UserError as error:
                outcome = None, error
        value, error = self.broadcast(outcome)
        if error is not None:
            raise error
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

    def require_equal(self, what: str, value: Any) -> None:
        """Raises `TrainingError`, on every rank, if ranks hold different values (anything that JSON can write)."""
        texts = self.gather(json.dumps(value, sort_keys=True))
        different = [rank for rank, text in enumerate(texts) if text != texts[0]]
        if different:
            raise TrainingError(
                f"{what} differs between ranks: rank 0 has {texts[0]}, rank {different[0]} has {texts[different[0]]}"
                f" (ranks that differ from rank 0: {different}); the run cannot go on"
            )

    def close(self) -> None:
        """Ends the process group."""
        if self._owner:
            dist.destroy_process_group()


class Vote:
    """Ranks agree on yes-or-no questions: `cast` before a step, `result` after it: the exchange hides behind it."""

    def __init__(self, communicator: Communicator, questions: int) -> None:
        self._group = communicator._control
        self._flags = torch.zeros(questions)
        self._work: dist.Work | None = None

    def cast(self, *answers: bool) -> None:
        """This rank's answers."""
        self._flags.copy_(torch.tensor(answers))
        if self._group is not None:
            self._work = dist.all_reduce(self._flags, group=self._group, async_op=True)

    def result(self) -> list[bool]:
        """For each question, whether any rank says yes; the same on every rank."""
        if self._work is not None:
            self._work.wait()
        return (self._flags > 0).tolist()
