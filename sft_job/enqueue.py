"""A run directory's script into the queue, and one job at a time on it. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_job import follow, jobscript, slurm
from sft_job.errors import RunDirError, SlurmError
from sft_job.files import append_line
from sft_job.rundir import RunDir
from sft_job.schema import JobConfig


@dataclass(frozen=True)
class Way:
    """How a job gets into the queue.

    Args:
        via: sbatch or submitit.
        cluster: slurm, or local: this machine.
        after: the job that it waits for.
    """

    via: str
    cluster: str
    after: str | None


def refuse_second(config: JobConfig, run_dir: RunDir, way: Way) -> None:
    """Two jobs on one run directory would train the same steps, one of them for nothing.

    Raises:
        RunDirError: a job that was submitted lives, or may be put back by Slurm.
        SlurmError: nobody knows.
    """
    try:
        found = follow.live(run_dir)
        if way.cluster == "slurm" and run_dir.path.is_dir():
            found = [*_not_written_down(run_dir), *found]
    except SlurmError as error:
        raise SlurmError(
            f"{error.what}; a second job would train the same steps",
            where=str(run_dir.path),
            remedy=f"{error.remedy or 'try again later'}; if the jobs in {run_dir.submissions} "
            "have ended, for sure, take their lines out of that file",
        ) from error
    if config.slurm is not None and not config.slurm.requeue:
        found = [(record, state) for record, state in found if state in slurm.ALIVE]
    if not found:
        return
    status = f"sft-job submit status {shlex.quote(str(run_dir.path))}"
    record, state = found[-1]
    if record["job"] != way.after:
        raise RunDirError(
            f"job {record['job']} works on it: {state}",
            where=str(run_dir.path),
            remedy=f"{status}, or cancel; --after {record['job']} starts when it has ended",
        )
    if run_dir.cancelled.exists():  # the marker is taken away with the next submission
        raise RunDirError(
            f"job {record['job']} is being cancelled",
            where=str(run_dir.path),
            remedy=f"submit when it has ended: {status}",
        )


def _not_written_down(run_dir: RunDir) -> Iterator[tuple[dict[str, Any], str]]:
    """Jobs that Slurm has on this directory and the directory does not know, as when sbatch did
    not answer in time."""
    known = {record["job"] for record in follow.submissions(run_dir)}
    for job, state in slurm.jobs_in(run_dir.path):
        if job not in known and state in slurm.ALIVE:
            yield {"job": job}, state


def enqueue(config: JobConfig, run_dir: RunDir, way: Way, grace: int) -> str:
    """Submit the run directory's script and write it down; returns the job id.

    Raises:
        SlurmError: it is not taken.
        OSError: it cannot be written down, and is not in the queue.
    """
    with open(run_dir.submissions, "ab"):  # before there is a job
        pass
    of = slurm.HERE
    if way.via == "sbatch":
        job, of = slurm.sbatch(run_dir, way.after)
    else:
        job = _by_submitit(config, run_dir, way, grace)
    record = {"time": time.time(), "job": job, "via": way.via, "cluster": way.cluster}
    try:
        append_line(run_dir.submissions, json.dumps(record | ({"of": of} if of else {})))
    except OSError:  # nobody would know of it
        if way.cluster == "slurm":
            slurm.ask("scancel", job, cluster=of)
        else:
            os.kill(int(job), signal.SIGTERM)
        raise
    return job


def _by_submitit(config: JobConfig, run_dir: RunDir, way: Way, grace: int) -> str:
    import submitit

    assert config.slurm is not None  # without it there is no script
    options = jobscript.options(config.slurm, config, grace)
    # Its own signal, to the batch process alone, which is Python by the `exec`.
    options |= {"signal": f"B:{submitit.JobEnvironment.USR_SIG}@{grace}"}
    if way.after:
        options["dependency"] = f"afterany:{way.after}"
    run_dir.submitit.mkdir(exist_ok=True)
    for name in os.environ.keys() - slurm.clean(os.environ).keys():
        del os.environ[name]  # submitit calls sbatch with this environment
    with contextlib.chdir(run_dir.path):  # sbatch's output goes where it is called
        if way.cluster == "local":
            executor: Any = submitit.LocalExecutor(folder=run_dir.submitit)
            attempt = slurm.LocalAttempt(str(run_dir.path), os.environ.get("CUDA_VISIBLE_DEVICES"))
            executor.update_parameters(timeout_min=config.slurm.time_min)
            with _output_to(run_dir.submitit / "controller.log"):
                return str(executor.submit(attempt).job_id)
        executor = submitit.SlurmExecutor(
            folder=run_dir.submitit,
            max_num_timeout=10**6,
            python=f"exec {shlex.quote(sys.executable)}",
        )
        executor.update_parameters(
            use_srun=False, stderr_to_stdout=True, wckey=None, time=config.slurm.time_min,
            additional_parameters=options,
        )  # fmt: skip
        try:
            return str(executor.submit(slurm.Attempt(str(run_dir.path))).job_id)
        except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
            raise SlurmError(f"sbatch refuses: {error}") from error


@contextlib.contextmanager
def _output_to(file: Path) -> Iterator[None]:
    """For processes that outlive this one: whoever reads our output would wait for them."""
    kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    try:
        with open(file, "ab") as log:
            for descriptor in kept:
                os.dup2(log.fileno(), descriptor)
        yield
    finally:
        for descriptor, copy in kept.items():
            os.dup2(copy, descriptor)
            os.close(copy)
