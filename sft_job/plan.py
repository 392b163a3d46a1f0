"""Everything that is derived from a job, each value with its reason.

`resolve` is pure. `sft-job plan` prints its result, `train` obeys it, the run directory
stores it. It runs on a login node: no torch, no numpy.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sft_job import attention, cli, hardware
from sft_job.attention import Choice, Heads, Package
from sft_job.batching import Schedule, deal, idle_share
from sft_job.config import JobConfig, LinearRope, load
from sft_job.errors import HardwareError, ModelError
from sft_job.hardware import Hardware
from sft_job.prepared import DataStats, ModelFacts, Prepared, find_prepared, model_facts

# Steps looked at for the predicted idle share; a longer run is sampled evenly.
IDLE_SAMPLE = 200


@dataclass(frozen=True)
class Plan:
    """The resolved job. None means: known only after encoding."""

    model: str
    parameters: int | None
    engine: str
    device: str
    device_type: str
    world_size: int
    precision: Choice
    attention: Choice
    cross_entropy: Choice
    rope: Choice
    rope_factor: float | None
    """Linear factor to apply; None leaves the model's own positions as they are."""
    micro_batch_tokens: int
    activation_checkpointing: Choice
    saved_products: int | None
    """Matrix products of a layer whose results selective checkpointing keeps."""
    conversations: int | None
    samples: int | None
    tokens: int | None
    supervised_tokens: int | None
    lost: Mapping[str, int]
    begin: str | None
    end: str | None
    seq_len: int
    batching: str
    global_batch_size: int
    steps: int | None
    steps_per_epoch: int | None
    warmup_steps: int | None
    micro_batches: tuple[int, int] | None
    """Fewest and most micro-batches in a step."""
    idle_share: float | None
    attention_scale: float
    hidden: int
    layer_parameters: int
    end_parameters: int
    """Elements of one decoder layer, and of embedding and head together."""
    checkpoint_bytes: int | None
    model_bytes: int | None
    notes: tuple[str, ...]


def resolve(
    config: JobConfig,
    hardware: Hardware,
    world_size: int,
    stats: DataStats | None,
    facts: ModelFacts | None,
    packages: Mapping[str, Package],
) -> Plan:
    """Derive everything from plain values.

    Args:
        packages: as from `attention.installed`, or `attention.image_packages`.

    Raises:
        HardwareError, ModelError: what the job asks for by name cannot be had.
    """
    precision = _precision(config, hardware)
    kernel = _attention(config, hardware, precision.value, facts, packages)
    rope, factor = _rope(config, facts)
    scale = facts.attention_scale if facts else 12.0 * 4096
    schedule = schedule_of(config, stats) if stats else None
    tokens = 16384 if config.train.micro_batch_tokens == "auto" else config.train.micro_batch_tokens
    recompute = Choice(config.train.activation_checkpointing.replace("auto", "full"), "")
    packs = attention.KERNELS[kernel.value].packs
    micro_batches, idle = _dealt(config, schedule, stats, world_size, scale, tokens, packs)
    parameters = facts.parameters if facts else None
    notes = []
    if config.engine.type == "zero3" and precision.value == "bf16":
        notes.append(
            "ZeRO-3 makes its fp32 masters from bf16-rounded weights; "
            "they are replaced by the exact ones before the first step"
        )
    if schedule and schedule.units < config.train.global_batch_size:
        notes.append(
            f"one epoch is a single step: {schedule.units} {config.data.batching} are fewer than "
            f"train.global_batch_size ({config.train.global_batch_size})"
        )
    if idle is not None and idle > 0.1:
        notes.append(
            f"ranks wait {idle:.0%} of the time for the heaviest one: "
            "a step has too few samples to be levelled over so many ranks"
        )
    steps = schedule.steps if schedule else None
    return Plan(
        model=config.model.path,
        parameters=parameters,
        engine=config.engine.type,
        device=f"{world_size} x {hardware.name}" if hardware.device == "cuda" else hardware.name,
        device_type=hardware.device,
        world_size=world_size,
        precision=precision,
        attention=kernel,
        cross_entropy=_cross_entropy(config, hardware, packages),
        rope=rope,
        rope_factor=factor,
        micro_batch_tokens=tokens,
        activation_checkpointing=recompute,
        saved_products=None,
        conversations=stats.conversations if stats else None,
        samples=stats.samples if stats else None,
        tokens=sum(stats.lengths) if stats and stats.lengths is not None else None,
        supervised_tokens=stats.supervised_tokens if stats else None,
        lost=dict(stats.lost) if stats else {},
        begin=stats.begin if stats else None,
        end=stats.end if stats else None,
        seq_len=config.data.seq_len,
        batching=config.data.batching,
        global_batch_size=config.train.global_batch_size,
        steps=steps,
        steps_per_epoch=schedule.steps_per_epoch if schedule else None,
        warmup_steps=math.ceil(config.train.warmup_ratio * steps) if steps else None,
        micro_batches=micro_batches,
        idle_share=idle,
        attention_scale=scale,
        hidden=facts.hidden if facts else 4096,
        layer_parameters=facts.layer_parameters if facts else 0,
        end_parameters=facts.end_parameters if facts else 0,
        # weights, and the first and second moment of Adam, all fp32
        checkpoint_bytes=12 * parameters if parameters else None,
        model_bytes=(4 if precision.value == "fp32" else 2) * parameters if parameters else None,
        notes=tuple(notes),
    )


def schedule_of(config: JobConfig, stats: DataStats) -> Schedule:
    return Schedule(
        sample_count=stats.samples,
        fingerprint=stats.fingerprint,
        seed=config.train.seed,
        batching=config.data.batching,
        global_batch_size=config.train.global_batch_size,
        num_train_epochs=config.train.num_train_epochs,
        max_steps=config.train.max_steps,
        seq_len=config.data.seq_len,
        lengths=stats.lengths,
    )


def _precision(config: JobConfig, hardware: Hardware) -> Choice:
    asked = config.train.precision
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


def _attention(
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
    kernel = attention.choose(
        config.model.attention,
        hardware,
        precision=precision,
        heads=heads,
        packages=packages,
        remote_code=facts is not None and facts.remote_code,
    )
    if not attention.KERNELS[kernel.value].packs and config.data.batching == "rows":
        raise ModelError(
            "data.batching: rows packs samples into rows, and attention kernel "
            f"{kernel.value} takes one sample per forward pass ({kernel.reason})",
            remedy="use data.batching=conversations",
        )
    return kernel


def _cross_entropy(
    config: JobConfig, hardware: Hardware, packages: Mapping[str, Package]
) -> Choice:
    """Liger's kernel needs Triton, which needs capability 8.0."""
    asked = config.model.cross_entropy
    number = attention.sm(hardware)
    package = packages.get(attention.LIGER)
    if number is None or number < 80:
        obstacle = f"Triton needs a GPU of capability 8.0, {hardware.name} is not one"
    elif package is None:
        obstacle = f"{attention.LIGER} is not installed"
    elif package.fault:
        obstacle = f"the installed {attention.LIGER} {package.version} is broken ({package.fault})"
    else:
        obstacle = None
    if asked == "liger" and obstacle:
        raise HardwareError(
            f"model.cross_entropy is liger, but {obstacle}", remedy="use model.cross_entropy=auto"
        )
    if asked == "torch":
        return Choice("torch", "asked for")
    if obstacle or package is None:
        return Choice("torch", f"not liger: {obstacle}")
    ground = f"{attention.LIGER} {package.version}: one pass over each chunk of logits"
    return Choice("liger", f"asked for; {ground}" if asked == "liger" else ground)


def _rope(config: JobConfig, facts: ModelFacts | None) -> tuple[Choice, float | None]:
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


def _dealt(
    config: JobConfig,
    schedule: Schedule | None,
    stats: DataStats | None,
    world_size: int,
    scale: float,
    micro_batch_tokens: int,
    packs: bool,
) -> tuple[tuple[int, int] | None, float | None]:
    if schedule is None or stats is None or stats.lengths is None:
        return None, None
    stride = max(1, schedule.steps // IDLE_SAMPLE)
    counts, shares = [], []
    tail = min(schedule.steps_per_epoch, schedule.steps) - 1
    for step in sorted({*range(0, schedule.steps, stride), tail}):
        units = schedule.step(step)
        lengths = [sum(stats.lengths[i] for i in unit) for unit in units]
        dealt = deal(
            lengths,
            world_size=world_size,
            micro_batch_tokens=micro_batch_tokens,
            attention_scale=scale,
            one_sample_each=not packs,
        )
        counts.append(len(dealt))
        shares.append(idle_share(dealt, lengths, scale))
    return (min(counts), max(counts)), sum(shares) / len(shares)


# --- shown to people -------------------------------------------------------------------

LOST = {
    "leading_assistant_turn": "assistant turns before any question, dropped",
    "empty_turn": "turns from an empty one on, dropped",
    "wrong_order": "turns after the roles stopped alternating, dropped",
    "trailing_user_turn": "questions without an answer, dropped",
    "no_complete_exchange": "conversations without a complete exchange, dropped",
    "system_turn": "system turns of dropped conversations",
    "duplicate": "conversations equal to an earlier one (kept)",
    "overlong": "conversations longer than data.seq_len",
    "overlong_dropped": "conversations dropped as overlong",
    "overlong_nothing_left": "overlong samples with no answer inside data.seq_len, dropped",
    "overlong_tokens": "tokens cut off as overlong",
    "overlong_supervised_tokens": "supervised tokens cut off as overlong",
    "straddling_token": "tokens across the boundary of an answer, not trained on",
}


def lost_lines(lost: Mapping[str, int]) -> list[str]:
    return [f"{count:>10,}  {LOST[reason]}" for reason, count in lost.items() if count]


def show(plan: Plan) -> str:
    """The plan as text, the arithmetic included."""

    def known(value: int | None, unit: str = "") -> str:
        return "known after encoding" if value is None else f"{value:,}{unit}"

    def chosen(choice: Choice) -> str:
        return f"{choice.value}  ({choice.reason})"

    size = f"{plan.parameters / 1e6:,.1f} M parameters" if plan.parameters else "size unknown"
    rows = [
        ("model", f"{plan.model}  ({size})"),
        ("engine", f"{plan.engine}, {plan.world_size} process(es) on {plan.device}"),
        ("precision", chosen(plan.precision) + "; fp32 masters and reductions"),
        ("attention", chosen(plan.attention)),
        ("rope", chosen(plan.rope)),
        ("loss", chosen(plan.cross_entropy)),
        ("recompute", chosen(plan.activation_checkpointing)),
        ("data", f"{known(plan.conversations)} conversations -> {known(plan.samples)} samples"),
    ]
    if plan.tokens and plan.supervised_tokens:
        share = plan.supervised_tokens / plan.tokens
        trained = f"{plan.supervised_tokens:,} ({share:.0%}) trained on, no padding"
        rows.append(("tokens", f"{plan.tokens:,} an epoch, {trained}"))
    if plan.end is not None:
        begin = f"{plan.begin!r}" if plan.begin else "nothing"
        rows.append(("stop token", f"{plan.end!r} after every answer; {begin} at the beginning"))
    if plan.steps and plan.steps_per_epoch:
        rows.append(
            (
                "steps",
                f"{plan.steps:,} of {plan.global_batch_size} {plan.batching} "
                f"({plan.steps_per_epoch:,} an epoch), {plan.warmup_steps:,} of them warm-up",
            )
        )
    else:
        rows.append(("steps", "known after encoding (sft-job data encode job.yaml)"))
    if plan.micro_batches and plan.idle_share is not None:
        fewest, most = plan.micro_batches
        count = f"{most}" if fewest == most else f"{fewest} to {most}"
        waits = f"predicted idle share {plan.idle_share:.1%}"
        rows.append(("step", f"{count} micro-batch(es) on each of {plan.world_size}; {waits}"))
    if plan.checkpoint_bytes and plan.model_bytes:
        rows.append(
            (
                "disk",
                f"{plan.checkpoint_bytes / 2**30:.2f} GiB a checkpoint, "
                f"{plan.model_bytes / 2**30:.2f} GiB the model",
            )
        )
    lines = [f"{name:<11}{text}" for name, text in rows]
    if plan.lost:
        lines += ["not trained on:", *lost_lines(plan.lost)]
    return "\n".join(lines + [f"note: {note}" for note in plan.notes])


def plan_of(config: JobConfig, world_size: int | None = None) -> tuple[Plan, Prepared | None]:
    """The plan for this machine (or for `world_size` processes of its kind)."""
    machine = hardware.detect()
    prepared = find_prepared(config)
    facts = model_facts(config, prepared)
    world = world_size or processes(config, machine)
    wanted = attention.candidates(config.model.attention, machine)
    # A worker has torch already; the launcher must not wait for it.
    packages = attention.installed(imported=wanted if "torch" in sys.modules else ())
    stats = prepared.stats if prepared else None
    return resolve(config, machine, world, stats, facts, packages), prepared


def processes(config: JobConfig, machine: Hardware) -> int:
    """Training processes on this machine.

    Raises:
        HardwareError: more than there are GPUs.
    """
    asked = config.run.processes
    if machine.device == "cuda" and asked is not None and asked > machine.count:
        raise HardwareError(
            f"run.processes is {asked}, but this machine has {machine.count} GPU(s)",
            remedy=f"use run.processes={machine.count} or leave it out",
        )
    return asked or machine.count


def main(argv: Sequence[str]) -> int:
    parser = cli.job_parser("plan", "Show what a job will do on this machine, without doing it.")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    args = parser.parse_intermixed_args(argv)
    plan, _ = plan_of(load(args.job, args.overrides))
    print(json.dumps(dataclasses.asdict(plan), indent=2) if args.json else show(plan))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
