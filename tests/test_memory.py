"""The memory that the plan predicts is the memory that is used, within 10%."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sft_job import hardware, memory
from sft_job.facts import KNOWN_FACTS, ModelFacts, read_facts
from sft_job.memory import Setting, estimate
from tests import ranks
from tests.runs import (
    ROOT,
    encode,
    environment,
    make_conversations,
    make_job,
    make_model,
    on_ranks,
)

LLAMA_2_7B = KNOWN_FACTS["meta-llama/Llama-2-7b-hf"]
LLAMA_3_8B = KNOWN_FACTS["meta-llama/Llama-3.1-8B"]


def fewer_layers(model: ModelFacts, layers: int, *, tied: bool = False) -> ModelFacts:
    """The same shape with fewer layers, its parameters counted anew."""
    tables = model.table_parameters * (1 if tied else 2)
    parameters = layers * model.layer_parameters + tables + model.hidden
    return dataclasses.replace(model, layers=layers, tied=tied, parameters=parameters)


@pytest.fixture(scope="module")
def tracker() -> Iterator[subprocess.Popen[str]]:
    """`python -m tests.tracker`, which answers line by line."""
    words = [sys.executable, "-m", "tests.tracker"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, cwd=ROOT, env=environment(), text=True, **pipes) as process:
        yield process
        process.stdin.close()


def tracked(
    tracker: subprocess.Popen[str],
    model: ModelFacts,
    setting: Setting,
    lengths: list[int],
    micro_batches: int,
) -> int:
    """Peak bytes by torch's tracker."""
    shape = {
        "hidden_size": model.hidden,
        "intermediate_size": model.intermediate,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.key_heads,
        "vocab_size": model.vocabulary,
        "tie_word_embeddings": model.tied,
        "max_position_embeddings": model.context,
    }
    arguments = {
        "shape": shape,
        "world_size": setting.world_size,
        "lengths": lengths,
        "supervised": setting.supervised,
        "precision": setting.precision,
        "recompute": setting.recompute,
        "saved_products": setting.saved_products,
        "micro_batches": micro_batches,
    }
    print(json.dumps(arguments), file=tracker.stdin, flush=True)
    answer = tracker.stdout.readline()
    assert answer, "the tracker ended: its traceback is in the captured stderr"
    return int(answer)


def setting(**changes: Any) -> Setting:
    values: dict[str, Any] = {
        "engine": "fsdp",
        "offload": "none",
        "precision": "bf16",
        "device": "cuda",
        "kernel": "torch_varlen",
        "cross_entropy": "torch",
        "world_size": 8,
        "tokens": 4096,
        "supervised": 2048,
        "recompute": "full",
        "saved_products": 0,
        "accumulates": True,
    }
    return Setting(**(values | changes))


SMALL = fewer_layers(LLAMA_2_7B, 6)
LARGE_HEAD = fewer_layers(LLAMA_3_8B, 6)
CASES = {
    "7b on 4": (LLAMA_2_7B, {"world_size": 4}),
    "7b on 8": (LLAMA_2_7B, {}),
    "7b on 8, selective": (LLAMA_2_7B, {"recompute": "selective", "saved_products": 5}),
    "one micro-batch": (SMALL, {"accumulates": False}),
    "no recomputation": (SMALL, {"recompute": "none"}),
    "selective, three": (SMALL, {"recompute": "selective", "saved_products": 3}),
    "attention alone": (SMALL, {"recompute": "selective", "saved_products": 0}),
    "more tokens": (SMALL, {"tokens": 16384, "supervised": 4000}),
    "fp32": (SMALL, {"precision": "fp32", "recompute": "none"}),
    "tied": (fewer_layers(LLAMA_2_7B, 6, tied=True), {}),
    "grouped queries, large vocabulary": (LARGE_HEAD, {"recompute": "none"}),
    "large vocabulary, tied": (fewer_layers(LLAMA_3_8B, 6, tied=True), {}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_fsdp_equals_torchs_own_tracker(tracker, case: str) -> None:
    """Fake tensors, a fake process group, real shapes: within 10%."""
    model, changes = CASES[case]
    asked = setting(**changes)
    lengths = [asked.tokens // 4] * 4
    predicted = estimate(model, asked).total
    seen = tracked(tracker, model, asked, lengths, micro_batches=2 if asked.accumulates else 1)
    assert 0.9 <= predicted / seen <= 1.1, (predicted / 2**30, seen / 2**30)


def test_the_tracker_can_tell(tracker) -> None:  # the comparison above must be able to fail
    """Without its recomputation, or on half the ranks, the prediction is far off."""
    model, asked = SMALL, setting(recompute="none")
    seen = tracked(tracker, model, asked, [1024] * 4, micro_batches=2)
    for wrong in (setting(recompute="full"), setting(recompute="none", world_size=4)):
        assert not 0.9 <= estimate(model, wrong).total / seen <= 1.1


# 100 M parameters, so that the interpreter counts for little.
SHAPE = {
    "vocab_size": 504,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 9,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 4096,
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 116 M parameters and conversations of up to 800 tokens, encoded."""
    folder = tmp_path_factory.mktemp("memory")
    model = make_model(folder / "model", **SHAPE)
    data = make_conversations(folder / "data.json", 8, words=80)
    job = make_job(folder, model, data, train__max_steps=2, train__global_batch_size=4,
                   data__seq_len=800)  # fmt: skip
    encode(job)
    return job


@pytest.mark.parametrize(
    ("engine", "processes", "precision", "recompute"),
    [
        ("fsdp", 1, "fp32", "none"),
        ("fsdp", 2, "bf16", "full"),
        ("zero3", 1, "fp32", "full"),
        ("zero3", 2, "bf16", "none"),
    ],
)
def test_measured_runs_take_what_was_predicted(
    job: Path, engine: str, processes: int, precision: str, recompute: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Resident memory of real training on CPUs, above that before loading: within 10%."""
    if precision == "bf16" and not hardware.detect().bf16:
        pytest.skip("this processor has no bf16 instructions: 116 M parameters take minutes a step")
    # Every large block goes back to the kernel as soon as it is free.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    results = on_ranks(
        ranks.measured_memory,
        processes,
        job,
        f"engine.type={engine}",
        f"train.precision={precision}",
        f"train.activation_checkpointing={recompute}",
    )
    for result in results:
        asked = setting(
            engine=engine,
            precision=precision,
            recompute=recompute,
            device="cpu",
            kernel="sdpa",
            world_size=processes,
            tokens=result["tokens"],
            supervised=result["supervised"],
            accumulates=result["micro_batches"] > 1,
        )
        predicted = estimate(read_facts(job.parent / "model"), asked).total
        ratio = predicted / result["bytes"]
        assert 0.9 <= ratio <= 1.1, (predicted / 2**20, result["bytes"] / 2**20)


# --- plain arithmetic ------------------------------------------------------------------------


def test_parts_scale_as_they_must() -> None:
    """Shards with the ranks, activations with the tokens, nothing else with either."""
    one, two = estimate(LLAMA_2_7B, setting()), estimate(LLAMA_2_7B, setting(world_size=16))
    assert two.weights == one.weights // 2
    assert two.optimizer == 2 * two.weights
    assert two.activations == one.activations
    wide = estimate(LLAMA_2_7B, setting(tokens=8192, supervised=4096))
    assert wide.activations == 2 * one.activations
    assert wide.weights == one.weights


def test_less_recomputation_takes_more_memory() -> None:
    """none > selective with 6 ... 0 products > full, strictly."""
    levels = [("none", 0), *(("selective", kept) for kept in range(6, -1, -1)), ("full", 0)]
    totals = [
        estimate(LLAMA_2_7B, setting(recompute=level, saved_products=kept)).total
        for level, kept in levels
    ]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == len(totals)


def test_offload_moves_masters_and_adam_to_the_host() -> None:
    """What leaves the device arrives in host memory."""
    here = estimate(LLAMA_2_7B, setting(engine="zero3"))
    there = estimate(LLAMA_2_7B, setting(engine="zero3", offload="cpu"))
    assert (there.optimizer, there.gradients) == (0, 0)
    assert here.host == 0
    assert there.host >= here.optimizer + here.gradients
    assert there.total < here.total


def test_the_parts_make_the_total() -> None:
    """Host memory is elsewhere."""
    memory = estimate(LLAMA_2_7B, setting(engine="zero3", offload="cpu"))
    parts = dataclasses.asdict(memory)
    del parts["moment"], parts["host"]
    assert sum(parts.values()) == memory.total


@pytest.mark.parametrize(
    ("supervised", "vocabulary", "hidden", "rows"),
    [
        (16384, 32_000, 4096, 2048),
        (16385, 32_000, 4096, 4096),  # 2049 rounded up, where a floor would say 2048
        (8192, 128_256, 4096, 256),
        (8193, 128_256, 4096, 512),
        (100, 128_256, 4096, 4),
        (1, 128_256, 4096, 1),
        (3, 503, 64, 1),
        (5, 100, 64, 4),
        (3, 64, 64, 3),  # 4, but there are 3
        (0, 32_000, 4096, 0),
    ],
)
def test_ligers_chunk_is_counted_as_it_cuts_it(
    supervised: int, vocabulary: int, hidden: int, rows: int
) -> None:
    """ceil, then the next power of two, then no more than there are."""
    assert memory.liger_rows(supervised, vocabulary, hidden) == rows


def test_ligers_chunk_is_that_of_the_installed_release() -> None:
    """The logits that it asks memory for, whatever it divides by what."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    import torch
    from liger_kernel.ops import fused_linear_cross_entropy as liger

    class Stop(Exception):
        """The first chunk has been cut."""

    class Rows(torch.Tensor):
        """Refuses to be sliced, and says where."""

        def __getitem__(self, part: Any) -> torch.Tensor:
            raise Stop(part.stop)

    for supervised, vocabulary, hidden in itertools.product((1, 3, 70, 4097), (97, 503), (8, 64)):
        rows = torch.zeros(supervised, hidden).as_subclass(Rows)
        targets = torch.zeros(supervised, dtype=torch.int64)
        with pytest.raises(Stop) as stopped:
            liger.fused_linear_cross_entropy_forward(
                rows, torch.zeros(vocabulary, hidden), targets, reduction="sum"
            )
        assert stopped.value.args == (memory.liger_rows(supervised, vocabulary, hidden),)
