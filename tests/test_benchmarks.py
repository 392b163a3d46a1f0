"""What the benchmarks of FLOPs and memory promise, and that they count rightly."""

import dataclasses
import json
import statistics
from pathlib import Path

import pytest
import torch

from benchmarks import flops, memory
from sft_job.facts import KNOWN_FACTS

SEVEN_B = KNOWN_FACTS[flops.MODEL]
# Every size another one, so that no two formulas give the same number by accident.
LAYERS, HIDDEN, WIDE, VOCABULARY, HEADS, KEY_HEADS, DIM = 3, 64, 160, 503, 4, 2, 16
SMALL = dataclasses.replace(
    SEVEN_B,
    layers=LAYERS,
    hidden=HIDDEN,
    intermediate=WIDE,
    vocabulary=VOCABULARY,
    heads=HEADS,
    key_heads=KEY_HEADS,
    head_dim=DIM,
    parameters=None,
)
SEQ_LEN = 300
# Weights of a layer's products in the order of execution: query, key, value, output, gate, up,
# down.
PRODUCTS = [
    HIDDEN * HEADS * DIM,
    HIDDEN * KEY_HEADS * DIM,
    HIDDEN * KEY_HEADS * DIM,
    HEADS * DIM * HIDDEN,
    HIDDEN * WIDE,
    HIDDEN * WIDE,
    WIDE * HIDDEN,
]


@pytest.fixture
def samples():
    """Conversations of the small step; they need three micro-batches of 1,000 tokens."""
    chosen = flops.conversations(12, SEQ_LEN)
    assert sum(len(sample.input_ids) for sample in chosen) > 2000
    return chosen


def tokens_of(samples) -> int:
    return sum(len(sample.input_ids) for sample in samples)


def supervised_of(samples) -> int:
    return sum(int(sample.supervised.sum()) for sample in samples)


def squares_of(samples) -> int:
    return sum(len(sample.input_ids) ** 2 for sample in samples)


# --- FLOPs: the counter ---------------------------------------------------------------------


def test_a_step_without_recomputation_is_counted_as_by_hand(samples) -> None:
    """Forward 1, backward 2 of each product; attention 1 and 2.5; nothing is missed or twice."""
    (row,) = flops.our_rows(SMALL, SEQ_LEN, samples, [("none", 0)], 1000)
    attention = 2 * 2 * HEADS * DIM * squares_of(samples) * LAYERS
    assert row.executed == {
        "aten.mm": 6 * sum(PRODUCTS) * LAYERS * tokens_of(samples)
        + 4 * VOCABULARY * HIDDEN * supervised_of(samples),
        # The head's gradient, which torch's own counter passes over.
        "aten.addmm_": 2 * VOCABULARY * HIDDEN * supervised_of(samples),
        "aten._scaled_dot_product_flash_attention": attention,
        "aten._scaled_dot_product_flash_attention_backward": attention * 5 // 2,
    }
    assert row.needed == row.total


@pytest.mark.parametrize("saved", range(7))
def test_selective_recomputes_the_products_that_are_not_kept(samples, saved: int) -> None:
    """The first products are kept, attention always, and the last product is not done again."""
    (row,) = flops.our_rows(SMALL, SEQ_LEN, samples, [("selective", saved)], 1000)
    again = 2 * sum(PRODUCTS[saved:-1]) * LAYERS * tokens_of(samples)
    assert row.total == row.needed + again


def test_full_recomputes_all_but_the_last_product(samples) -> None:
    """Attention's forward pass is done again as well."""
    (row,) = flops.our_rows(SMALL, SEQ_LEN, samples, [("full", 0)], 1000)
    again = 2 * sum(PRODUCTS[:-1]) * tokens_of(samples) + 4 * HEADS * DIM * squares_of(samples)
    assert row.total == row.needed + again * LAYERS


def test_fastchat_computes_whole_rows(samples) -> None:
    """Padding goes through the layers and the head; a reentrant checkpoint recomputes all."""
    rows = {(row.side, row.recomputation): row for row in flops.fastchat_rows(SMALL, 300, samples)}
    positions = len(samples) * SEQ_LEN
    forward = 2 * sum(PRODUCTS) * LAYERS * positions
    head = 6 * VOCABULARY * HIDDEN * positions
    for script, squares in (
        ("train.py", len(samples) * SEQ_LEN**2),
        ("train_mem.py", squares_of(samples)),
    ):
        attention = 4 * HEADS * DIM * squares * LAYERS
        plain, again = (rows[f"FastChat {script}", mode] for mode in ("none", "full"))
        assert plain.total == 3 * forward + attention * 7 // 2 + head
        assert again.total == plain.total + forward + attention


def test_a_product_that_nothing_counts_is_refused() -> None:
    """A new operator cannot make a step look cheaper than it is."""
    matrix = torch.empty(4, 4, device="meta")
    assert flops.count(lambda: matrix @ matrix) == {"aten.mm": 2 * 4**3}
    with pytest.raises(NotImplementedError, match=r"aten\.addmv.*nothing counts"):
        flops.count(lambda: torch.ops.aten.addmv(matrix[0], matrix, matrix[0]))


# --- FLOPs: the promise ---------------------------------------------------------------------


def test_conversations_are_realistic() -> None:
    """Long-tailed, 860 tokens on average at a length of 2,048, about half of them answers."""
    chosen = flops.conversations(flops.CONVERSATIONS, 2048)
    lengths = [len(sample.input_ids) for sample in chosen]
    assert statistics.mean(lengths) == pytest.approx(860, rel=0.01)
    assert statistics.median(lengths) < 720
    assert max(lengths) == 2048
    assert min(lengths) < 150
    assert 0.45 < supervised_of(chosen) / tokens_of(chosen) < 0.55


def test_a_7b_step_executes_hardly_more_than_necessary() -> None:
    """The real shape, all layers: 1.02 without recomputation, 1.12 selective, 1.36 full."""
    chosen = flops.conversations(flops.CONVERSATIONS, 2048)
    wanted = [("none", 0), ("selective", 6), ("full", 0)]
    ratios = [row.ratio for row in flops.our_rows(SEVEN_B, 2048, chosen, wanted)]
    assert all(ratio <= bound for ratio, bound in zip(ratios, (1.02, 1.12, 1.36), strict=True)), (
        ratios
    )
    assert min(ratios) >= 0.999  # less than necessary would be a fault of the counting
    assert flops.BOUNDS == {"none": 1.02, "selective": 1.12, "full": 1.36}


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command counts a small model at one length instead of the 7B one at two."""
    one_layer = dataclasses.replace(SMALL, layers=1)
    monkeypatch.setattr(flops, "KNOWN_FACTS", {flops.MODEL: one_layer})
    monkeypatch.setattr(flops, "SEQ_LENS", (SEQ_LEN,))


def test_the_command_reports_every_row(
    small_model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Markdown table on standard output, the same figures as JSON."""
    out = tmp_path / "flops.json"
    assert flops.main(["--out", str(out), "--conversations", "2"]) == 0
    report = json.loads(out.read_text())
    table = capsys.readouterr().out.splitlines()
    # none, selective at 7 levels, full; FastChat's two scripts, each with and without.
    assert len(report["rows"]) == len(table) - 2 == 9 + 4
    for row, line in zip(report["rows"], table[2:], strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:4] == [
            str(row["seq_len"]), row["side"], row["recomputation"], f"{row['ratio']:.3f}"
        ]  # fmt: skip


def test_the_command_fails_when_a_bound_is_broken(
    small_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever runs it in a script learns of it."""
    monkeypatch.setattr(flops, "BOUNDS", {"none": 1.02, "selective": 1.12, "full": 1.01})
    assert flops.main(["--conversations", "2"]) == 1


# --- memory ---------------------------------------------------------------------------------


def test_the_highest_sum_is_found() -> None:
    """Releases count, also those of what was there before."""
    assert memory.highest([5, 3, -5, 4, -3]) == 8
    assert memory.highest([-7, 5]) == 0
    assert memory.highest([]) == 0


def test_a_step_needs_less_than_half_of_plain_trainers_memory(tmp_path: Path) -> None:
    """At most 0.4 of both peaks at Llama 3's vocabulary, with the same loss in fp32.

    A quarter of the benchmark's tokens: the plain side would need 13 GiB.
    """
    work = memory.Workload(rows=4, row_tokens=512, hidden=64)
    memory.write_job(tmp_path, work)
    ours, plain = (memory.measure(tmp_path, side, "fp32", work.rows) for side in memory.SIDES)
    logits = 4 * work.rows * work.row_tokens * work.vocabulary
    assert plain["step_bytes"] > 2 * logits  # else it is not the plain side that was measured
    ratios = memory.compare(ours, plain)
    assert ratios["step"] <= 0.4
    assert ratios["process"] <= 0.4
    assert ratios["loss"] <= 1e-5
    assert memory.holds("fp32", ratios)


def test_a_broken_promise_is_noticed() -> None:
    """Either peak, and in fp32 the loss; bf16 rounds, so its loss promises nothing."""
    good = {"step": 0.4, "process": 0.4, "loss": 1e-5}
    assert memory.holds("fp32", good)
    assert not memory.holds("fp32", good | {"step": 0.41})
    assert not memory.holds("bf16", good | {"process": 0.41})
    assert not memory.holds("fp32", good | {"loss": 2e-5})
    assert memory.holds("bf16", good | {"loss": 2e-5})
