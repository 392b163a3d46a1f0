"""Real jobs on a real Slurm: they end with the weights of the same job on one machine."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft_job import follow
from sft_job.files import read_records
from sft_job.rundir import RunDir
from tests.cluster import jobs
from tests.runs import ROOT, run_job, sft_job
from tests.test_place import at_a_terminal

ENGINES = ["fsdp", "zero3"]
WAYS = ["sbatch", "submitit"]
STEPS = 60
GRACE_S = 30


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, cluster: Path) -> Path:
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="session")
def job(folder: Path) -> Path:
    changes = {"train.max_steps": STEPS, "checkpoint.every_steps": 20, "checkpoint.keep": 2}
    return jobs.make_cluster_job(folder / "job", **changes)


@pytest.fixture(scope="session")
def expected(folder: Path, job: Path) -> dict[str, RunDir]:
    """The undisturbed job on four processes of one machine."""
    return {
        name: run_job(
            job, f"engine.type={name}", f"run.dir={folder}/local-{name}",
            "run.processes=4", "slurm=null",
        )
        for name in ENGINES
    }  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "via"),
    [
        ("fsdp", "sbatch"),
        ("zero3", "submitit"),
        # CI has these interrupted and continued, below.
        pytest.param("fsdp", "submitit", marks=pytest.mark.widest),
        pytest.param("zero3", "sbatch", marks=pytest.mark.widest),
    ],
)
def test_equals_the_job_on_one_machine(
    folder: Path, job: Path, expected: dict[str, RunDir], engine: str, via: str
) -> None:
    """Two nodes with two tasks each; waited for by the command itself, in a shell that knows much
    of other jobs."""
    run = RunDir(folder / f"{engine}-{via}")
    options = (f"engine.type={engine}", f"run.dir={run.path}", "--via", via, "--wait")
    result = sft_job("submit", job, *options, env=jobs.HOSTILE)
    assert result.returncode == 0, result.stdout + result.stderr + jobs.output(run)
    assert "state        DONE" in result.stdout
    jobs.assert_same_weights(run, expected[engine])
    logs = [run.log(1, rank).read_text() for rank in range(4)]
    assert not [log for log in logs if "Traceback" in log]
    assert jobs.last_attempt(run) == 1


def test_the_shell_of_an_interactive_step(folder: Path, job: Path) -> None:
    """`srun --pty bash` of several tasks, of which one has a shell: a launcher starts there."""
    run = RunDir(folder / "interactive")
    train = [sys.executable, "-m", "sft_job", "train", job, f"run.dir={run.path}",
             "train.max_steps=2", "run.processes=2", "slurm=null"]  # fmt: skip
    typed = f"cd {ROOT}; {shlex.join(map(str, train))}; echo code $((1 + $?)); exit\n"
    srun = shutil.which("srun")
    assert srun is not None
    said = at_a_terminal(srun, "--ntasks=2", "--pty", "bash", "--norc", typed=typed)
    assert "code 1" in said, said
    assert run.done.exists()


def out_of_time(run: RunDir, cluster: Path) -> None:
    """A rank is held until less than the grace is left of the job's minute."""
    began = read_records(run.attempts_file)[0]["began"]
    rank = jobs.rank_process(run, 3)
    rank.suspend()
    time.sleep(max(0.0, began + 60 - GRACE_S + 3 - time.time()))
    rank.resume()


def signal_steps(run: RunDir, cluster: Path) -> None:
    jobs.slurm("scancel", "--signal=USR1", jobs.job_id(run))


def terminate_steps(run: RunDir, cluster: Path) -> None:
    jobs.slurm("scancel", "--signal=TERM", jobs.job_id(run))


def requeue(run: RunDir, cluster: Path) -> None:
    jobs.slurm("scontrol", "requeue", jobs.job_id(run))


def lose_node(run: RunDir, cluster: Path) -> None:
    node = "nodename=tn2"
    jobs.slurm("scontrol", "update", node, "state=down", "reason=test")
    time.sleep(2)
    # Refused where the node has come back by itself.
    subprocess.run(["scontrol", "update", node, "state=resume"], check=False, timeout=60)


def warned_by_slurm(run: RunDir, cluster: Path) -> None:
    """The signal of `#SBATCH --signal` comes; until then a rank is held."""
    words = "asked to stop by the batch system"
    if words not in jobs.said(run):
        rank = jobs.rank_process(run, 3)
        rank.suspend()
        jobs.wait_for_words(run, words)
        rank.resume()


def forbid_requeue(run: RunDir, cluster: Path) -> None:
    jobs.slurm("scontrol", "update", f"jobid={jobs.job_id(run)}", "requeue=0")
    signal_steps(run, cluster)


KINDS = {
    "time limit": out_of_time,
    "--signal": warned_by_slurm,
    "no requeue": forbid_requeue,
    "scancel --signal": signal_steps,
    "scancel TERM": terminate_steps,
    "scontrol requeue": requeue,
    "node down": lose_node,
}
# What there is time for in CI; both engines and both ways are among them.
IN_CI = {
    ("fsdp", "sbatch", "--signal"),
    ("zero3", "submitit", "scancel --signal"),
    ("fsdp", "sbatch", "scontrol requeue"),
    ("fsdp", "sbatch", "node down"),
}


@pytest.mark.parametrize(
    ("engine", "via", "kind"),
    [
        pytest.param(
            engine, via, kind, marks=[] if (engine, via, kind) in IN_CI else [pytest.mark.widest]
        )
        for engine in ENGINES
        for via in WAYS
        for kind in KINDS
    ],
)
def test_interrupted_and_continued(
    folder: Path,
    job: Path,
    expected: dict[str, RunDir],
    cluster: Path,
    engine: str,
    via: str,
    kind: str,
) -> None:
    """It goes on by itself, from a checkpoint, and ends with the very weights."""
    run_dir = folder / f"{engine}-{via}-{kind.replace(' ', '-')}"
    options = [f"engine.type={engine}", "--via", via]
    if kind == "time limit":
        options += ["slurm.time_min=1", f"slurm.grace_s={GRACE_S}"]
    elif kind == "--signal":  # the script must not learn when its time is over
        tools = folder / "tools"
        tools.mkdir(exist_ok=True)
        (tools / "squeue").write_text("#!/bin/sh\nexit 1\n")
        (tools / "squeue").chmod(0o755)
        setup = f"slurm.setup=['export PATH={tools}:$PATH']"
        options += ["slurm.time_min=1", "slurm.grace_s=5", setup]
    run = jobs.submit(job, run_dir, *options)
    jobs.wait_for_step(run, 1 if "slurm.time_min=1" in options else 25)
    KINDS[kind](run, cluster)
    assert jobs.wait_for_end(run) == "DONE", jobs.output(run)
    attempts = jobs.attempts_of(run)
    assert max(attempts) >= 2, jobs.output(run)
    assert len(attempts) >= STEPS
    # Put back, and not followed as well; or followed.
    assert len(follow.submissions(run)) == (2 if kind == "no requeue" else 1)
    jobs.assert_same_weights(run, expected[engine])
