"""fp16 with dynamic loss scaling: true-sized gradients, and what happens when they overflow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sft_job.rundir import RunDir
from tests import ranks
from tests.runs import (
    encode,
    make_conversations,
    make_job,
    make_model,
    metrics,
    on_ranks,
    run_job,
    sft_job,
    unfinished_copy,
    weights,
)

ENGINES = ["fsdp", "zero3"]


def make_steep(folder: Path, size: float) -> Path:
    """A model whose loss is ordinary and whose gradients are large: about 1 / `size`.

    Layers add nothing to the residual stream, so that the norm behind them divides by the
    embedding itself, and one token's is tiny. Its row is in the second rank's half.
    """
    model = make_model(folder, vocab_size=504, rms_norm_eps=1e-16)
    tensors = weights(model)
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    from transformers import AutoTokenizer

    (moon,) = AutoTokenizer.from_pretrained(model)(" moon", add_special_tokens=False).input_ids
    assert 252 <= moon < 504
    tensors["model.embed_tokens.weight"][moon] *= size / 0.1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("precision")


@pytest.fixture(scope="module")
def job(folder: Path) -> Path:
    """Ten steps of a steep model; at the first loss scale its gradients overflow."""
    data = make_conversations(folder / "data.json", 64)
    changes = {"run.processes": 2, "checkpoint.every_steps": 7, "train.precision": "fp16"}
    return make_job(folder, make_steep(folder / "model", 1e-3), data, **changes)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_overflowing_step_is_left_out_on_every_rank(job: Path, engine: str) -> None:
    """Weights and schedule stay and the scale halves; then steps are clipped at their true size.

    Plain SGD moves the weights by rate times gradient, so that their size is seen.
    """
    encode(job)
    options = [f"engine.type={engine}", f"run.dir={job.parent}/{engine}-ranks"]
    options += ["train.extra={optim: sgd}", "train.lr_scheduler_type=linear"]
    first, second = on_ranks(ranks.steps_taken, 2, job, *options, "train.warmup_ratio=0.0")
    assert first == second
    skipped = [number for number, step in enumerate(first) if step["grad_norm"] is None]
    natural = [number for number in skipped if number != ranks.INJECTED]
    assert 2 <= len(natural) <= 6
    assert skipped == [*range(len(natural)), *([ranks.INJECTED] if engine == "fsdp" else [])]
    taken = 0
    for number, step in enumerate(first):
        rate = 1e-3 * (1 - taken / 10)
        if number in skipped:
            assert step["moved"] == 0.0
        else:
            taken += 1
            assert step["grad_norm"] > 2.0
            assert step["moved"] == pytest.approx(rate * 1.0, rel=1e-3)  # max_grad_norm: 1.0
        assert step["overflows"] == number + 1 - taken
        assert step["scale"] == 2.0 ** (16 - step["overflows"])
        assert step["next_rate"] == pytest.approx(1e-3 * (1 - taken / 10))


@pytest.mark.parametrize("engine", ENGINES)
def test_resumed_with_its_loss_scale(folder: Path, job: Path, engine: str) -> None:
    """Ten steps, of which some overflow, equal seven and three bit for bit."""
    whole = run_job(job, f"engine.type={engine}", f"run.dir={folder}/{engine}-whole")
    run = unfinished_copy(whole, folder / f"{engine}-resumed", 7)
    run_job(job, f"engine.type={engine}", f"run.dir={run.path}")
    records = metrics(whole)
    keys = ("step", "loss", "grad_norm", "learning_rate", "loss_scale", "overflows")
    for ours, theirs in zip(metrics(run)[-3:], records[-3:], strict=True):
        assert [ours[key] for key in keys] == [theirs[key] for key in keys]
        assert (ours["attempt"], theirs["attempt"]) == (2, 1)
    assert records[0]["grad_norm"] is None
    assert 2 <= records[-1]["overflows"] <= 6
    assert records[-1]["loss_scale"] == 2.0 ** (16 - records[-1]["overflows"])
    ours, theirs = weights(run.model), weights(whole.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("engine", ENGINES)
def test_precision_auto_goes_on_elsewhere(folder: Path, job: Path, engine: str) -> None:
    """A checkpoint in fp16 on a machine that computes in another precision: FSDP2 takes its fp32
    masters and goes on; ZeRO-3 would take over the loss scale, and says so."""
    whole = RunDir(folder / f"{engine}-whole")
    if not whole.done.exists():
        run_job(job, f"engine.type={engine}", f"run.dir={whole.path}")
    run = unfinished_copy(whole, folder / f"{engine}-elsewhere", 7)
    stored = json.loads(run.job_file.read_text())
    stored["train"]["precision"] = "fp32"  # as if it had been auto
    run.job_file.write_text(json.dumps(stored))
    run.identity.unlink()  # which would know better
    options = [f"engine.type={engine}", f"run.dir={run.path}", "train.precision=fp32"]
    result = sft_job("train", job, *options)
    if engine == "fsdp":
        assert result.returncode == 0, result.stderr
        for ours, theirs in zip(metrics(run)[-3:], metrics(whole)[-3:], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    else:
        assert result.returncode == 1
        assert "the checkpoint was written in another precision than fp32 (asked for)" in (
            result.stderr
        )
        assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize("engine", ENGINES)
def test_an_overflow_that_no_scale_prevents_ends_the_job(
    tmp_path: Path, job: Path, engine: str
) -> None:
    """The step, its conversations and the ways out; no traceback, and nothing of the model."""
    model = make_steep(tmp_path / "model", 1e-7)
    run = tmp_path / "run"
    options = [f"model.path={model}", f"engine.type={engine}", f"run.dir={run}"]
    result = sft_job("train", job, *options, "train.max_steps=30")
    assert result.returncode == 1
    assert result.stderr.count("error:") == 1
    assert "Traceback" not in result.stdout + result.stderr
    # 2^16 halved fifteen times is 2, the least
    assert "fp16 overflows at step 16 even at a loss scale of 2. Its conversations:" in (
        result.stderr
    )
    assert f"({job.parent / 'data.json'}:" in result.stderr
    assert "use GPUs that have bf16, or train.precision=fp32" in result.stderr
    assert "lower train.learning_rate; the last checkpoint, of step 14, is whole" in result.stderr


def test_activations_that_do_not_fit_fp16(tmp_path: Path, job: Path) -> None:
    """They make the loss itself infinite; no loss scale helps, the way out is said."""
    model = make_model(tmp_path / "model", vocab_size=504)
    tensors = weights(model)
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    options = [f"model.path={model}", f"run.dir={tmp_path}/run", "run.processes=1"]
    result = sft_job("train", job, *options)
    assert result.returncode == 1
    assert "the loss of step 1 is nan; the step was not taken further" in result.stderr
    assert "the model may not fit fp16, as happens to models trained in bf16" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
