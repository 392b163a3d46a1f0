"""The training processes of a machine: what each is given, and how its start is timed.

    sft-job train job.yaml              the launcher: no torch, starts one worker per GPU
      └── the same command with RANK, WORLD_SIZE, ... set: a worker

Under torchrun or srun the variables are there already, and every process is a worker: `place.py`.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from sft_job.hardware import cores
from sft_job.schema import JobConfig

ATTEMPT = "SFT_JOB_ATTEMPT"
LAUNCHED = "SFT_JOB_LAUNCHED"
BEGAN = "SFT_JOB_BEGAN"

# A text may name the step. All deprecated functions of torch.distributed warn from one line.
WARNINGS_OF_A_LINE = 20

# glibc gives large blocks back to the kernel at once and faults them in anew in every layer;
# keeping them took 15-20% off a step on a CPU (135M parameters, 2 processes).
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**31), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


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


def training_environment(place: Place, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a training process, for whoever starts it: `environ`, its place, and a
    proposal for what `environ` leaves open. slurm/job.sh proposes the same."""
    proposed = {
        "OMP_NUM_THREADS": str(max(1, cores() // place.local_world_size)),
        "NCCL_DEBUG": "WARN",
        **MALLOC,
    }
    return proposed | dict(environ) | place.environment()


def own_environment(config: JobConfig, environ: Mapping[str, str]) -> dict[str, str]:
    """What a training process tells its libraries before it imports them, and a benchmark's too."""
    found = {}
    if not environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        # The number of tokens differs from batch to batch; blocks of fixed size would be cut to
        # pieces that fit no later one.
        found["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if config.train.deterministic and "CUBLAS_WORKSPACE_CONFIG" not in environ:
        found["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if not config.run.online:
        found["HF_HUB_OFFLINE"] = "1"
    return found


def say_warnings_once() -> None:
    """Print each warning of a library once, and of those that one line makes the first few.

    Python forgets which ones it has shown when anyone changes the filters; torch does in every
    step, and DeepSpeed's steps warn: a log would grow by kilobytes each.
    """
    show = warnings.showwarning
    shown: dict[tuple[type[Warning], str, int], set[str]] = {}

    def once(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        texts = shown.setdefault((category, filename, lineno), set())
        if str(message) in texts or len(texts) == WARNINGS_OF_A_LINE:
            return
        texts.add(str(message))
        show(message, category, filename, lineno, file, line)
        if len(texts) == WARNINGS_OF_A_LINE:
            show("more of these are not shown", category, filename, lineno, file, line)

    warnings.showwarning = once


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
