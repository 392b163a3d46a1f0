"""The start imports and reads no more than it needs; how its parts are compared."""

from __future__ import annotations

from pathlib import Path

from benchmarks import startup
from tests.runs import make_conversations, make_job, make_model, sft_job

PARTS = {
    "launch": 0.5, "torch and process group": 1.0, "imports": 2.0, "data": 0.25, "weights": 0.5,
    "engine": 0.25, "self-test": 3.0, "first step": 4.0,
}  # fmt: skip


def test_an_fsdp_job_does_without_deepspeed_and_the_loggers(tmp_path: Path) -> None:
    """From the launcher to the export; what was imported is in the worker's log."""
    data = make_conversations(tmp_path / "data.json", 16)
    job = make_job(tmp_path, make_model(tmp_path / "model"), data, train__max_steps=1)
    result = sft_job("train", job, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert result.returncode == 0, result.stderr
    log = (tmp_path / "run" / "logs" / "attempt-1" / "rank-0.log").read_text()
    lines = [line for line in log.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip() for line in lines}
    assert {"torch", "accelerate", "sft_job.trainer"} <= imported
    assert not imported & {"deepspeed", "tensorboard", "wandb", "mlflow", "datasets", "pandas"}


def test_what_counts_ends_before_the_first_forward_pass() -> None:
    """The self-test is the first forward pass; the ratio is of the same round's two."""
    assert startup.before_first_forward(PARTS) == 4.5
    slow = PARTS | {"self-test": 99.0, "weights": 1.5}
    bare = [{"imports": 2.5, "weights": 0.5}, {"imports": 4.0, "weights": 1.5}]
    assert startup.ratios(bare, [PARTS, slow]) == [1.5, 1.0]


def test_the_table_has_every_part_and_the_sum() -> None:
    """Medians, and nothing where a side has no such part."""
    bare = [{"imports": seconds, "weights": 0.5} for seconds in (2.0, 3.0, 9.0)]
    lines = startup.table(bare, {"fsdp, 1 process": [PARTS]}).splitlines()
    assert lines[0] == "| seconds | bare | fsdp, 1 process |"
    assert "| launch |  | 0.50 |" in lines
    assert "| imports | 3.00 | 2.00 |" in lines
    assert lines[-3] == "| **to the first forward pass** | 3.50 | 4.50 |"
    assert lines[-2].startswith("| self-test |")
