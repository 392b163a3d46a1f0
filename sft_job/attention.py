"""The attention kernels and the choice among them. The functions are in `varlen.py`."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sft_job.errors import HardwareError, ModelError
from sft_job.hardware import Hardware


@dataclass(frozen=True)
class Choice:
    """A value together with the reason why it was chosen."""

    value: str
    reason: str


@dataclass(frozen=True)
class Package:
    """An installed Python distribution.

    Args:
        fault: why it cannot be imported; None when it can, or when nobody has tried.
    """

    version: str
    fault: str | None = None


@dataclass(frozen=True)
class Heads:
    """The attention shape of a model, and the share of attention weights that it drops."""

    dim: int
    query: int
    key: int
    dropout: float = 0.0


@dataclass(frozen=True)
class Kernel:
    """One row of the table.

    Args:
        architectures: compute capabilities (80 is 8.0) that it has device code for; empty
            means whatever torch runs on.
        dtypes: of queries, keys and values.
        head_dim: the largest head dimension with a backward pass.
        multiple: the head dimension is a multiple of this.
        distribution, module, minimum: the Python package that it comes in, and from which
            version on; None for what is a part of torch from the first supported version on.
        packs: several samples share one row and never see each other.
        drops: it can drop attention weights in training.
        shares_keys: grouped-query attention reads one key for several queries; otherwise keys
            and values are repeated before the call.
    """

    name: str
    description: str
    architectures: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")
    head_dim: int = 1024
    multiple: int = 1
    distribution: str | None = None
    module: str | None = None
    minimum: str | None = None
    packs: bool = True
    drops: bool = True
    shares_keys: bool = True


HALF = ("bf16", "fp16")
LIGER = "liger-kernel"

# In the order in which `auto` prefers them. Architectures: flash-attn is built for sm_80, 90
# and 100, and cubins of sm_80 run on 86 and 89; torch's wheels carry its own flash kernel for
# 80 to 120; xformers calls torch's cutlass kernels, whose last architecture is 90.
KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel(
            "flash_attention_3",
            "flash-attn 3, Hopper's own",
            architectures=(90,),
            dtypes=HALF,
            head_dim=256,
            multiple=8,
            distribution="flash-attn-3",
            module="flash_attn_interface",
            minimum="3.0",
            drops=False,
        ),
        Kernel(
            "flash_attention_2",
            "flash-attn 2",
            architectures=(80, 86, 89, 90, 100),
            dtypes=HALF,
            head_dim=256,
            multiple=8,
            distribution="flash-attn",
            module="flash_attn",
            # The first whose kernels are torch operators, which selective activation
            # checkpointing needs to see.
            minimum="2.7",
        ),
        Kernel(
            "torch_varlen",
            "torch's own variable-length flash attention",
            architectures=(80, 86, 89, 90, 100, 120),
            dtypes=HALF,
            head_dim=256,
            multiple=8,
            distribution="torch",
            minimum="2.10",
            drops=False,
        ),
        Kernel(
            "xformers",
            "xformers memory-efficient attention",
            architectures=(70, 75, 80, 86, 89, 90),
            head_dim=512,
            multiple=8,
            distribution="xformers",
            module="xformers.ops",
            minimum="0.0.34",  # the first for torch 2.10
            shares_keys=False,
        ),
        Kernel("sdpa", "torch scaled_dot_product_attention, each sample of a row by itself"),
        Kernel("own", "the model's own attention, one sample per forward pass", packs=False),
    )
}

# What `auto` may take, best first. A GPU that is in no list gets sdpa, which runs everywhere.
PREFERRED = {
    70: ("xformers",),
    75: ("xformers",),
    80: ("flash_attention_2", "torch_varlen"),
    86: ("flash_attention_2", "torch_varlen"),
    89: ("flash_attention_2", "torch_varlen"),
    90: ("flash_attention_3", "flash_attention_2", "torch_varlen"),
    100: ("flash_attention_2", "torch_varlen"),
    120: ("torch_varlen",),
}

# The packages of the images, for plans of machines that are not this one.
IMAGES = {
    "ampere": {
        "torch": Package("2.10.0"),
        "flash-attn": Package("2.8.3.post2"),
        LIGER: Package("0.8.5"),
    },
    "volta": {"torch": Package("2.10.0"), "xformers": Package("0.0.35")},
}


def image_packages(hardware: Hardware) -> Mapping[str, Package]:
    """The packages of the image that is made for this hardware."""
    old = hardware.capability is not None and hardware.capability < (8, 0)
    return IMAGES["volta" if old else "ampere"]


def installed(*, imported: Iterable[str] = ()) -> dict[str, Package]:
    """The kernel packages of this environment, by distribution.

    Args:
        imported: distributions that are also imported: one that was built for another torch
            fails only then. Costs the import of torch.
    """
    modules = {k.distribution: k.module for k in KERNELS.values() if k.distribution}
    modules[LIGER] = "liger_kernel.ops.fused_linear_cross_entropy"
    found = {}
    for distribution, module in modules.items():
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        fault = _import_fault(module) if distribution in imported and module else None
        found[distribution] = Package(version, fault)
    return found


def candidates(asked: str, hardware: Hardware) -> set[str]:
    """The distributions that the choices for this hardware look at."""
    number = sm(hardware)
    names = preferred(number) if asked == "auto" else (asked,)
    found = {d for d in (KERNELS[name].distribution for name in names) if d}
    return found | ({LIGER} if number is not None and number >= 80 else set())


def _import_fault(module: str) -> str | None:
    """Why a module cannot be imported. Broken native code raises anything at all, and whatever
    it raises is the reason why its kernel is passed over or refused."""
    try:
        importlib.import_module(module)
    except Exception as error:
        for name in [name for name in sys.modules if name.split(".")[0] == module.split(".")[0]]:
            del sys.modules[name]  # half imported
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".strip()
    return None


def sm(hardware: Hardware) -> int | None:
    """The architecture as NVIDIA numbers it: 80 for compute capability 8.0; None on a CPU."""
    if hardware.capability is None:
        return None
    major, minor = hardware.capability
    return 10 * major + minor


def base(number: int | None, architectures: Iterable[int]) -> int | None:
    """Whose device code a GPU runs: of its own architecture, or of the nearest older one with the
    same major number (CUDA C++ Programming Guide, "Binary Compatibility"); None without any."""
    if number is None:
        return None
    fitting = [a for a in architectures if a // 10 == number // 10 and a <= number]
    return max(fitting, default=None)


def preferred(number: int | None) -> tuple[str, ...]:
    """The kernels that `auto` may take on an architecture, best first."""
    return PREFERRED.get(base(number, PREFERRED) or 0, ())


def choose(
    asked: str,
    hardware: Hardware,
    *,
    precision: str,
    heads: Heads | None,
    packages: Mapping[str, Package],
    remote_code: bool = False,
) -> Choice:
    """The kernel for this hardware and model; only `auto` chooses, a name is done or refused.

    Args:
        precision: the dtype of the computation.
        heads: None while the model is not known; its shape then rules nothing out.
        packages: as from `installed`, or `image_packages`.
        remote_code: the model brings its own Python code, which knows no other attention.

    Raises:
        HardwareError, ModelError: the kernel that is asked for cannot run here.
    """
    if asked == "auto":
        return _best(hardware, precision, heads, packages, remote_code)
    kernel = KERNELS[asked]
    if remote_code and kernel.packs:
        raise ModelError(
            f"model.attention is {asked}, but the model brings its own Python code, whose "
            "attention cannot be replaced",
            remedy="use model.attention=own or auto: one sample per forward pass",
        )
    if obstacle := _obstacle(kernel, hardware, precision, heads, packages):
        instead = _best(hardware, precision, heads, packages, remote_code)
        raise HardwareError(
            f"model.attention is {asked}, but {obstacle}",
            remedy=f"use model.attention=auto, which takes {instead.value} here"
            + (f", or install {kernel.distribution}" if "install" in obstacle else ""),
        )
    return Choice(asked, f"asked for; {_ground(kernel, hardware, precision, packages)}")


def _best(
    hardware: Hardware,
    precision: str,
    heads: Heads | None,
    packages: Mapping[str, Package],
    remote_code: bool,
) -> Choice:
    if remote_code:
        return Choice("own", "the model brings its own code: one sample per forward pass")
    number = sm(hardware)
    if number is None:
        return Choice("sdpa", "CPU: each sample attended by itself")
    if not preferred(number):
        return Choice("sdpa", f"sm_{number} is not in the table of kernels; this one runs anywhere")
    passed_over: list[str] = []
    for name in preferred(number):
        obstacle = _obstacle(KERNELS[name], hardware, precision, heads, packages)
        if obstacle is None:
            reasons = [_ground(KERNELS[name], hardware, precision, packages), *passed_over]
            return Choice(name, "; ".join(reasons))
        passed_over.append(f"not {name}: {obstacle}")
    return Choice("sdpa", "; ".join(["each sample attended by itself", *passed_over]))


def _ground(
    kernel: Kernel, hardware: Hardware, precision: str, packages: Mapping[str, Package]
) -> str:
    number = sm(hardware)
    words = [f"sm_{number}" if number else "CPU", precision]
    if kernel.distribution is not None and kernel.distribution in packages:
        words.append(f"{kernel.distribution} {packages[kernel.distribution].version}")
    return ", ".join(words)


def _obstacle(
    kernel: Kernel,
    hardware: Hardware,
    precision: str,
    heads: Heads | None,
    packages: Mapping[str, Package],
) -> str | None:
    """Why a kernel cannot run, or None."""
    number = sm(hardware)
    if kernel.architectures and base(number, kernel.architectures) is None:
        here = f"{hardware.name} is sm_{number}" if number else f"{hardware.name} is not a GPU"
        return f"{here}, and it runs on {', '.join(f'sm_{a}' for a in kernel.architectures)}"
    if precision not in kernel.dtypes:
        return f"the computation is {precision}, and it knows {' and '.join(kernel.dtypes)}"
    if heads is not None and (heads.dim > kernel.head_dim or heads.dim % kernel.multiple):
        return (
            f"the model's head dimension is {heads.dim}, and it takes multiples of "
            f"{kernel.multiple} up to {kernel.head_dim}"
        )
    if heads is not None and heads.dropout and not kernel.drops:
        return f"the model drops attention weights ({heads.dropout:g}), which it cannot do"
    if kernel.distribution is None:
        return None
    package = packages.get(kernel.distribution)
    if package is None:
        return f"{kernel.distribution} is not installed"
    if kernel.minimum and _parts(package.version) < _parts(kernel.minimum):
        return (
            f"{kernel.distribution} {package.version} is installed, and {kernel.minimum} is needed"
        )
    if package.fault:
        return (
            f"the installed {kernel.distribution} {package.version} is broken ({package.fault}); "
            f"it must be built for this torch"
        )
    return None


def _parts(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.8.3.post2+cu12 -> (2, 8, 3)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
