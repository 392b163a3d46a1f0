"""Jobs on the test cluster: made, submitted with the real command, watched."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from sft_job import follow
from sft_job.rundir import RunDir
from tests.runs import make_conversations, make_job, make_model, metrics, sft_job, weights

# A job that hangs is told from one on a busy machine: less than ranks wait for each other (half an
# hour), so that what ends by itself in this time has ended for a reason.
PATIENCE_S = 900.0
SLURM = {"nodes": 2, "gpus_per_node": 2, "time_min": 10, "grace_s": 15}

# What a shell may have kept of other jobs and launchers, and what its user has set.
HOSTILE = {
    "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1",
    "TORCHELASTIC_USE_AGENT_STORE": "True", "ACCELERATE_MIXED_PRECISION": "bf16", "PMI_SIZE": "1",
    "SFT_JOB_ATTEMPT": "9", "CUDA_VISIBLE_DEVICES": "7", "SQUEUE_USERS": "nobody",
    "SQUEUE_PARTITION": "x", "SQUEUE_STATES": "CD", "SQUEUE_FORMAT2": "jobid",
    "SINFO_PARTITION": "x", "SINFO_FORMAT": "%N", "SCANCEL_INTERACTIVE": "1",
    "SLURM_TIME_FORMAT": "relative", "SLURM_LABELIO": "1", "SLURM_STEP_NUM_TASKS": "1",
    "SBATCH_TIMELIMIT": "1", "SRUN_CPUS_PER_TASK": "9",
}  # fmt: skip


def slurm(*command: str, env: dict[str, str] | None = None) -> str:
    """What a Slurm command prints."""
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True, env=env
    ).stdout.strip()


def make_cluster_job(folder: Path, **changes: Any) -> Path:
    """A job of a tiny model on two nodes with two tasks each, its data encoded."""
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model(folder / "model")
    data = make_conversations(folder / "data.json", 128)
    job = make_job(folder, model, data, slurm=SLURM, **changes)
    assert sft_job("data", "encode", job).returncode == 0
    return job


def submit(job: Path, run_dir: Path, *arguments: str, **environ: str) -> RunDir:
    """Submit; the test fails with the program's own words otherwise."""
    result = sft_job("submit", job, f"run.dir={run_dir}", *arguments, env=environ)
    assert result.returncode == 0, result.stdout + result.stderr
    return RunDir(run_dir)


def job_id(run: RunDir) -> str:
    return str(follow.submissions(run)[-1]["job"])


def wait_for_step(run: RunDir, step: int) -> None:
    """Until a step is recorded, as long as the job lives."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        records = metrics(run)
        if records and records[-1]["step"] >= step:
            return
        state = follow.job_state(run)
        assert state in follow.slurm.ALIVE, f"{state}\n{output(run)}"
        time.sleep(0.2)
    raise AssertionError(f"step {step} did not come:\n{output(run)}")


def wait_for_words(run: RunDir, words: str) -> None:
    """Until a job script has said this."""
    deadline = time.monotonic() + PATIENCE_S
    while words not in said(run):
        assert time.monotonic() < deadline, output(run)
        time.sleep(0.2)


def wait_for_end(run: RunDir) -> str:
    """Until Slurm and the run directory agree that nothing goes on; the state."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        state = follow.job_state(run)
        last = follow.submissions(run)[-1]
        # The job of a lost node is in no queue for some seconds.
        alive = follow.slurm.ALIVE | {"NODE_FAIL"}
        if state not in alive and (follow.slurm.state(last["job"]) not in follow.slurm.ALIVE):
            return state
        time.sleep(0.2)
    raise AssertionError(f"still {state}:\n{output(run)}")


def output(run: RunDir) -> str:
    """Everything that the job has said."""
    files = [*run.path.glob("slurm-*.log"), *run.path.glob("logs/*/*")]
    files += [*run.path.glob("submitit/*.out"), *run.path.glob("submitit/*.sh")]
    return "\n".join(
        f"--- {f.relative_to(run.path)}\n{f.read_text(errors='replace')[-3000:]}"
        for f in files
        if f.is_file()
    )


def said(run: RunDir) -> str:
    """What the job scripts have printed."""
    return "\n".join(f.read_text(errors="replace") for f in sorted(run.path.glob("slurm-*.log")))


def first_error(run: RunDir) -> str:
    found = re.search(r"^error: (.*)$", said(run), re.MULTILINE)
    assert found is not None, output(run)
    return found[1]


def assert_same_weights(run: RunDir, expected: RunDir) -> None:
    """Bit for bit."""
    ours, theirs = weights(run.model), weights(expected.model)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert different == [], output(run)


def last_attempt(run: RunDir) -> int:
    return follow.attempts(run)


def attempts_of(run: RunDir) -> list[int]:
    """The attempt of each recorded step."""
    return [record["attempt"] for record in metrics(run)]


def rank_process(run: RunDir, rank: int) -> psutil.Process:
    """The training process of a rank."""
    for process in psutil.process_iter():
        try:
            words, environ = process.cmdline(), process.environ()
        except psutil.Error:
            continue
        if (
            "sft_job.train" in words
            and str(run.job_file) in words
            and environ.get("SLURM_PROCID") == str(rank)
            and words[0].endswith(("python", "python3", "python3.11"))
        ):
            return process
    raise AssertionError(f"no process of rank {rank}:\n{output(run)}")


def node_pid(state: Path, node: str) -> int:
    """A process in the namespaces of a node."""
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if words[:1] and words[0].endswith("slurmd") and words[-1] == node:
            return process.pid
    raise AssertionError(f"no slurmd of {node} ({state})")


def stored(run: RunDir) -> dict[str, Any]:
    """job.json."""
    found: dict[str, Any] = json.loads(run.job_file.read_text())
    return found
