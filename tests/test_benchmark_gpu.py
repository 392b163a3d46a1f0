"""`benchmarks/gpu.py` is ready for a GPU machine: its own code runs here, on a CPU."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from sft_job import hardware, launcher, workers
from sft_job.config import load
from sft_job.hardware import Hardware
from sft_job.launcher import Workers
from sft_job.rundir import RunDir
from sft_job.workers import Place

CPU = Hardware("cpu", 1, "Xeon", None, True, 64.0)


def test_it_measures_each_combination_and_names_the_faults(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    job_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tiny shape on one process: rates, memory against the plan's; a kernel that cannot run
    here has its reason in the table."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
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
    place = Place(0, 0, 1, 1, "127.0.0.1", 1)
    config = load(job_file)
    told = workers.training_environment(place, {}).keys() - place.environment().keys()
    assert report["environment"].keys() == told | workers.own_environment(config, {}).keys()
    assert "model.attention is flash_attention_2, but" in bad["fault"]
    shown = capsys.readouterr().out
    assert "| fsdp | sdpa | none | 128 |" in shown
    assert "| fsdp | flash_attention_2 | none | rank 0: model.attention is" in shown


class Started(Exception):
    """A process would be started with this environment."""


def test_its_ranks_get_the_environment_of_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads, malloc, NCCL: what `sft-job train` gives its workers on the same machine."""

    def refuse(*_: Any, env: dict[str, str], **__: Any) -> None:
        raise Started(env)

    monkeypatch.setattr(subprocess, "Popen", refuse)
    found = []
    for start in (
        lambda: Workers(RunDir(tmp_path / "run"), 1, 2).start(["job.yaml"]),
        lambda: gpu.start_ranks(tmp_path, gpu.Combination("fsdp", "sdpa", "none"), 2, tmp_path),
    ):
        with pytest.raises(Started) as started:
            start()
        (environment,) = started.value.args
        own = (workers.ATTEMPT, workers.BEGAN, launcher.LISTENER, launcher.REPORT_TO)
        for name in ("MASTER_PORT", "PYTHONPATH", *own):
            environment.pop(name, None)
        found.append(environment)
    assert found[0] == found[1]
    assert found[0].items() >= workers.MALLOC.items()


def sleepers(count: int) -> list[subprocess.Popen[bytes]]:
    """Processes that wait for each other for ever, as ranks in a collective do."""
    return [
        subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
        for _ in range(count)
    ]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_killed_rank_ends_its_combination(tmp_path: Path, number: signal.Signals) -> None:
    """At once, with the signal's name; the ranks that wait for it are ended."""
    ranks = sleepers(3)
    # It fails because of the killed one, and is quicker to say so.
    gpu._answer(tmp_path, 0).write_text(json.dumps({"fault": "Connection reset by peer"}))
    ranks[1].send_signal(number)
    fault = gpu.watch(ranks, tmp_path, grace_s=0)
    assert fault is not None
    assert fault.startswith(f"rank 1: ended by {number.name}")
    assert ("memory runs out" in fault) is (number is signal.SIGKILL)
    assert [rank.poll() for rank in ranks] == [-signal.SIGKILL, -number, -signal.SIGKILL]


def test_the_rank_that_says_why_wins_over_one_that_aborts(tmp_path: Path) -> None:
    """A library that finds its peer gone aborts; alone, that is the cause."""
    ranks = sleepers(2)
    ranks[0].send_signal(signal.SIGABRT)
    assert gpu.watch(ranks, tmp_path, grace_s=0) == "rank 0: ended by SIGABRT"
    ranks = sleepers(2)
    ranks[0].send_signal(signal.SIGABRT)
    ranks[1] = subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(1)"])
    gpu._answer(tmp_path, 1).write_text(json.dumps({"fault": "CUDA out of memory"}))
    assert gpu.watch(ranks, tmp_path) == "rank 1: CUDA out of memory"


def test_ranks_that_say_nothing_are_named(tmp_path: Path) -> None:
    """By their exit code, or that none of them has ended."""
    silent = [subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(3)"]), *sleepers(1)]
    fault = gpu.watch(silent, tmp_path, grace_s=0)
    assert fault == "rank 0: ended with exit code 3 and without a word"
    waiting = sleepers(2)
    assert gpu.watch(waiting, tmp_path, timeout_s=0) == "no answer within 0 s"
    assert None not in [rank.poll() for rank in waiting]


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
