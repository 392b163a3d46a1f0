"""What goes wrong on a cluster ends the job, and its first line says where and why."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from sft_job import follow
from sft_job.rundir import RunDir
from tests.cluster import jobs
from tests.runs import ROOT, environment, sft_job


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, cluster: Path) -> Path:
    folder = tmp_path_factory.mktemp("failures")
    return jobs.make_cluster_job(folder / "job", **{"train.max_steps": 5000})


def ended(run: RunDir) -> str:
    """The first error, of a job that has failed before its ranks are tired of waiting."""
    assert jobs.wait_for_end(run) == "FAILED", jobs.output(run)
    return jobs.first_error(run)


def test_a_rank_that_is_killed(job: Path) -> None:
    """The rank that died, not those that missed it."""
    run = jobs.submit(job, job.parent / "killed")
    jobs.wait_for_step(run, 3)
    jobs.rank_process(run, 3).kill()
    assert ended(run) == "node tn2, rank 3: ended by the system: Killed"
    said = sft_job("submit", "status", run.path)
    assert "failed       node tn2, rank 3: ended by the system: Killed" in said.stdout


def test_a_task_that_raises(job: Path, tmp_path: Path) -> None:
    """Its own traceback, once."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Boom:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'sft_job.trainer': raise RuntimeError('boom')\n"
        "if os.environ.get('SLURM_PROCID') == '2' and 'SFT_JOB_ATTEMPT' in os.environ:\n"
        "    sys.meta_path.insert(0, Boom())\n"
    )
    run = jobs.submit(job, job.parent / "raises", PYTHONPATH=f"{tmp_path}:{Path.cwd()}")
    assert ended(run) == "node tn2, rank 2: RuntimeError: boom"
    assert jobs.said(run).count("Traceback") == 1


def test_an_image_that_is_gone(job: Path, tmp_path: Path) -> None:
    """There when the job was submitted; each node looks for it before anything starts."""
    image, empty = tmp_path / "x.sif", tmp_path / "empty"
    empty.mkdir()
    for command in (["tests/cluster/apptainer_install.sh"],
                    ["apptainer", "build", "--fakeroot", image, empty]):  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT, timeout=300)
    held = ["slurm.extra={begin: now+5}"]
    container = f"container={{type: apptainer, image: {image}}}"
    run = jobs.submit(job, job.parent / "no-image", container, *held)
    image.unlink()
    assert ended(run) == f"node tn1: not there or not readable: {image}"


def test_a_node_without_the_shared_folder(job: Path, cluster: Path) -> None:
    """The node by name."""
    hidden = job.parent / "hidden"
    hidden.mkdir()
    inside = ["nsenter", f"--target={jobs.node_pid(cluster, 'tn2')}", "--mount"]
    subprocess.run([*inside, "mount", "-t", "tmpfs", "none", hidden], check=True)
    try:
        run = jobs.submit(job, hidden / "run")
        expected = f"node tn2: the run directory is not on this node: {run.path}"
        assert ended(run) == expected
    finally:
        subprocess.run([*inside, "umount", hidden], check=True)


def test_no_progress_is_not_repeated_for_ever(job: Path) -> None:
    """Interrupted twice before anything is saved, the job stops and says why."""
    run = jobs.submit(job, job.parent / "stuck", "slurm.time_min=1", "slurm.grace_s=59")
    assert jobs.wait_for_end(run) == "FAILED", jobs.output(run)
    assert jobs.last_attempt(run) == 2
    assert jobs.first_error(run).startswith("two attempts in a row have saved nothing new (step 0)")


def test_cancelled_in_slurm(job: Path) -> None:
    """Plain scancel: whatever the ranks have saved by the way, the job does not come back."""
    run = jobs.submit(job, job.parent / "scancelled")
    jobs.wait_for_step(run, 3)
    jobs.slurm("scancel", jobs.job_id(run))
    jobs.wait_for_end(run)
    time.sleep(10)  # longer than a requeued job takes to begin
    assert follow.slurm.state(jobs.job_id(run)) == "CANCELLED", jobs.output(run)
    assert jobs.last_attempt(run) == 1
    assert len(follow.submissions(run)) == 1


def test_cancelled_with_a_checkpoint(job: Path) -> None:
    """`cancel` saves, ends, and does not come back; submitted again, it goes on."""
    run = jobs.submit(job, job.parent / "cancelled")
    jobs.wait_for_step(run, 3)
    assert sft_job("submit", job, f"run.dir={run.path}").returncode == 2  # it works there already
    result = sft_job("submit", "cancel", run.path)
    assert "saves a checkpoint and ends" in result.stdout, result.stderr
    assert jobs.wait_for_end(run) == "INTERRUPTED", jobs.output(run)
    step = run.checkpoint_steps()[0]
    assert step >= 3
    status = sft_job("submit", "status", run.path).stdout
    assert "interrupted by cancelled by the user" in status
    # By hand, as the script says; sbatch passes on all that the shell knows of others.
    environ = environment() | jobs.HOSTILE | {"SBATCH_TIMELIMIT": "10"}
    words = ["sbatch", "--parsable", f"--chdir={run.path}", str(run.script)]
    by_hand = jobs.slurm(*words, env=environ)
    jobs.wait_for_words(run, "attempt 2, ")
    assert jobs.job_id(run) == by_hand
    jobs.wait_for_step(run, step + 1)
    assert jobs.attempts_of(run)[-1] == 2
    sft_job("submit", "cancel", run.path)
    jobs.wait_for_end(run)
