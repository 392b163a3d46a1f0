"""The run directory and the cache beside it: every name in them, and how they are written.

RUN_DIR/
  config.yaml            the job file as given
  job.json               the checked configuration, overrides applied, paths absolute
  plan.json              the resolved plan
  attempts/N/            made by attempt N, which has its number by that; nobody else writes here
      owner.json         who it is: host, process, Slurm job
      metrics.jsonl      one line per step that it logged
      attempts.jsonl     when it began, where it resumed, and how long its start took, by part
      interrupted        it was stopped on request, and says why
      began              by the job script: the submission, and the step that was saved by then
      unloadable-200     the checkpoint of that step could not be loaded; says why
      model.json         size and SHA-256 of each file of the model that it wrote
  logs/attempt-N/        one log per rank, rank-R.error when a rank failed; from the job script
                         rank-R.ready, first-error, error (the cause) and Slurm's messages
  metrics.jsonl          the records of all attempts that count, see `attempt.py`
  attempts.jsonl         of all attempts
  tensorboard/           with logging.report_to: [tensorboard]
  checkpoints/step-00000200/
  model/                 the exported model
  stop-N                 made by a user or a batch script: attempt N shall stop; says why
  job.sh                 the job script, with `sft-job submit`
  submissions.jsonl      each time it was submitted
  CANCELLED              by `sft-job submit cancel`: saved, and not requeued
  save_seconds           what the last checkpoint took
  DONE                   the model is complete; made once, never replaced

CACHE_DIR/
  models/NAME/           converted weights and repaired tokenizers
  tokens/FINGERPRINT/    encoded conversations
  prepared/KEY.json      which of them belong to a job file
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sft_job.errors import RunDirError
from sft_job.schema import JobConfig

# Left open, it is what the hub cache has; who submits a job writes the commit down.
OPEN = "model.revision"
_STEP = re.compile(r"step-(\d{8,})")


class RunDir:
    """Owns every name in a run directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.job_file = self.path / "job.json"
        self.plan_file = self.path / "plan.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.attempts_file = self.path / "attempts.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.tensorboard = self.path / "tensorboard"
        self.done = self.path / "DONE"
        self.script = self.path / "job.sh"
        self.cancelled = self.path / "CANCELLED"
        self.submissions = self.path / "submissions.jsonl"
        self.save_seconds = self.path / "save_seconds"
        self.submitit = self.path / "submitit"

    def attempt(self, number: int) -> Path:
        return self.path / "attempts" / str(number)

    def owner(self, attempt: int) -> Path:
        return self.attempt(attempt) / "owner.json"

    def interrupted(self, attempt: int) -> Path:
        return self.attempt(attempt) / "interrupted"

    def began(self, attempt: int) -> Path:
        return self.attempt(attempt) / "began"

    def unloadable(self, attempt: int, step: int) -> Path:
        return self.attempt(attempt) / f"unloadable-{step}"

    def written_model(self, attempt: int) -> Path:
        return self.attempt(attempt) / "model.json"

    def logs(self, attempt: int) -> Path:
        return self.path / "logs" / f"attempt-{attempt}"

    def log(self, attempt: int, rank: int) -> Path:
        return self.logs(attempt) / f"rank-{rank}.log"

    def error(self, attempt: int, rank: int) -> Path:
        return self.logs(attempt) / f"rank-{rank}.error"

    def ready(self, attempt: int, rank: int) -> Path:
        return self.logs(attempt) / f"rank-{rank}.ready"

    def first_error(self, attempt: int) -> Path:
        """Of the rank that was first to fail."""
        return self.logs(attempt) / "first-error"

    def cause(self, attempt: int) -> Path:
        """Why the attempt failed, as the job script has found out."""
        return self.logs(attempt) / "error"

    def stop_file(self, attempt: int) -> Path:
        return self.path / f"stop-{attempt}"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps of the published checkpoint folders, newest first (complete or not)."""
        if not self.checkpoints.is_dir():
            return []
        matches = (_STEP.fullmatch(entry.name) for entry in self.checkpoints.iterdir())
        return sorted((int(m[1]) for m in matches if m), reverse=True)

    def attempts(self) -> list[int]:
        """The numbers of all attempts, oldest first. Those of versions that made no folder for
        each have left their logs."""
        found = set()
        for folder, prefix in (("attempts", ""), ("logs", "attempt-")):
            try:
                names = os.listdir(self.path / folder)
            except (FileNotFoundError, NotADirectoryError):
                continue
            numbers = (n.removeprefix(prefix) for n in names if n.startswith(prefix))
            found |= {int(n) for n in numbers if n.isascii() and n.isdigit()}
        return sorted(found)

    def newest_attempt(self) -> int:
        """0 before the first."""
        return max(self.attempts(), default=0)

    def interruption(self, attempt: int) -> str | None:
        """Why an attempt was stopped on request; None when it was not."""
        try:
            marker = read_json(self.interrupted(attempt))
        except FileNotFoundError:
            return None
        except ValueError:  # cut off by a full disk or a lost machine
            return "interrupted"
        message = marker.get("message") if isinstance(marker, dict) else None
        return str(message or "interrupted")

    @contextmanager
    def alone(self, name: str, doing: str, *, patience_s: float = 0) -> Iterator[None]:
        """Hold a lock of this directory: two processes on it would mix what they write.

        Args:
            name: of the lock file.
            doing: what another holder does, as in "another process is ...".
            patience_s: a lock that a lost machine held lives on until its server notices.

        Raises:
            RunDirError: somebody else holds it.
        """
        deadline = time.monotonic() + patience_s
        with open(self.path / name, "w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() >= deadline:
                        raise RunDirError(
                            f"another process is {doing}",
                            where=str(self.path),
                            remedy="wait for it, or give this job a run.dir of its own",
                        ) from error
                    time.sleep(0.5)
                except OSError as error:  # Lustre can be without locks
                    if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                        raise
                    break
            yield

    def claim(self, config: JobConfig, text: str) -> None:
        """Make the directory this job's, or find that it already is.

        Args:
            text: the job file as given.

        Raises:
            RunDirError: it is not a directory, not writable, or holds something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunDirError("run.dir is a file", where=str(self.path))
        if self.job_file.exists():
            self.refuse_another_job(config)
            return
        if self.path.is_dir() and any(self.path.iterdir()):
            raise RunDirError(
                "the folder is not empty and holds no job",
                where=str(self.path),
                remedy="choose another run.dir, or empty the folder yourself",
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # job.json first: it is what makes the folder this job's.
            write_atomically(self.job_file, config.model_dump_json(indent=2) + "\n")
            write_atomically(self.config_file, text)
        except OSError as error:
            raise RunDirError(
                f"cannot be written: {error.strerror}",
                where=str(self.path),
                remedy="choose a run.dir that this user may write to",
            ) from error

    def refuse_another_job(self, config: JobConfig) -> None:
        """
        Raises:
            RunDirError: the directory, which holds a job, holds another one.
        """
        try:
            before = JobConfig.model_validate_json(self.job_file.read_text()).identity()
        except (ValidationError, OSError, UnicodeDecodeError) as error:
            raise RunDirError(
                "job.json was not written by this version, so it cannot be told whose run this is",
                where=str(self.job_file),
                remedy="give the job a run.dir of its own",
            ) from error
        now = config.identity()
        changed = [
            f"{key}: {before.get(key)!r} before, {now.get(key)!r} now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
            and (key != OPEN or None not in (before[key], now[key]))
        ]
        if changed:
            raise RunDirError(
                "the directory belongs to a job with other settings:\n  " + "\n  ".join(changed),
                where=str(self.path),
                remedy="give the new job a run.dir of its own, or set these keys back to resume",
            )


class CacheDir:
    """Owns every name in the cache."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def model(self, name: str) -> Path:
        return self.path / "models" / name

    def tokens(self, fingerprint: str) -> Path:
        return self.path / "tokens" / fingerprint[:32]

    def prepared(self, key: str) -> Path:
        return self.path / "prepared" / f"{key[:32]}.json"


def write_atomically(path: Path, text: str) -> None:
    """Write beside, flush to disk, rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def append_line(path: Path, line: str) -> None:
    """Append a line; a half one that a killed process left is closed first."""
    with open(path, "ab+") as file:
        if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
            file.write(b"\n")
        file.write(line.encode() + b"\n")


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


def _umask() -> int:
    """Read, not set and set back: another thread could write a file in between."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    raise OSError("no Umask in /proc/self/status")


def fsync_dir(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def publish_dir(path: Path) -> Iterator[Path]:
    """A folder that appears complete or not at all.

    Two processes may build the same folder at once: the first to finish publishes, the other's
    work is dropped. The caller's content must therefore depend on nothing but the name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield beside
        os.chmod(beside, 0o777 & ~_umask())
        for file in beside.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        fsync_dir(beside)
        try:
            os.rename(beside, path)
        except OSError:
            if not path.is_dir():
                raise
            shutil.rmtree(beside)
        fsync_dir(path.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


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
