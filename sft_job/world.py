"""The processes that train together: who this one is, and what they agree on.

Agreements go over a gloo group of their own, on the CPU: they neither wait for the GPU nor
mix with the engines' collectives.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from sft_job import attention
from sft_job.cli import StopRequest
from sft_job.errors import HardwareError, SftJobError, WorkerError
from sft_job.hardware import Hardware, unusable
from sft_job.rendezvous import Rendezvous
from sft_job.workers import Place

T = TypeVar("T")

# Between two looks of those who wait for the main rank.
POLL_S = 0.1


@dataclass(frozen=True)
class Limits:
    """How long ranks wait for each other, seconds.

    Args:
        start: to find each other.
        nccl: for a collective of the engines on GPUs.
        gloo: for one on the CPU.
    """

    start: float = 300.0
    nccl: float = 600.0
    gloo: float = 1800.0


@dataclass(frozen=True)
class World:
    """The process group, from the point of view of one process."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup

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
    limits: Limits = Limits(),
    *,
    stop: StopRequest | None = None,
    name: str = "",
    published: Path | None = None,
) -> World:
    """Enter the process group; one process is a group of one and runs the same code.

    Args:
        stop, name, published: see `Rendezvous`.

    Raises:
        HardwareError: the machine has GPUs that torch cannot use.
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
    over_network = place.world_size > place.local_world_size
    if over_network and "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = _interface(place.master_addr)
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    rendezvous = Rendezvous(
        place, limit_s=limits.start, stop=stop or StopRequest(), name=name, published=published
    )
    store = rendezvous.store()
    gloo = timedelta(seconds=limits.gloo)

    def connect() -> dist.ProcessGroup:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
        dist.init_process_group(
            backend,
            store=store,
            rank=place.rank,
            world_size=place.world_size,
            timeout=gloo if hardware.device == "cpu" else timedelta(seconds=limits.nccl),
        )
        group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=gloo)
        return group

    group = rendezvous.bounded(connect)
    return World(place.rank, place.local_rank, place.world_size, device, group)


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


def _interface(master_addr: str) -> str | None:
    """The network interface over which this machine and the first one reach each other; gloo
    would take the address of the host's own name, on many machines 127.0.1.1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            master = socket.gethostbyname(master_addr)
            # Its own name, as many distributions write it into /etc/hosts: then the default route
            # decides (192.0.2.1 is nobody's). Connecting a datagram socket sends nothing.
            own_name = master in ("127.0.0.1", "127.0.1.1")
            probe.connect(("192.0.2.1" if own_name else master, 9))
        except OSError:
            return None  # the process group will say what cannot be reached
        names: dict[str, str] = {}
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
            except OSError:
                continue  # no IPv4 address
            names[socket.inet_ntoa(answer[20:24])] = name
        # On the first machine itself, the way to its address is the loopback; its address is not.
        wanted = probe.getsockname()[0] if own_name else master
        return names.get(wanted) or names.get(probe.getsockname()[0])


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
