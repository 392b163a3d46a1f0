"""A real Slurm cluster of two nodes on this machine, for one session."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
USER = "sft-job-test"
ASKED = "SFT_JOB_CLUSTER"  # 1: what CI runs; all: every combination


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    asked = os.environ.get(ASKED)
    for item in items:
        if not item.path.is_relative_to(HERE):
            continue
        if not asked:
            item.add_marker(pytest.mark.skip(reason="a real Slurm: `make cluster` runs it"))
        elif asked != "all" and item.get_closest_marker("widest"):
            item.add_marker(pytest.mark.skip(reason="`make cluster ALL=1` runs it"))
        else:
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Path]:
    """The folder of its state. Short and readable by all: it holds a unix socket."""
    state = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))
    state.chmod(0o755)
    up = subprocess.run(
        [HERE / "slurm_up.sh", state],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        check=False,
    )
    assert up.returncode == 0, up.stderr[-4000:]
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("SLURM_")]:
            patch.delenv(name)  # the tests may themselves run inside a job
        patch.setenv("SLURM_CONF", str(state / "etc/slurm.conf"))
        yield state
    subprocess.run([HERE / "slurm_down.sh", state], timeout=60, check=False)
    shutil.rmtree(state, ignore_errors=True)


@pytest.fixture(scope="session")
def user() -> Iterator[pwd.struct_passwd]:
    """Without a home, and with nothing in /root to lean on."""
    subprocess.run(["useradd", "--no-create-home", USER], check=True)
    yield pwd.getpwnam(USER)
    subprocess.run(["userdel", USER], check=True)
