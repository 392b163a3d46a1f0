"""Everything that is derived from a job, each value with its reason.

`resolve` is pure. `sft-job plan` prints its result, `train` obeys it, the run directory
stores it. It runs on a login node: no torch, no numpy.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft_job import attention, choices, cli, fit, flops, hardware, preflight, rates
from sft_job.attention import Choice, Package
from sft_job.batching import Schedule, deal, idle_share
from sft_job.config import load
from sft_job.errors import HardwareError
from sft_job.facts import ModelFacts
from sft_job.flops import Work
from sft_job.formats import ignored_line
from sft_job.hardware import Hardware
from sft_job.memory import BYTES, Memory
from sft_job.prepared import DataStats, Prepared, find_prepared, model_facts
from sft_job.schema import MOST_PROCESSES, JobConfig

# Steps looked at for the predicted idle share; a longer run is sampled evenly, in its first
# epochs: later ones are shuffled alike, and each costs a shuffle.
IDLE_SAMPLE = 200
IDLE_EPOCHS = 3
# Ranks, or units of a step, times the steps that are looked at.
IDLE_WORK = 10**6


@dataclass(frozen=True)
class Plan:
    """The resolved job. None means: known only after encoding, or not known of this hardware."""

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
    micro_batch_reason: str
    activation_checkpointing: Choice
    saved_products: int | None
    """Matrix products of a layer whose results selective checkpointing keeps."""
    memory: Memory | None
    memory_room: int | None
    """Bytes that tensors of one process may fill."""
    remedy: str | None
    """The cheapest change after which the job fits; None when it fits."""
    conversations: int | None
    samples: int | None
    tokens: int | None
    supervised_tokens: int | None
    lost: Mapping[str, int]
    ignored_keys: Mapping[str, Mapping[str, int]]
    """Keys of the data that mean nothing here, as from `formats.IgnoredKeys.counted`."""
    begin: str | None
    end: str | None
    seq_len: int
    longest: int | None
    """Tokens of the longest sample; None where nobody has looked yet."""
    window: int | None
    """Tokens that every layer looks back; None without a limit."""
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
    step: Work
    """Mean work of a step over all ranks; before encoding, the most that it can be."""
    step_flops: float | None
    step_flops_executed: float | None
    mfu: float | None
    """Share of the peak that needed operations are taken to reach."""
    seconds_per_step: float | None
    peak_flops: float | None
    """Operations per second of all devices together, dense, in the plan's precision."""
    checkpoint_bytes: int | None
    model_bytes: int | None
    disk_bytes: int | None
    """All checkpoints that are kept, and the model."""
    notes: tuple[str, ...]

    @property
    def hours(self) -> float | None:
        if self.seconds_per_step is None or self.steps is None:
            return None
        return self.seconds_per_step * self.steps / 3600


def resolve(
    config: JobConfig,
    hardware: Hardware,
    world_size: int,
    stats: DataStats | None,
    facts: ModelFacts | None,
    packages: Mapping[str, Package],
    mfu: float | None = None,
) -> Plan:
    """Derive everything from plain values.

    Args:
        packages: as from `attention.installed`, or `attention.image_packages`.
        mfu: model FLOPs utilisation to plan with; None takes `flops.assumed_utilisation`.

    Raises:
        ConfigError, HardwareError, ModelError: what the job asks for cannot be had.
    """
    notes = choices.check_model(config, facts, stats) if facts else []
    precision = choices.precision(config, hardware)
    kernel = choices.attention(config, hardware, precision.value, facts, packages)
    loss = choices.cross_entropy(config, hardware, precision.value, packages)
    rope, factor = choices.rope(config, facts, stats)
    scale = facts.attention_scale if facts else 12.0 * 4096
    schedule = schedule_of(config, stats) if stats else None
    steps = schedule.steps if schedule else None
    warmup = rates.checked_warmup(config, steps)
    step = _step(config, schedule, stats)
    parameters = facts.parameters if facts else None
    room = fit.capacity(hardware, world_size)
    question = (
        fit.question_of(config, hardware, world_size, facts, step, precision, kernel, loss)
        if facts and parameters
        else None
    )
    found, tokens, why_tokens, recompute = fit.answer(config, question, room)
    packs = attention.KERNELS[kernel.value].packs
    micro_batches, idle = _dealt(config, schedule, stats, world_size, scale, tokens, packs)
    executed = needed = None
    if facts and parameters:
        needed = flops.needed(facts, step)
        saved = found.level.saved_products if found else None
        executed = flops.executed(facts, step, recompute.value, saved)
    used, seconds = flops.speed(hardware, world_size, precision.value, needed, executed, mfu)
    # weights, and the first and second moment of Adam, all fp32
    checkpoint_bytes = 12 * parameters if parameters else None
    model_bytes = BYTES[precision.value] * parameters if parameters else None
    peak = hardware.peak_tflops(precision.value)
    return Plan(
        model=config.model.path,
        parameters=parameters,
        engine=config.engine.type,
        device=f"{world_size} x {hardware.name}" if hardware.device == "cuda" else hardware.name,
        device_type=hardware.device,
        world_size=world_size,
        precision=precision,
        attention=kernel,
        cross_entropy=loss,
        rope=rope,
        rope_factor=factor,
        micro_batch_tokens=tokens,
        micro_batch_reason=why_tokens,
        activation_checkpointing=recompute,
        saved_products=found.level.saved_products if found else None,
        memory=found.memory if found else None,
        memory_room=room,
        remedy=fit.remedy(question, found, room, hardware),
        **_data(config, stats),
        window=facts.window if facts else None,
        global_batch_size=config.train.global_batch_size,
        steps=steps,
        steps_per_epoch=schedule.steps_per_epoch if schedule else None,
        warmup_steps=warmup,
        micro_batches=micro_batches,
        idle_share=idle,
        attention_scale=scale,
        hidden=facts.hidden if facts else 4096,
        layer_parameters=facts.layer_parameters if facts else 0,
        end_parameters=facts.end_parameters if facts else 0,
        step=step,
        step_flops=needed,
        step_flops_executed=executed,
        mfu=used,
        seconds_per_step=seconds,
        peak_flops=peak * 1e12 * world_size if peak is not None else None,
        checkpoint_bytes=checkpoint_bytes,
        model_bytes=model_bytes,
        disk_bytes=_disk(config, steps, checkpoint_bytes, model_bytes),
        notes=(*notes, *_notes(config, precision, schedule, idle)),
    )


def _data(config: JobConfig, stats: DataStats | None) -> dict[str, Any]:
    """What is asked of the data, and what encoding found."""
    names = ("conversations", "samples", "supervised_tokens", "begin", "end")
    found = {name: getattr(stats, name) if stats else None for name in names}
    tokens = sum(stats.lengths) if stats and stats.lengths is not None else None
    found |= {
        "tokens": tokens,
        "lost": dict(stats.lost) if stats else {},
        "ignored_keys": dict(stats.ignored_keys) if stats else {},
    }
    found |= {"seq_len": config.data.seq_len, "batching": config.data.batching}
    return found | {"longest": choices.longest_sample(config, stats)}


def _notes(
    config: JobConfig, precision: Choice, schedule: Schedule | None, idle: float | None
) -> Iterator[str]:
    if config.engine.type == "zero3" and precision.value != "fp32":
        yield (
            f"ZeRO-3 makes its fp32 masters from {precision.value}-rounded weights; "
            "they are replaced by the exact ones before the first step"
        )
    if schedule and schedule.units < config.train.global_batch_size:
        yield (
            f"one epoch is a single step: {schedule.units} {config.data.batching} are fewer than "
            f"train.global_batch_size ({config.train.global_batch_size})"
        )
    if idle is not None and idle > 0.1:
        yield (
            f"ranks wait {idle:.0%} of the time for the heaviest one: "
            "a step has too few samples to be levelled over so many ranks"
        )


def _step(config: JobConfig, schedule: Schedule | None, stats: DataStats | None) -> Work:
    """Mean work of a step; without lengths the most that it can be."""
    if schedule is None or stats is None or stats.lengths is None:
        samples, seq_len = config.train.global_batch_size, config.data.seq_len
        tokens = float(samples * seq_len)
        return Work(tokens, tokens * seq_len, tokens)
    count = schedule.steps_per_epoch
    return Work(
        sum(stats.lengths) / count,
        sum(length * length for length in stats.lengths) / count,
        (stats.supervised_tokens or 0) / count,
    )


def _disk(
    config: JobConfig, steps: int | None, checkpoint: int | None, model: int | None
) -> int | None:
    """What the run directory grows to."""
    if checkpoint is None or model is None:
        return None
    keep = config.checkpoint.keep
    if steps is not None:
        made = math.ceil(steps / config.checkpoint.every_steps)
        keep = made if keep is None else min(keep + 1, made)  # one more while it is written
    return checkpoint * keep + model if keep is not None else None


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
    looked_at = min(schedule.steps, IDLE_EPOCHS * schedule.steps_per_epoch)
    most = min(IDLE_SAMPLE, max(1, IDLE_WORK // max(world_size, schedule.global_batch_size)))
    stride = max(1, looked_at // most)
    counts, shares = [], []
    tail = min(schedule.steps_per_epoch, schedule.steps) - 1
    for step in sorted({*range(0, looked_at, stride), tail}):
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
    "untrained_answer": "answers flagged as not to be trained on",
    "no_complete_exchange": "conversations without a complete exchange, dropped",
    "no_trained_answer": "conversations without an answer that is to be trained on, dropped",
    "system_turn": "system turns of dropped conversations",
    "duplicate": "conversations equal to an earlier one (kept)",
    "control_characters": "turns with control characters (kept as they are)",
    "overlong": "conversations longer than data.seq_len",
    "overlong_dropped": "conversations dropped as overlong",
    "overlong_nothing_left": "overlong samples with no answer to train on in data.seq_len, dropped",
    "overlong_tokens": "tokens cut off as overlong",
    "overlong_supervised_tokens": "supervised tokens cut off as overlong",
    "straddling_token": "tokens across the boundary of an answer, not trained on",
}


def lost_lines(lost: Mapping[str, int]) -> list[str]:
    return [f"{count:>10,}  {LOST[reason]}" for reason, count in lost.items() if count]


def show(plan: Plan) -> str:
    """The plan as text, the arithmetic included."""
    rows = [*_job_rows(plan), *_data_rows(plan), *_cost_rows(plan)]
    lines = [f"{name:<13}{text}" for name, text in rows]
    if plan.remedy:
        lines.append(f"DOES NOT FIT; the cheapest change that fits: {plan.remedy}")
    if ignored := ignored_line(plan.ignored_keys):
        lines.append(ignored)
    if plan.lost:
        lines += ["not trained on:", *lost_lines(plan.lost)]
    return "\n".join(lines + [f"note: {note}" for note in plan.notes])


Rows = Iterator[tuple[str, str]]


def _job_rows(plan: Plan) -> Rows:
    def chosen(choice: Choice) -> str:
        return f"{choice.value}  ({choice.reason})"

    size = f"{plan.parameters / 1e6:,.1f} M parameters" if plan.parameters else "size unknown"
    yield "model", f"{plan.model}  ({size})"
    yield "engine", f"{plan.engine}, {plan.world_size} process(es) on {plan.device}"
    yield "precision", chosen(plan.precision) + "; fp32 masters and reductions"
    yield "attention", chosen(plan.attention)
    yield "loss", chosen(plan.cross_entropy)
    yield "rope", chosen(plan.rope)
    yield "recompute", chosen(plan.activation_checkpointing)
    yield "micro-batch", f"{plan.micro_batch_tokens:,} tokens at most  ({plan.micro_batch_reason})"


def _data_rows(plan: Plan) -> Rows:
    def known(value: int | None) -> str:
        return "known after encoding" if value is None else f"{value:,}"

    yield "data", f"{known(plan.conversations)} conversations -> {known(plan.samples)} samples"
    if plan.tokens and plan.supervised_tokens:
        share = plan.supervised_tokens / plan.tokens
        trained = f"{plan.supervised_tokens:,} ({share:.0%}) trained on, no padding"
        yield "tokens", f"{plan.tokens:,} an epoch, {trained}"
    if plan.end is not None:
        begin = f"{plan.begin!r}" if plan.begin else "nothing"
        yield "stop token", f"{plan.end!r} after every answer; {begin} at the beginning"
    if plan.steps and plan.steps_per_epoch:
        yield (
            "steps",
            f"{plan.steps:,} of {plan.global_batch_size} {plan.batching} "
            f"({plan.steps_per_epoch:,} an epoch), {plan.warmup_steps:,} of them warm-up",
        )
    else:
        yield "steps", "known after encoding (sft-job data encode job.yaml)"
    if plan.micro_batches and plan.idle_share is not None:
        fewest, most = plan.micro_batches
        count = f"{most}" if fewest == most else f"{fewest} to {most}"
        waits = f"predicted idle share {plan.idle_share:.1%}"
        yield "step", f"{count} micro-batch(es) on each of {plan.world_size}; {waits}"


def _cost_rows(plan: Plan) -> Rows:
    """Memory, operations, time, disk."""
    bound = "" if plan.tokens is not None else "at most "
    if plan.memory is not None:
        memory, device = plan.memory, "GPU" if plan.device_type == "cuda" else "process"
        room = "" if plan.memory_room is None else f" of {gib(plan.memory_room)} usable"
        yield "memory", f"{gib(memory.total)}{room} GiB on each {device}, most in {memory.moment}:"
        parts = ("weights", "gradients", "optimizer", "activations", "working", "logits", "buffers")
        yield "", ", ".join(f"{part} {gib(getattr(memory, part))}" for part in parts)
        if memory.host:
            yield "", f"and {gib(memory.host)} GiB of host memory for each GPU"
    if plan.step_flops and plan.step_flops_executed:
        again = plan.step_flops_executed / plan.step_flops - 1
        yield (
            "operations",
            f"{bound}{plan.step_flops:.3g} a step for {bound}{plan.step.tokens:,.0f} tokens; "
            f"{again:.0%} more are executed",
        )
    if plan.seconds_per_step is not None:
        text = f"{bound}{plan.seconds_per_step:.2f} s a step, if {plan.mfu:.0%} MFU is reached"
        if plan.hours is not None:
            text += f"; {plan.hours:,.1f} h, {plan.hours * plan.world_size:,.0f} GPU-hours in all"
        yield "time", text
    else:
        yield "time", "not known of this hardware"
    if plan.checkpoint_bytes and plan.model_bytes:
        text = f"{gib(plan.checkpoint_bytes)} GiB a checkpoint, {gib(plan.model_bytes)} the model"
        if plan.disk_bytes is not None:
            text += f", {gib(plan.disk_bytes)} in all"
        yield "disk", text


def gib(count: int) -> str:
    return f"{count / 2**30:,.2f}"


def plan_of(
    config: JobConfig, world_size: int | None = None, machine: Hardware | None = None
) -> tuple[Plan, Prepared | None]:
    """The plan for this machine (or for `world_size` processes of its kind).

    Args:
        machine: what `hardware.detect` found, where that has been asked for already.
    """
    machine = machine or hardware.detect()
    wanted = attention.candidates(config.model.attention, machine)
    # A worker has torch already; the launcher must not wait for it.
    packages = attention.installed(imported=wanted if "torch" in sys.modules else ())
    world, prepared = world_size or processes(config, machine), find_prepared(config)
    return _of_prepared(config, machine, world, prepared, packages), prepared


def plan_for(config: JobConfig, gpu: str, count: int, mfu: float | None) -> Plan:
    """The plan for `count` GPUs that need not be here, in the image that is made for them."""
    machine, prepared = hardware.named(gpu, count), find_prepared(config)
    return _of_prepared(config, machine, count, prepared, attention.image_packages(machine), mfu)


def _of_prepared(
    config: JobConfig, machine: Hardware, world: int, prepared: Prepared | None,
    packages: Mapping[str, Package], mfu: float | None = None,
) -> Plan:  # fmt: skip
    facts, stats = model_facts(config, prepared), prepared.stats if prepared else None
    plan = resolve(config, machine, world, stats, facts, packages, mfu)
    # What was found out while the model was prepared is said in every plan.
    notes = prepared.notes if prepared else ()
    return dataclasses.replace(plan, notes=(*notes, *plan.notes))


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
    parser = cli.job_parser("plan", "Show what a job will do, without doing it.")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--gpu", metavar="KEY", help=f"plan for: {', '.join(hardware.GPUS)}")
    parser.add_argument("--count", type=int, metavar="N", help="so many of them (default 1)")
    parser.add_argument("--mfu", type=float, metavar="SHARE", help="e.g. 0.45, as measured")
    args = parser.parse_intermixed_args(argv)
    if args.gpu is None and (args.count is not None or args.mfu is not None):
        parser.error("--count and --mfu go with --gpu")
    if args.mfu is not None and not 0 < args.mfu <= 1:
        parser.error("--mfu is a share of the peak: more than 0, at most 1")
    if args.count is not None and not 1 <= args.count <= MOST_PROCESSES:
        parser.error(f"--count: a number from 1 to {MOST_PROCESSES:,}")
    config = load(args.job, args.overrides)
    preflight.check(config)
    plan = plan_for(config, args.gpu, args.count or 1, args.mfu) if args.gpu else plan_of(config)[0]
    print(json.dumps(dataclasses.asdict(plan), indent=2) if args.json else show(plan))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
