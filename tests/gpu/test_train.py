"""The tiny job on the machine's GPUs gives the curve of the CPU run. Needs an NVIDIA GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.runs import make_conversations, make_job, make_model, metrics, run_job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        shutil.which("nvidia-smi") is None, reason="no NVIDIA GPU: nvidia-smi is not there"
    ),
]


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_gpus_give_the_curve_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """fp32 on all GPUs against fp32 on one CPU process, TF32 left at torch's default (off)."""
    model = make_model(tmp_path / "model")
    data = make_conversations(tmp_path / "data.json", 64)
    job = make_job(tmp_path, model, data, **{"engine.type": engine})
    on_gpus = run_job(job, f"run.dir={tmp_path}/gpu")
    # An empty list hides every GPU from nvidia-smi's reader and from torch.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    on_cpu = run_job(job, f"run.dir={tmp_path}/cpu")
    for ours, theirs in zip(metrics(on_gpus), metrics(on_cpu), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
