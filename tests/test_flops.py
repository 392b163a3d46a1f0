"""Operations of a step and its time, against figures computed by hand."""

from __future__ import annotations

import dataclasses

import pytest

from sft_job import flops, hardware
from sft_job.facts import KNOWN_FACTS
from sft_job.flops import Work, executed, needed

LLAMA = KNOWN_FACTS["meta-llama/Llama-2-7b-hf"]
GROUPED = KNOWN_FACTS["meta-llama/Llama-3.1-8B"]
WORK = Work(tokens=1000, squares=1000 * 500, supervised=400)


def test_needed_operations_of_llama_2_7b() -> None:
    """6 x elements of the layers x tokens, the head where supervised, half of n^2 in attention."""
    layers = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096)
    head = 6 * 32000 * 4096 * 400
    attention = 3 * 32 * 4 * 4096 * (1000 * 500 + 1000) / 2
    assert needed(LLAMA, WORK) == pytest.approx(6 * layers * 1000 + head + attention, rel=1e-6)


def test_recomputation_costs_what_is_done_again() -> None:
    """none nothing; selective the products that are not kept; full those and attention."""
    base = needed(LLAMA, WORK)
    products = [4096 * 4096] * 4 + [4096 * 11008] * 2  # without the last, which is never repeated
    assert executed(LLAMA, WORK, "none", None) == base
    for kept in range(7):
        again = 2 * 32 * 1000 * sum(products[kept:])
        assert executed(LLAMA, WORK, "selective", kept) == pytest.approx(base + again)
    attention = 32 * 4 * 4096 * (1000 * 500 + 1000) / 2
    again = 2 * 32 * 1000 * sum(products) + attention
    assert executed(LLAMA, WORK, "full", None) == pytest.approx(base + again)
    assert executed(LLAMA, WORK, "selective", 6) == base


def test_grouped_queries_have_narrow_keys() -> None:
    """Keys and values of 8 heads are a quarter as wide as queries."""
    assert GROUPED.projections == (4096, 1024)
    repeated = executed(GROUPED, WORK, "selective", 0) - needed(GROUPED, WORK)
    widths = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 2 * 4096 * 14336
    assert repeated == pytest.approx(2 * 32 * 1000 * widths)


def test_layers_counted_and_computed_agree() -> None:
    """The elements of a layer from the count of the whole model, and from its shape."""
    for name, facts in KNOWN_FACTS.items():
        computed = dataclasses.replace(facts, parameters=None).layer_parameters
        assert facts.layer_parameters == pytest.approx(computed, rel=1e-4), name


def test_time_needs_known_hardware() -> None:
    """Seconds are operations / (MFU x peak x GPUs); unknown stays unknown."""
    a100 = hardware.named("a100-80", 8)
    assert flops.speed(a100, 8, "bf16", 312e12 * 8, 312e12 * 8, 0.5) == (0.5, pytest.approx(2.0))
    assumed, seconds = flops.speed(a100, 8, "bf16", 1e15, 1.25e15, None)
    assert assumed == pytest.approx(flops.ASSUMED[80] / 1.25)
    assert seconds == pytest.approx(1e15 / (assumed * 312e12 * 8))
    assert flops.speed(hardware.named("v100-32", 1), 1, "bf16", 1e15, 1e15, 0.5) == (None, None)
    cpu = hardware.Hardware("cpu", 1, "Xeon", None, True, 64.0)
    assert flops.speed(cpu, 1, "bf16", 1e15, 1e15, None) == (None, None)


def test_communication_is_compared_with_computation() -> None:
    """No other rank, no communication; a slow link needs larger micro-batches."""
    nvlink, pcie = hardware.named("a100-80", 8), hardware.named("a100-pcie-80", 8)
    assert flops.communication_tokens(LLAMA, nvlink, "bf16", 1) == 0
    fast = flops.communication_tokens(LLAMA, nvlink, "bf16", 8)
    slow = flops.communication_tokens(LLAMA, pcie, "bf16", 8)
    assert slow == pytest.approx(fast * 600 / 64)
    assert flops.communication_tokens(LLAMA, nvlink, "bf16", 64) == 8192
