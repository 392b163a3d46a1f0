"""Checkpoints: published whole, verified before use, chosen newest first.

    checkpoints/.step-00000200.attempt-3.tmp/   being written by all ranks of attempt 3
    checkpoints/step-00000200/                  renamed, never replaced, when it is complete
        __0_0.distcp ... | global_step200/...     model and optimizer, sharded by the engine
        rng_state*.pth, scheduler.pt, trainer_state.json
        manifest.json                   last: size and SHA-256 of every file, and its own

A folder without a manifest is not a checkpoint.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sft_job import seal
from sft_job.attempt import Attempt
from sft_job.errors import CheckpointError, DiskSpaceError, SftJobError
from sft_job.files import discard, make_folder, put_aside, read_json, settle
from sft_job.files import publish as publish_folder
from sft_job.rundir import RunDir
from sft_job.world import World

MANIFEST = "manifest.json"
FORMAT = 1
INCOMPLETE = "no manifest, it was never completed"

# A failed write on a disk with less room, or fewer inodes, than this is taken for a full disk:
# torch's zip writer says no more than "unexpected pos".
FULL_BYTES = 2**20
FULL_INODES = 8


@dataclass(frozen=True)
class Found:
    """The checkpoint to resume from, and why newer folders were passed over."""

    folder: Path
    step: int
    manifest: dict[str, Any]


def publish(
    attempt: Attempt,
    step: int,
    write: Callable[[Path], None],
    world: World,
    *,
    engine: str,
    data: str,
    weights: str | None = None,
    needed_bytes: int | None,
) -> bool:
    """Write a checkpoint with all ranks and make it visible when it is complete.

    No rank returns before it is there. Another attempt may have published the same step
    meanwhile; if that one verifies, it is as good.

    Args:
        write: writes this rank's part into the folder it is given.
        data: fingerprint of the data; the order of all steps depends on it.
        weights: of the base model (`identity.weights`).
        needed_bytes: refused beforehand when the disk has less.

    Returns:
        Whether it is the one that was written here.

    Raises:
        DiskSpaceError: the disk is full; earlier checkpoints are untouched.
        SupersededError: a later attempt runs this job.
        CheckpointError: another failure to write.
    """
    run_dir = attempt.run_dir
    what = f"checkpoint of step {step}"
    beside = run_dir.checkpoint(step).with_name(
        f".{run_dir.checkpoint(step).name}.attempt-{attempt.number}.tmp"
    )

    def begin() -> int:
        attempt.refuse_if_superseded()
        try:
            discard(beside)  # of this very attempt: an earlier save that failed
            make_folder(run_dir.checkpoints)
            beside.mkdir()
            return shutil.disk_usage(beside).free
        except OSError as error:
            raise not_written(run_dir, what, error, None) from error

    free = world.on_main(begin)
    if needed_bytes is not None and free < needed_bytes:
        if world.is_main:
            discard(beside)
        raise disk_full(run_dir, what, needed_bytes, free)
    try:
        sealed = _write_parts(beside, write, world)
    # torch wraps the errors of all ranks in a BaseException of its own (CheckpointException).
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        reason = not_written(run_dir, what, error, needed_bytes)
        discard(beside)
        raise reason from error
    manifest = {
        "format": FORMAT,
        "step": step,
        "engine": engine,
        "data": data,
        "weights": weights,
        "world_size": world.size,
        "attempt": attempt.number,
        "files": dict(sorted(sealed.items())),
    }

    def end() -> bool:
        try:
            return _make_visible(attempt, beside, manifest)
        except OSError as error:
            reason = not_written(run_dir, what, error, needed_bytes)
            discard(beside)
            raise reason from error

    return world.on_main(end)


def _write_parts(beside: Path, write: Callable[[Path], None], world: World) -> dict[str, Any]:
    """Every rank writes its part and seals its share of all files; size and SHA-256 of each."""
    write(beside)
    world.barrier()
    files = sorted(path for path in beside.rglob("*") if path.is_file())
    mine = files[world.rank :: world.size]
    sealed: dict[str, Any] = {}
    for part in world.gather({str(file.relative_to(beside)): _seal(file) for file in mine}):
        sealed |= part
    return sealed


def _make_visible(attempt: Attempt, beside: Path, manifest: dict[str, Any]) -> bool:
    """The manifest into the folder, and the folder to its place; see `publish`."""
    folder = attempt.run_dir.checkpoint(manifest["step"])
    text = json.dumps(seal.sealed(manifest), indent=1) + "\n"
    (beside / MANIFEST).write_text(text)
    settle(beside)
    attempt.refuse_if_superseded()
    if os.path.lexists(folder) and not folder.is_dir():
        put_aside(folder)
    while not publish_folder(beside, folder):
        if fault(folder) is None and _unloadable(attempt.run_dir, folder) is None:
            discard(beside)
            return False
        _set_aside(folder)
    return True


def identity(folder: Path) -> str:
    """Tells a checkpoint from any other: SHA-256 of its manifest; empty without one."""
    try:
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return ""


def _unloadable(run_dir: RunDir, folder: Path) -> str | None:
    return run_dir.unloadable(int(folder.name.rpartition("-")[2]), identity(folder))


def _set_aside(folder: Path) -> None:
    """Keep a damaged checkpoint under another name: deleting is not ours to decide."""
    number = 1
    while not publish_folder(folder, folder.with_name(f"damaged-{number}-{folder.name}")):
        number += 1


def _seal(file: Path) -> dict[str, Any]:
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def not_written(
    run_dir: RunDir, what: str, error: BaseException, needed: int | None
) -> SftJobError:
    """Why something could not be written, by what the disk says now."""
    if isinstance(error, SftJobError):
        return error
    if _is_disk_full(error) or is_full(run_dir.path):
        return disk_full(run_dir, what, needed, None)
    return CheckpointError(
        f"the {what} could not be written: {_root(error)}",
        where=str(run_dir.path),
        remedy=_intact(run_dir),
    )


def is_full(folder: Path) -> bool:
    """Whether hardly anything can be written to its file system."""
    disk = os.statvfs(folder)
    no_inodes = disk.f_files > 0 and disk.f_favail < FULL_INODES
    return disk.f_bavail * disk.f_frsize < FULL_BYTES or no_inodes


def disk_full(run_dir: RunDir, what: str, needed: int | None, free: int | None) -> DiskSpaceError:
    """
    Args:
        free: bytes found before anything was written; None after a write has failed.
    """
    amount = f" needs {needed / 2**30:.2f} GiB" if needed else ""
    if free is not None:
        found = f"{' and' if amount else ''} finds {free / 2**30:.2f} GiB free"
    else:
        disk = os.statvfs(run_dir.path)
        inodes = disk.f_files > 0 and disk.f_favail < FULL_INODES
        left = "no inode" if inodes else f"{disk.f_bavail * disk.f_frsize / 2**30:.2f} GiB"
        found = f"{',' if amount else ''} could not be written: {left} left"
    return DiskSpaceError(
        f"no room: the {what}{amount}{found}",
        where=str(run_dir.path),
        remedy=f"free some space or choose another run.dir; {_intact(run_dir)}",
    )


def _intact(run_dir: RunDir) -> str:
    steps = [s for s in run_dir.checkpoint_steps() if (run_dir.checkpoint(s) / MANIFEST).is_file()]
    if not steps:
        return "no earlier checkpoint exists"
    return f"running the job again resumes from the checkpoint of step {steps[0]}, if it verifies"


def _root(error: BaseException) -> str:
    """The first line that says something, through torch's wrapping of other ranks' errors."""
    failures = getattr(error, "failures", None)  # CheckpointException: {rank: (error, traceback)}
    if failures:
        rank, (inner, _) = next(iter(failures.items()))
        return f"rank {rank}: {_root(inner)}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _is_disk_full(error: BaseException) -> bool:
    """Whether the operating system said so, on this rank or on one that torch reports."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        failures = getattr(seen, "failures", {})
        if any(_is_disk_full(inner) for inner, _ in failures.values()):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


# What torch, gloo and allocators say of other things than a file.
_OF_THE_MACHINE = re.compile(
    r"by peer|[Rr]emote process|Broken pipe|[Tt]imed? ?out|pair closure|NCCL|CUDA|"
    r"allocate memory|[Oo]ut of memory|bad_alloc"
)


def is_blamed_by(error: BaseException) -> bool:
    """Whether a failure to load one says that it is damaged. When a rank was killed, the others
    fail for want of it, in the midst of loading too; memory and file servers fail for a while."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError | dist.DistError):
            return False
        if isinstance(seen, OSError) and seen.errno not in _OF_A_FILE:
            return False
        if isinstance(seen, RuntimeError) and _OF_THE_MACHINE.search(str(seen)):
            return False
        failures = getattr(seen, "failures", {})
        if not all(is_blamed_by(inner) for inner, _ in failures.values()):
            return False
        seen = seen.__cause__ or seen.__context__
    return True


# A file that is not there, or not what it should be: asked for by a damaged one, once it verified.
_OF_A_FILE = (None, errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EINVAL, errno.ENAMETOOLONG)


def find(
    run_dir: RunDir, world: World, *, engine: str, data: str, weights: str | None = None
) -> tuple[Found | None, list[str]]:
    """The newest checkpoint that verifies; all ranks share the reading.

    Returns:
        The checkpoint, or None, and one sentence for each folder passed over.

    Raises:
        CheckpointError: the checkpoint cannot be used by this engine or number of processes.
    """
    skipped: list[str] = []
    for step in world.gather(run_dir.checkpoint_steps())[0]:
        folder = run_dir.checkpoint(step)
        reading = _unloadable(run_dir, folder) or fault(folder, world.rank, world.size)
        first = next(filter(None, world.gather(reading)), None)
        if first is not None:
            skipped.append(f"checkpoint of step {step} passed over: {first}")
            continue
        manifest = read_json(folder / MANIFEST)
        if engine == "zero3" and manifest["world_size"] != world.size:
            raise CheckpointError(
                f"a ZeRO-3 checkpoint of {manifest['world_size']} processes cannot be resumed "
                f"by {world.size}",
                where=str(folder),
                remedy=f"use {manifest['world_size']} processes; engine fsdp resumes on any number",
            )
        if manifest["data"] != data:
            raise CheckpointError(
                "the data or its encoding has changed since this checkpoint was written",
                where=str(folder),
                remedy="give the changed job a run.dir of its own, or put the data back",
            )
        if weights is not None and manifest.get("weights", weights) not in (None, weights):
            raise CheckpointError(
                "the base model has other weights than when this checkpoint was written",
                where=str(folder),
                remedy="give the changed job a run.dir of its own, or put the model back",
            )
        return Found(folder, step, manifest), skipped
    if damaged := [line for line in skipped if INCOMPLETE not in line]:
        raise CheckpointError(
            "there are checkpoints, but none can be used:\n  " + "\n  ".join(damaged),
            where=str(run_dir.checkpoints),
            remedy="move them away to start from the beginning",
        )
    return None, skipped


def fault(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """Why a folder is not a good checkpoint; each of several looks at its share of the files."""
    try:
        manifest = read_json(folder / MANIFEST)
    except FileNotFoundError:
        return INCOMPLETE
    except (OSError, ValueError, RecursionError) as error:
        return f"its manifest cannot be read ({_root(error)})"
    if reason := _manifest_fault(folder, manifest):
        return reason
    for name, sealed in sorted(manifest["files"].items())[part::parts]:
        file = folder / name
        try:
            size = file.stat().st_size
            if size != sealed["bytes"]:
                return f"{name} has {size} bytes, the manifest says {sealed['bytes']}"
            with open(file, "rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, ValueError) as error:  # or a name that no file can have
            return f"{name} cannot be read ({_root(error)})"
        if digest != sealed["sha256"]:
            return f"{name} was changed after it was written (SHA-256 differs)"
    return None


def _manifest_fault(folder: Path, manifest: Any) -> str | None:
    """Why what a manifest says cannot be relied on: it may be cut off, edited, or another's."""
    if not isinstance(manifest, dict):
        return "its manifest is damaged"
    if manifest.get("format") != FORMAT:
        return f"format {manifest.get('format')}, this version reads {FORMAT}"
    kinds = {"step": int, "engine": str, "data": str, "world_size": int, "files": dict}
    for key, kind in kinds.items():
        if not isinstance(manifest.get(key), kind):
            return f"its manifest is damaged ({key} is {manifest.get(key)!r:.40})"
    if "seal" in manifest and not seal.is_sealed(manifest):
        return "its manifest was changed after it was written"
    if folder.name != f"step-{manifest['step']:08d}":
        return f"its manifest is of step {manifest['step']}"
    files = manifest["files"]
    if not 0 < manifest["world_size"] <= len(files):
        return f"its manifest is damaged (world_size is {manifest['world_size']})"
    for name, sealed in files.items():
        whole = isinstance(sealed, dict) and {"bytes", "sha256"} <= sealed.keys()
        inside = ".." not in Path(name).parts and not Path(name).is_absolute()
        if not whole or not inside:
            return f"its manifest is damaged ({name!r:.40})"
    missing = required_files(manifest["engine"], manifest["world_size"]) - files.keys()
    if missing:
        return f"its manifest lacks {sorted(missing)[0]}"
    if manifest["engine"] == "fsdp" and not any(name.endswith(".distcp") for name in files):
        return "its manifest lacks the weights"
    return None


def required_files(engine: str, world_size: int) -> set[str]:
    """What every checkpoint has, whatever the model: a manifest without it is not one."""
    ranks = range(world_size)
    found = {"scheduler.pt", "trainer_state.json"}
    found |= {"rng_state.pth"} if world_size == 1 else {f"rng_state_{r}.pth" for r in ranks}
    if engine == "fsdp":
        found.add(".metadata")
    return found


def drop_old(attempt: Attempt, keep: int | None, newest: int) -> None:
    """Delete all but the newest `keep` complete checkpoints up to step `newest`, just written.

    Later ones were passed over as damaged when this attempt began: they count for nothing.
    """
    run_dir = attempt.run_dir
    if keep is None or attempt.superseded_by() is not None:
        return
    complete = [
        step
        for step in run_dir.checkpoint_steps()
        if step <= newest and (run_dir.checkpoint(step) / MANIFEST).is_file()
    ]
    for step in complete[keep:]:
        discard(run_dir.checkpoint(step))
