"""What this machine has, found without torch, and what is known of GPUs. Unknown stays unknown."""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sft_job.errors import HardwareError

Link = Literal["nvlink", "pcie"]

# Tests put their own here: where Linux shows its devices, and how long an answer may take (s).
DEVICES = Path("/dev")
PCI = Path("/sys/bus/pci/devices")
KERNEL_DRIVER = Path("/proc/driver/nvidia/version")
PATIENCE = 60.0

# GB/s of 16 lanes of PCIe 5, both directions together; every NVLink board here has more.
PCIE_5 = 128.0
# The memory of one product varies: with ECC, by driver, and torch sees less of it.
SAME_MEMORY = 0.08
ON_CPU = "or set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU"

# An image says in SFT_JOB_FLAVOUR which one it is: what it is for, and what it is built from.
FLAVOUR = "SFT_JOB_FLAVOUR"
IMAGES = {
    "ampere": ("A100, H100 and newer GPUs", "Dockerfile"),
    "volta": ("V100 and T4", "docker/Dockerfile.v100"),
    "cpu": ("machines without an NVIDIA GPU", "Dockerfile, with the lock cpu.txt"),
}
# The oldest driver by the major number of CUDA (NVIDIA, CUDA Compatibility, "Minor Version
# Compatibility").
DRIVERS = {11: 450, 12: 525, 13: 580}


@dataclass(frozen=True)
class Gpu:
    """What its maker says of one GPU product.

    Args:
        key: short name for a command line, lower case.
        capability: CUDA compute capability (major, minor).
        memory_gib: total as the driver reports it, GiB (2^30 bytes).
        tflops: peak TFLOP/s by dtype, dense. bf16 and fp16 with fp32 accumulation (half the
            rate on GeForce), fp32 without TF32; no bf16 below capability 8.0.
        bandwidth_gbs: of its memory, GB/s.
        link_gbs: to the other GPUs, GB/s, both directions together: NVLink where the product
            always has it, else PCIe (a bridge between two cards is an extra).
        names: what drivers call it, without "NVIDIA".
        source: title of the document that the figures are from.
    """

    key: str
    capability: tuple[int, int]
    memory_gib: float
    tflops: Mapping[str, float] = field(hash=False)
    bandwidth_gbs: float
    link_gbs: float
    names: tuple[str, ...]
    source: str

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def link(self) -> Link:
        return "nvlink" if self.link_gbs > PCIE_5 else "pcie"


# Tensor rates are dense: half of what stands in a datasheet that counts sparsity.
# key, capability, GiB, tensor TFLOP/s, fp32 TFLOP/s, memory GB/s, link GB/s, names ; source
_TABLE = """\
v100-16          7.0  16.0    125  15.7  900  300  Tesla V100-SXM2-16GB ; V100 datasheet, 2020
v100-32          7.0  32.0    125  15.7  900  300  Tesla V100-SXM2-32GB ; V100 datasheet, 2020
v100-pcie-16     7.0  16.0    112  14.0  900   32  Tesla V100-PCIE-16GB ; V100 datasheet, 2020
v100-pcie-32     7.0  32.0    112  14.0  900   32  Tesla V100-PCIE-32GB ; V100 datasheet, 2020
v100s            7.0  32.0    130  16.4 1134   32  Tesla V100S-PCIE-32GB ; V100 datasheet, 2020
t4               7.5  15.0     65   8.1  320   32  Tesla T4 ; T4 product page, 2019
titan-rtx        7.5  24.0    130  16.3  672   32  TITAN RTX ; TITAN RTX product page, 2018
quadro-rtx-6000  7.5  24.0  130.5  16.3  672   32  Quadro RTX 6000 ; Turing whitepaper, 2018
rtx-2080ti       7.5  11.0   56.9  14.2  616   32  GeForce RTX 2080 Ti ; Turing whitepaper, 2018
quadro-rtx-8000  7.5  48.0  130.5  16.3  672   32  Quadro RTX 8000 ; Quadro RTX 8000 datasheet, 2018
a100-40          8.0  40.0    312  19.5 1555  600  A100-SXM4-40GB ; A100 datasheet, 2021
a100-80          8.0  80.0    312  19.5 2039  600  A100-SXM4-80GB ; A100 datasheet, 2021
a100-pcie-40     8.0  40.0    312  19.5 1555   64  A100-PCIE-40GB ; A100 datasheet, 2021
a100-pcie-80     8.0  80.0    312  19.5 1935   64  A100 80GB PCIe ; A100 datasheet, 2021
a800-80          8.0  80.0    312  19.5 2039  400  A800-SXM4-80GB ; A800 datasheet, 2022
a30              8.0  24.0    165  10.3  933   64  A30 ; A30 datasheet, 2022
a10              8.6  22.5    125  31.2  600   64  A10 ; A10 datasheet, 2021
a10g             8.6  22.5     70  35.0  600   64  A10G ; A10G datasheet of AWS, 2022
a40              8.6  45.0  149.7  37.4  696   64  A40 ; GA102 whitepaper, version 2
a6000            8.6  48.0  154.8  38.7  768   64  RTX A6000 ; GA102 whitepaper, version 2
a5000            8.6  24.0  111.1  27.8  768   64  RTX A5000 ; RTX A5000 datasheet, 2021
rtx-3090         8.6  24.0   71.2  35.6  936   64  GeForce RTX 3090 ; RTX Blackwell whitepaper, 2025
rtx-4090         8.9  24.0  165.2  82.6 1008   64  GeForce RTX 4090 ; RTX Blackwell whitepaper, 2025
rtx6000-ada      8.9  48.0  364.2  91.1  960   64  RTX 6000 Ada Generation ; RTX PRO whitepaper, 2025
l4               8.9  22.5    121  30.3  300   64  L4 ; L4 datasheet, 2023
l40              8.9  45.0 181.05  90.5  864   64  L40 ; L40 datasheet, 2023
l40s             8.9  45.0 362.05  91.6  864   64  L40S ; L40S datasheet, 2023
h100-sxm         9.0  79.6  989.4  66.9 3350  900  H100 80GB HBM3 ; H100 whitepaper, 2023
h100-pcie        9.0  79.6    756  51.2 2000  128  H100 PCIe ; H100 whitepaper, 2023
h100-nvl         9.0  93.6  835.5  60.0 3938  128  H100 NVL ; H100 NVL datasheet, 2024
h800             9.0  79.6  989.5  67.0 3350  400  H800 ; H800 datasheet, 2023
h20              9.0  95.6    148  44.0 4000  900  H20 ; H20 as reported, no public datasheet
h200             9.0 140.4  989.5  67.0 4800  900  H200 ; H200 datasheet, 2024
h200-nvl         9.0 140.4  835.5  60.0 4800  128  H200 NVL ; H200 datasheet, 2024
gh200            9.0  95.6  989.5  67.0 4000  900  GH200 480GB | GH200 120GB ; GH200 datasheet, 2024
gh200-144        9.0 143.4  989.5  67.0 4900  900  GH200 144G HBM3e ; GH200 datasheet, 2024
b200            10.0 179.1   2250  75.0 7700 1800  B200 ; HGX B200 datasheet, 2025
gb200           10.0 185.0   2500  80.0 8000 1800  GB200 ; GB200 NVL72 datasheet, 2025
b300            10.3 268.6   2250  75.0 7700 1800  B300 SXM6 AC ; HGX B300 datasheet, 2025
rtx-5090        12.0  31.8  209.5 104.8 1792  128  GeForce RTX 5090 ; RTX Blackwell whitepaper, 2025
rtx-pro-6000    12.0  95.6  503.8 125.0 1792  128  RTX PRO 6000 Blackwell Workstation Edition ; RTX PRO whitepaper, 2025
"""  # noqa: E501


def _read(table: str) -> dict[str, Gpu]:
    gpus: dict[str, Gpu] = {}
    for line in table.splitlines():
        key, capable, memory, tensor, fp32, bandwidth, link, rest = line.split(maxsplit=7)
        names, _, source = rest.partition(" ; ")
        capability = _capability(capable)
        tflops = {"fp16": float(tensor), "fp32": float(fp32)}
        if capability >= (8, 0):
            tflops["bf16"] = float(tensor)
        figures = float(memory), tflops, float(bandwidth), float(link)
        gpus[key] = Gpu(key, capability, *figures, tuple(names.split(" | ")), f"NVIDIA {source}")
    return gpus


def _capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor)


GPUS: Mapping[str, Gpu] = _read(_TABLE)


@dataclass(frozen=True)
class Hardware:
    """The devices of one machine.

    Args:
        count: GPUs, or 1 for a CPU.
        capability: CUDA compute capability (major, minor); None on a CPU.
        bf16: the device computes in bf16 by itself (capability >= 8.0; on a CPU AVX512-BF16
            or AMX), not by emulation.
        memory_gib: of one GPU (the smallest), or of the machine.
        driver: version of the NVIDIA driver.
        interconnect: what joins all GPUs with each other; None for one GPU or if unknown.
        gpu: what is known of the product; None for a product that the table does not have.
    """

    device: Literal["cuda", "cpu"]
    count: int
    name: str
    capability: tuple[int, int] | None
    bf16: bool
    memory_gib: float | None
    driver: str | None = None
    interconnect: Link | None = None
    gpu: Gpu | None = None

    def peak_tflops(self, dtype: str) -> float | None:
        """Dense peak of one device in TFLOP/s for bf16, fp16 or fp32; None if unknown."""
        return self.gpu.tflops.get(dtype) if self.gpu else None


class _Seen(NamedTuple):
    """One GPU as the driver or torch shows it; `divided` into parts (MIG)."""

    name: str
    memory_gib: float | None
    capability: tuple[int, int]
    divided: bool = False


def detect() -> Hardware:
    """This machine: its NVIDIA GPUs, else its CPU.

    Asks nvidia-smi, and where that is not on PATH but there are NVIDIA devices, torch.

    Raises:
        HardwareError: there is a GPU that cannot be used, is divided (MIG), differs, or that
            this image is not for.
    """
    if _all_hidden():
        return _cpu()
    found = (_ask_driver() if shutil.which("nvidia-smi") else _ask_torch()) or _cpu()
    refuse_wrong_image(found, os.environ.get(FLAVOUR))
    return found


def detect_for_training() -> Hardware:
    """The same, and an image for GPUs trains on the CPU only where that is asked for.

    Raises:
        HardwareError: as `detect`, or there is no GPU.
    """
    found, flavour = detect(), os.environ.get(FLAVOUR)
    if found.device == "cpu" and flavour in ("ampere", "volta") and not _all_hidden():
        raise HardwareError(
            f"this image is for {IMAGES[flavour][0]}, and it sees no GPU",
            remedy="start it with its GPUs (docker run --gpus all, podman run --device "
            f"nvidia.com/gpu=all, apptainer run --nv) on a machine that has some, {ON_CPU}",
        )
    return found


def refuse_wrong_image(hardware: Hardware, flavour: str | None) -> None:
    """An image has the kernels of some GPUs; on others a job would fail, or be slow in silence.

    Args:
        flavour: what the image says of itself; None outside of the images.

    Raises:
        HardwareError: there is a GPU, and the image is for others.
    """
    if flavour is None or hardware.capability is None:
        return
    if flavour not in IMAGES:
        raise HardwareError(
            f"{FLAVOUR} is {flavour!r}, and the images are {', '.join(IMAGES)}",
            remedy="unset it: an image says by it which GPUs it is for",
        )
    capable = hardware.capability
    right = "ampere" if capable >= (8, 0) else "volta" if capable >= (7, 0) else None
    if right == flavour:
        return
    remedy = f"no image is for it: compute capability 7.0 or newer is needed; {ON_CPU[3:]}"
    if right is not None:
        remedy = f"use the image for {IMAGES[right][0]} (from {IMAGES[right][1]}), {ON_CPU}"
    raise HardwareError(
        f"this image is for {IMAGES[flavour][0]}; the GPU is {hardware.name} "
        f"(sm_{10 * capable[0] + capable[1]})",
        remedy=remedy,
    )


def unusable(hardware: Hardware, torch: str, cuda: str | None) -> HardwareError:
    """The refusal of a GPU that torch cannot use.

    Args:
        torch, cuda: versions of torch, and of the CUDA that it is built for.
    """
    what = f"this machine has {hardware.name}, but torch {torch} cannot use it"
    if cuda is None:
        return HardwareError(
            f"{what}: it is built without CUDA", remedy=f"install a CUDA build of torch, {ON_CPU}"
        )
    found, needed = hardware.driver, DRIVERS.get(int(cuda.partition(".")[0]))
    if found is not None and needed is not None and int(found.partition(".")[0]) < needed:
        older = ", use torch 2.10, which runs on 525 and newer" if needed > DRIVERS[12] else ""
        return HardwareError(
            f"{what}: the driver is {found}, and CUDA {cuda} needs {needed} or newer",
            remedy=f"have the driver updated{older}, {ON_CPU}",
        )
    return HardwareError(
        what,
        remedy=f"install a CUDA build of torch that fits the driver {found or ''}".rstrip()
        + f", {ON_CPU}",
    )


def named(key: str, count: int) -> Hardware:
    """`count` GPUs of the table on one machine, which need not be this one.

    Raises:
        HardwareError: the table has no such key, or fewer than one GPU is asked for.
    """
    wanted = key.lower()
    if wanted not in GPUS:
        near = [known for known in GPUS if wanted and wanted in known]
        near = near or difflib.get_close_matches(wanted, GPUS, n=1, cutoff=0.7)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise HardwareError(
            f"no figures for a GPU called {key!r}{hint}", remedy=f"known are {', '.join(GPUS)}"
        )
    if count < 1:
        raise HardwareError(f"{count} GPUs are asked for", remedy="ask for at least 1")
    gpu = GPUS[wanted]
    seen = [_Seen(gpu.name, gpu.memory_gib, gpu.capability)] * count
    return _machine(seen, interconnect=gpu.link if count > 1 else None)


def find(name: str, memory_gib: float | None) -> Gpu | None:
    """The product of a driver's name and memory; another memory is another product."""
    plain = name.removeprefix("NVIDIA ")
    for gpu in GPUS.values():
        near = memory_gib is not None and abs(memory_gib / gpu.memory_gib - 1) <= SAME_MEMORY
        if near and plain in gpu.names:
            return gpu
    return None


def _machine(
    seen: Sequence[_Seen], *, driver: str | None = None, interconnect: Link | None = None
) -> Hardware:
    for gpu in seen:
        if gpu.divided:
            raise HardwareError(
                f"{gpu.name} is divided into parts (MIG), which are not supported",
                remedy="use whole GPUs: switch MIG off (nvidia-smi -mig 0) or choose others",
            )
    if len({gpu.capability for gpu in seen}) > 1:
        kinds = (f"{gpu.name} (sm_{gpu.capability[0]}.{gpu.capability[1]})" for gpu in seen)
        raise HardwareError(
            "the GPUs differ: " + ", ".join(kinds),
            remedy="choose GPUs of one kind with CUDA_VISIBLE_DEVICES "
            "(and CUDA_DEVICE_ORDER=PCI_BUS_ID, to count them as nvidia-smi does)",
        )
    products = {find(gpu.name, gpu.memory_gib) for gpu in seen}
    memories = [gpu.memory_gib for gpu in seen if gpu.memory_gib is not None]
    return Hardware(
        device="cuda",
        count=len(seen),
        name=" + ".join(dict.fromkeys(gpu.name for gpu in seen)),
        capability=seen[0].capability,
        bf16=seen[0].capability >= (8, 0),
        memory_gib=min(memories) if len(memories) == len(seen) else None,
        driver=driver,
        interconnect=interconnect,
        gpu=products.pop() if len(products) == 1 else None,
    )


def _ask_driver() -> Hardware | None:
    fields = "name,memory.total,compute_cap,uuid,driver_version,mig.mode.current"
    said, rows = _nvidia_smi(f"--query-gpu={fields}", "--format=csv,noheader,nounits"), []
    if said.returncode == 0:
        rows = [[cell.strip() for cell in line.split(",")] for line in said.stdout.splitlines()]
    if not rows or any(len(row) != 6 or not re.match(r"\d+\.\d", row[2]) for row in rows):
        if not (_nodes() or _on_pci_bus()):
            return None  # a login node, say, that has the tools alone
        raise HardwareError(
            f"nvidia-smi failed: {(said.stderr or said.stdout).strip() or 'it shows no GPU'}",
            remedy=f"mend the driver (525 or newer), {ON_CPU}",
        )
    chosen = _visible([row[3] for row in rows])
    if not chosen:
        return None
    seen = []
    for name, mib, capable, _, _, mig in (rows[index] for index in chosen):
        memory = int(mib) / 1024 if mib.isdigit() else None  # "[N/A]" where the host shares it
        seen.append(_Seen(name, memory, _capability(capable), mig == "Enabled"))
    return _machine(seen, driver=rows[chosen[0]][4], interconnect=_interconnect(chosen))


def _nvidia_smi(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["nvidia-smi", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer within {PATIENCE:g} s")
    except OSError as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _interconnect(chosen: Sequence[int]) -> Link | None:
    """nvlink if it joins all chosen GPUs, directly or through each other, as NCCL's rings do."""
    if len(chosen) < 2:
        return None
    matrix = {}
    for line in _nvidia_smi("topo", "-m").stdout.splitlines():
        label, *cells = line.split() or [""]
        if re.fullmatch(r"GPU\d+", label):  # the head may match too; its row comes after it
            matrix[int(label[3:])] = cells
    if any(len(matrix.get(index, [])) <= max(chosen) for index in chosen):
        return None
    joined, new = set[int](), {chosen[0]}
    while new:
        joined |= new
        new = {b for a in joined for b in chosen if matrix[a][b].startswith("NV")} - joined
    return "nvlink" if joined == set(chosen) else "pcie"


def _all_hidden() -> bool:
    """CUDA_VISIBLE_DEVICES begins with nothing that names a GPU: empty, -1, NoDevFiles."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return chosen is not None and not re.match(r"\s*(\d|GPU-|MIG-)", chosen)


def _visible(uuids: Sequence[str]) -> list[int]:
    """Apply CUDA_VISIBLE_DEVICES as the driver does: the list ends at the first unknown entry."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return list(range(len(uuids)))
    visible = []
    for entry in (item.strip() for item in chosen.split(",")):
        if entry.isdigit() and int(entry) < len(uuids):
            visible.append(int(entry))
        elif entry and (those := [i for i, uuid in enumerate(uuids) if uuid.startswith(entry)]):
            visible.append(those[0])
        elif entry.startswith(("MIG-", "GPU-")):
            raise HardwareError(
                f"CUDA_VISIBLE_DEVICES names {entry}, which is not a whole GPU of this machine",
                remedy="name GPUs by index; parts of a GPU (MIG) are not supported",
            )
        else:
            break
    return visible


def _nodes() -> list[str]:
    """NVIDIA's device nodes, and that of WSL, which is there with GPUs of any maker."""
    names = os.listdir(DEVICES) if DEVICES.is_dir() else []
    return sorted(name for name in names if re.fullmatch(r"nvidia(\d+|ctl)|dxg", name))


def _on_pci_bus() -> bool:
    """A display device (class 0x03xxxx) of NVIDIA (vendor 0x10de) is plugged in."""
    for device in PCI.glob("*"):
        try:
            vendor, kind = ((device / name).read_text() for name in ("vendor", "class"))
        except OSError:
            continue  # unplugged meanwhile
        if vendor.strip() == "0x10de" and kind.startswith("0x03"):
            return True
    return False


def _ask_torch() -> Hardware | None:
    nodes = _nodes()
    if not nodes:
        return None
    try:
        loaded = sys.modules.get("torch")
        seen = torch_gpus(loaded) if loaded else _torch_elsewhere()
    except (RuntimeError, AssertionError) as error:  # without CUDA torch fails an assertion
        if nodes == ["dxg"]:
            return None
        raise HardwareError(
            f"{DEVICES / nodes[-1]} is there, nvidia-smi is not on PATH, "
            f"and torch cannot use the GPU: {error}",
            remedy="put nvidia-smi on PATH, install a CUDA build of torch that fits the driver, "
            + ON_CPU,
        ) from error
    version = KERNEL_DRIVER.read_text() if KERNEL_DRIVER.exists() else ""
    driver = re.search(r"\b\d{3}\.\d[\d.]*", version)
    return _machine(seen, driver=driver[0] if driver else None)


def torch_gpus(torch: Any) -> list[_Seen]:
    """The GPUs that torch sees, of which CUDA has taken away what is hidden."""
    torch.cuda.init()
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        _Seen(gpu.name, gpu.total_memory / 2**30, (gpu.major, gpu.minor), " MIG " in gpu.name)
        for gpu in found
    ]


def _torch_elsewhere() -> list[_Seen]:
    """Ask torch in a process of its own: importing it takes seconds, and CUDA stays with it."""
    code = "import json, torch; from sft_job.hardware import torch_gpus as ask; "
    command = [sys.executable, "-c", code + "print(json.dumps(ask(torch)))"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=5 * PATIENCE)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no answer within {5 * PATIENCE:g} s") from None
    if said.returncode:
        raise RuntimeError(said.stderr.strip().rpartition("\n")[2])
    rows = json.loads(said.stdout.splitlines()[-1])
    return [_Seen(name, memory, (major, minor), mig) for name, memory, (major, minor), mig in rows]


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
