#!/usr/bin/env python3
"""What an image must hold, checked while it is built: no GPU is needed.

    python docker/check_image.py ampere|volta|cpu [--lock FILE]

Prints what was checked, and on standard error every fault, one line each; ends with 1 if there
are any. WITH_FLASH_ATTN=0 and WITH_FA3=1 in the environment mean what they mean to the
Dockerfile. The GPU itself is looked at when a job starts (`sft_job.hardware`).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import mmap
import os
import re
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The GPUs that each image is for: sm_80 A100, 90 H100, 100 B200; 70 V100, 75 T4.
ARCHITECTURES: Mapping[str, tuple[int, ...]] = {
    "ampere": (80, 90, 100),
    "volta": (70, 75),
    "cpu": (),
}
# A GPU of each kind that an image is for, by its key in sft_job.hardware.
GPUS = {"ampere": ("a100-80", "h100-sxm", "b200"), "volta": ("v100-32", "t4")}
# The project itself, and the installer where an image keeps one.
BESIDE_THE_LOCK = {"sft-job", "pip"}
DEEPSPEED_OPS = {
    "fused_adam": "deepspeed.ops.adam.fused_adam_op",
    "utils": "deepspeed.ops.utils_op",
}
FATBIN, ELF = 0xBA55ED50, 2


# --- packages ----------------------------------------------------------------------------


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(file: Path) -> dict[str, str]:
    """Version by canonical name."""
    pins = dict(re.findall(r"(?m)^([A-Za-z0-9][\w.-]*)==(\S+)", file.read_text(encoding="utf-8")))
    if not pins:
        raise SystemExit(f"{file} has no pins\n  -> make it with docker/lock.sh")
    return {canonical(name): version for name, version in pins.items()}


def installed_packages() -> dict[str, str]:
    found = importlib.metadata.distributions()
    return {canonical(d.metadata["Name"]): d.version for d in found}


def package_faults(
    lock: Mapping[str, str],
    installed: Mapping[str, str],
    *,
    left_out: frozenset[str] = frozenset(),
    added: frozenset[str] = frozenset(),
) -> list[str]:
    """What differs between lock and environment.

    Args:
        left_out: locked packages that this build does without, and must not have.
        added: packages that this build has beside the lock, and must have.
    """
    faults = []
    for name, version in sorted(lock.items()):
        here = installed.get(name)
        if name in left_out:
            if here is not None:
                faults.append(f"{name} {here} is installed, and this build is without it")
        elif here is None:
            faults.append(f"{name} is not installed, the lock has {version}")
        elif here != version:
            faults.append(f"{name} {here} is installed, the lock has {version}")
    faults += [
        f"{name} is not installed, and this build is with it" for name in added - set(installed)
    ]
    extra = set(installed) - set(lock) - added - BESIDE_THE_LOCK
    faults += [
        f"{name} {installed[name]} is installed, the lock has none" for name in sorted(extra)
    ]
    return faults


# --- device code -------------------------------------------------------------------------


def missing_architectures(wanted: tuple[int, ...], flags: str) -> list[str]:
    """Of `sm_70 sm_80 compute_90`, as torch says it, what is wanted and not there. Exact: device
    code of an older minor number would run too, but then the build is another than is meant."""
    return [f"sm_{number}" for number in wanted if f"sm_{number}" not in flags.split()]


def device_code(library: Path) -> set[int]:
    """The architectures of the machine code in a shared library; empty for plain C++.

    Reads the containers that nvcc embeds (fat binaries): a header of magic, version, header size
    and size of the rest, then entries of kind (2: machine code), version, header size and size,
    with the architecture at byte 28. Checked against cuobjdump --list-elf.
    """
    architectures = set()
    with (
        open(library, "rb") as file,
        contextlib.closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) as data,
    ):
        magic = struct.pack("<I", FATBIN)
        at = data.find(magic)
        while at >= 0:
            architectures.update(_entries(data, at))
            at = data.find(magic, at + 4)
    return architectures


def _entries(data: mmap.mmap, at: int) -> Iterator[int]:
    """Architectures of one fat binary; nothing where the magic number stands by chance."""
    if at + 16 > len(data):
        return
    _, version, header, size = struct.unpack_from("<IHHQ", data, at)
    end = at + header + size
    if version != 1 or header != 16 or end > len(data):
        return
    at += header
    while at + 64 <= end:
        kind, _, header, size = struct.unpack_from("<HHIQ", data, at)
        if header < 32 or at + header + size > end:
            return
        if kind == ELF:
            yield struct.unpack_from("<I", data, at + 28)[0]
        at += header + size


def code_faults(name: str, library: Path, wanted: tuple[int, ...]) -> list[str]:
    found = device_code(library)
    missing = [f"sm_{number}" for number in wanted if number not in found]
    if not missing:
        return []
    has = ", ".join(f"sm_{number}" for number in sorted(found)) or "no device code"
    return [f"{name} is built without {', '.join(missing)}: {library} has {has}"]


def has_bf16_adam(library: Path) -> bool:
    """FusedAdam's kernel is instantiated for bf16. The host code registers each kernel under its
    mangled name, so that the name is there even where the device code is compressed. DeepSpeed
    0.19.8 always does it; this is for a release that goes by the architectures."""
    return re.search(rb"AdamFunctorIN3c108BFloat16E", library.read_bytes()) is not None


# --- what can be tried without a GPU ------------------------------------------------------


def library_of(module: str) -> Path | None:
    """Where a compiled module is, without importing it."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None


def import_fault(module: str) -> str | None:
    """Code that was built for another torch raises ImportError: undefined symbol."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} cannot be imported: {str(error).splitlines()[0]}"
    return None


def torch_faults(flavour: str) -> list[str]:
    import torch

    if flavour == "cpu":
        version = torch.version.cuda
        return [f"torch {torch.__version__} is built for CUDA {version}"] if version else []
    if torch.version.cuda is None:
        return [f"torch {torch.__version__} is built without CUDA"]
    # torch.cuda.get_arch_list() is empty where there is no GPU.
    flags = torch._C._cuda_getArchFlags()
    missing = missing_architectures(ARCHITECTURES[flavour], flags)
    return (
        [f"torch {torch.__version__} has no code for {', '.join(missing)}: {flags}"]
        if missing
        else []
    )


def kernel_faults(flavour: str, *, flash_attn: bool, fa3: bool) -> list[str]:
    """The attention packages, and that a job on each GPU of the flavour chooses them."""
    faults = []
    if flavour == "ampere" and flash_attn:
        fault = import_fault("flash_attn")  # imports flash_attn_2_cuda
        library = library_of("flash_attn_2_cuda")
        if fault or library is None:
            faults.append(fault or "flash_attn_2_cuda is not installed")
        else:
            faults += code_faults("flash-attn", library, ARCHITECTURES[flavour])
    if flavour == "volta":
        faults += xformers_faults()
    return faults or choice_faults(flavour, flash_attn=flash_attn, fa3=fa3)


def xformers_faults() -> list[str]:
    fault = import_fault("xformers.ops.fmha.cutlass")
    if fault:
        return [fault]
    from xformers.ops.fmha import cutlass

    operators = (cutlass.FwOp, cutlass.BwOp)
    return [f"xformers' {op.NAME} is not available" for op in operators if not op.is_available()]


def choice_faults(flavour: str, *, flash_attn: bool, fa3: bool) -> list[str]:
    from sft_job import attention, hardware

    faults = []
    for key in GPUS.get(flavour, ()):
        expected = "xformers" if flavour == "volta" else "torch_varlen"
        if flavour == "ampere" and flash_attn:
            expected = "flash_attention_2"
        if fa3 and key == "h100-sxm":
            expected = "flash_attention_3"
        gpu = hardware.named(key, 1)
        precision = "bf16" if gpu.bf16 else "fp16"
        heads = attention.Heads(dim=128, query=32, key=32)
        packages = attention.installed(imported=attention.candidates("auto", gpu))
        chosen = attention.choose("auto", gpu, precision=precision, heads=heads, packages=packages)
        if chosen.value != expected:
            faults.append(
                f"on {key} a job would use {chosen.value}, not {expected}: {chosen.reason}"
            )
    return faults


def deepspeed_faults(flavour: str) -> list[str]:
    fault = import_fault("deepspeed")
    if fault or flavour == "cpu":
        return [fault] if fault else []
    import torch
    from deepspeed.git_version_info import accelerator_name, installed_ops, torch_info

    faults = []
    if accelerator_name != "cuda":
        faults.append(
            f"DeepSpeed was built for {accelerator_name}: build it with DS_ACCELERATOR=cuda"
        )
    here = (
        ".".join(torch.__version__.split(".")[:2]),
        ".".join((torch.version.cuda or "none").split(".")[:2]),
    )
    built = torch_info["version"], torch_info["cuda_version"]
    if built != here:
        faults.append(
            f"DeepSpeed's ops were built for torch {built[0]} and CUDA {built[1]}, "
            f"here are torch {here[0]} and CUDA {here[1]}"
        )
    for op, module in DEEPSPEED_OPS.items():
        library = library_of(module)
        if not installed_ops.get(op) or library is None:
            faults.append(
                f"DeepSpeed's op {op} is not built: build it with DS_BUILD_{op.upper()}=1"
            )
            continue
        fault = import_fault(module)
        faults += [fault] if fault else []
        if op == "fused_adam":
            faults += code_faults("DeepSpeed's fused_adam", library, ARCHITECTURES[flavour])
            if flavour == "ampere" and not has_bf16_adam(library):
                faults.append(f"DeepSpeed's fused_adam is built without bf16: {library}")
    return faults


# -----------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("flavour", choices=ARCHITECTURES)
    parser.add_argument("--lock", type=Path, help="default: locks/FLAVOUR.txt beside this file")
    args = parser.parse_args()
    flavour = args.flavour
    flash_attn = flavour == "ampere" and os.environ.get("WITH_FLASH_ATTN", "1") != "0"
    fa3 = flavour == "ampere" and os.environ.get("WITH_FA3", "0") == "1"

    lock = read_lock(args.lock or HERE / "locks" / f"{flavour}.txt")
    # Before anything is imported: setuptools puts its own packages on the path when it is.
    installed = installed_packages()
    left_out = frozenset() if flash_attn else frozenset({"flash-attn"})
    added = frozenset({"flash-attn-3"}) if fa3 else frozenset()
    checks = {
        f"packages equal the lock ({len(lock)} pins)": package_faults(
            lock, installed, left_out=left_out, added=added
        ),
        "torch has code for the image's GPUs": torch_faults(flavour),
        "attention kernels import and are chosen": kernel_faults(
            flavour, flash_attn=flash_attn, fa3=fa3
        ),
        "DeepSpeed's ops": deepspeed_faults(flavour),
    }
    for check, faults in checks.items():
        print(f"{check}: {'ok' if not faults else 'wrong'}")
        for fault in faults:
            print(f"error: {fault}", file=sys.stderr)
    return 1 if any(checks.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
