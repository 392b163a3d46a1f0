"""Commands of the image tests: builds, and runs by Docker, Podman and Apptainer alike."""

from __future__ import annotations

import os
import pwd
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BASE = "localhost/debian-base:bookworm"
TAG = "localhost/sft_job:test"
USER = "sft-job-test"  # made by the fixture `user`; no image knows its number
STAND_IN = ["--build-arg", f"BUILD_BASE={BASE}", "--build-arg", f"FINAL_BASE={BASE}",
            "--build-arg", "PYTHON=3.11", "--network", "host"]  # fmt: skip


def run(
    *words: str | Path, timeout: float = 120, quiet: bool = False, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run and wait; the test fails with the program's own words unless it ends with `code`.

    Args:
        quiet: standard output is dropped: a daemon started by the program keeps it open.
    """
    with open(os.devnull) as nothing:
        result = subprocess.run(
            [str(word) for word in words],
            stdin=nothing,
            stdout=subprocess.DEVNULL if quiet else subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            timeout=timeout,
        )
    said = f"{result.stdout or ''}\n{result.stderr}"
    assert result.returncode == code, f"{words}: {result.returncode}\n{said[-6000:]}"
    return result


def build(tool: str, *options: str, flavor: str = "cpu", extra: tuple[str, ...] = ()) -> str:
    """Build an image with docker/build.sh on the stand-in base, from docker/wheels alone.

    Returns:
        Its tag.
    """
    build_sh = [ROOT / "docker/build.sh", "image", "--tool", tool, "--flavor", flavor, "--offline"]
    run(*build_sh, *options, "--", *STAND_IN, *extra, timeout=800)
    return options[options.index("--tag") + 1] if "--tag" in options else ""


def user_id() -> int:
    return pwd.getpwnam(USER).pw_uid


@dataclass(frozen=True)
class Tool:
    """A container tool with an image of its kind."""

    name: str
    image: str

    def command(
        self,
        *words: str | Path,
        folder: Path,
        options: tuple[str, ...] = (),
        writable: bool = True,
    ) -> list[str]:
        """Run `words` in the image: as an unknown user, root read-only, no network.

        Args:
            folder: seen inside at the same place.
            writable: /tmp can be written to.
        """
        inside = [str(word) for word in words]
        if self.name == "apptainer":
            number = str(user_id())
            return [
                # Its own --network none is root's alone.
                "unshare", "--net", "bash", "-c", 'ip link set lo up; exec "$@"', "-",
                "setpriv", f"--reuid={number}", f"--regid={number}", "--clear-groups",
                "env", "--ignore-environment", "PATH=/usr/bin:/bin", "HOME=/nonexistent",
                "OMP_NUM_THREADS=1", "apptainer", "--silent", "run", "--no-home",
                "--bind", str(folder), "--pwd", str(folder), *options, self.image, *inside,
            ]  # fmt: skip
        return [
            self.name, "run", "--rm", "--network", "none", "--read-only", "--cap-drop", "ALL",
            *(["--tmpfs", "/tmp:exec"] if writable else []),
            "--user", f"{user_id()}:{user_id()}", "--volume", f"{folder}:{folder}",
            "--workdir", str(folder), "--env", "OMP_NUM_THREADS=1", *options, self.image, *inside,
        ]  # fmt: skip

    def run(self, *words: str | Path, code: int = 0, **how: Any) -> Any:
        return run(*self.command(*words, **how), timeout=300, code=code)
