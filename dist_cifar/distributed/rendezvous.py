"""The rendezvous of a job's ranks: they connect to a store that rank 0 hosts and only ranks of this start can find.

Contract: rank 0 hosts a TCPStore on a free port, and tells that port to the ranks that connect to its rendezvous
server. The server listens on the first free one of a few ports that follow from the job (`candidate_ports`). A rank
introduces itself by a line with the job's key and its rank. A line with another key gets no answer. Ranks of this job
are held until all of them have connected, and then all are answered at once. So a port that is taken costs nothing,
jobs do not mix whatever ports they share, and a rank 0 of an earlier start admits nobody: its server is closed, or it
waits for ranks that are gone. At the end of the wait it is known which ranks are missing.

The launcher's own store, through which torch's `env://` connects ranks, is not used: torchrun's outlives a start of the
job with all that is in it, so restarted ranks look for peers that are gone. With torch 2.14.1, 4 of 13 jobs of
`torchrun --standalone --max-restarts 3` (two gloo ranks, one killed) restarted cleanly; the others failed once more or
hung. It was 12 of 12 with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, but whoever starts torchrun would have to set that.
Under srun and mpirun there is no such store, and the ports that `env://` takes may be taken by others.

Every line of the protocol is JSON. A client sends `[_MAGIC, job, world_size, rank]`, and `_GONE` when its wait ends.
Rank 0 sends `_HOLD` at once and then every second, and at last `[_MAGIC, port of the store, address]`, where the
address is that of rank 0's node as ranks on other nodes see it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import selectors
import socket
import time
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from dist_cifar import stopping
from dist_cifar.distributed.interfaces import lead_to_other_nodes, require_existing, stay_on_node
from dist_cifar.distributed.launch_env import DistEnv, candidate_ports
from dist_cifar.distributed.timeouts import Timeouts
from dist_cifar.errors import EXIT_SAVED, LaunchError

_MAGIC = "dist_cifar 1"
_HOLD = b"[]\n"
"""Rank 0 has accepted the rank and waits for others."""
_GONE = b"[0]\n"
"""The rank disconnects because its own wait is over."""
_POLL_SECONDS, _RECEIVE_SECONDS = 0.1, 0.2
_LONGEST_LINE_BYTES = 1024


def open_store(env: DistEnv, timeouts: Timeouts, *, setting: str = "") -> dist.Store:
    """Opens a new store; all ranks of the job call it, and rank 0's process must outlive the store's use.

    It also chooses the interface of gloo: loopback for one node; for several, unless it is set, the one through which
    the other nodes are reached: gloo would take the address of the hostname, on many hosts 127.0.1.1.
    Raises `LaunchError` if not all ranks connect within `timeouts.run_seconds` (`setting` is the config field that it
    comes from), or with exit code 75 if a signal asks to stop: nothing was done that could be lost.
    """
    if env.has_several_nodes:
        require_existing(os.environ)
    else:
        stay_on_node(os.environ)
    timeout, wait = datetime.timedelta(seconds=timeouts.run_seconds), _Wait(env, timeouts, setting)
    if env.rank == 0:
        store = _host_store(env, timeout)
        # Only now: torch looks up names for its log, which takes 5 s where a name server is lost.
        with RendezvousServer(env) as server:
            address = server.wait_for_ranks(store.port, wait)
    else:
        address, port, own = _connect(env, wait)
        # The answer proves that the address is right and that the store is there.
        store = dist.TCPStore(env.master_addr, port, None, False, timeout=timeout, wait_for_workers=False)
        address = address if _is_loopback(own) else own
    if env.has_several_nodes and not _is_loopback(address):
        lead_to_other_nodes(address, os.environ)
    return store


def _host_store(env: DistEnv, timeout: datetime.timedelta) -> dist.TCPStore:
    """A store on a free port, which nobody outside this node can reach if all ranks are on it."""
    listener = _create_server(env, 0)
    port = listener.getsockname()[1]
    # torch closes what it is given, and alone it would listen on every interface.
    descriptor = listener.detach()
    return dist.TCPStore(
        "127.0.0.1", port, None, True, timeout=timeout, wait_for_workers=False, master_listen_fd=descriptor
    )


def _create_server(env: DistEnv, port: int) -> socket.socket:
    """Listens at the port: on loopback, or for ranks on other nodes on every interface."""
    if not env.has_several_nodes:
        return socket.create_server(("127.0.0.1", port), backlog=1024)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=1024)


class _Wait:
    """The time that is left to connect, and the error when it is over."""

    def __init__(self, env: DistEnv, timeouts: Timeouts, setting: str) -> None:
        self.timeouts = timeouts
        self._who = f"rank {env.rank} of {env.world_size}"
        self._deadline = time.monotonic() + timeouts.run_seconds
        self._waited = f"{timeouts.run_seconds:g} s" + (f" ({setting})" if setting else "")

    def is_over(self) -> bool:
        """Whether to give up. Raises `LaunchError` after a signal to stop."""
        if stopping.stop_requested():
            error = LaunchError(
                f"launch: {self._who} was stopped by {stopping.first_received()} before all ranks had connected; run it"
                " again"
            )
            error.exit_code = EXIT_SAVED
            raise error
        return time.monotonic() > self._deadline

    def error(self, what: str) -> LaunchError:
        """The error of a rank that has waited in vain for `what`."""
        return LaunchError(f"launch: {self._who} has waited {self._waited} for {what}")


# --- rank 0 ------------------------------------------------------------------------------------------------------


class _Peer:
    """A connection to the rendezvous server."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection, self.received, self.since = connection, b"", time.monotonic()
        self.rank: int | None = None
        """None until it has introduced itself with the job's key."""


class RendezvousServer:
    """The server that rank 0 runs until all ranks have connected. Leaving the `with` closes it and its connections."""

    def __init__(self, env: DistEnv) -> None:
        """Raises `LaunchError` if all ports are taken."""
        self._env = env
        self._listener = _listen(env)
        self._peers: dict[socket.socket, _Peer] = {}
        self._gone: set[int] = set()
        """Ranks that had connected when their own wait ended, which may be just before that of rank 0."""
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    def __enter__(self) -> RendezvousServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        self._listener.close()
        for connection in self._peers:
            connection.close()

    def wait_for_ranks(self, store_port: int, wait: _Wait) -> str:
        """Waits for all ranks and tells them the store's port; returns this node's address, as other nodes see it."""
        held_at = time.monotonic()
        while missing := self._missing():
            if wait.is_over():
                raise wait.error(
                    f"ranks that have not connected: {_listed(set(missing) - self._gone or missing)}; it listens on"
                    f" {socket.gethostname()}, port {self._listener.getsockname()[1]}; look at how they ended, and"
                    f" whether they can reach it at {self._env.master_addr}"
                )
            for key, _ in self._selector.select(timeout=_POLL_SECONDS):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._receive(self._peers[key.fileobj])  # type: ignore[index]
            now = time.monotonic()
            if now - held_at > wait.timeouts.hold_seconds:
                held_at = now
                for peer in list(self._peers.values()):
                    if peer.rank is not None:
                        self._send(peer, _HOLD)
                    elif now - peer.since > wait.timeouts.silence_seconds:
                        self._drop(peer)
        address = self._address()
        for peer in list(self._peers.values()):
            if peer.rank is not None:
                self._send(peer, json.dumps([_MAGIC, store_port, address]).encode() + b"\n")
        return address

    def _missing(self) -> list[int]:
        """The ranks that are not connected."""
        connected = {peer.rank for peer in self._peers.values()}
        return [rank for rank in range(1, self._env.world_size) if rank not in connected]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it disconnected before it was accepted
            connection, _ = self._listener.accept()
            self._peers[connection] = _Peer(connection)
            self._selector.register(connection, selectors.EVENT_READ)

    def _receive(self, peer: _Peer) -> None:
        try:
            data = peer.connection.recv(_LONGEST_LINE_BYTES)
        except OSError:
            data = b""
        if peer.rank is not None and data == _GONE:
            self._gone.add(peer.rank)
        peer.received += data
        if not data or peer.rank is not None or len(peer.received) > _LONGEST_LINE_BYTES:
            self._drop(peer)  # its process is gone, or it is not a rank of this job
        elif b"\n" in peer.received:
            rank = self._rank_of(peer.received)
            if rank in self._missing():
                peer.rank = rank
                self._send(peer, _HOLD)
            else:
                self._drop(peer)

    def _rank_of(self, line: bytes) -> int | None:
        """The rank in a line by which a peer introduces itself; None if it is not of this job and start."""
        values = _parse(line)
        is_ours = values[:3] == _introduction(self._env)[:3] and len(values) == 4
        return values[3] if is_ours else None

    def _send(self, peer: _Peer, line: bytes) -> None:
        try:
            peer.connection.sendall(line)
        except OSError:
            self._drop(peer)

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        del self._peers[peer.connection]
        peer.connection.close()

    def _address(self) -> str:
        """The address remote ranks connected to; loopback on a single node."""
        found = [_address_of(connection) for connection in self._peers]
        return next((address for address in found if not _is_loopback(address)), "127.0.0.1")


def _listen(env: DistEnv) -> socket.socket:
    """Listens on the first free one of the job's ports."""
    ports = candidate_ports(env.master_port)
    for port in ports:
        with contextlib.suppress(OSError):
            return _create_server(env, port)
    raise LaunchError(
        f"launch: rank 0 can listen on none of the ports {_listed(ports)} of {socket.gethostname()}: all are taken; set"
        " another MASTER_PORT, from which they follow"
    )


# --- the other ranks ---------------------------------------------------------------------------------------------


def _connect(env: DistEnv, wait: _Wait) -> tuple[str, int, str]:
    """Finds rank 0; returns its address and the store's port, as it tells them, and this rank's address towards it."""
    ports, seen = candidate_ports(env.master_port), "nobody who knows this job answers"
    while True:
        for port in ports:
            if wait.is_over():
                raise wait.error(
                    f"rank 0 at {env.master_addr}, ports {_listed(ports)}: {seen}; look at how rank 0 ended, and"
                    " whether MASTER_ADDR is its node"
                )
            with (
                contextlib.suppress(OSError),
                socket.create_connection((env.master_addr, port), timeout=wait.timeouts.connect_seconds) as connection,
            ):
                connection.sendall(json.dumps(_introduction(env)).encode() + b"\n")
                for line in _lines(connection, wait):
                    if line + b"\n" == _HOLD:
                        seen = f"it listens on port {port} and waits for other ranks"
                        continue
                    match _parse(line):
                        case [str(magic), int(store_port), str(address)] if magic == _MAGIC:
                            return address, store_port, _address_of(connection)
                    break  # it is not rank 0 of this job
                if wait.is_over():
                    connection.sendall(_GONE)
        time.sleep(_POLL_SECONDS)


def _lines(connection: socket.socket, wait: _Wait) -> Iterable[bytes]:
    """Yields lines as they arrive, until the other side closes, is silent, or sends a line longer than any of ours."""
    rest, heard_at = b"", time.monotonic()
    connection.settimeout(_RECEIVE_SECONDS)
    silence_seconds = wait.timeouts.silence_seconds
    while len(rest) <= _LONGEST_LINE_BYTES and time.monotonic() - heard_at < silence_seconds and not wait.is_over():
        with contextlib.suppress(TimeoutError):
            data = connection.recv(_LONGEST_LINE_BYTES)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            if lines:
                heard_at = time.monotonic()
            yield from lines


# --- the protocol ------------------------------------------------------------------------------------------------


def _introduction(env: DistEnv) -> list[object]:
    """The first line that a rank sends, as a list."""
    return [_MAGIC, env.job, env.world_size, env.rank]


def _parse(line: bytes) -> list[Any]:
    """The list that a line holds as JSON; an empty one if it holds anything else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return []
    return value if isinstance(value, list) else []


def _listed(numbers: Iterable[int]) -> str:
    """The numbers in order, with ranges: `1, 4-7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


# --- addresses ---------------------------------------------------------------------------------------------------


def _address_of(connection: socket.socket) -> str:
    """The address of this side of the connection; an IPv4 address is not written as an IPv6 one."""
    return connection.getsockname()[0].removeprefix("::ffff:")


def _is_loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")
