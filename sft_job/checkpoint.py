"""Checkpoints: published whole, verified before use, chosen newest first.

    checkpoints/.step-00000200.tmp/     being written by all ranks
    checkpoints/step-00000200/          renamed when every rank has written
        __0_0.distcp ... | global_step200/...     model and optimizer, sharded by the engine
        rng_state*.pth, scheduler.pt, trainer_state.json
        manifest.json                   last: size and SHA-256 of every file

A folder without manifest.json is not a checkpoint.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_job.errors import CheckpointError, DiskSpaceError
from sft_job.rundir import RunDir, fsync_dir, read_json, write_atomically
from sft_job.world import World

MANIFEST = "manifest.json"
FORMAT = 1
INCOMPLETE = "no manifest, it was never completed"

# A failed write on a disk with less room than this is taken for a full disk: torch's zip writer
# says no more than "unexpected pos".
FULL_BYTES = 2**20


@dataclass(frozen=True)
class Found:
    """The checkpoint to resume from, and why newer folders were passed over."""

    folder: Path
    step: int
    manifest: dict[str, Any]


def publish(
    run_dir: RunDir,
    step: int,
    write: Callable[[Path], None],
    world: World,
    *,
    engine: str,
    data: str,
    needed_bytes: int | None,
) -> Path:
    """Write a checkpoint with all ranks and make it visible when it is complete.

    No rank returns before the manifest is there.

    Args:
        write: writes this rank's part into the folder it is given.
        data: fingerprint of the data; the order of all steps depends on it.
        needed_bytes: refused beforehand when the disk has less.

    Raises:
        DiskSpaceError: the disk is full; earlier checkpoints are untouched.
        CheckpointError: another failure to write.
    """
    folder = run_dir.checkpoint(step)
    beside = folder.with_name(f".{folder.name}.tmp")
    if world.is_main:
        shutil.rmtree(beside, ignore_errors=True)  # left by an attempt that died in here
        if folder.exists():
            _set_aside(folder)  # it did not verify, else this step would not run again
        beside.mkdir(parents=True)
    world.barrier()
    free = min(world.gather(shutil.disk_usage(beside).free))
    if needed_bytes is not None and free < needed_bytes:
        if world.is_main:
            shutil.rmtree(beside, ignore_errors=True)
        raise disk_full(run_dir, f"checkpoint of step {step}", needed_bytes, free)
    try:
        write(beside)
        world.barrier()
        files = sorted(p for p in beside.rglob("*") if p.is_file())
        mine = {
            str(file.relative_to(beside)): _seal(file) for file in files[world.rank :: world.size]
        }
    # torch wraps the errors of all ranks in a BaseException of its own (CheckpointException).
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        left = shutil.disk_usage(beside.parent).free  # another rank may have removed it already
        shutil.rmtree(beside, ignore_errors=True)
        if left < FULL_BYTES or _is_disk_full(error):
            raise disk_full(run_dir, f"checkpoint of step {step}", needed_bytes, free) from error
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written: {_root(error)}",
            where=str(run_dir.checkpoints),
            remedy=_intact(run_dir),
        ) from error
    sealed: dict[str, Any] = {}
    for part in world.gather(mine):
        sealed |= part
    if world.is_main:
        for directory in [beside, *(p for p in beside.rglob("*") if p.is_dir())]:
            fsync_dir(directory)
        os.rename(beside, folder)
        fsync_dir(folder.parent)
        manifest = {
            "format": FORMAT,
            "step": step,
            "engine": engine,
            "data": data,
            "world_size": world.size,
            "files": dict(sorted(sealed.items())),
        }
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    world.barrier()
    return folder


def _set_aside(folder: Path) -> None:
    """Keep a damaged checkpoint under another name: deleting is not ours to decide."""
    number = 1
    while (aside := folder.with_name(f"damaged-{number}-{folder.name}")).exists():
        number += 1
    folder.rename(aside)


def _seal(file: Path) -> dict[str, Any]:
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def disk_full(run_dir: RunDir, what: str, needed: int | None, free: int) -> DiskSpaceError:
    amount = f"needs {needed / 2**30:.2f} GiB and " if needed else ""
    return DiskSpaceError(
        f"no room: the {what} {amount}finds {free / 2**30:.2f} GiB free",
        where=str(run_dir.path),
        remedy=f"free some space or choose another run.dir; {_intact(run_dir)}",
    )


def _intact(run_dir: RunDir) -> str:
    steps = [s for s in run_dir.checkpoint_steps() if (run_dir.checkpoint(s) / MANIFEST).is_file()]
    if not steps:
        return "no earlier checkpoint exists"
    return f"the checkpoint of step {steps[0]} is untouched, running the job again resumes from it"


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


def find(
    run_dir: RunDir, world: World, *, engine: str, data: str
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
        fault = next(filter(None, world.gather(_fault(folder, world))), None)
        if fault is not None:
            skipped.append(f"checkpoint of step {step} passed over: {fault}")
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
        return Found(folder, step, manifest), skipped
    if damaged := [line for line in skipped if INCOMPLETE not in line]:
        raise CheckpointError(
            "there are checkpoints, but none can be used:\n  " + "\n  ".join(damaged),
            where=str(run_dir.checkpoints),
            remedy="move them away to start from the beginning",
        )
    return None, skipped


def _fault(folder: Path, world: World) -> str | None:
    """Why a folder is not a good checkpoint; this rank looks at its share of the files."""
    if not (folder / MANIFEST).is_file():
        return INCOMPLETE
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        return f"format {manifest.get('format')}, this version reads {FORMAT}"
    files = sorted(manifest["files"].items())
    for name, sealed in files[world.rank :: world.size]:
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != sealed["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, the manifest says {sealed['bytes']}"
        with open(file, "rb") as handle:
            if hashlib.file_digest(handle, "sha256").hexdigest() != sealed["sha256"]:
                return f"{name} was changed after it was written (SHA-256 differs)"
    return None


def drop_old(run_dir: RunDir, keep: int | None, newest: int) -> None:
    """Delete all but the newest `keep` complete checkpoints up to step `newest`, just written.

    Later ones were passed over as damaged when this attempt began: they count for nothing.
    """
    if keep is None:
        return
    complete = [
        step
        for step in run_dir.checkpoint_steps()
        if step <= newest and (run_dir.checkpoint(step) / MANIFEST).is_file()
    ]
    for step in complete[keep:]:
        # The manifest goes first: a deletion cut short leaves no folder that looks complete.
        (run_dir.checkpoint(step) / MANIFEST).unlink()
        shutil.rmtree(run_dir.checkpoint(step))
