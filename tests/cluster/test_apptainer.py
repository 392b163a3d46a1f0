"""The same jobs inside a real Apptainer image, submitted and run by an ordinary user."""

from __future__ import annotations

import os
import pwd
import shutil
import site
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sft_job.rundir import RunDir
from tests.cluster import jobs
from tests.runs import ROOT, run_job

HERE = Path(__file__).parent
PACKAGES = site.getsitepackages()[0]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Debian with Python, nothing else: the packages are bound into it."""
    folder = Path(tempfile.mkdtemp(prefix="sif-", dir="/tmp"))
    folder.chmod(0o755)
    quiet = {"check": True, "capture_output": True, "timeout": 500}
    subprocess.run([HERE / "apptainer_install.sh"], **quiet)
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "mmdebstrap"]
    subprocess.run(install, **quiet)
    root = folder / "root"
    make = ["mmdebstrap", "--variant=minbase", "--include=python3", "bookworm", root]
    subprocess.run(make, **quiet)
    file = folder / "debian.sif"
    shutil.rmtree(
        root / "dev"
    )  # device nodes cannot be copied by everyone; a container has its own
    (root / "dev").mkdir()
    build = ["apptainer", "build", "--fakeroot", "--mksquashfs-args", "-noI -noD -noF -noX"]
    subprocess.run([*build, file, root], **quiet)
    shutil.rmtree(root)
    yield file
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def folder(cluster: Path, user: pwd.struct_passwd) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="job-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def as_user(user: pwd.struct_passwd, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run as the user, with the system's Python and this project's packages."""
    environment = {
        "PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "SLURM_CONF": os.environ["SLURM_CONF"],
        "PYTHONPATH": f"{ROOT}:{PACKAGES}", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.run(
        ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups",
         *command],
        env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("zero3", marks=pytest.mark.widest)])
def test_inside_an_image_as_an_ordinary_user(
    folder: Path, image: Path, user: pwd.struct_passwd, engine: str
) -> None:
    """The model equals that of the job without a container."""
    job = jobs.make_cluster_job(folder / engine, **{"train.max_steps": 60, "run.dir": "run"})
    options = [f"engine.type={engine}", f"run.dir={folder}/{engine}/local", "slurm=null"]
    expected = run_job(job, *options, "run.processes=4")
    shutil.rmtree(folder / engine / ".sft_job_cache")  # it is root's
    for path in (folder / engine, *(folder / engine).rglob("*")):
        os.chown(path, user.pw_uid, user.pw_gid)
    container = f"container={{type: apptainer, image: {image}, bind: [{ROOT}, {PACKAGES}]}}"
    submit = ["/usr/bin/python3", "-m", "sft_job", "submit", job, f"engine.type={engine}"]
    result = as_user(user, *submit, container, "--fetch", "--wait")
    run = RunDir(folder / engine / "run")
    assert result.returncode == 0, result.stdout + result.stderr + jobs.output(run)
    assert "data       128 samples, encoded: " in result.stdout
    assert not list(Path("/tmp").glob("sft_job-job-*"))  # Apptainer's folder of this job
    assert run.model.stat().st_uid == user.pw_uid
    jobs.assert_same_weights(run, expected)
