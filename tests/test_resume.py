"""Stopped anywhere, a job goes on as if nothing had happened; what is broken is not used."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from sft_job import checkpoint, seal
from sft_job.attempt import Attempt
from sft_job.rundir import RunDir
from tests import ranks
from tests.runs import (
    command,
    environment,
    held_at,
    interrupt_job,
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

KEYS = [
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "supervised_tokens",
    "tokens_per_second",
    "seconds_per_step",
    "peak_memory_gib",
    "epoch",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def job(folder: Path) -> Path:
    """A tiny job of 6 steps on two processes, saved every 3 steps, logged every step."""
    model = make_model(folder / "model")
    data = make_conversations(folder / "data.json", 40)  # 3 steps an epoch: resumes inside one
    changes = {
        "train.max_steps": 6,
        "train.micro_batch_tokens": 400,
        "run.processes": 2,
        "checkpoint.every_steps": 3,
    }
    return make_job(folder, model, data, **changes)


def same_bits(run: RunDir, other: RunDir) -> None:
    ours, theirs = weights(run.model), weights(other.model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def last_records(run: RunDir) -> dict[int, tuple[float, float, float]]:
    return {r["step"]: (r["loss"], r["grad_norm"], r["learning_rate"]) for r in metrics(run)}


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_stopped_and_resumed_equals_undisturbed(folder: Path, job: Path, engine: str) -> None:
    """Signal, exit 75, checkpoint, second call: weights and records equal bit for bit.

    checkpoint.keep: 1 leaves the newest checkpoint only.
    """
    options = (f"engine.type={engine}",)
    whole = run_job(job, *options, f"run.dir={folder}/{engine}-whole")
    stopped = (*options, f"run.dir={folder}/{engine}-stopped", "checkpoint.keep=1")
    output = interrupt_job(job, *stopped, after=2)
    run = RunDir(folder / f"{engine}-stopped")
    assert "interrupted by signal SIGTERM after step" in output
    assert run.interruption(1) is not None
    (step,) = run.checkpoint_steps()
    assert 2 <= step < 6
    run_job(job, *stopped)
    assert run.interruption(2) is None
    assert last_records(run) == last_records(RunDir(folder / f"{engine}-whole"))
    assert [r["step"] for r in metrics(run)] == [1, 2, 3, 4, 5, 6]
    same_bits(run, whole)
    assert run.checkpoint_steps() == [6]
    assert whole.checkpoint_steps() == [6, 3]


@pytest.fixture(scope="module")
def finished(folder: Path, job: Path) -> RunDir:
    """An fsdp run with checkpoints of steps 3 and 6."""
    run = RunDir(folder / "fsdp-whole")
    return run if run.done.exists() else run_job(job, f"run.dir={run.path}")


def test_a_checkpoint_that_verifies_and_cannot_be_loaded_is_left_out(
    folder: Path, job: Path, finished: RunDir
) -> None:
    """The same command says so, and goes on from the one before in another attempt."""
    run = unfinished_copy(finished, folder / "unloadable", 3)
    shutil.copytree(finished.checkpoint(6), run.checkpoint(6))
    manifest_file = run.checkpoint(6) / checkpoint.MANIFEST
    manifest = json.loads(manifest_file.read_text())
    for file in run.checkpoint(6).glob("*.distcp"):
        file.write_bytes(b"no zip file at all")
        manifest["files"][file.name] = checkpoint._seal(file)
    manifest_file.write_text(json.dumps(seal.sealed(manifest)))
    result = sft_job("train", job, f"run.dir={run.path}")
    assert result.returncode == 0, result.stderr
    assert "note: the checkpoint of step 6 could not be loaded (" in result.stderr
    assert "checkpoint of step 6 passed over: attempt 2 could not load it" in result.stdout
    assert "resuming after step 3" in result.stdout
    same_bits(run, finished)
    assert (run.checkpoints / "damaged-1-step-00000006").is_dir()


def test_fsdp_resumes_on_another_number_of_processes(
    folder: Path, job: Path, finished: RunDir
) -> None:
    """From two processes to one: the same conversations, numbers equal to rounding."""
    run = unfinished_copy(finished, folder / "one-process", 3)
    run_job(job, f"run.dir={run.path}", "run.processes=1")
    for step, (loss, norm, rate) in last_records(finished).items():
        assert last_records(run)[step] == pytest.approx((loss, norm, rate), rel=1e-4)
    ours, theirs = weights(run.model), weights(finished.model)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)


def test_stopped_before_the_export_only_the_export_is_left(
    folder: Path, job: Path, finished: RunDir
) -> None:
    """All steps are done and saved, the model is not written: no step is taken again."""
    run = unfinished_copy(finished, folder / "export-only", 3)
    shutil.copytree(finished.checkpoint(6), run.checkpoint(6))
    before = len(metrics(run))
    run_job(job, f"run.dir={run.path}")
    assert len(metrics(run)) == before
    same_bits(run, finished)


def test_what_is_left_is_bounded_and_open_to_others(finished: RunDir) -> None:
    """The log history is in metrics.jsonl alone, not once more in every checkpoint; files have
    the mode that the umask gives, whatever the library that wrote them had in mind."""
    for step in finished.checkpoint_steps():
        state = json.loads((finished.checkpoint(step) / "trainer_state.json").read_text())
        assert state["log_history"] == []
    for folder in (finished.model, finished.checkpoint(6), finished.path / "attempts"):
        for path in folder.rglob("*"):
            assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path


def test_finished_run_is_not_run_again(job: Path, finished: RunDir) -> None:
    """A second call says where the model is and changes nothing."""
    before = sorted(p.stat().st_mtime_ns for p in finished.path.rglob("*") if p.name != ".lock")
    result = sft_job("train", job, f"run.dir={finished.path}")
    assert result.returncode == 0
    assert f"this job is done; its model is in {finished.model}" in result.stdout
    after = sorted(p.stat().st_mtime_ns for p in finished.path.rglob("*") if p.name != ".lock")
    assert after == before


def test_other_settings_are_refused_with_the_ways_out(job: Path, finished: RunDir) -> None:
    """The run directory belongs to its job; the changed keys are named."""
    result = sft_job("train", job, f"run.dir={finished.path}", "train.learning_rate=0.5")
    assert result.returncode == 2
    assert "train.learning_rate: 0.001 before, 0.5 now" in result.stderr
    assert "run.dir of its own" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_other_signals_and_the_loading_phase(folder: Path, job: Path, number: int) -> None:
    """Asked to stop before the workers have imported torch: exit 75, nothing half-made."""
    run = RunDir(folder / f"early-{number}")
    process = subprocess.Popen(
        command("train", job, f"run.dir={run.path}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=held_at(folder / "held", "start"),
    )
    while not run.log(1, 1).exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    output, _ = process.communicate()
    assert process.returncode == 75, output
    assert "interrupted by signal" in output
    assert run.checkpoint_steps() == []


def test_stop_file_stops_like_a_signal(folder: Path, job: Path) -> None:
    """A file named for this attempt stops it; one that was there before is of another."""
    run = RunDir(folder / "stop-file")
    run.claim(ranks.load(job, [f"run.dir={run.path}"]), job.read_text())
    run.stop_file(1).touch()
    process = subprocess.Popen(
        command("train", job, f"run.dir={run.path}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=held_at(folder / "held", "start"),
    )
    while run.stop_file(1).exists():
        assert process.poll() is None
        time.sleep(0.005)
    run.stop_file(1).touch()
    output, _ = process.communicate()
    assert process.returncode == 75, output
    assert "stop file stop-1" in output
    run_job(job, f"run.dir={run.path}")


def test_stopped_while_the_model_is_written(tmp_path: Path) -> None:
    """All ranks leave at the same file; no half-written model is to be seen."""
    model = make_model(tmp_path / "model")
    assert on_ranks(ranks.stopped_export, 2, model, tmp_path / "run", 3) == [3, 3]
    assert not RunDir(tmp_path / "run").model.exists()
    assert list((tmp_path / "run").glob(".*")) == []  # nor does it take room


def children(process: subprocess.Popen[str]) -> list[int]:
    listing = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    )
    return [int(pid) for pid in listing.stdout.split()]


def test_killed_worker_takes_the_others_down(folder: Path, job: Path) -> None:
    """kill -9 of rank 1: the launcher says so and leaves no process behind."""
    run = RunDir(folder / "killed")
    process = subprocess.Popen(
        command("train", job, f"run.dir={run.path}", "train.max_steps=5000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    while len(metrics(run)) < 2 and process.poll() is None:
        time.sleep(0.05)
    workers = children(process)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "rank 1 was ended by signal SIGKILL" in errors
    assert "Traceback" not in errors
    for pid in workers:
        assert not Path(f"/proc/{pid}").exists()


def test_failing_worker_is_shown_once(folder: Path, job: Path) -> None:
    """A bug on one rank: one sentence, not the others' broken connections; its traceback is in
    its log."""
    broken = folder / "broken"
    broken.mkdir()
    # Imported at start-up by every worker; fails on rank 1 in the middle of training.
    (broken / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import sft_job.dataset as d\n"
        "    whole = d.collate\n"
        "    def collate(samples, calls=[]):\n"
        "        calls.append(1)\n"
        "        if len(calls) == 3:\n"
        "            raise RuntimeError('a bug on rank 1')\n"
        "        return whole(samples)\n"
        "    d.collate = collate\n"
    )
    path = f"{broken}:{environment()['PYTHONPATH']}"
    result = sft_job("train", job, f"run.dir={folder}/bug", env={"PYTHONPATH": path})
    assert result.returncode == 1
    log = RunDir(folder / "bug").log(1, 1)
    said = "error: rank 1: unexpected RuntimeError: a bug on rank 1 ("
    assert result.stderr.startswith(said)
    assert f"the traceback is in {log}" in result.stderr
    assert "Traceback" not in result.stderr
    assert log.read_text().count("RuntimeError: a bug on rank 1") == 1


def test_non_finite_loss_stops_before_the_step(folder: Path, tmp_path: Path) -> None:
    """A loss that is not a number is not trained on; the conversations are named."""
    model = make_model(tmp_path / "model")
    tensors = weights(model)
    tensors["model.norm.weight"][:] = 1e38  # finite, but no logit is
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    data = make_conversations(tmp_path / "data.json", 20)
    result = sft_job("train", make_job(tmp_path, model, data))
    assert result.returncode == 1, result.stderr
    assert "the loss of step 1 is nan" in result.stderr
    assert f"({data}:" in result.stderr
    assert "Traceback" not in result.stderr


def test_checkpoints_of_two_ranks_are_whole(tmp_path: Path) -> None:
    """The manifest lists every rank's file; without manifest or whole files it is passed over."""
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    (newest, files, older, skipped), other = on_ranks(ranks.checkpoints, 2, str(run.path))
    assert [newest, files, older, skipped] == other
    assert (newest, older) == (2, 1)
    assert {"__0_0.distcp", "__1_0.distcp", "scheduler.pt", "rng_state_1.pth"} <= set(files)
    assert [line.split(": ")[1].split(",")[0] for line in skipped] == [
        "its manifest is of step 1",
        "no manifest",
    ]


def test_zero3_refuses_another_number_of_processes(folder: Path, job: Path) -> None:
    """A ZeRO-3 checkpoint of two processes is not loaded into one; the way out is said."""
    options = ("engine.type=zero3", f"run.dir={folder}/zero3-stopped")
    assert RunDir(folder / "zero3-stopped").checkpoint_steps() != []
    RunDir(folder / "zero3-stopped").done.unlink()
    result = sft_job("train", job, *options, "run.processes=1")
    assert result.returncode == 1
    assert "a ZeRO-3 checkpoint of 2 processes cannot be resumed by 1" in result.stderr


def test_job_file_stores_what_ran(job: Path, finished: RunDir) -> None:
    """The run directory holds the job as given, as checked, and the resolved plan."""
    assert finished.config_file.read_text() == job.read_text()
    stored = json.loads(finished.job_file.read_text())
    assert (
        stored["train"]["learning_rate"]
        == yaml.safe_load(job.read_text())["train"]["learning_rate"]
    )
    plan = json.loads(finished.plan_file.read_text())
    assert plan["steps"] == 6
    assert plan["attention"]["reason"]
    for record in metrics(finished):
        for key in KEYS:
            assert isinstance(record[key], int | float), key
    assert metrics(finished)[-1]["epoch"] == 2.0


def test_changed_data_is_not_resumed(folder: Path, job: Path, finished: RunDir) -> None:
    """The order of all steps follows from the data; other data would be another run."""
    run = unfinished_copy(finished, folder / "other-data", 3)
    data = folder / "data.json"
    before = data.read_text()
    data.write_text(before.replace("sun", "moon", 1))
    result = sft_job("train", job, f"run.dir={run.path}")
    data.write_text(before)
    assert result.returncode == 2
    assert "the data has changed since this run began: other content, or" in result.stderr
    assert str(data) in result.stderr


def test_when_no_checkpoint_can_be_used_nothing_starts_from_zero(
    folder: Path, job: Path, finished: RunDir
) -> None:
    """Days of work are not begun anew behind a line in the log."""
    run = unfinished_copy(finished, folder / "all-damaged", 3)
    next(run.checkpoint(3).glob("*.distcp")).write_bytes(b"short")
    result = sft_job("train", job, f"run.dir={run.path}")
    assert result.returncode == 1
    assert "there are checkpoints, but none can be used" in result.stderr
    assert run.checkpoint_steps() == [3]


def test_keep_counts_what_was_just_written(tmp_path: Path) -> None:
    """A damaged later checkpoint does not push out the good one written after it."""
    run = RunDir(tmp_path)
    for step in (200, 250, 400):
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / "manifest.json").write_text("{}")
    checkpoint.drop_old(Attempt(run, 1), 1, newest=250)
    assert run.checkpoint_steps() == [400, 250]
