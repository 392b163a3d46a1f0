"""What fits: how much is recomputed, how large a micro-batch is, what would have to change."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sft_job import flops
from sft_job.attention import KERNELS, Choice
from sft_job.errors import HardwareError
from sft_job.facts import ModelFacts
from sft_job.hardware import Hardware
from sft_job.memory import Memory, Setting, estimate, product_widths
from sft_job.schema import JobConfig, Zero3

GIB = 2**30
# Not for tensors: CUDA context, NCCL and cuBLAS on a GPU; the interpreter and libraries on a CPU.
RESERVED_GIB = {"cuda": 1.5, "cpu": 1.0}
# Of the rest, what an allocator can fill before fragments hinder it.
FILLED = 0.95
# What rows of a single longest sample cost besides: ranks wait 1 to 4% longer for each other
# (dealing 128 conversations to 4 to 16 ranks), and kernels have more tails and launches.
SMALL_ROWS = 0.05
# The largest micro-batch that auto looks at: more tokens are no faster per token.
MOST_TOKENS = 32768


@dataclass(frozen=True)
class Level:
    """A degree of activation checkpointing."""

    recompute: str
    saved_products: int | None = None


def levels(model: ModelFacts, asked: str) -> list[Level]:
    """The degrees that a job allows, least recomputation first."""
    kept = range(len(product_widths(model)), -1, -1)
    every = [
        Level("none"),
        *(Level("selective", count) for count in kept),
        Level("full"),
    ]
    return [level for level in every if asked in ("auto", level.recompute)]


def capacity(hardware: Hardware, world_size: int) -> int | None:
    """Bytes that tensors of one process may fill; None where the memory is not known."""
    if hardware.memory_gib is None:
        return None
    sharing = world_size if hardware.device == "cpu" else 1
    usable = hardware.memory_gib / sharing - RESERVED_GIB[hardware.device]
    return int(max(usable, 0.0) * FILLED * GIB)


@dataclass(frozen=True)
class Fit:
    """A micro-batch size and a degree of checkpointing, with the memory they take."""

    tokens: int
    level: Level
    memory: Memory
    cost: float
    """Token-equivalents of a step per rank: comparable, not a time."""


@dataclass(frozen=True)
class Question:
    """What is to be fitted.

    Args:
        setting: everything but tokens and checkpointing.
        supervised_share: of the tokens.
        tokens: micro-batch sizes allowed; levels: degrees allowed; least recomputation first.
        step_tokens: of one rank in one step.
        communication: see `flops.communication_tokens`.
    """

    model: ModelFacts
    setting: Setting
    supervised_share: float
    tokens: Sequence[int]
    levels: Sequence[Level]
    step_tokens: float
    communication: float
    seq_len: int


def candidates(question: Question) -> Iterator[Fit]:
    for tokens, level in itertools.product(question.tokens, question.levels):
        yield _fit(question, tokens, level)


def _fit(question: Question, tokens: int, level: Level) -> Fit:
    filled = min(float(tokens), question.step_tokens)
    setting = dataclasses.replace(
        question.setting,
        tokens=tokens,
        supervised=max(int(tokens * question.supervised_share), 1),
        recompute=level.recompute,
        saved_products=level.saved_products or 0,
        accumulates=2 * question.step_tokens > tokens,  # a mean: some steps have twice as much
    )
    work = flops.Work(filled, 0.0, filled * question.supervised_share)
    executed = flops.executed(question.model, work, level.recompute, level.saved_products)
    share = executed / flops.needed(question.model, work)
    count = math.ceil(question.step_tokens / tokens)
    cost = max(share * question.step_tokens, count * question.communication)
    cost *= 1 + SMALL_ROWS * question.seq_len / tokens
    return Fit(tokens, level, estimate(question.model, setting), cost)


def choose(question: Question, room: int | None) -> Fit:
    """The cheapest that fits; where nothing does, or the room is not known, the smallest."""
    every = list(candidates(question))
    fitting = [fit for fit in every if room is not None and fit.memory.total <= room]
    if fitting:
        return min(fitting, key=lambda fit: (fit.cost, -fit.tokens))
    return min(every, key=lambda fit: (fit.memory.total, fit.cost))


def token_options(seq_len: int, step_tokens: float) -> list[int]:
    """Micro-batch sizes that auto looks at: powers of two from seq_len on, no larger than a
    step needs."""
    first = 2 ** math.ceil(math.log2(max(seq_len, 256)))
    options = [first]
    while options[-1] * 2 <= MOST_TOKENS and options[-1] < step_tokens:
        options.append(options[-1] * 2)
    return options if first == seq_len else [seq_len, *options]


def remedy(
    question: Question | None, fit: Fit | None, room: int | None, hardware: Hardware
) -> str | None:
    """The cheapest change of the job after which it fits; None where it fits, or nothing is known.

    First what costs time only, then host memory, then more GPUs.
    """
    if question is None or fit is None or room is None or fit.memory.total <= room:
        return None
    model, setting = question.model, question.setting
    options = token_options(question.seq_len, question.step_tokens)
    tokens = sorted({*options, *question.tokens})
    free = dataclasses.replace(question, tokens=tokens, levels=levels(model, "auto"))
    found = choose(free, room)
    if found.memory.total <= room:
        return _words(question, found)
    if hardware.device == "cuda" and setting.offload == "none":
        offloaded = dataclasses.replace(
            free, setting=dataclasses.replace(setting, engine="zero3", offload="cpu")
        )
        found = choose(offloaded, room)
        if found.memory.total <= room:
            host = found.memory.host / GIB
            how = _words(question, found)
            return (
                f"engine.type=zero3 engine.offload=cpu{f' {how}' if how else ''} with {host:.0f} "
                "GiB of host memory for each GPU"
            )
    if hardware.device == "cuda":
        for factor in (2, 4, 8, 16, 32, 64):
            world = setting.world_size * factor
            wider = dataclasses.replace(
                free,
                setting=dataclasses.replace(setting, world_size=world),
                step_tokens=question.step_tokens / factor,
            )
            found = choose(wider, room)
            if found.memory.total <= room:
                how = _words(question, found)
                return f"{world} such GPUs{f' and {how}' if how else ''}"
    return "a smaller model, a shorter data.seq_len, or devices with more memory"


def _words(question: Question, found: Fit) -> str:
    """The overrides that lead from the job to what was found."""
    words = []
    if found.tokens not in question.tokens:
        words.append(f"train.micro_batch_tokens={found.tokens}")
    if found.level not in question.levels:
        words.append(f"train.activation_checkpointing={found.level.recompute}")
    return " ".join(words)


# --- for a job ---------------------------------------------------------------------------


def question_of(
    config: JobConfig,
    hardware: Hardware,
    world_size: int,
    facts: ModelFacts,
    step: flops.Work,
    precision: Choice,
    kernel: Choice,
    loss: Choice,
) -> Question:
    asked, per_rank = config.train.micro_batch_tokens, step.tokens / world_size
    seq_len = config.data.seq_len
    setting = Setting(
        engine=config.engine.type,
        offload=config.engine.offload if isinstance(config.engine, Zero3) else "none",
        precision=precision.value,
        device=hardware.device,
        kernel=kernel.value,
        cross_entropy=loss.value,
        world_size=world_size,
        tokens=0,
        supervised=0,
        recompute="none",
        saved_products=0,
    )
    if not KERNELS[kernel.value].packs:
        options = [seq_len]  # one sample at a time, whatever a micro-batch could hold
    elif asked == "auto":
        options = token_options(seq_len, per_rank)
    else:
        options = [asked]
    return Question(
        facts,
        setting,
        supervised_share=step.supervised / max(step.tokens, 1.0),
        tokens=options,
        levels=levels(facts, config.train.activation_checkpointing),
        step_tokens=per_rank,
        communication=flops.communication_tokens(facts, hardware, precision.value, world_size),
        seq_len=seq_len,
    )


def answer(
    config: JobConfig, question: Question | None, room: int | None
) -> tuple[Fit | None, int, str, Choice]:
    """Micro-batch size and checkpointing, each with its reason.

    Raises:
        HardwareError: micro_batch_tokens is auto, and the memory is not known.
    """
    asked, recompute = config.train.micro_batch_tokens, config.train.activation_checkpointing
    named = "asked for" if asked != "auto" else ""
    if asked == "auto" and room is None:
        raise HardwareError(
            "train.micro_batch_tokens is auto, but the memory of this device is not known",
            remedy="give a number, such as 8192",
        )
    if question is None:
        tokens = 16384 if asked == "auto" else asked
        unknown = "the model is not here yet"
        level = "full" if recompute == "auto" else recompute
        reason = f"{unknown}: the least memory" if recompute == "auto" else "asked for"
        return None, tokens, named or unknown, Choice(level, reason)
    found = choose(question, room)
    fits = room is not None and found.memory.total <= room
    if recompute != "auto":
        reason = "asked for"
    elif room is None:
        reason = "the memory of this device is not known: the least memory"
    else:
        reason = "the least recomputation that fits" if fits else "nothing fits; the least memory"
    if found.level.recompute == "selective":
        reason += (
            f"; keeps attention and {found.level.saved_products} of the first "
            f"{len(product_widths(question.model))} matrix products of a layer"
        )
    how = "the fastest that fits" if fits else "nothing fits; the least memory"
    return found, found.tokens, named or how, Choice(found.level.recompute, reason)
