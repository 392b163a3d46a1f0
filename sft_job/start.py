"""What has to be true before a job's processes train: looked at, made ready, then claimed.

The launcher does this; under srun or torchrun the main rank does it for all. Everything that can
be refused is refused before the run directory becomes this job's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from sft_job import identity, preflight, result
from sft_job.cli import StopRequest
from sft_job.errors import DiskSpaceError, Interrupted, RunDirError, SftJobError, UserError
from sft_job.files import put_aside
from sft_job.hardware import Hardware
from sft_job.launcher import ENCODES_FOR
from sft_job.plan import Plan, plan_of
from sft_job.prepared import Prepared, find_prepared
from sft_job.rundir import RunDir
from sft_job.schema import JobConfig

LOCK, RUNNING = ".lock", "running this job"
POLL_S = 0.05
# For deleting what is half made, of a large model too.
CLEARING_S = 30.0


def enter(
    held: ExitStack,
    config: JobConfig,
    job: Path,
    overrides: Sequence[str],
    machine: Hardware,
    stop: StopRequest,
    *,
    world_size: int | None = None,
    patience_s: float = 0,
) -> bool:
    """Lock the run directory, find out whether this job may run in it, and make it ready.

    Args:
        held: gets the lock.
        world_size: processes that train; None for those of this machine.
        patience_s: see `RunDir.exclusive_lock`.

    Returns:
        Whether there is anything to do; a job that is done says so.

    Raises:
        SftJobError: the first reason not to begin.
        Interrupted: asked to stop meanwhile.
    """
    run_dir = RunDir(config.run.dir)
    lock = run_dir.exclusive_lock(LOCK, RUNNING, patience_s=patience_s, given_up=stop.requested)
    held.enter_context(lock)
    run_dir.refuse_foreign(config)
    if is_done(run_dir):
        return False
    preflight.check(config, here=True)
    identity.refuse_changed_sources(run_dir, config)
    plan_of(config, world_size, machine)  # refuses what has nothing to do with the data
    prepare(config, job, overrides, stop)
    plan, prepared = plan_of(config, world_size, machine)
    if prepared is None:
        raise SftJobError("the prepared data has vanished", where=str(config.cache_dir))
    run_dir.claim(config, job.read_text(encoding="utf-8"))
    identity.refuse_changed_content(run_dir, config, prepared)
    refuse_small_disk(run_dir, plan)
    return True


def is_done(run_dir: RunDir) -> bool:
    """Whether the run has a model, as its mark says; a mark whose model is gone or damaged is
    taken back, so that the model is written again.

    Raises:
        RunDirError: it cannot be written again.
    """
    if not run_dir.done.exists():
        return False
    reason = result.model_fault(run_dir)
    if reason is not None and (written := result.written_before(run_dir)) is not None:
        result.mark_again(run_dir, written)
        print("note: DONE was damaged and is made anew; the model is whole", file=sys.stderr)
        reason = None
    if reason is None:
        print(f"this job is done; its model is in {run_dir.model}")
        return True
    if not run_dir.checkpoint_steps():
        raise RunDirError(
            f"this job is done, but its model is damaged ({reason}), and no checkpoint is left "
            "to write it again from",
            where=str(run_dir.model),
            remedy=f"put the model back, or remove {run_dir.done} to train again",
        )
    result.unmark(run_dir)
    said = f"note: this job was done, but its model is damaged ({reason}); it is written again"
    if run_dir.model.exists():
        said += f", the old one is {put_aside(run_dir.model).name}"
    print(said, file=sys.stderr)
    return False


def prepare(config: JobConfig, job: Path, overrides: Sequence[str], stop: StopRequest) -> None:
    """Make model and token cache ready, in a process of its own and outside any process group.

    Raises:
        SftJobError: whatever `sft-job data encode` refuses, with its exit code.
        Interrupted: asked to stop meanwhile; nothing half-made is left.
    """
    if find_prepared(config) is not None:
        return
    command = [sys.executable, "-m", "sft_job.data", "encode", str(job), *overrides]
    child = subprocess.Popen(
        command,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | {ENCODES_FOR: str(os.getpid())},
    )
    said: list[str] = []
    reader = threading.Thread(target=_forward, args=(child.stderr, said))
    reader.start()
    try:
        while child.poll() is None and not stop.requested():
            time.sleep(POLL_S)
    finally:
        _end(child, stop)
        reader.join()
    if child.returncode and stop.requested():  # by us, or by a signal to all processes
        what = f"interrupted by {stop.reason} while preparing the data"
        raise Interrupted(what, remedy="run the same command again")
    if child.returncode:
        message = "".join(said).strip() or (
            f"model and data could not be made ready: ended with {child.returncode}"
        )
        kind = UserError if child.returncode == UserError.exit_code else SftJobError
        raise kind(message)


def _end(child: subprocess.Popen[str], stop: StopRequest) -> None:
    """Ask it to clear away what is half made; end it if it does not, as one that is stopped.
    The next one clears away what is then left."""
    if child.poll() is not None:
        return
    child.terminate()
    deadline = time.monotonic() + CLEARING_S
    while child.poll() is None and time.monotonic() < deadline and stop.times < 3:
        time.sleep(POLL_S)
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _forward(lines: Iterable[str], said: list[str]) -> None:
    """Pass on what the child says, but its error, which is raised here."""
    for line in lines:
        if said or line.startswith("error: "):
            said.append(line.removeprefix("error: "))
        else:
            sys.stderr.write(line)


def refuse_small_disk(run_dir: RunDir, plan: Plan) -> None:
    """Training for hours towards a checkpoint that cannot be written helps nobody.

    Raises:
        DiskSpaceError: there is no room for one checkpoint and the model.
    """
    if plan.checkpoint_bytes is None or plan.model_bytes is None:
        return
    needed, what = plan.checkpoint_bytes + plan.model_bytes, "one checkpoint and the model need"
    if run_dir.checkpoint_steps()[:1] == [plan.steps]:
        needed, what = plan.model_bytes, "the model needs"  # all that is left to do
    # The ranks begin by deleting what earlier attempts have left half written.
    free = shutil.disk_usage(run_dir.path).free + _used(run_dir.half_made(sys.maxsize))
    if free < needed:
        raise DiskSpaceError(
            f"no room: {what} {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free",
            where=str(run_dir.path),
            remedy="free some space or choose another run.dir; nothing has been started",
        )


def _used(folders: Iterable[Path]) -> int:
    """Bytes on disk; what vanishes meanwhile counts nothing."""
    used = 0
    for path in (path for folder in folders for path in folder.rglob("*")):
        with contextlib.suppress(OSError):
            used += 512 * path.lstat().st_blocks
    return used


def wait_until_seen(config: JobConfig, limit_s: float) -> Prepared:
    """What was made ready, which a file server may show this machine a little later.

    Raises:
        SftJobError: it is not seen within the limit.
    """
    deadline = time.monotonic() + limit_s
    while (prepared := find_prepared(config)) is None:
        if time.monotonic() > deadline:
            raise SftJobError(
                "the prepared data is not seen on this machine",
                where=str(config.cache_dir),
                remedy="data.cache_dir must be on a file system that all machines share",
            )
        time.sleep(POLL_S)
    return prepared
