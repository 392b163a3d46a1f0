"""The image's SIF under real Slurm tasks, as `sft-job submit` starts it."""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sft_job import __version__
from sft_job.rundir import RunDir
from tests.cluster import jobs
from tests.images.containers import run
from tests.runs import ROOT, run_job

COMMIT = "c0ffee" * 6 + "c0ff"
SITE = Path(pytest.__file__).parents[1]  # where this project's packages are


@pytest.fixture(scope="module")
def folder(cluster: Path, user: pwd.struct_passwd) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="job-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def as_user(
    user: pwd.struct_passwd, *words: str | Path, home: Path | str = "/nonexistent", code: int = 0
) -> str:
    """With the system's Python, as on a login node."""
    number = str(user.pw_uid)
    result = run(
        "setpriv", f"--reuid={number}", f"--regid={number}", "--clear-groups",
        "env", "--ignore-environment", "PATH=/usr/bin:/bin", f"HOME={home}",
        "OMP_NUM_THREADS=1", f"SLURM_CONF={os.environ['SLURM_CONF']}",
        f"PYTHONPATH={ROOT}:{SITE}", *words, timeout=500, code=code,
    )  # fmt: skip
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def job(folder: Path, user: pwd.struct_passwd) -> Path:
    file = jobs.make_cluster_job(folder / "job", **{"train.max_steps": 10})
    shutil.rmtree(folder / "job/.sft_job_cache")  # it is root's
    return file


def give(folder: Path, user: pwd.struct_passwd) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user.pw_uid, user.pw_gid)


def test_exec_under_slurm(folder: Path, sif: Path, job: Path, user: pwd.struct_passwd) -> None:
    """Two nodes with two tasks each, all packages the image's, the model in the hub cache of the
    user's home, which the image does not see; the weights of the same job without all that."""
    options = ["run.processes=4", "slurm=null"]
    expected = run_job(job, f"run.dir={job.parent}/local", *options)
    shutil.rmtree(job.parent / ".sft_job_cache")
    hub = folder / "home/.cache/huggingface/hub/models--org--model"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs/main").write_text(COMMIT)
    shutil.copytree(job.parent / "model", hub / "snapshots" / COMMIT)
    give(folder, user)
    result = RunDir(job.parent / "run")
    container = f"container={{type: apptainer, image: {sif}}}"
    submit = ["/usr/bin/python3", "-m", "sft_job", "submit", job, container, "--wait"]
    options = ["model.path=org/model", f"run.dir={result.path}"]
    said = as_user(user, *submit, *options, home=folder / "home")
    assert result.done.exists(), said + jobs.output(result)
    assert f"model      org/model at {COMMIT}\n" in said
    assert f"container  apptainer: {sif}, sft_job {__version__}\n" in said
    jobs.assert_same_weights(result, expected)


def test_without_slurms_variables_it_refuses(
    folder: Path, sif: Path, job: Path, user: pwd.struct_passwd
) -> None:
    """--cleanenv: every task would start the whole job."""
    give(job.parent, user)
    words = ["srun", "--nodes=1", "--ntasks=2", "--chdir", folder, "apptainer", "--silent", "run",
             "--cleanenv", "--no-home", "--bind", folder, sif,
             "train", job, f"run.dir={folder}/never"]  # fmt: skip
    said = as_user(user, *words, code=2)
    assert "error: this is a task of a Slurm job, but Slurm's variables are not here" in said
    assert "--cleanenv" in said
    assert not (folder / "never").exists()
