"""The launcher's side of the training processes of one machine: started, watched, stopped.

What a worker has to say when it fails goes into a file of its logs and through a pipe: the disk
that the logs are on may be what it failed of.

The kernel ends all workers when the launcher dies (`die_with_parent`): nobody would look after
them, and the next attempt may begin at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_job.cli import STOP_SIGNALS, StopRequest, unexpected
from sft_job.errors import Interrupted, SftJobError, UserError, WorkerError
from sft_job.files import read_json, write_atomically
from sft_job.rundir import RunDir
from sft_job.workers import ATTEMPT, BEGAN, LAUNCHED, Place, began, training_environment

# File descriptors that a worker inherits: where it reports a failure, and of rank 0 the socket on
# which the others find it.
REPORT_TO, LISTENER = "SFT_JOB_REPORT_TO", "SFT_JOB_LISTENER"

# Of a process that makes the data ready: the one that waits for it.
ENCODES_FOR = "SFT_JOB_ENCODES_FOR"

# After one worker has failed, the others get so long to say why before they are killed.
GRACE_S = 3.0
# A job that was asked to stop waits so long for a worker that something else has stopped.
SILENT_S = 10.0
POLL_S = 0.05
# What a pipe takes at once (64 KiB, pipe(7)), with room to spare: nobody reads it before the end.
REPORT_BYTES = 60_000


def die_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel for a signal when the process that has started this one dies. A worker is
    killed, also while it is stopped: two attempts would train the same steps."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)
    if os.getppid() != parent:  # it died before the kernel was asked
        raise WorkerError("the process that has started this one has gone")


def report_failure(run_dir: RunDir, attempt: int, rank: int, error: BaseException) -> int:
    """Leave this worker's error where launcher and job script look; returns the exit code."""
    expected = isinstance(error, SftJobError)
    code = error.exit_code if isinstance(error, SftJobError) else 1
    if isinstance(error, SftJobError) and error.of_another_rank:
        return code
    trace = "".join(traceback.format_exception(error))
    record = {
        "time": time.time(),
        "exit_code": code,
        "message": f"error: {error}" if expected else f"error: rank {rank}: {unexpected(error)}",
        "expected": expected,
        "traceback": trace,
    }
    print(record["message"] if expected else trace, file=sys.stderr, flush=True)
    _through_pipe(record)
    kind = "" if expected else f"{type(error).__name__}: "
    lines = [f"node {socket.gethostname()}, rank {rank}: {kind}{error}"]
    if not expected:
        lines.append(trace)
    # On a disk that is full the pipe has said it, or nothing can.
    with contextlib.suppress(OSError):
        write_atomically(run_dir.error(attempt, rank), json.dumps(record) + "\n")
    # Another rank may have been first; this one then may have failed for want of it.
    with contextlib.suppress(OSError), open(run_dir.first_error(attempt), "x") as file:
        file.write("\n".join(lines).rstrip() + "\n")
    return code


def _through_pipe(record: dict[str, Any]) -> None:
    if REPORT_TO not in os.environ:
        return
    said = json.dumps(record).encode()
    if len(said) > REPORT_BYTES:
        said = json.dumps(record | {"message": record["message"][:5000], "traceback": ""}).encode()
    with contextlib.suppress(OSError):  # the launcher has gone
        os.write(int(os.environ[REPORT_TO]), said)


@dataclass
class _Worker:
    """A worker's process, and where it reports a failure."""

    process: subprocess.Popen[bytes]
    reports: int

    def is_stopped(self) -> bool:
        """By SIGSTOP or a terminal; not by a debugger."""
        with contextlib.suppress(OSError, IndexError):
            stat = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8")
            return stat.rpartition(")")[2].split()[0] == "T"
        return False

    def report(self) -> dict[str, Any] | None:
        """What it said when it failed; called when it has ended."""
        said = b""
        with contextlib.suppress(BlockingIOError):  # a process that it started still has the pipe
            while part := os.read(self.reports, 2**16):
                said += part
        try:
            record = json.loads(said)
        except ValueError:
            return None
        return record if isinstance(record, dict) else None


class Workers:
    """The workers of one attempt."""

    def __init__(self, run_dir: RunDir, attempt: int, count: int) -> None:
        self.run_dir, self.attempt, self.count = run_dir, attempt, count
        self._workers: list[_Worker] = []

    @property
    def processes(self) -> list[subprocess.Popen[bytes]]:
        return [worker.process for worker in self._workers]

    def start(self, arguments: Sequence[str]) -> None:
        """Start `python -m sft_job.train ARGUMENTS` once per rank.

        Signals that ask to stop are held back until the worker's handlers stand: a blocked
        signal survives exec and is delivered when the worker lets it through.
        """
        self.run_dir.logs(self.attempt).mkdir(parents=True, exist_ok=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            # Handed on instead of its number alone, which somebody else could take meanwhile.
            with socket.create_server(("127.0.0.1", 0), backlog=2 * self.count) as listener:
                for rank in range(self.count):
                    self._start(rank, arguments, listener)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _start(self, rank: int, arguments: Sequence[str], listener: socket.socket) -> None:
        port = listener.getsockname()[1]
        place = Place(rank, rank, self.count, self.count, "127.0.0.1", port)
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        own = {
            ATTEMPT: str(self.attempt),
            LAUNCHED: str(os.getpid()),
            BEGAN: str(began()),
            REPORT_TO: str(writing),
        }
        handed_on = [writing]
        if rank == 0:
            own[LISTENER] = str(listener.fileno())
            handed_on.append(listener.fileno())
        with open(self.run_dir.log(self.attempt, rank), "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "sft_job.train", *arguments],
                env=training_environment(place, os.environ) | own,
                stdin=subprocess.DEVNULL,
                stdout=None if rank == 0 else log,
                stderr=log,
                pass_fds=handed_on,
                # The terminal's Ctrl-C reaches the launcher alone, which passes it on.
                start_new_session=True,
            )
        os.close(writing)
        self._workers.append(_Worker(process, reading))

    def wait(self, stop: StopRequest) -> None:
        """Wait for all workers, passing a request to stop on to them once.

        Raises:
            Interrupted: asked to stop, but a worker that does not answer keeps the others from
                saving; all have been ended.
            SftJobError: a worker failed; the others have been ended.
        """
        told: float | None = None
        polls, silent = 0, _Silent()
        try:
            while True:
                codes = [process.poll() for process in self.processes]
                if any(codes):
                    self._end_others()
                    raise self._first_failure(codes)
                if all(code == 0 for code in codes):
                    return
                if stop.requested() and told is None:
                    told = time.monotonic()
                    for process in self.processes:
                        process.send_signal(stop.signal)
                if polls % int(1 / POLL_S) == 0:
                    silent.look(self._workers)
                if told is not None and silent.since(told) > SILENT_S:
                    raise Interrupted(
                        f"interrupted by {stop.reason}, without a checkpoint of its own: "
                        f"{silent}, and all others wait for it"
                    )
                if stop.times >= 3:
                    raise Interrupted(
                        f"interrupted by {stop.reason}, asked {stop.times} times: "
                        "not waiting for a checkpoint"
                    )
                polls += 1
                time.sleep(POLL_S)
        finally:
            self._end_others(grace_s=0)

    def _end_others(self, grace_s: float = GRACE_S) -> None:
        """End what still runs: workers left waiting in a collective do not end by themselves."""
        deadline = time.monotonic() + grace_s
        processes = self.processes
        while time.monotonic() < deadline and any(p.poll() is None for p in processes):
            time.sleep(POLL_S)
        for process in processes:
            if process.poll() is None:
                process.kill()
        for process in processes:
            process.wait()

    def _first_failure(self, codes: Sequence[int | None]) -> SftJobError:
        """The failure that came first: when a rank dies, the others fail for want of it."""
        killed = [rank for rank, code in enumerate(codes) if code is not None and code < 0]
        # A library that finds its peer gone aborts; that is never the first failure.
        aborted = {-signal.SIGABRT}
        records = [
            (record, rank)
            for rank in range(self.count)
            if (record := self._report(rank)) is not None
        ]
        if killed and not (records and codes[killed[0]] in aborted):
            number = -int(codes[killed[0]] or 0)
            hint = "; the kernel does that when memory runs out" if number == 9 else ""
            known = {s.value: s.name for s in signal.Signals}
            return WorkerError(
                f"the process of rank {killed[0]} was ended by signal "
                f"{known.get(number, number)}{hint}",
                remedy=f"its last output is in {self.run_dir.log(self.attempt, killed[0])}",
            )
        if not records:
            rank, code = next((r, c) for r, c in enumerate(codes) if c)
            return WorkerError(
                f"the process of rank {rank} ended with exit code {code} and no message:\n"
                + _tail(self.run_dir.log(self.attempt, rank)),
            )
        record, rank = min(records, key=lambda item: item[0]["time"])
        message = str(record["message"]).removeprefix("error: ")
        if not record["expected"]:
            log = self.run_dir.log(self.attempt, rank)
            return WorkerError(message, remedy=f"the traceback is in {log}")
        if record["exit_code"] == UserError.exit_code:
            return UserError(message)
        return WorkerError(message)

    def _report(self, rank: int) -> dict[str, Any] | None:
        """A rank's failure as it came through its pipe, or from its file."""
        record = self._workers[rank].report() if rank < len(self._workers) else None
        if record is None:
            try:
                record = read_json(self.run_dir.error(self.attempt, rank))
            except (OSError, ValueError):
                return None
        wanted = {"time", "message", "expected", "exit_code"}
        return record if isinstance(record, dict) and wanted <= record.keys() else None


class _Silent:
    """Workers that something else has stopped, so that all others wait for them."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}
        self._pids: dict[int, int] = {}

    def look(self, workers: Sequence[_Worker]) -> None:
        """Say of one that is newly stopped, once."""
        now = time.monotonic()
        for rank, worker in enumerate(workers):
            if not worker.is_stopped():
                self._since.pop(rank, None)
            elif rank not in self._since:
                self._since[rank], self._pids[rank] = now, worker.process.pid
                print(f"note: {self}, and all others wait for it", file=sys.stderr, flush=True)

    def since(self, moment: float) -> float:
        """Seconds that one has been silent from this moment on."""
        if not self._since:
            return 0.0
        return time.monotonic() - max(moment, min(self._since.values()))

    def __str__(self) -> str:
        named = [f"rank {rank} (process {self._pids[rank]})" for rank in sorted(self._since)]
        return f"the process of {', '.join(named)} is stopped (kill -CONT lets it go on)"


def _tail(path: Path, lines: int = 20) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError as error:
        return f"(its log cannot be read: {error.strerror})"
