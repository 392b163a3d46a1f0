"""The attention kernels and the choice among them. The functions are in `varlen.py`."""

from __future__ import annotations

from dataclasses import dataclass

from sft_job.hardware import Hardware


@dataclass(frozen=True)
class Choice:
    """A value together with the reason why it was chosen."""

    value: str
    reason: str


@dataclass(frozen=True)
class Kernel:
    name: str
    devices: tuple[str, ...]
    description: str


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel(
            "sdpa",
            ("cuda", "cpu"),
            "torch scaled_dot_product_attention, each sample of a row by itself",
        ),
    )
}


def choose(asked: str, hardware: Hardware) -> Choice:
    """The kernel for this hardware; only `auto` chooses."""
    if asked != "auto":
        return Choice(asked, "asked for")
    if hardware.device == "cpu":
        return Choice("sdpa", "CPU: each sample attended by itself")
    return Choice("sdpa", "the one kernel of this version")
