"""How the processes of a job find each other, within a limit, and stopped when asked.

Rank 0 holds torch's store on a socket; the others come to it. Where it listens:

    our launcher      on a socket that the launcher has opened and handed on: no port is guessed
    the job script    at MASTER_PORT of the first node, else, where that is taken, at any; it is
                      written to logs/attempt-N/rendezvous, which every rank sees
    torchrun          its agent has the store
    others            at MASTER_ADDR:MASTER_PORT

All of it happens in a thread: torch waits in C++, where no signal is handled.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed

from sft_job.cli import StopRequest
from sft_job.errors import Interrupted, WorkerError
from sft_job.files import write_atomically
from sft_job.launcher import LISTENER
from sft_job.workers import Place

T = TypeVar("T")

dist: Any = torch.distributed  # it does not declare what it exports
Store = Any  # torch.distributed.Store

POLL_S = 0.05


class Rendezvous:
    """One process's way into the group."""

    def __init__(
        self,
        place: Place,
        *,
        limit_s: float,
        stop: StopRequest,
        name: str = "",
        published: Path | None = None,
    ) -> None:
        """
        Args:
            limit_s: for everything together; then the ranks that are missing are named.
            stop: obeyed meanwhile.
            name: of this attempt, so that a store of another one is never mistaken for ours.
            published: where rank 0 writes its port, on a file system that all ranks share.
        """
        self.place, self.limit_s, self.stop = place, limit_s, stop
        self.name, self.published = name, published
        self._deadline = time.monotonic() + limit_s
        self._store: Store | None = None

    def store(self) -> Store:
        """The common store, once every rank has come to it.

        Raises:
            WorkerError: they have not found each other.
            Interrupted: asked to stop meanwhile.
        """
        return self.bounded(self._meet)

    def bounded(self, action: Callable[[], T]) -> T:
        """Do something that waits for other ranks, in a thread of its own.

        Raises:
            WorkerError: it takes longer than the limit, or the connection fails.
            Interrupted: asked to stop meanwhile.
        """
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(action())
            except BaseException as error:  # handed to the main thread, which raises it
                errors.append(error)

        # A daemon: nothing ends it while it waits in C++.
        thread = threading.Thread(target=run, daemon=True, name="rendezvous")
        thread.start()
        while thread.is_alive():
            thread.join(POLL_S)
            if self.stop.requested():
                raise Interrupted(
                    f"interrupted by {self.stop.reason} while the processes found each other"
                )
            if time.monotonic() > self._deadline:
                raise self._late()
        if results:
            return results[0]
        (error,) = errors
        if isinstance(error, RuntimeError | OSError):  # torch's DistError is a RuntimeError
            if time.monotonic() > self._deadline - 1:
                raise self._late() from error
            raise WorkerError(
                f"the processes cannot connect: {_first_line(error)}", where=self._where()
            ) from error
        raise error

    def _meet(self) -> Store:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            left = timedelta(seconds=self.limit_s)
            place = self.place
            found = dist.rendezvous("env://", place.rank, place.world_size, timeout=left)
            store: Store = next(iter(found))[0]
        else:
            store = self._listen() if self.place.rank == 0 else self._visit()
        self._store = store = dist.PrefixStore(f"sft_job/{self.name}", store)
        store.set(f"joined/{self.place.rank}", socket.gethostname())
        while self._missing():
            time.sleep(POLL_S)
        return store

    def _listen(self) -> Store:
        """Rank 0's store."""
        place = self.place
        if LISTENER in os.environ:
            handle = int(os.environ[LISTENER])
            return self._tcp_store(place.master_addr, place.master_port, handle)
        # A name that nobody can resolve would leave the others waiting.
        _resolve(place.master_addr)
        try:
            listener = _server(place.master_port)
        except OSError as error:
            if self.published is None:
                raise WorkerError(
                    f"port {place.master_port} of this machine cannot be used: {error.strerror}",
                    where=self._where(),
                    remedy="set MASTER_PORT to another one",
                ) from error
            listener = _server(0)  # somebody has it: any other will do
        port = listener.getsockname()[1]
        store = self._tcp_store(place.master_addr, port, listener.detach())
        if self.published is not None:
            write_atomically(self.published, f"{port}\n")
        return store

    def _visit(self) -> Store:
        """The store, as the other ranks have it."""
        place, port = self.place, self.place.master_port
        _resolve(place.master_addr)
        if self.published is not None and LISTENER not in os.environ:
            port = self._published_port(self.published)
        # torch would print pages of its own frames for every try.
        while not self._answers(place.master_addr, port):
            if time.monotonic() > self._deadline:
                raise TimeoutError(f"{place.master_addr}:{port} does not answer")
            time.sleep(POLL_S)
        return self._tcp_store(place.master_addr, port, None)

    @staticmethod
    def _answers(host: str, port: int) -> bool:
        try:
            socket.create_connection((host, port), timeout=5).close()
        except OSError:
            return False
        return True

    def _published_port(self, file: Path) -> int:
        asked = 0.0
        while True:
            try:
                return int(file.read_text())
            except (FileNotFoundError, ValueError):  # not yet
                time.sleep(POLL_S)
            if time.monotonic() > asked + 1:
                asked = time.monotonic()
                # A client of a file server remembers that a file was not there, until it hears of
                # a change to its folder.
                with contextlib.suppress(OSError):
                    os.utime(file.parent)

    def _tcp_store(self, host: str, port: int, listener: int | None) -> Store:
        return dist.TCPStore(
            host,
            port,
            self.place.world_size,
            self.place.rank == 0,
            timeout=timedelta(seconds=max(self._deadline - time.monotonic(), 1)),
            wait_for_workers=False,
            master_listen_fd=listener,
        )

    def _missing(self) -> list[int]:
        """Ranks that have not come to the store."""
        store = self._store
        if store is None:
            return []
        return [r for r in range(self.place.world_size) if not store.check([f"joined/{r}"])]

    def _late(self) -> WorkerError:
        who = f"{self.place.master_addr}:{self.place.master_port} does not answer"
        # Rank 0 holds the store; another one's question could wait for it again.
        if self.place.rank == 0 and (missing := self._missing()):
            ranks = ", ".join(map(str, missing[:20])) + (" ..." if len(missing) > 20 else "")
            who = f"{len(missing)} of {self.place.world_size} have not come (rank {ranks})"
        return WorkerError(
            f"the processes did not find each other within {self.limit_s:g} s: {who}",
            where=self._where(),
            remedy="look into the logs of the ranks that are missing, and whether a firewall lets "
            "the machines reach each other; run.start_timeout_s is the limit",
        )

    def _where(self) -> str:
        return f"node {socket.gethostname()}, rank {self.place.rank}"


def _server(port: int) -> socket.socket:
    """A socket that listens on all addresses of this machine, IPv6 ones included."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # IPv6 can be built in and switched off
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
    return socket.create_server(("", port), backlog=1024)


def _resolve(host: str) -> None:
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as error:
        raise WorkerError(
            f"the name of the first machine, {host!r}, means nothing here: {error.strerror}",
            where=f"node {socket.gethostname()}",
            remedy="set MASTER_ADDR to a name or an address that every machine of the job knows",
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
