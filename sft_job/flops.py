"""How many floating-point operations a step needs and executes, and how long that takes. Pure.

A product of [a, b] and [b, c] is 2abc operations; the backward pass of a product is two of
them. Attention is counted causally and inside samples: a sample of n tokens has n(n + 1) / 2
pairs, of which each costs 4 x width operations (scores and weighted values) in the forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from sft_job.facts import ModelFacts
from sft_job.hardware import Hardware
from sft_job.memory import product_widths

# Share of the peak that the executed operations reach: a guess to plan with, until
# `benchmarks/gpu.py` has measured it on the machine. Published for 7B models and 4,096 tokens
# with recomputation (llm-foundry, scripts/train/benchmarking): 54.8% MFU on A100-80, 40.4% on
# H100, of needed operations, a quarter more of executed ones; compiled, unlike here.
ASSUMED = {70: 0.35, 75: 0.35, 80: 0.50, 86: 0.45, 89: 0.45, 90: 0.38, 100: 0.33, 120: 0.40}
ASSUMED_OTHER = 0.35


@dataclass(frozen=True)
class Work:
    """What has to be computed: tokens, the sum of squared sample lengths, supervised tokens."""

    tokens: float
    squares: float
    supervised: float


def needed(model: ModelFacts, work: Work) -> float:
    """Operations of forward and backward pass, nothing twice, nothing for nothing."""
    products = 6.0 * model.layers * model.layer_parameters * work.tokens
    head = 6.0 * model.table_parameters * work.supervised
    return products + head + 3 * _attention(model, work)


def executed(model: ModelFacts, work: Work, recompute: str, saved_products: int | None) -> float:
    """The same with what activation checkpointing computes again.

    A layer's last product is never repeated; selective keeps attention.
    """
    again = 0.0
    if recompute != "none":
        kept = saved_products or 0 if recompute == "selective" else 0
        query = model.projections[0]
        inputs = [model.hidden] * 3 + [query] + [model.hidden] * 2
        widths = product_widths(model)
        repeated = list(zip(inputs, widths, strict=True))[kept:]
        again = 2.0 * model.layers * work.tokens * sum(a * b for a, b in repeated)
    if recompute == "full":
        again += _attention(model, work)
    return needed(model, work) + again


def _attention(model: ModelFacts, work: Work) -> float:
    """Operations of attention in the forward pass."""
    pairs = (work.squares + work.tokens) / 2
    return 4.0 * model.layers * model.projections[0] * pairs


def assumed_utilisation(hardware: Hardware) -> float:
    """Share of the peak to plan with for executed operations."""
    if hardware.capability is None:
        return ASSUMED_OTHER
    major, minor = hardware.capability
    return ASSUMED.get(10 * major + minor, ASSUMED_OTHER)


def speed(
    hardware: Hardware,
    world_size: int,
    precision: str,
    needed: float | None,
    executed: float | None,
    mfu: float | None,
) -> tuple[float | None, float | None]:
    """MFU to plan with, and seconds per step at it; unknown hardware stays unknown."""
    peak = hardware.peak_tflops(precision)
    if peak is None or needed is None or executed is None:
        return None, None
    used = mfu if mfu is not None else assumed_utilisation(hardware) * needed / executed
    return used, needed / (used * peak * 1e12 * world_size)


# Share of a link's stated rate that collectives reach.
LINK_EFFICIENCY = 0.7
# GPUs that a link joins; more are on several machines, whose network is not known.
ON_ONE_MACHINE = 8


def communication_tokens(
    model: ModelFacts, hardware: Hardware, precision: str, world_size: int
) -> float:
    """Tokens of a micro-batch whose computation takes as long as its communication.

    Both engines gather the weights twice in the compute dtype and reduce fp32 gradients once
    for every micro-batch. 8,192 where the hardware or the network is not known.
    """
    if world_size == 1:
        return 0.0
    peak = hardware.peak_tflops(precision)
    if hardware.gpu is None or peak is None or world_size > min(hardware.count, ON_ONE_MACHINE):
        return 8192.0
    per_parameter = 2 * (4 if precision == "fp32" else 2) + 4  # bytes
    one_way = hardware.gpu.link_gbs / 2 * 1e9 * LINK_EFFICIENCY
    compute = 6.0 / (assumed_utilisation(hardware) * peak * 1e12)  # s per parameter and token
    return per_parameter / one_way / compute
