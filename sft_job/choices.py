"""The single decisions of a plan: precision, attention kernel, loss, positions. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sft_job import attention as kernels
from sft_job import families
from sft_job.attention import Choice, Heads, Package
from sft_job.errors import HardwareError, ModelError
from sft_job.facts import ModelFacts, unsupported
from sft_job.hardware import Hardware
from sft_job.prepared import DataStats
from sft_job.schema import JobConfig, LinearRope, Model


def own_code(model: Model, facts: ModelFacts | None) -> bool:
    """Whether Python code that the model brings is run."""
    return facts is not None and facts.remote_code and model.trust_remote_code


def refuse_unsupported(model: Model, facts: ModelFacts) -> None:
    """What can be said of a model before its weights are read or converted.

    Raises:
        ModelError: it is not trained here, or not with this attention.
    """
    mine = own_code(model, facts)
    if facts.remote_code and not mine and not facts.built_in:
        raise unasked_code(model)
    for obstacle in facts.obstacles:
        lifted = obstacle.own and model.attention == "own"
        if not lifted and (obstacle.code or not mine):
            raise unsupported(facts.model_type, obstacle, model.path)


def unasked_code(model: Model) -> ModelError:
    return ModelError(
        "the model brings its own Python code, which is not run unasked",
        where=model.path,
        remedy="read the code, then set model.trust_remote_code: true",
    )


def windows(config: JobConfig, facts: ModelFacts, stats: DataStats | None) -> list[str]:
    """Sliding windows against the samples; returns a note where lengths are not known yet.

    Raises:
        ModelError: a sample is longer than a layer looks back.
    """
    window, seq_len = facts.window, config.data.seq_len
    if window is None or config.model.attention == "own" or own_code(config.model, facts):
        return []
    own = ", or model.attention=own, which attends through windows: one sample per forward pass"
    remedy = f"use data.seq_len={window}" + (own if config.data.batching != "rows" else "")
    longest = longest_sample(config, stats)
    looks = f"layers of {facts.model_type} look back {window:,} tokens only (sliding_window)"
    if longest is None:
        late = f"{looks}: a longer sample would be refused when the data is encoded; {remedy}"
        return [late] if seq_len > window else []
    if longest <= window:
        return []
    known = stats is not None and stats.lengths is not None
    which = "the longest sample has" if known else "with data.preprocess: lazy a sample may have"
    raise ModelError(
        f"{which} {longest:,} tokens, and {looks}, which no attention kernel here does",
        where=config.model.path,
        remedy=remedy,
    )


def longest_sample(config: JobConfig, stats: DataStats | None) -> int | None:
    """Tokens of the longest sample; None before the data is encoded. Under preprocess: lazy
    nobody looks at the lengths before the start: as long as it may be."""
    if stats is not None and stats.lengths is not None:
        return max(stats.lengths)
    return config.data.seq_len if config.data.preprocess == "lazy" else None


def check_model(config: JobConfig, facts: ModelFacts, stats: DataStats | None) -> list[str]:
    """All that a model's facts forbid, whatever the hardware; returns what else is said.

    Raises:
        ModelError: it is not trained here, or not with this attention or these lengths.
    """
    refuse_unsupported(config.model, facts)
    rope(config, facts, stats)
    notes = [*facts.notes, *windows(config, facts, stats)]
    if facts.remote_code and not config.model.trust_remote_code:
        notes.append(
            "the Python code that comes with the model (auto_map in config.json) is not run: "
            f"transformers has {facts.model_type} built in; model.trust_remote_code=true runs it"
        )
    return notes


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
        heads = Heads(dim, facts.heads, facts.key_heads or facts.heads, facts.dropout)
    kernel = kernels.choose(
        config.model.attention,
        hardware,
        precision=precision,
        heads=heads,
        packages=packages,
        remote_code=own_code(config.model, facts),
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


def rope(
    config: JobConfig, facts: ModelFacts | None, stats: DataStats | None = None
) -> tuple[Choice, float | None]:
    """The RoPE decision: a reason, and the linear factor to set (None: leave as it is)."""
    asked, seq_len = config.model.rope, config.data.seq_len
    if facts is None:
        return Choice("unknown", "the model's config.json is not here yet"), None
    native = facts.context
    if facts.rope is not None:
        return _existing_rope(config, facts, facts.rope, stats), None
    if facts.fixed_positions and (isinstance(asked, LinearRope) or seq_len > native):
        raise ModelError(
            f"the positions of {facts.model_type} {facts.fixed_positions}: its native context of "
            f"{native:,} cannot be extended by model.rope",
            where=config.model.path,
            remedy=f"use model.rope=auto with data.seq_len <= {native}",
        )
    # Their distances are within the window, whatever the length of a sample.
    nested = facts.model_type in families.NESTED_ROPE
    where = "; in layers with full attention, those with a window keep theirs" if nested else ""
    if isinstance(asked, LinearRope):
        if asked.factor * native < seq_len:
            raise ModelError(
                f"model.rope factor {asked.factor:g} x native context {native:,} is less than "
                f"data.seq_len {seq_len:,}",
                where=config.model.path,
                remedy=f"use a factor of at least {math.ceil(seq_len / native)}, or rope: auto",
            )
        return Choice(f"linear x{asked.factor:g}", f"asked for{where}"), asked.factor
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
    reason = f"ceil(data.seq_len {seq_len:,} / native context {native:,}){where}"
    return Choice(f"linear x{factor:g}", reason), factor


def _existing_rope(
    config: JobConfig, facts: ModelFacts, existing: Mapping[str, Any], stats: DataStats | None
) -> Choice:
    """The model's own scaling, where it is long enough and means the same for every sample."""
    asked, seq_len, native = config.model.rope, config.data.seq_len, facts.context
    kind = str(existing.get("rope_type") or existing.get("type"))
    factor = float(existing.get("factor") or 1)
    original = existing.get("original_max_position_embeddings")
    # Some families state the scaled context, some the original one.
    scaled = native if original and native > original else int((original or native) * factor)
    same = isinstance(asked, LinearRope) and (kind, factor) == ("linear", asked.factor)
    if not (asked == "auto" or same) or scaled < seq_len:
        raise ModelError(
            f"the model already scales its positions ({kind} x{factor:g}, context {scaled:,}) "
            f"and data.seq_len {seq_len:,} with model.rope {_show_rope(asked)} does not fit that",
            where=config.model.path,
            remedy=f"use model.rope=auto with data.seq_len <= {scaled}, or an unscaled base model",
        )
    fixed = {"dynamic": native, "longrope": int(original or native)}.get(kind)
    if existing.get("alpha"):
        fixed = None  # HunYuan's "dynamic" has a base of its own, whatever the length
    alone = kind == "longrope" and (
        config.model.attention == "own" or own_code(config.model, facts)
    )
    longest = longest_sample(config, stats)
    if fixed is not None and not alone and longest is not None and longest > fixed:
        own = " or model.attention=own, one sample per forward pass" if kind == "longrope" else ""
        raise ModelError(
            f"the model's {kind} positions depend on the longest sample of a row beyond {fixed:,} "
            f"tokens, so that samples of a row would change each other, and one has {longest:,}",
            where=config.model.path,
            remedy=f"use data.seq_len={fixed}{own}",
        )
    return Choice(f"{kind} x{factor:g}", f"the model's own, good for {scaled:,}")


def _show_rope(asked: str | LinearRope) -> str:
    return asked if isinstance(asked, str) else f"{asked.type} x{asked.factor:g}"
