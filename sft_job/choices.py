"""The single decisions of a plan: precision, attention kernel, loss, positions. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sft_job import attention as kernels
from sft_job.attention import Choice, Heads, Package
from sft_job.errors import HardwareError, ModelError
from sft_job.hardware import Hardware
from sft_job.prepared import ModelFacts
from sft_job.schema import JobConfig, LinearRope


def precision(config: JobConfig, hardware: Hardware) -> Choice:
    asked = config.train.precision
    if config.train.extra.get("tf32") is True and (hardware.capability or (0, 0)) < (8, 0):
        raise HardwareError(  # else torch does, in the ranks
            f"train.extra.tf32 is true, but {hardware.name} has no TF32 (GPUs of compute "
            "capability 8.0 and newer have)",
            remedy="leave it out",
        )
    old = hardware.device == "cuda" and not hardware.bf16
    if asked == "bf16" and old:
        raise HardwareError(
            f"train.precision: bf16, but {hardware.name} has no bf16 arithmetic "
            "(compute capability 8.0 or newer has; torch would emulate it)",
            remedy="use train.precision=fp16 or auto",
        )
    if asked != "auto":
        return Choice(asked, "asked for")
    if hardware.bf16:
        return Choice("bf16", f"{hardware.name} computes in bf16")
    if old:
        return Choice(
            "fp16", f"{hardware.name} has no bf16 arithmetic; the loss is scaled dynamically"
        )
    return Choice("fp32", f"{hardware.name} has no bf16 arithmetic")


def attention(
    config: JobConfig,
    hardware: Hardware,
    precision: str,
    facts: ModelFacts | None,
    packages: Mapping[str, Package],
) -> Choice:
    heads = None
    if facts is not None and facts.heads is not None:
        dim = facts.head_dim or facts.hidden // facts.heads
        heads = Heads(dim, facts.heads, facts.key_heads or facts.heads)
    kernel = kernels.choose(
        config.model.attention,
        hardware,
        precision=precision,
        heads=heads,
        packages=packages,
        remote_code=facts is not None and facts.remote_code,
    )
    if not kernels.KERNELS[kernel.value].packs and config.data.batching == "rows":
        raise ModelError(
            "data.batching: rows packs samples into rows, and attention kernel "
            f"{kernel.value} takes one sample per forward pass ({kernel.reason})",
            remedy="use data.batching=conversations",
        )
    return kernel


def liger_obstacle(
    hardware: Hardware, precision: str, packages: Mapping[str, Package]
) -> str | None:
    """Why Liger's loss is not for this machine and precision, or None.

    Its kernel needs Triton, which needs capability 8.0. In fp16 it narrows the gradients of the
    logits as they are: a probability below 3e-8 becomes 0 and pushes nothing away
    (tests/test_loss.py counts them). `loss.chunked` shifts them by 2^12 before; Liger's sums over
    a chunk's tokens are fp16 products, which the shift would overflow.
    """
    number = kernels.sm(hardware)
    package = packages.get(kernels.LIGER)
    if number is None or number < 80:
        return f"Triton needs a GPU of capability 8.0, {hardware.name} is not one"
    if precision == "fp16":
        return "in fp16 it loses the gradients of small probabilities"
    if package is None:
        return f"{kernels.LIGER} is not installed"
    if package.fault:
        return f"the installed {kernels.LIGER} {package.version} is broken ({package.fault})"
    return None


def cross_entropy(
    config: JobConfig, hardware: Hardware, precision: str, packages: Mapping[str, Package]
) -> Choice:
    asked, obstacle = config.model.cross_entropy, liger_obstacle(hardware, precision, packages)
    if asked == "liger" and obstacle:
        raise HardwareError(
            f"model.cross_entropy is liger, but {obstacle}", remedy="use model.cross_entropy=auto"
        )
    if asked == "torch":
        return Choice("torch", "asked for")
    if obstacle:
        return Choice("torch", f"not liger: {obstacle}")
    ground = (
        f"{kernels.LIGER} {packages[kernels.LIGER].version}: one pass over each chunk of logits"
    )
    return Choice("liger", f"asked for; {ground}" if asked == "liger" else ground)


def rope(config: JobConfig, facts: ModelFacts | None) -> tuple[Choice, float | None]:
    """The RoPE decision: a reason, and the linear factor to set (None: leave as it is)."""
    asked, seq_len = config.model.rope, config.data.seq_len
    if facts is None:
        return Choice("unknown", "the model's config.json is not here yet"), None
    native, existing = facts.context, facts.rope
    if existing is not None:
        kind = str(existing.get("rope_type") or existing.get("type"))
        factor = float(existing.get("factor") or 1)
        original = existing.get("original_max_position_embeddings")
        # Some families state the scaled context, some the original one.
        scaled = native if original and native > original else int((original or native) * factor)
        same = isinstance(asked, LinearRope) and (kind, factor) == ("linear", asked.factor)
        if (asked == "auto" or same) and scaled >= seq_len:
            return Choice(f"{kind} x{factor:g}", f"the model's own, good for {scaled:,}"), None
        raise ModelError(
            f"the model already scales its positions ({kind} x{factor:g}, context {scaled:,}) "
            f"and data.seq_len {seq_len:,} with model.rope {_show_rope(asked)} does not fit that",
            where=config.model.path,
            remedy=f"use model.rope=auto with data.seq_len <= {scaled}, or an unscaled base model",
        )
    if isinstance(asked, LinearRope):
        if asked.factor * native < seq_len:
            raise ModelError(
                f"model.rope factor {asked.factor:g} x native context {native:,} is less than "
                f"data.seq_len {seq_len:,}",
                where=config.model.path,
                remedy=f"use a factor of at least {math.ceil(seq_len / native)}, or rope: auto",
            )
        return Choice(f"linear x{asked.factor:g}", "asked for"), asked.factor
    if seq_len <= native:
        return Choice("none", f"data.seq_len fits the native context of {native:,}"), None
    if asked == "none":
        raise ModelError(
            f"data.seq_len {seq_len:,} is longer than the native context of {native:,} "
            "and model.rope is none",
            where=config.model.path,
            remedy="use model.rope=auto, or a shorter data.seq_len",
        )
    factor = float(math.ceil(seq_len / native))
    reason = f"ceil(data.seq_len {seq_len:,} / native context {native:,})"
    return Choice(f"linear x{factor:g}", reason), factor


def _show_rope(asked: str | LinearRope) -> str:
    return asked if isinstance(asked, str) else f"{asked.type} x{asked.factor:g}"
