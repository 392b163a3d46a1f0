"""Real images of the cpu flavour, built on a stand-in for the CUDA base, and run by real tools."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import cluster, user
from tests.images import containers
from tests.images.containers import ROOT, Tool
from tests.runs import make_conversations, make_job, make_model

__all__ = ["cluster", "user"]  # fixtures

HERE = Path(__file__).parent
ASKED = "SFT_JOB_IMAGES"  # 1: what CI runs; all: every combination
# Short, for the unix socket in it; kept, for the layers and packages in it.
STATE = Path(os.environ.get("SFT_JOB_IMAGES_STATE", "/tmp/sft-images"))
DISK = 18 << 30  # bytes at the peak, while Apptainer converts: two stores of layers, archive, SIF


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    asked = os.environ.get(ASKED)
    for item in items:
        if not item.path.is_relative_to(HERE):
            continue
        if not asked:
            item.add_marker(pytest.mark.skip(reason="real images: `make images` runs it"))
        elif asked != "all" and item.get_closest_marker("widest"):
            item.add_marker(pytest.mark.skip(reason="`make images ALL=1` runs it"))
        else:
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def tools() -> Iterator[Path]:
    """Docker, Podman, Apptainer and linters on PATH; the folder of their state."""
    STATE.mkdir(mode=0o755, exist_ok=True)
    assert STATE.stat().st_uid == os.getuid(), f"{STATE} belongs to somebody else"
    with open(STATE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two sessions would stop each other's daemon
        held = int(containers.run("du", "-s", "--block-size=1", STATE).stdout.split()[0])
        free = shutil.disk_usage(STATE).free
        more = (DISK - held) >> 30
        assert free >= DISK - held, f"{STATE}: {free >> 30} GiB free, the images need {more} more"
        containers.run(HERE / "up.sh", STATE, timeout=600, quiet=True)
        show = ["bash", "-c", f'. "{STATE}/env.sh"; env -0']
        found = subprocess.run(show, capture_output=True, check=True, text=True).stdout
        with pytest.MonkeyPatch.context() as patch:
            for name, _, value in (line.partition("=") for line in found.split("\0") if line):
                patch.setenv(name, value)
            yield STATE
        containers.run(HERE / "down.sh", STATE, timeout=120)


@pytest.fixture(scope="session")
def wheels(tools: Path) -> Path:
    """docker/wheels with every package of the cpu lock, so that no build asks an index."""
    assert sys.version_info[:2] == (3, 11), "the stand-in base, Debian 12, has Python 3.11"
    containers.run(
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes",
        "--disable-pip-version-check", "--requirement", ROOT / "docker/locks/cpu.txt",
        "--dest", tools / "wheels", timeout=600,
    )  # fmt: skip
    folder = ROOT / "docker/wheels"
    for file in (tools / "wheels").iterdir():
        (folder / file.name).unlink(missing_ok=True)
        try:
            os.link(file, folder / file.name)
        except OSError:  # another file system
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="session")
def image(wheels: Path) -> str:
    """The tag of the image that Docker has built."""
    return containers.build("docker", "--tag", containers.TAG)


@pytest.fixture(scope="session")
def archive(tools: Path, image: str) -> Path:
    """What `docker save` makes of it."""
    file = tools / "image.tar"
    containers.run(ROOT / "docker/build.sh", "save", "--tag", image, file, timeout=300)
    return file


@pytest.fixture(scope="session")
def sif(tools: Path, archive: Path) -> Path:
    """What Apptainer makes of that."""
    file = tools / "image.sif"
    # As root without all capabilities. Compression would take four times as long.
    options = ["--fakeroot", "--force", "--mksquashfs-args", "-noI -noD -noF -noX"]
    sif = [ROOT / "docker/build.sh", "sif", archive, file, "--flavor", "cpu"]
    containers.run(*sif, "--", *options, timeout=600)
    return file


@pytest.fixture(scope="session")
def tool(request: pytest.FixtureRequest, user: object) -> Tool:
    """Docker, Podman or Apptainer with the image, by the parameter of the test."""
    name = request.param
    if name == "apptainer":
        return Tool(name, str(request.getfixturevalue("sif")))
    tag = request.getfixturevalue("image")
    if name == "podman":
        archive = request.getfixturevalue("archive")
        containers.run("podman", "load", "--quiet", "--input", archive, timeout=300)
    return Tool(name, tag)


@pytest.fixture(scope="session")
def job(tools: Path) -> Iterator[Path]:
    """A job of a tiny model, in a folder that every user may read and write."""
    with tempfile.TemporaryDirectory(prefix="job-", dir="/tmp") as name:
        folder = Path(name)
        model = make_model(folder / "model")
        data = make_conversations(folder / "data.json", 128)
        file = make_job(folder, model, data, run__processes=2)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o644)
        yield file
