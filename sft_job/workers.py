"""The training processes of one machine: started and watched.

    sft-job train job.yaml              the launcher: no torch, starts one worker per GPU
      └── the same command with RANK, WORLD_SIZE, ... set: a worker

Under torchrun or srun the variables are there already, and every process is a worker: `place.py`.
"""

from __future__ import annotations

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

from sft_job.cli import STOP_SIGNALS, StopRequest
from sft_job.errors import SftJobError, UserError, WorkerError
from sft_job.hardware import cores
from sft_job.rundir import RunDir, read_json, write_atomically

ATTEMPT = "SFT_JOB_ATTEMPT"
LAUNCHED = "SFT_JOB_LAUNCHED"
BEGAN = "SFT_JOB_BEGAN"

# After one worker has failed, the others get so long to say why before they are killed.
GRACE_S = 3.0

# glibc gives large blocks back to the kernel at once and faults them in anew in every layer;
# keeping them took 15-20% off a step on a CPU (135M parameters, 2 processes).
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**31), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
POLL_S = 0.05


@dataclass(frozen=True)
class Place:
    """One process's place among all."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_addr: str
    master_port: int

    def environment(self) -> dict[str, str]:
        """The variables that torch, accelerate and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def began() -> float:
    """When the command was given, seconds since the epoch: this process, or its launcher, began."""
    if BEGAN in os.environ:
        return float(os.environ[BEGAN])
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


class Phases:
    """How long each part of the start took, seconds."""

    def __init__(self, began: float) -> None:
        """
        Args:
            began: when the command was given, seconds since the epoch.
        """
        self._last = self.began = began
        self.seconds: dict[str, float] = {}

    def end(self, phase: str) -> None:
        """The part of this name ends now."""
        now = time.time()
        self.seconds[phase] = round(now - self._last, 3)
        self._last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s to the end of the first step: {parts}"


def die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGTERM when the launcher dies, so that no worker is left behind."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the kernel was asked
        raise WorkerError("the launcher has gone")


def report_failure(run_dir: RunDir, attempt: int, rank: int, error: BaseException) -> int:
    """Leave this worker's error where launcher and job script look; returns the exit code."""
    expected = isinstance(error, SftJobError)
    code = error.exit_code if isinstance(error, SftJobError) else 1
    record = {
        "time": time.time(),
        "exit_code": code,
        "message": f"error: {error}" if expected else None,
        "traceback": "".join(traceback.format_exception(error)),
    }
    write_atomically(run_dir.error(attempt, rank), json.dumps(record) + "\n")
    kind = "" if expected else f"{type(error).__name__}: "
    lines = [f"node {socket.gethostname()}, rank {rank}: {kind}{error}"]
    if not expected:
        lines.append(str(record["traceback"]))
    try:
        with open(run_dir.first_error(attempt), "x", encoding="utf-8") as file:
            file.write("\n".join(lines).rstrip() + "\n")
    except FileExistsError:
        pass  # another rank was first; this one may have failed for want of it
    return code


class Workers:
    """The workers of one attempt."""

    def __init__(self, run_dir: RunDir, attempt: int, count: int) -> None:
        self.run_dir, self.attempt, self.count = run_dir, attempt, count
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, arguments: Sequence[str]) -> None:
        """Start `python -m sft_job.train ARGUMENTS` once per rank.

        Signals that ask to stop are held back until the worker's handlers stand: a blocked
        signal survives exec and is delivered when the worker lets it through.
        """
        port = _free_port()
        self.run_dir.logs(self.attempt).mkdir(parents=True, exist_ok=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            for rank in range(self.count):
                place = Place(rank, rank, self.count, self.count, "127.0.0.1", port)
                threads = {"OMP_NUM_THREADS": str(max(1, cores() // self.count)), **MALLOC}
                own = {ATTEMPT: str(self.attempt), LAUNCHED: str(os.getpid()), BEGAN: str(began())}
                environment = threads | dict(os.environ) | place.environment() | own
                with open(self.run_dir.log(self.attempt, rank), "ab") as log:
                    self._processes.append(
                        subprocess.Popen(
                            [sys.executable, "-m", "sft_job.train", *arguments],
                            env=environment,
                            stdin=subprocess.DEVNULL,
                            stdout=None if rank == 0 else log,
                            stderr=log,
                            # The terminal's Ctrl-C reaches the launcher alone, which passes it on.
                            start_new_session=True,
                        )
                    )
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def wait(self, stop: StopRequest) -> None:
        """Wait for all workers, passing a request to stop on to them once.

        Raises:
            SftJobError: a worker failed; the others have been ended.
        """
        told = False
        try:
            while True:
                codes = [process.poll() for process in self._processes]
                if any(codes):
                    self._end_others()
                    raise self._first_failure(codes)
                if all(code == 0 for code in codes):
                    return
                if stop and not told:
                    told = True
                    for process in self._processes:
                        process.send_signal(stop.signal)
                time.sleep(POLL_S)
        finally:
            self._end_others(grace_s=0)

    def _end_others(self, grace_s: float = GRACE_S) -> None:
        """End what still runs: workers left waiting in a collective do not end by themselves."""
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline and any(p.poll() is None for p in self._processes):
            time.sleep(POLL_S)
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()

    def _first_failure(self, codes: Sequence[int | None]) -> SftJobError:
        """The failure that came first: when a rank dies, the others fail for want of it."""
        killed = [rank for rank, code in enumerate(codes) if code is not None and code < 0]
        # A library that finds its peer gone aborts; that is never the first failure.
        aborted = {-signal.SIGABRT}
        records = []
        for rank in range(self.count):
            file = self.run_dir.error(self.attempt, rank)
            if file.is_file():
                records.append((read_json(file), rank))
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
        if record["message"] is None:
            error: SftJobError = WorkerError(f"rank {rank} failed:\n{record['traceback']}".rstrip())
        elif record["exit_code"] == UserError.exit_code:
            error = UserError(record["message"].removeprefix("error: "))
        else:
            error = WorkerError(record["message"].removeprefix("error: "))
        return error


def _tail(path: Path, lines: int = 20) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
