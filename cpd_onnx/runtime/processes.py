"""Processes that divide the batches of one run: those of a launcher such as torchrun, or workers of an executor.

All others connect to the first process of the run, which passes on what each sends: workers of an executor where the
first process has submitted their jobs, those of a launcher where torch has told them its address.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

from cpd_onnx.errors import CpdError
from cpd_onnx.runtime.sessions import custom_operators
from cpd_onnx.runtime.shards import Group, sharing

_SECONDS = 300.0
"""Number of seconds within which all processes must have started (heuristic)."""
_INTERVAL = 0.2
"""Number of seconds between two looks at what the workers do (heuristic)."""
_ENDING_SECONDS = 5.0
"""Number of seconds to wait for the error of a worker whose connection is broken (heuristic)."""
_HERE = "127.0.0.1"
"""Address of this computer that others cannot reach."""
_KEY_BYTES = 32
"""Number of bytes of the key by which a worker proves that it belongs to the run."""


class _EndedError(CpdError):
    """Another process of the run has ended before this one."""


@dataclass(frozen=True)
class Place:
    """Where a worker finds its run.

    Attributes:
        hosts: Names of the first process's computer, of which one can be reached.
        port: Port on which the first process listens.
        key: Key that both sides prove to know.
        rank: Rank of the worker.
        size: Number of processes.
    """

    hosts: tuple[str, ...]
    port: int
    key: bytes
    rank: int
    size: int


@dataclass(frozen=True)
class _First:
    """The first process, with connections to the others by rank."""

    others: Sequence[Connection]
    rank: int = 0

    @property
    def size(self) -> int:
        """Number of processes."""
        return 1 + len(self.others)

    def exchanged(self, value: Any) -> list[Any]:
        """Return the values that all processes give, by rank, and send them to the others."""
        with _told("another process of the run has ended"):
            values = [value, *(other.recv() for other in self.others)]
            for other in self.others:
                other.send(values)
        return values


@dataclass(frozen=True)
class _Worker:
    """A worker, with a connection to the first process."""

    first: Connection
    rank: int
    size: int

    def exchanged(self, value: Any) -> list[Any]:
        """Return the values that all processes give, by rank."""
        with _told("the first process of the run has ended"):
            self.first.send(value)
            values: list[Any] = self.first.recv()
        return values


@contextmanager
def working(executor: Executor, size: int, job: Callable[[Place], None], *, is_local: bool) -> Iterator[Group]:
    """Share batches with workers of an executor, each of which carries out a job that does the same as this process.

    Args:
        executor: Runs the jobs, all at the same time.
        size: Number of processes with this one.
        job: Called in a worker; it takes part by `joined`.
        is_local: Whether all workers run on this computer, which then listens to no other.

    Raises CpdError if the workers do not start, and the error of a job that fails.
    """
    jobs: list[Future[None]] = []

    def submit(place: Place) -> None:
        jobs.extend(executor.submit(job, replace(place, rank=rank)) for rank in range(1, size))

    def check() -> None:
        for each in jobs:
            if each.done():
                each.result()

    try:
        with leading(size, submit, check, is_local=is_local) as group:
            yield group
        for each in jobs:
            each.result()
    except _EndedError:
        wait(jobs, _ENDING_SECONDS, FIRST_EXCEPTION)
        check()  # which says more
        raise
    finally:
        for each in jobs:
            each.cancel()  # one that has not started; the others have ended, or do so with their connection


@contextmanager
def leading(
    size: int, invite: Callable[[Place], object], check: Callable[[], None] = lambda: None, *, is_local: bool
) -> Iterator[Group]:
    """Share batches with workers that connect to this process, the first of a run.

    Args:
        size: Number of processes with this one.
        invite: Called with the place that the workers are to join, each with its own rank.
        check: Called while they are awaited, and raises an error if one has failed.
        is_local: Whether all workers run on this computer, which then listens to no other.

    Raises CpdError if the workers do not connect.
    """
    hosts = (_HERE,) if is_local else (os.environ.get("MASTER_ADDR", ""), socket.gethostname(), socket.getfqdn(), _HERE)
    key, others = secrets.token_bytes(_KEY_BYTES), dict[int, Connection]()
    try:
        with socket.create_server((_HERE if is_local else "", 0), backlog=size) as server:
            invite(Place(tuple(filter(None, hosts)), server.getsockname()[1], key, 0, size))
            others.update(_connecting(server, size - 1, key, check))
        group = _First([others[rank] for rank in sorted(others)])
        with sharing(group):
            yield group
    finally:
        for other in others.values():
            other.close()


def _connecting(
    server: socket.socket, number: int, key: bytes, check: Callable[[], None]
) -> Iterator[tuple[int, Connection]]:
    """Yield the rank of each worker and the connection to it; raises CpdError if one does not connect."""
    count, until = 0, time.monotonic() + _SECONDS
    server.settimeout(_INTERVAL)
    while count < number:
        try:
            accepted, _ = server.accept()
        except TimeoutError:
            check()
            if time.monotonic() > until:
                missing = f"only {count} of {number} further processes have started within {_SECONDS:.0f} s"
                raise CpdError(f"{missing}: all must run at the same time") from None
            continue
        connection = _prompt(accepted)
        try:
            deliver_challenge(connection, key)
            answer_challenge(connection, key)
            rank = connection.recv()
        except (AuthenticationError, EOFError, OSError):  # another program has tried the port
            connection.close()
            continue
        count += 1
        yield rank, connection


@contextmanager
def joined(place: Place) -> Iterator[Group]:
    """Share batches with the run at a place, in one of its workers."""
    with _told("the first process of the run cannot be reached"):
        connection = _reached(place)
        connection.send(place.rank)
    with connection:
        group = _Worker(connection, place.rank, place.size)
        with sharing(group):
            yield group


def _reached(place: Place) -> Connection:
    """Return a connection to the first process by the first of its names that leads to it."""
    *others, last = place.hosts
    for host in others:
        with suppress(OSError, EOFError, AuthenticationError):
            return _connected(host, place)
    return _connected(last, place)


def _connected(host: str, place: Place) -> Connection:
    connection = _prompt(socket.create_connection((host, place.port)))
    try:
        answer_challenge(connection, place.key)
        deliver_challenge(connection, place.key)
    except BaseException:
        connection.close()
        raise
    return connection


def _prompt(connected: socket.socket) -> Connection:
    """Return a connection that sends at once what is written: its messages have several parts and wait for answers."""
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(connected.detach())


@contextmanager
def in_worker(custom_ops: Sequence[Path], *, is_quiet: bool) -> Iterator[None]:
    """Prepare a worker for a request as the command line prepares the first process."""
    with warnings.catch_warnings(), custom_operators(custom_ops):
        if is_quiet:
            warnings.simplefilter("ignore")
        yield


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Raise an error that says what has happened where a connection breaks."""
    try:
        yield
    except (OSError, EOFError, AuthenticationError) as error:
        raise _EndedError(f"{what} ({error or type(error).__name__})") from error
