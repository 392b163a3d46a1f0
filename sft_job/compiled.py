"""Code that is compiled at its first use: once on each machine, whoever is killed meanwhile.

torch's own way waits without a limit for a lock file whose owner may have been killed
(torch/utils/file_baton.py), and the launcher kills ranks when another has failed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sft_job.errors import HardwareError
from sft_job.launcher import GRACE_S, POLL_S, die_with_parent

# DeepSpeed's CPU Adam takes a minute; a machine may be busy.
LIMIT_S = 900.0

# Compiles DeepSpeed's CPU Adam as DeepSpeed does: for this very processor, and loads it once.
CPU_ADAM = """
import os, sys
folder, name = sys.argv[1:]
os.environ["TORCH_EXTENSIONS_DIR"] = folder
# pip puts ninja beside Python, where a shell looks only in an activated environment.
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
from deepspeed.ops.op_builder import CPUAdamBuilder
module = CPUAdamBuilder().jit_load(verbose=False)
os.rename(module.__file__, os.path.join(folder, name))
"""


def name_of(stem: str, versions: Iterable[str]) -> str:
    """A file name for what depends on these versions and on this processor, which a home folder
    that machines share does not tell."""
    lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    processor = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    python = sys.implementation.cache_tag
    text = "\n".join([*versions, python, *processor])
    return f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"


def once(
    file: Path, code: str, *, what: str, asked: str, remedy: str, limit_s: float = LIMIT_S
) -> None:
    """Have `file` made: by an earlier process, by another one now, or by this one.

    It is made in a folder of its own and published when it is whole. The lock only saves doing
    the same work twice: without one, as on some file systems, the first to publish wins.

    Args:
        file: its name says all that its content depends on.
        code: Python that makes the file argv[2] in the folder argv[1].
        what, asked, remedy: "ASKED, but WHAT cannot be compiled on this machine".
        limit_s: for waiting, and for compiling.

    Raises:
        HardwareError: it cannot be made here, or not in this time.
    """
    if file.is_file():
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _alone(file, what, limit_s) as locked:
            if file.is_file():
                return
            mine = f".{file.name}.{socket.gethostname()}."
            if locked:  # then whoever was at it on this machine has been killed
                for left in file.parent.glob(f"{mine}*"):
                    shutil.rmtree(left, ignore_errors=True)
            beside = Path(tempfile.mkdtemp(prefix=mine, dir=file.parent))
            try:
                fault = _run(code, [str(beside), file.name], limit_s)
                if fault is not None:
                    raise HardwareError(
                        f"{asked}, but {what} cannot be compiled on this machine: {fault}",
                        remedy=remedy,
                    )
                _publish(beside / file.name, file)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        raise HardwareError(
            f"{asked}, and {what}, once compiled, cannot be written: {error.strerror}",
            where=str(file.parent),
            remedy="set TORCH_EXTENSIONS_DIR to a folder that this user may write to",
        ) from error


@contextmanager
def _alone(file: Path, what: str, limit_s: float) -> Iterator[bool]:
    """Hold the lock beside `file`, which ends with its holder; or find that `file` is there, or
    that there are no locks here: then it yields False."""
    place = file.with_name(f"{file.name}.lock")
    deadline, said = time.monotonic() + limit_s, False
    with open(place, "a+", encoding="utf-8", errors="replace") as lock:
        while (locked := _locked(lock)) is False and not file.is_file():
            lock.seek(0)
            holder = lock.read().strip() or "of unknown number"
            if not said:
                print(f"waiting for process {holder} to compile {what}", flush=True)
                said = True
            if time.monotonic() >= deadline:
                raise HardwareError(
                    f"process {holder} has been compiling {what} for more than {limit_s:.0f} s",
                    where=str(place),
                    remedy="end that process, and start again",
                )
            time.sleep(POLL_S)
        if locked:
            lock.truncate(0)
            lock.write(f"{os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
        yield bool(locked)


def _locked(lock: IO[str]) -> bool | None:
    """Whether it is ours; None: this file system has no locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # Lustre can be without
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        return None
    return True


def _run(code: str, arguments: list[str], limit_s: float) -> str | None:
    """Run Python in a process of its own that ends with this one; what is wrong, or None."""
    root = str(Path(__file__).parents[1])
    preamble = (
        f"import sys\nsys.path.insert(0, {root!r})\n"
        f"from sft_job import compiled\ncompiled.end_with({os.getpid()})\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", preamble + code, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"it takes more than {limit_s:.0f} s"
    finally:
        _end(process)
    if process.returncode == 0:
        return None
    lines = said.strip().splitlines() or [f"exit code {process.returncode}"]
    words = ("not found", "error:")  # in the midst of the whole command and its output
    return next((line for line in lines if any(word in line for word in words)), lines[-1])


def _end(process: subprocess.Popen[str]) -> None:
    """With what it has started: see `end_with`."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.stdout is not None:
        process.stdout.close()  # a compiler that has survived may hold its other end


def end_with(parent: int) -> None:
    """Called by the process that compiles: it ends with its parent, and what it started with it.

    ninja ends its compilers when it gets SIGTERM; they are in process groups of their own. A
    batch system wakes all processes of a job by a signal that only ranks know what to do with.
    """

    def end(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        os._exit(1)

    signal.signal(signal.SIGTERM, end)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(parent, signal.SIGTERM)


def _publish(made: Path, file: Path) -> None:
    """Give it its name, whole and on disk, unless another one has it: that may be in use."""
    with open(made, "rb") as content:
        os.fsync(content.fileno())
    try:
        os.link(made, file)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.rename(made, file)
