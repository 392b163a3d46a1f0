"""The processes that train together: who this one is, and what they agree on.

Agreements go over a gloo group of their own, on the CPU: they neither wait for the GPU nor
mix with the engines' collectives.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from sft_job import attention
from sft_job.cli import StopRequest
from sft_job.errors import HardwareError, SftJobError, WorkerError
from sft_job.hardware import Hardware, unusable
from sft_job.network import network_environment
from sft_job.rendezvous import Rendezvous
from sft_job.schema import Run
from sft_job.workers import Place

T = TypeVar("T")

# Between two looks of those who wait for the main rank.
POLL_S = 0.1


@dataclass(frozen=True)
class Timeouts:
    """How long ranks wait for each other before they fail.

    Args:
        start: until all are there.
        nccl: in an exchange between GPUs.
        gloo: in one between hosts.
    """

    start: timedelta
    nccl: timedelta
    gloo: timedelta

    @classmethod
    def of(cls, run: Run) -> Timeouts:
        seconds = (run.start_timeout_s, run.nccl_timeout_s, run.gloo_timeout_s)
        return cls(*(timedelta(seconds=number) for number in seconds))

    def apply(self, groups: Sequence[dist.ProcessGroup] | None = None) -> None:
        """Give each backend of every group its own limit.

        A group is made with one limit for all of its backends, and what libraries make (DeepSpeed
        its copy of the whole world) waits for half an hour, torch's default, whatever was asked
        for.

        Args:
            groups: None means all that there are.
        """
        limits = {"nccl": self.nccl, "gloo": self.gloo}
        for group in distributed_c10d._world.pg_map if groups is None else groups:
            for device in group._device_types:
                backend = group._get_backend(device)
                if backend.name() in limits:
                    backend._set_default_timeout(limits[backend.name()])


@dataclass(frozen=True)
class World:
    """The process group, from the point of view of one process."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup
    timeouts: Timeouts

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        dist.barrier(group=self.group)

    def max(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.MAX)

    def sum(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.SUM)

    def any(self, claim: bool) -> bool:
        return bool(self.max([float(claim)])[0])

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, by rank, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def on_main(self, work: Callable[[], T], stop: StopRequest | None = None) -> T:
        """Have the main rank do something that takes long; the others wait for it without limit,
        and get its result, or its error.

        Args:
            work: looks at `stop` by itself.
            stop: a request at any rank is handed on to the main one.
        """
        outcomes: list[tuple[T | None, BaseException | None]] = []

        def run() -> None:
            try:
                outcomes.append((work(), None))
            except BaseException as error:  # shared below, and raised on every rank
                outcomes.append((None, error))

        thread = threading.Thread(target=run, name="main rank's work")
        if self.is_main:
            thread.start()
        while True:
            if self.is_main:
                thread.join(POLL_S)
            asked = stop is not None and stop.requested()
            done, wanted = self.max([float(bool(outcomes)), float(asked)])
            if stop is not None and wanted:
                stop.request("a request to another process")
            if done:
                break
        if self.is_main:
            thread.join()
        result, error = outcomes[0] if outcomes else (None, None)
        said = error
        if error is not None and not isinstance(error, SftJobError):
            said = WorkerError(f"rank 0 has failed: {type(error).__name__}: {error}")
        result, said = self.gather((result, said))[0]
        if error is not None:
            raise error
        if isinstance(said, SftJobError):
            said.of_another_rank = True
            raise said
        return cast("T", result)

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, operation, group=self.group)
        return [float(value) for value in tensor]


def join(
    place: Place,
    hardware: Hardware,
    run: Run,
    *,
    stop: StopRequest | None = None,
    name: str = "",
    published: Path | None = None,
) -> World:
    """Enter the process group; one process is a group of one and runs the same code.

    Args:
        stop, name, published: see `Rendezvous`.

    Raises:
        HardwareError: the machine has GPUs that torch cannot use, or that cannot work together.
        WorkerError: the processes did not find each other.
        Interrupted: asked to stop meanwhile.
    """
    for name, value in place.environment().items():
        os.environ[name] = value  # torch, accelerate and DeepSpeed all read these
    if hardware.device == "cuda":
        if not torch.cuda.is_available():
            raise unusable(hardware, torch.__version__, torch.version.cuda)
        index = _device_index(place.local_rank, torch.cuda.device_count())
        os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed takes the GPU of this number
        device = torch.device("cuda", index)
        _refuse_missing_code(torch.cuda.get_device_capability(device), torch.cuda.get_arch_list())
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    timeouts = Timeouts.of(run)
    told = network_environment(place, hardware, os.environ)
    os.environ.update(told)
    if told and place.local_rank == 0:
        print("for gloo and NCCL: " + ", ".join(f"{name}={told[name]}" for name in sorted(told)))
    rendezvous = Rendezvous(
        place,
        limit_s=run.start_timeout_s,
        stop=stop or StopRequest(),
        name=name,
        published=published,
    )
    store = rendezvous.store()

    def connect() -> dist.ProcessGroup:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
        # Of all backends together: torch has one limit for making a group.
        longest = timeouts.nccl if device.type == "cuda" else timeouts.gloo
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.world_size, timeout=longest
        )
        group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeouts.gloo)
        return group

    group = rendezvous.bounded(connect)
    timeouts.apply()
    return World(place.rank, place.local_rank, place.world_size, device, group, timeouts)


def _refuse_missing_code(capability: tuple[int, int], architectures: Sequence[str]) -> None:
    """torch only warns of a GPU that its build has no code for, and fails at the first kernel;
    its wheels carry no PTX that the driver could compile.

    Args:
        architectures: sm_80 (device code), compute_90 (PTX, compiled for any newer one), ...
    """
    number = 10 * capability[0] + capability[1]
    parts = [name.partition("_") for name in architectures]
    code = [int(n) for kind, _, n in parts if kind == "sm" and n.isdigit()]
    portable = [int(n) for kind, _, n in parts if kind == "compute" and n.isdigit()]
    if attention.base(number, code) is None and not any(n <= number for n in portable):
        raise HardwareError(
            f"the GPU is sm_{number}, and torch {torch.__version__} has no code for it "
            f"(it has {', '.join(architectures)})",
            remedy="install a release of torch that has: V100 needs one of CUDA 12.8 or older, "
            "such as 2.10",
        )


def _device_index(local_rank: int, visible: int) -> int:
    """The GPU of this process: its SLURM_LOCALID's, or the only one that it has been given.

    Raises:
        HardwareError: there are several, but not one for each process.
    """
    if visible == 1:
        if local_rank:
            print(f"process {local_rank} of this machine sees one GPU alone, and takes it")
        return 0
    if local_rank >= visible:
        raise HardwareError(
            f"process {local_rank} of this machine has no GPU of its own: {visible} are visible",
            remedy="start at most one process for each GPU",
        )
    return local_rank


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
