"""How files and folders are written: seen whole or not at all, published once, never replaced.

    write_atomically    a file that its one owner may change: the reader sees the old or the new one
    create              a file that is made once by whoever comes first
    publish             a folder that is made once by whoever comes first
    publish_dir         the same for a cache, sealed, and built by several at once without harm
    is_intact           whether such a folder can be used
    discard             a folder that others may still be writing to is taken out of their sight

Nothing is checked before it is done: on a file server another machine may be in between.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import json
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from sft_job import seal
from sft_job.errors import DiskSpaceError, FileError, SftJobError

# File systems without the operation say one of these.
UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ENOTTY}
_RENAME_NOREPLACE, _AT_FDCWD = 1, -100
# In a folder of the cache that is being built: locked by its builder, so that others can tell
# whether it is alive.
_BUILDER = ".builder"
# A builder surely has its lock so long after its folder was made, by the clocks of two machines.
MAKING_S = 3600.0


def write_atomically(path: Path, text: str) -> None:
    """Write beside, flush to disk, rename: a reader sees the old file or the new one."""
    with _beside(path, text) as beside:
        try:
            os.replace(beside, path)
        except IsADirectoryError:
            put_aside(path)
            os.replace(beside, path)
    fsync_dir(path.parent)


def create(path: Path, text: str) -> bool:
    """Make a file with its content at once, if nobody has; returns whether it was made here."""
    with _beside(path, text) as beside:
        try:
            os.link(beside, path)
        except FileExistsError:
            return False
        except OSError as error:  # a file system without hard links
            if error.errno not in UNSUPPORTED:
                raise
            try:
                _rename_noreplace(beside, path)
            except FileExistsError:
                return False
    fsync_dir(path.parent)
    return True


@contextlib.contextmanager
def _beside(path: Path, text: str) -> Iterator[Path]:
    """The content on disk, under a name of its own; locked, so that `clear_unwritten` can tell
    whether its writer lives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file, beside = _locked_beside(path)
    try:
        with file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            yield beside
    finally:
        beside.unlink(missing_ok=True)


def _locked_beside(path: Path) -> tuple[IO[str], Path]:
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        file = os.fdopen(handle, "w", encoding="utf-8")
        with contextlib.suppress(OSError):  # where a file system has no locks nothing is cleared
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # not cleared before it was locked
            return file, Path(name)
        file.close()


def clear_unwritten(*files: Path) -> None:
    """Delete what killed writers of these files (names may be patterns) have left."""
    for path in files:
        for left in path.parent.glob(f".{path.name}.????????"):
            with contextlib.suppress(OSError), open(left, "r+") as file:
                if _try_lock(file.fileno()):
                    left.unlink()


def _rename_noreplace(source: Path, target: Path) -> None:
    """renameat2(2) with RENAME_NOREPLACE."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(source), os.fsencode(target)
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_NOREPLACE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(source), None, str(target))


def publish(beside: Path, folder: Path) -> bool:
    """Give a finished folder its name, if no folder has it; returns whether it was this one.

    Renaming onto a folder with something in it is refused by the system itself.
    """
    try:
        os.rename(beside, folder)
    except OSError:
        if not folder.is_dir():
            raise
        return False
    fsync_dir(folder.parent)
    return True


def discard(folder: Path) -> None:
    """Delete a folder that others may still be writing to, or be about to publish: first it
    loses its name, so that nobody can take a part of it for the whole."""
    nobody = folder.with_name(f".discarded-{uuid.uuid4().hex[:12]}")
    try:
        os.rename(folder, nobody)
    except FileNotFoundError:
        return
    shutil.rmtree(nobody, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make a folder and those above; a file in its place is put aside."""
    if os.path.lexists(path) and not path.is_dir():
        put_aside(path)
    path.mkdir(parents=True, exist_ok=True)


def put_aside(path: Path) -> Path:
    """Rename something of unknown origin, or damaged: deleting is not ours to decide."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"replaced-{number}-{path.name}")):
        number += 1
    os.rename(path, aside)
    return aside


def translated(error: OSError) -> SftJobError | None:
    """What the operating system refuses, in the user's terms; None where that is no explanation."""
    place, reason = str(error.filename or ""), error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskSpaceError(
            f"nothing can be written: {reason} (space or inodes)",
            where=place or None,
            remedy="free some there, and run the same command again",
        )
    if not place:
        return None
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return FileError(
            reason, where=place, remedy="have it opened to this user, or name another place"
        )
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
        return FileError(reason, where=place, remedy="name another place")
    if error.errno in (errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ENXIO):
        return SftJobError(
            reason, where=place, remedy="the disk or the file server has a fault: try again later"
        )
    return None


def append_line(path: Path, line: str) -> None:
    """Append a line; a half one that a killed process left is closed first."""
    with open(path, "ab+", buffering=0) as file:
        last = b"\n"
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
        data = (b"" if last == b"\n" else b"\n") + line.encode() + b"\n"
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def read_json(path: Path) -> Any:
    """
    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON in UTF-8.
    """
    return parse_json(path.read_bytes())


def parse_json(text: bytes) -> Any:
    """
    Raises:
        ValueError: it is not JSON in UTF-8.
    """
    try:
        return json.loads(text.decode("utf-8"))
    except RecursionError as error:  # a damaged file may be full of brackets
        raise ValueError("nested too deeply") from error


def read_records(file: Path) -> list[dict[str, Any]]:
    """All whole records of a JSON-lines file. A process that was killed, or a disk that was full,
    may have left anything in between."""
    records = []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            record = parse_json(line)
        except ValueError:  # not JSON, not UTF-8
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def fsync_dir(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def settle(folder: Path) -> None:
    """Everything below a folder on disk, and readable to whom the umask lets: libraries write
    some files for their owner alone."""
    mask = _umask()
    for path in [folder, *folder.rglob("*")]:
        if path.is_symlink():
            continue
        os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~mask)
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    """Read, not set and set back: another thread could write a file in between."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    raise OSError("no Umask in /proc/self/status")


@contextlib.contextmanager
def publish_dir(path: Path) -> Iterator[Path]:
    """A folder of the cache that appears complete, with its seal, or not at all.

    Two processes may build the same folder at once: the first to finish publishes, the other's
    work is dropped. The caller's content must therefore depend on nothing but the name. What a
    killed builder has left is cleared away by the next one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_dead(path)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with open(beside / f"{_BUILDER}.new", "w") as alive:
            _try_lock(alive.fileno())
            os.rename(alive.name, beside / _BUILDER)  # never seen without its lock
            yield beside
            names = [p.relative_to(beside).as_posix() for p in beside.rglob("*") if p.is_file()]
            names.remove(_BUILDER)  # it stays to the end: flushing to disk takes long
            (beside / seal.SEAL).write_text(json.dumps(seal.make(beside, names)) + "\n")
            settle(beside)
            if publish(beside, path):
                (path / _BUILDER).unlink(missing_ok=True)
            else:
                shutil.rmtree(beside)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def is_intact(path: Path) -> bool:
    """Whether a folder of the cache is there and as it was published; a damaged one is deleted."""
    if not path.is_dir():
        if os.path.lexists(path):
            print(f"note: {path} is no folder: now {put_aside(path).name}", file=sys.stderr)
        return False
    reason = seal.fault(path)
    if reason is not None:
        print(f"note: {path} is damaged ({reason}) and made anew", file=sys.stderr)
        discard(path)
    return reason is None


def _clear_dead(path: Path) -> None:
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        try:
            with open(left / _BUILDER) as owner:
                if _try_lock(owner.fileno()):
                    discard(left)
        except OSError:
            # Gone meanwhile, or just being made; or never, since its builder was killed.
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > MAKING_S:
                    discard(left)


def _try_lock(handle: int) -> bool:
    """Whether nobody holds it. Where a file system has no locks nobody can tell."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
