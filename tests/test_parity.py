"""The mathematics does not depend on engine, processes, accumulation or preprocessing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sft_job import rates
from sft_job.config import load
from tests.runs import (
    make_conversations,
    make_job,
    make_model,
    metrics,
    run_job,
    unfinished_copy,
    weights,
)

# engine, processes, micro_batch_tokens, expected micro-batches (at least) in a step
VARIANTS = [
    ("fsdp", 1, 280, 4),
    ("fsdp", 2, 4096, 1),
    ("fsdp", 2, 160, 4),
    ("zero3", 1, 4096, 1),
    ("zero3", 1, 280, 4),
    ("zero3", 2, 4096, 1),
    ("zero3", 2, 160, 4),
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory):
    """fsdp, one process, one micro-batch a step."""
    folder = tmp_path_factory.mktemp("parity")
    model = make_model(folder / "model")
    data = make_conversations(folder / "data.json", 64)
    job = make_job(folder, model, data, train__weight_decay=0.1)
    run = run_job(job, f"run.dir={folder / 'reference'}")
    return folder, job, run


def same(run, reference) -> None:
    """The tolerances of the contract, on loss, gradient norm and weights."""
    ours = list({r["step"]: r for r in metrics(run)}.values())  # after a resume, the last ones
    theirs = metrics(reference)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs] == list(range(1, 11))
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        # AdamW and clipping hide a constant factor in the gradients from every other check.
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["learning_rate"] == b["learning_rate"]
        assert (a["tokens"], a["supervised_tokens"]) == (b["tokens"], b["supervised_tokens"])
    ours, theirs = weights(run.model), weights(reference.model)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)


def moved(reference) -> float:
    """How far training went: the tolerance must be small against it."""
    folder, _, run = reference
    before, after = weights(folder / "model"), weights(run.model)
    return min(float((before[n] - after[n]).abs().max()) for n in before)


def test_reference_moves_far_more_than_the_tolerance(reference) -> None:
    """Equal weights mean something only if training changed them."""
    assert moved(reference) > 1e-3


def test_a_record_has_the_learning_rate_of_its_own_step(reference) -> None:
    """Not the next step's; the first one trains."""
    _, job, run = reference
    share = rates.schedule(load(job), 10)
    assert [r["learning_rate"] for r in metrics(run)] == [1e-3 * share(i) for i in range(10)]
    assert metrics(run)[0]["learning_rate"] == pytest.approx(1e-3 / 3)


@pytest.mark.parametrize(("engine", "processes", "tokens", "micro"), VARIANTS)
def test_same_numbers(reference, engine: str, processes: int, tokens: int, micro: int) -> None:
    """Loss, gradient norm and weights equal the reference's at every step."""
    folder, job, expected = reference
    run = run_job(
        job,
        f"run.dir={folder}/{engine}-{processes}-{tokens}",
        f"engine.type={engine}",
        f"run.processes={processes}",
        f"train.micro_batch_tokens={tokens}",
    )
    plan = json.loads(run.plan_file.read_text())
    assert plan["micro_batches"][1] >= micro
    assert plan["world_size"] == processes
    same(run, expected)


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_fp16_follows_fp32(reference, engine: str) -> None:
    """The same curve and true-sized gradients up to the rounding of fp16, two processes."""
    folder, job, expected = reference
    options = [f"engine.type={engine}", "run.processes=2", "train.precision=fp16"]
    run = run_job(job, f"run.dir={folder}/{engine}-fp16", *options)
    for ours, theirs in zip(metrics(run), metrics(expected), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=5e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-3)
        assert (ours["loss_scale"], ours["overflows"]) == (2.0**16, 0)
        assert ours["learning_rate"] == theirs["learning_rate"]
    trained, wanted = weights(run.model), weights(expected.model)
    for name, tensor in trained.items():
        assert tensor.dtype == torch.float16
        # As a whole hardly further off than rounding to fp16 takes it (2**-11 / sqrt(3) of a
        # number): Adam's first step goes by the signs of gradients, and some of them are all
        # rounding. A single element by no more than one of Adam's steps.
        difference = tensor.float() - wanted[name]
        assert difference.norm() <= 2**-11 * wanted[name].norm(), name
        assert difference.abs().max() <= 1e-3, name


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_offloaded_optimizer(reference) -> None:
    """DeepSpeed's CPU Adam on masters in host memory gives the same numbers, also when a job goes
    on without it, and with it again."""
    folder, job, expected = reference
    options = ["run.processes=2", "checkpoint.every_steps=3", "engine.type=zero3"]
    run = run_job(job, f"run.dir={folder}/offload-0", *options, "engine.offload=cpu")
    same(run, expected)
    for step, offload in ((3, "none"), (6, "cpu")):
        run = unfinished_copy(run, folder / f"offload-{step}", step)
        run_job(job, f"run.dir={run.path}", *options, f"engine.offload={offload}")
        same(run, expected)


def test_lazy_equals_cached(reference) -> None:
    """Tokenising each step as it comes, on two processes, trains on the same batches."""
    folder, job, expected = reference
    run = run_job(
        job,
        f"run.dir={folder}/lazy",
        "run.processes=2",
        "data.preprocess=lazy",
        "train.micro_batch_tokens=200",
    )
    same(run, expected)


def test_recomputation_and_released_weights_change_nothing(reference) -> None:
    """ZeRO-3 that really frees and gathers weights, with full activation checkpointing."""
    folder, job, expected = reference
    run = run_job(
        job,
        f"run.dir={folder}/released",
        "run.processes=2",
        "engine={type: zero3, stage3_max_live_parameters: 0, stage3_max_reuse_distance: 0, "
        "stage3_param_persistence_threshold: 0}",
        "train.activation_checkpointing=full",
    )
    same(run, expected)


def test_tied_embeddings_and_recomputation(tmp_path: Path) -> None:
    """A tied head with full recomputation gives one curve under both engines."""
    model = make_model(tmp_path / "model", tied=True)
    data = make_conversations(tmp_path / "data.json", 64)
    job = make_job(tmp_path, model, data, train__activation_checkpointing="full")
    run = run_job(job, f"run.dir={tmp_path}/a", "run.processes=2")
    other = run_job(job, f"run.dir={tmp_path}/b", "run.processes=2", "engine.type=zero3")
    assert "lm_head.weight" not in weights(run.model)
    same(other, run)
