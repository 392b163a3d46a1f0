"""`benchmarks/gpu.py` is ready for a GPU machine: its own code runs here, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu
from sft_job import hardware
from sft_job.hardware import Hardware

CPU = Hardware("cpu", 1, "Xeon", None, True, 64.0)


def test_it_measures_each_combination_and_names_the_faults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tiny shape on one process: rates, memory against the plan's; a kernel that cannot run
    here has its reason in the table."""
    out = tmp_path / "gpu.json"
    arguments = [
        "--shape", "tiny", "--seq-len", "128", "--steps", "2", "--rows-per-gpu", "2",
        "--micro-batch-tokens", "128", "--engines", "fsdp", "--recompute", "none",
        "--kernels", "sdpa", "flash_attention_2", "--count", "1", "--out", str(out),
    ]  # fmt: skip
    assert gpu.main(arguments) == 0
    report = json.loads(out.read_text())
    good, bad = report["rows"]
    assert good["tokens_per_second_per_device"] > 0
    assert good["mfu"] is None
    assert good["micro_batch_tokens"] == 128
    assert len(good["losses"]) == gpu.WARM_UP + 2
    assert "model.attention is flash_attention_2, but" in bad["fault"]
    shown = capsys.readouterr().out
    assert "| fsdp | sdpa | none | 128 |" in shown
    assert "| fsdp | flash_attention_2 | none | rank 0: model.attention is" in shown


@pytest.mark.parametrize(
    ("machine", "kernels"),
    [(CPU, ["sdpa"]), (hardware.named("a100-80", 8), ["torch_varlen", "sdpa"])],
)
def test_all_kernels_that_run_on_the_machine_are_measured(machine, kernels, monkeypatch) -> None:
    """What is installed and has code for the device."""
    from sft_job import attention

    monkeypatch.setattr(
        attention, "installed", lambda imported=(): {"torch": attention.Package("2.13.0")}
    )
    args = gpu.parse([], machine)
    assert args.kernels == kernels
    assert len(list(gpu.combinations(args))) == 2 * 2 * len(kernels)


def test_published_figures_stand_beside_ours() -> None:
    """Where shape and product are those of a publication."""
    row = {
        "engine": "fsdp", "kernel": "flash_attention_2", "recompute": "full",
        "tokens_per_second_per_device": 3700.4, "mfu": 0.551, "peak_memory_gib": 33.21,
        "predicted_memory_gib": 34.0, "micro_batch_tokens": 16384,
    }  # fmt: skip
    report = {
        "shape": "llama-2-7b", "seq_len": 4096, "device": "8 x A100", "torch": "2.10.0",
        "reference": gpu.REFERENCES["llama-2-7b", "a100-80"], "rows": [row],
    }  # fmt: skip
    text = gpu.table(report)
    assert "| 16,384 | 3,700 | 55.1% | 33.2 (34.0) |" in text
    assert "3,684 (54.8%)" in text
    for shape, product in gpu.REFERENCES:
        assert shape in gpu.SHAPES
        assert product in hardware.GPUS
