"""Checkpoints on one process: published once, never replaced, believed only when they verify."""

import errno
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from sft_job import checkpoint, result
from sft_job.attempt import Attempt
from sft_job.checkpoint import MANIFEST
from sft_job.errors import CheckpointError, DiskSpaceError, SupersededError
from sft_job.rundir import RunDir


class Alone:
    """A world of one process without a process group."""

    rank, size, is_main = 0, 1, True

    def barrier(self) -> None: ...

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def on_main(self, work: Any, stop: Any = None) -> Any:
        return work()


def save(attempt: Attempt, step: int, content: bytes = b"weights") -> bool:
    """Publish a checkpoint of a few bytes."""

    def write(folder: Path) -> None:
        (folder / "__0_0.distcp").write_bytes(content)
        for name in checkpoint.required_files("fsdp", 1):
            (folder / name).write_text(name)

    return checkpoint.publish(
        attempt, step, write, Alone(), engine="fsdp", data="d", weights="w", needed_bytes=10
    )


def find(run: RunDir, **other: str) -> tuple[int | None, list[str]]:
    options = {"engine": "fsdp", "data": "d", "weights": "w"} | other
    found, skipped = checkpoint.find(run, Alone(), **options)
    return (found.step if found else None), skipped


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Saved at steps 2 and 4 by attempt 1."""
    run = RunDir(tmp_path / "run")
    attempt = Attempt.claim(run)
    assert save(attempt, 2)
    assert save(attempt, 4)
    return run


def edit(run: RunDir, change: Any) -> None:
    """Change what the manifest of step 4 says."""
    file = run.checkpoint(4) / MANIFEST
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def without_seal(change: Any) -> Any:
    """As in a manifest of an earlier version, which has no checksum of its own."""

    def both(manifest: dict[str, Any]) -> None:
        del manifest["seal"]
        change(manifest)

    return both


CHANGES = {
    "no files": lambda m: m.update(files={}),
    "one file less": lambda m: m["files"].popitem(),
    "another step": lambda m: m.update(step=2),
    "no world": lambda m: m.pop("world_size"),
    "a world of text": lambda m: m.update(world_size="1"),
    "a larger world": lambda m: m.update(world_size=2),
    "no engine": lambda m: m.pop("engine"),
    "no data": lambda m: m.pop("data"),
    "files as a list": lambda m: m.update(files=[]),
    "a file of no size": lambda m: m["files"].update({"scheduler.pt": {}}),
    "a file elsewhere": lambda m: m["files"].update({"../x": m["files"]["scheduler.pt"]}),
    "no format": lambda m: m.pop("format"),
}


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_a_manifest_that_was_changed_is_passed_over(run: RunDir, name: str, sealed: bool) -> None:
    """The one before is taken, and the reason is said."""
    edit(run, CHANGES[name] if sealed else without_seal(CHANGES[name]))
    step, (said,) = find(run)
    assert step == 2
    assert said.startswith("checkpoint of step 4 passed over: ")


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\0", b"{", b"null", b"[]", b"3", b"\xff\xfe", b"[" * 10_000, b"{}"]
)
def test_a_manifest_that_is_none_is_passed_over(run: RunDir, content: bytes) -> None:
    """Empty, binary, cut off, another value, nested beyond reason."""
    (run.checkpoint(4) / MANIFEST).write_bytes(content)
    step, (said,) = find(run)
    assert step == 2
    assert said.startswith("checkpoint of step 4 passed over: ")


def test_a_manifest_of_an_earlier_version_is_read(run: RunDir) -> None:
    """It has the same fields but for its own checksum, the attempt and the weights."""

    def earlier(manifest: dict[str, Any]) -> None:
        for key in ("seal", "attempt", "weights"):
            del manifest[key]

    edit(run, earlier)
    assert find(run) == (4, [])


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "folder"])
@pytest.mark.parametrize("name", ["__0_0.distcp", "rng_state.pth", ".metadata", MANIFEST])
def test_every_damage_to_a_file_is_found(run: RunDir, name: str, damage: str) -> None:
    """The one before is taken."""
    file = run.checkpoint(4) / name
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[:-2])
    elif damage == "flip":
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "folder":
        file.mkdir()
    assert find(run)[0] == 2


def test_a_checkpoint_of_other_weights_is_refused(run: RunDir) -> None:
    """The base model was changed under its name, and the run's own record of it is lost."""
    with pytest.raises(CheckpointError, match="the base model has other weights than when"):
        find(run, weights="other")


def test_a_checkpoint_that_could_not_be_loaded_is_passed_over(run: RunDir) -> None:
    """By every later attempt; how to have it tried again is said."""
    identity = checkpoint.identity(run.checkpoint(4))
    Attempt(run, 1).cannot_load(4, "RuntimeError:\nbad magic number", identity)
    step, (said,) = find(run)
    assert step == 2
    assert "attempt 1 could not load it: RuntimeError: bad magic number (without " in said
    assert save(Attempt.claim(run), 4, b"again")
    assert find(run) == (4, [])  # the mark is of the other one, which is put aside
    assert (run.checkpoints / "damaged-1-step-00000004").is_dir()


def test_the_same_step_of_another_attempt_stays_if_it_is_good(run: RunDir) -> None:
    """It was published by an attempt that slept; nothing is replaced, nothing put aside."""
    late = Attempt.claim(run)
    assert save(late, 4, b"the same step again") is False
    assert (run.checkpoint(4) / "__0_0.distcp").read_bytes() == b"weights"
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-00000002", "step-00000004"]


def test_a_damaged_one_in_the_way_is_put_aside(run: RunDir) -> None:
    """Under another name: deleting is not ours to decide."""
    (run.checkpoint(4) / "__0_0.distcp").write_bytes(b"damaged")
    assert save(Attempt.claim(run), 4, b"again") is True
    assert find(run) == (4, [])
    aside = run.checkpoints / "damaged-1-step-00000004"
    assert (aside / "__0_0.distcp").read_bytes() == b"damaged"


def test_an_older_attempt_saves_nothing(run: RunDir) -> None:
    """Another one has taken over, before or while it writes."""
    older = Attempt(run, 1)
    Attempt.claim(run)
    with pytest.raises(SupersededError):
        save(older, 6)
    assert run.checkpoint_steps() == [4, 2]


def test_an_older_attempt_cannot_publish_what_the_next_has_cleared_away(run: RunDir) -> None:
    """It sleeps in the midst of writing, and wakes up when its folder is gone: a part of it is
    never taken for the whole, whatever it looked at before."""
    older = Attempt(run, 1)

    def write(folder: Path) -> None:
        (folder / "__0_0.distcp").write_bytes(b"half")
        result.clear_left_over(Attempt.claim(run))

    with pytest.raises((SupersededError, CheckpointError)):
        checkpoint.publish(older, 6, write, Alone(), engine="fsdp", data="d", needed_bytes=None)
    assert run.checkpoint_steps() == [4, 2]


def test_what_earlier_attempts_left_is_cleared_away(run: RunDir) -> None:
    """Of this and later ones nothing; checkpoints stay."""
    names = [".step-00000006.attempt-1.tmp", ".step-00000006.attempt-3.tmp", ".step-00000006.tmp",
             ".discarded-0123456789ab", ".other"]  # fmt: skip
    for name in names:
        (run.checkpoints / name).mkdir()
    result.clear_left_over(Attempt(run, 3))
    left = sorted(p.name for p in run.checkpoints.iterdir() if p.name.startswith("."))
    assert left == [".other", ".step-00000006.attempt-3.tmp"]


def test_old_ones_go_whole_or_not_at_all(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deletion that is cut short leaves nothing that looks complete."""
    monkeypatch.setattr(shutil, "rmtree", lambda folder, ignore_errors: None)
    checkpoint.drop_old(Attempt(run, 1), 1, 4)
    assert run.checkpoint_steps() == [4]


def test_an_older_attempt_deletes_nothing(run: RunDir) -> None:
    """The next one may be resuming from it."""
    Attempt.claim(run)
    checkpoint.drop_old(Attempt(run, 1), 1, 4)
    assert run.checkpoint_steps() == [4, 2]


def test_what_is_free_is_looked_at_after_a_write_has_failed(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the figure of before; without inodes that is what is said."""
    real = os.statvfs(run.path)
    fields = {name: getattr(real, name) for name in dir(real) if name.startswith("f_")}

    class Disk:
        def __init__(self, **changes: int) -> None:
            self.__dict__.update(fields | changes)

    error = OSError(28, "No space left on device")
    for changes, said in (
        ({"f_bavail": 2**18, "f_frsize": 4096}, "could not be written: 1.00 GiB left"),
        ({"f_files": 100, "f_favail": 0}, "could not be written: no inode left"),
    ):
        monkeypatch.setattr(os, "statvfs", lambda path, changes=changes: Disk(**changes))
        failure = checkpoint.not_written(run, "checkpoint of step 6", error, 2**30)
        assert isinstance(failure, DiskSpaceError)
        assert f"no room: the checkpoint of step 6 needs 1.00 GiB, {said}" in str(failure)
        assert "resumes from the checkpoint of step 4, if it verifies" in str(failure)


def test_a_file_in_the_place_of_a_checkpoint_is_put_aside(run: RunDir) -> None:
    """Else no attempt would get beyond this step."""
    run.checkpoint(6).write_text("a file")
    assert save(Attempt(run, 1), 6)
    assert find(run)[0] == 6
    assert (run.checkpoints / "replaced-1-step-00000006").read_text() == "a file"


def wrapped(error: BaseException) -> BaseException:
    """As torch hands on what a rank has failed of."""
    return CheckpointException("read", {1: (error, None)})


GLOO = "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:55010: Connection reset by peer"


@pytest.mark.parametrize(
    ("error", "blamed"),
    [
        (RuntimeError(GLOO), False),
        (RuntimeError("Timed out waiting 1799000ms for recv operation to complete"), False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ..."), False),
        (dist.DistBackendError("NCCL error"), False),
        (MemoryError(), False),
        (OSError(errno.EIO, "Input/output error"), False),
        (OSError(errno.EMFILE, "Too many open files"), False),
        (RuntimeError("PytorchStreamReader failed finding central directory"), True),
        (pickle.UnpicklingError("invalid load key"), True),
        (FileNotFoundError(errno.ENOENT, "No such file", "__9_0.distcp"), True),
        (ValueError("cannot mmap an empty file"), True),
        (KeyError("optimizer"), True),
    ],
)
def test_only_what_says_something_of_a_checkpoint_is_its_fault(
    error: BaseException, blamed: bool
) -> None:
    """When a rank is killed while all load, the others fail: a good checkpoint is not given up."""
    assert checkpoint.is_blamed_by(error) is blamed
    assert checkpoint.is_blamed_by(wrapped(error)) is blamed
    outer = RuntimeError("while loading")
    outer.__cause__ = error
    assert checkpoint.is_blamed_by(outer) is blamed


def test_a_world_beyond_reason_is_damage(run: RunDir) -> None:
    """In a manifest of an earlier version, which has no checksum; nothing is made of its size."""
    edit(run, without_seal(lambda m: m.update(world_size=10**15)))
    assert find(run)[0] == 2
