"""The run directory and the cache beside it: every name in them, and how they are written.

RUN_DIR/
  config.yaml            the job file as given
  job.json               the checked configuration, overrides applied, paths absolute
  plan.json              the resolved plan
  identity.json          what data and base model are, by content
  attempts/N/            made by attempt N, which has its number by that; nobody else writes here
      owner.json         who it is: host, process, Slurm job
      metrics.jsonl      one line per step that it logged
      attempts.jsonl     when it began, where it resumed, and how long its start took, by part
      interrupted        it was stopped on request, and says why
      began              by the job script: the submission, and the step that was saved by then
      unloadable-00000200  it could not load that checkpoint, and says why
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
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from sft_job import seal
from sft_job.config import read_stored, stored
from sft_job.errors import Interrupted, RunDirError, SftJobError, UserError
from sft_job.files import create, parse_json, put_aside, read_json, translated
from sft_job.schema import JobConfig

_STEP = re.compile(r"step-(\d{8,})")
_HALF_MADE = re.compile(r"\.(?:step-\d+|model)(?:\.attempt-(\d+))?\.tmp|\.discarded-.*")
# What a start may leave that was ended before the directory was this job's.
_OURS = re.compile(r"\.lock|\.submit|\.(job\.json|config\.yaml)\..*|\.nfs.*")


class RunDir:
    """Owns every name in a run directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.job_file = self.path / "job.json"
        self.plan_file = self.path / "plan.json"
        self.identity = self.path / "identity.json"
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

    def written_model(self, attempt: int) -> Path:
        return self.attempt(attempt) / "model.json"

    def unloadable_mark(self, attempt: int, step: int) -> Path:
        return self.attempt(attempt) / f"unloadable-{step:08d}"

    def unloadable(self, step: int, identity: str) -> str | None:
        """Why an attempt could not load a checkpoint, though it verifies; None when none failed.

        Args:
            identity: of the checkpoint; a later one of the same step is another.
        """
        for attempt in self.attempts():
            with suppress(OSError):
                mark = self.unloadable_mark(attempt, step)
                reason, _, whose = mark.read_text(errors="replace").partition("\n")
                if whose.strip() == identity:
                    said = f"attempt {attempt} could not load it: {reason}"
                    return f"{said} (without {mark} it is tried)"
        return None

    def logs(self, attempt: int) -> Path:
        return self.path / "logs" / f"attempt-{attempt}"

    def log(self, attempt: int, rank: int) -> Path:
        return self.logs(attempt) / f"rank-{rank}.log"

    def rendezvous(self, attempt: int) -> Path:
        """Where rank 0 writes its port, with the job script."""
        return self.logs(attempt) / "rendezvous"

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

    def half_made(self, before: int) -> list[Path]:
        """Checkpoints and models that attempts before this one have left without a name, and
        what was being deleted."""
        found = [*self.checkpoints.glob(".*"), *self.path.glob(".*")]
        matches = [(path, _HALF_MADE.fullmatch(path.name)) for path in found]
        return [path for path, m in matches if m and (m[1] is None or int(m[1]) < before)]

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
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, IsADirectoryError):  # cut off by a full disk or a lost machine
            return "interrupted"
        message = marker.get("message") if isinstance(marker, dict) else None
        return str(message or "interrupted")

    @contextmanager
    def exclusive_lock(
        self,
        name: str,
        doing: str,
        *,
        patience_s: float = 0,
        given_up: Callable[[], bool] = lambda: False,
    ) -> Iterator[None]:
        """Hold a lock of this directory, which is made if need be. It spares a second process
        its work; what it may write is decided by its attempt's number alone (`attempt.py`).

        Args:
            name: of the lock file.
            doing: what the holder does, as in "another process is ...".
            patience_s: a lock that a lost machine held lives on until its server notices.
            given_up: asked while waiting.

        Raises:
            RunDirError: somebody else holds it, or nothing can be written here.
            Interrupted: asked to stop while waiting.
        """
        file, made = self.path / name, self._make()
        deadline = time.monotonic() + patience_s
        try:
            while (lock := self._lock(file)) is None:
                said = f"another process is {_holder(file, doing)}"
                if time.monotonic() >= deadline:
                    raise RunDirError(
                        said,
                        where=str(self.path),
                        remedy="wait for it, or give this job a run.dir of its own",
                    )
                if given_up():
                    raise Interrupted(
                        f"interrupted while it waited: {said}",
                        where=str(self.path),
                        remedy="run the same command again",
                    )
                time.sleep(0.2)
        except OSError as error:
            raise self._unwritable(error) from error
        with lock:
            with suppress(OSError):  # for others to read; the disk may be full
                lock.truncate(0)
                owner = {"host": socket.gethostname(), "pid": os.getpid(), "doing": doing}
                lock.write(json.dumps(owner))
                lock.flush()
            try:
                yield
            finally:
                if not self.job_file.exists():  # nothing was claimed: leave no trace
                    with suppress(OSError):
                        file.unlink()
                        for folder in made:
                            folder.rmdir()

    def _make(self) -> list[Path]:
        """Make the directory; returns what was made, the innermost first."""
        made = [p for p in (self.path, *self.path.parents) if not os.path.lexists(p)]
        if self.path.exists() and not self.path.is_dir():
            raise RunDirError(
                "run.dir is a file", where=str(self.path), remedy="choose another run.dir"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        return made

    def _unwritable(self, error: OSError) -> SftJobError:
        place = error.filename or str(self.path)
        if isinstance(error, FileExistsError) and self.path.is_symlink():
            return RunDirError(
                f"a link to {os.readlink(self.path)}, which is not there",
                where=str(self.path),
                remedy="make that folder, or choose another run.dir",
            )
        known = translated(error)
        if known is not None and not isinstance(
            known, UserError
        ):  # the disk is full, or has a fault
            return known
        return RunDirError(
            f"cannot be written: {error.strerror}",
            where=str(place),
            remedy="choose a run.dir that this user may write to",
        )

    @staticmethod
    def _lock(file: Path) -> IO[str] | None:
        """The open file, locked; None while somebody else has it."""
        if file.is_dir() and (file.parent / "job.json").exists():
            put_aside(file)
        lock = open(file, "a+", encoding="utf-8")  # noqa: SIM115 (the caller closes it)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        except OSError as error:  # Lustre can be without locks
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                lock.close()
                raise
        try:
            same = os.path.samestat(os.fstat(lock.fileno()), os.stat(file))
        except FileNotFoundError:
            same = False
        if not same:  # its last holder has taken it away
            lock.close()
            return None
        return lock

    def refuse_foreign(self, config: JobConfig) -> None:
        """
        Raises:
            RunDirError: the directory holds something else than a run of this job.
        """
        if self.job_file.exists() or self.identity.exists():
            self._refuse_another_job(config)
            return
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._unwritable(error) from error
        foreign = sorted(name for name in names if not _OURS.fullmatch(name))
        if foreign and not self.job_file.exists():  # another may have claimed it meanwhile
            raise RunDirError(
                f"the folder is not empty and holds no job (there is {foreign[0]!r})",
                where=str(self.path),
                remedy="choose another run.dir, or empty the folder yourself",
            )

    def claim(self, config: JobConfig, text: str) -> None:
        """Make the directory this job's, or find that it already is.

        Args:
            text: the job file as given.

        Raises:
            RunDirError: it is not a directory, not writable, or holds something else.
        """
        self._make()
        self.refuse_foreign(config)
        try:
            # job.json first: it is what makes the folder this job's.
            if not create(self.job_file, stored(config)):
                self._refuse_another_job(config)
                self._mend(config)
            create(self.config_file, text)
        except OSError as error:
            raise self._unwritable(error) from error

    def _refuse_another_job(self, config: JobConfig) -> None:
        first, now = self._first_settings(), config.identity()
        if first == now:
            return  # whatever has become of job.json
        before = self._settings()
        if before == now and first is not None:  # somebody has edited job.json
            before = now | {key: first[key] for key in first.keys() & now.keys()}
        changed = [
            f"{key}: {before.get(key)!r} before, {now.get(key)!r} now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise RunDirError(
                "the directory belongs to a job with other settings:\n  " + "\n  ".join(changed),
                where=str(self.path),
                remedy="give the new job a run.dir of its own, or set these keys back to resume",
            )

    def _settings(self) -> dict[str, Any]:
        """What job.json says of the job (`JobConfig.identity`), or identity.json where that is
        gone or damaged."""
        try:
            text = self.job_file.read_text(encoding="utf-8")
            parse_json(text.encode())
        except (ValueError, OSError) as error:
            if (settings := self._first_settings()) is not None:
                return settings
            raise RunDirError(
                "job.json is damaged, so it cannot be told whose run this is",
                where=str(self.job_file),
                remedy=f"put it back ({self.config_file.name} is the job file as it was given), "
                "or give the job a run.dir of its own",
            ) from error
        try:
            return read_stored(text).identity()
        except ValueError as error:
            raise RunDirError(
                "job.json was not written by this version, so it cannot be told whose run this is",
                where=str(self.job_file),
                remedy="give the job a run.dir of its own",
            ) from error

    def _first_settings(self) -> dict[str, Any] | None:
        """What the first attempt wrote down; None where there is none, or it is damaged."""
        try:
            record = read_json(self.identity)
        except (OSError, ValueError):
            return None
        settings = record.get("settings") if seal.is_sealed(record) else None
        return settings if isinstance(settings, dict) else None

    def _mend(self, config: JobConfig) -> None:
        """Write job.json again where it is damaged; this job was found to be the same."""
        with suppress(ValueError, OSError):
            if read_stored(self.job_file.read_text(encoding="utf-8")).identity() == (
                config.identity()
            ):
                return
        put_aside(self.job_file)
        create(self.job_file, stored(config))


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


def _holder(lock: Path, doing: str) -> str:
    """What the holder of a lock does, who it is, and whether it can go on."""
    try:
        owner = read_json(lock)
        host, pid, doing = owner["host"], int(owner["pid"]), str(owner["doing"])
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError):  # just being written
        return doing
    said = f"{doing}: process {pid} on {host}"
    if host == socket.gethostname():
        with suppress(OSError, IndexError):
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
            if stat.rpartition(")")[2].split()[0] == "T":
                said += f", which is stopped (kill -CONT {pid} lets it go on)"
    return said
