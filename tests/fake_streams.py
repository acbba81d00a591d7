"""Streams of a GPU that is not there: what runs in which, and whether one touches what another may still use.

`with watched() as streams:` replaces torch's streams and events by ones that only keep vector clocks: each stream knows
up to which of their operations it has waited for the others. Every operator that torch dispatches belongs to the stream
that is current in its thread. Where it reads or overwrites what another stream has written, or overwrites what another
has read, without having waited for that, there is a race. What an allocator does with freed memory is not seen.
Source: Lamport, "Time, clocks, and the ordering of events in a distributed system", 1978.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_VIEWS = ("detach", "alias", "as_strided", "_unsafe_view")


class Stream:
    """A stream that runs nothing."""

    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.priority = priority
        self.seen: dict[Stream, int] = {self: 0}
        """Of each stream, the number of its last operation that this one has waited for; of itself, how many it has."""

    def wait_stream(self, other: Stream) -> None:
        self._take_over(other.seen)

    def record_event(self) -> Event:
        return Event(self.seen)

    def wait_event(self, event: Event) -> None:
        self._take_over(event.seen)

    def _take_over(self, seen: dict[Stream, int]) -> None:
        for stream, count in seen.items():
            self.seen[stream] = max(self.seen.get(stream, 0), count)


class Event:
    """A point in a stream."""

    def __init__(self, seen: dict[Stream, int]) -> None:
        self.seen = dict(seen)


class _Memory:
    """What is known of a storage."""

    def __init__(self) -> None:
        self.written: tuple[Stream, int] | None = None
        self.read: dict[Stream, int] = {}


class _Watch(TorchDispatchMode):
    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self._streams = streams

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if function.is_view or name in _VIEWS:
            return out
        read, written = [], []
        for i, argument in enumerate(function._schema.arguments):
            value = args[i] if i < len(args) else (kwargs or {}).get(argument.name)
            tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            (written if is_written else read).extend(tensors)
        given = {tensor.untyped_storage()._cdata for tensor in (*read, *written)}
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        made = [tensor for tensor in made if tensor.untyped_storage()._cdata not in given]
        self._streams.note(name, read, written, made)
        return out


class Streams:
    """The streams of a process and the memory that they use."""

    def __init__(self) -> None:
        self.races: list[str] = []
        self.main = Stream()
        self._current = threading.local()
        self._memory: dict[int, _Memory] = {}
        self._lock = threading.Lock()

    def current(self, device: object = None) -> Stream:
        return getattr(self._current, "stream", self.main)

    @contextmanager
    def entered(self, stream: Stream) -> Iterator[None]:
        before = self.current()
        self._current.stream = stream
        try:
            with _Watch(self):  # in whichever thread
                yield
        finally:
            self._current.stream = before

    def note(self, name: str, read: list[torch.Tensor], written: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        """An operator of the current stream has used these tensors; of what it has made nothing is known before."""
        with self._lock:
            stream = self.current()
            stream.seen[stream] += 1
            now = stream.seen[stream]
            for tensor in made:
                self._memory.pop(tensor.untyped_storage()._cdata, None)
            for tensor in read:
                memory = self._of(tensor)
                self._check(f"{name} reads what is being written", stream, memory.written)
                memory.read[stream] = now
            for tensor in (*written, *made):
                memory = self._of(tensor)
                self._check(f"{name} overwrites what is being written", stream, memory.written)
                for other in memory.read.items():
                    self._check(f"{name} overwrites what is being read", stream, other)
                memory.written, memory.read = (stream, now), {}

    def _of(self, tensor: torch.Tensor) -> _Memory:
        return self._memory.setdefault(tensor.untyped_storage()._cdata, _Memory())

    def _check(self, what: str, stream: Stream, use: tuple[Stream, int] | None) -> None:
        if use is not None and use[0] is not stream and stream.seen.get(use[0], 0) < use[1]:
            self.races.append(what)


@contextmanager
def watched() -> Iterator[Streams]:
    """Fake streams instead of torch's, in a `with` block, whose operators are watched."""
    streams = Streams()
    with ExitStack() as stack:
        for name, fake in (("Stream", Stream), ("current_stream", streams.current), ("stream", streams.entered)):
            stack.enter_context(mock.patch.object(torch.cuda, name, fake))
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", lambda tensor, stream: None))
        stack.enter_context(_Watch(streams))
        yield streams
