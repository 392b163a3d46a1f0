"""What this machine has, found without torch. Unknown stays unknown."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sft_job.errors import HardwareError


@dataclass(frozen=True)
class Hardware:
    """The devices of one machine.

    Args:
        count: GPUs, or 1 for a CPU.
        capability: CUDA compute capability (major, minor); None on a CPU.
        bf16: the device computes in bf16 by itself (capability >= 8.0; on a CPU AVX512-BF16
            or AMX), not by emulation.
        memory_gib: of one GPU, or of the machine.
    """

    device: Literal["cuda", "cpu"]
    count: int
    name: str
    capability: tuple[int, int] | None
    bf16: bool
    memory_gib: float | None


def detect() -> Hardware:
    """This machine: its NVIDIA GPUs where the driver answers, else its CPU.

    Raises:
        HardwareError: nvidia-smi is there but fails, or the GPUs differ.
    """
    return _gpus() or _cpu()


def _gpus() -> Hardware | None:
    query = "name,memory.total,compute_cap,uuid"
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired as error:
        raise HardwareError(
            "nvidia-smi gave no answer within 60 s", remedy="look after the GPU driver"
        ) from error
    if answer.returncode:
        raise HardwareError(
            f"nvidia-smi failed: {(answer.stderr or answer.stdout).strip()}",
            remedy="mend the driver, or take nvidia-smi from PATH to run on the CPU",
        )
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines()]
    rows = _visible([row for row in rows if len(row) == 4])
    if not rows:
        return None
    if len({row[2] for row in rows}) > 1:
        raise HardwareError(
            "the GPUs differ: " + ", ".join(f"{row[0]} (sm_{row[2]})" for row in rows),
            remedy="choose GPUs of one kind with CUDA_VISIBLE_DEVICES",
        )
    major, _, minor = rows[0][2].partition(".")
    capability = (int(major), int(minor))
    return Hardware(
        device="cuda",
        count=len(rows),
        name=rows[0][0],
        capability=capability,
        bf16=capability >= (8, 0),
        # "[N/A]" where GPU and host share their memory
        memory_gib=float(rows[0][1]) / 1024 if rows[0][1].isdigit() else None,
    )


def _visible(rows: list[list[str]]) -> list[list[str]]:
    """Apply CUDA_VISIBLE_DEVICES as the driver does: the list ends at the first unknown entry."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return rows
    visible = []
    for entry in (item.strip() for item in chosen.split(",")):
        if entry.isdigit() and int(entry) < len(rows):
            visible.append(rows[int(entry)])
        elif entry and (named := [row for row in rows if row[3].startswith(entry)]):
            visible.append(named[0])
        elif entry.startswith(("MIG-", "GPU-")):
            raise HardwareError(
                f"CUDA_VISIBLE_DEVICES names {entry}, which is not a whole GPU of this machine",
                remedy="name GPUs by index; parts of a GPU (MIG) are not supported",
            )
        else:
            break
    return visible


def _cpu() -> Hardware:
    name, flags = "CPU", set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
                break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    bf16 = bool(flags & {"avx512_bf16", "amx_bf16"})
    return Hardware("cpu", 1, name, None, bf16, memory)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
