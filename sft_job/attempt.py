"""One attempt at a job. Its number is claimed, and whatever it writes carries the number.

Two attempts can be alive at once: one was stopped together with its machine, its lock ran out,
the next one went on, and then it wakes up in the midst of anything. Looking before writing does
not help (it may sleep in between, and file servers answer from memory), so that nothing rests on
it: a number is had by making a folder, records go into files of that attempt alone, and what is
published is never replaced (`rundir.create`, `rundir.publish`). Looking only ends the older one
sooner.

Which records count is decided by those who read: of each attempt those up to the step from which
a later one resumed.

    attempts/1/metrics.jsonl    1 2 3 4 5 6        attempt 2 resumed after step 4
    attempts/2/metrics.jsonl            5 6 7      metrics.jsonl: 1 2 3 4 | 5 6 7
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from typing import Any

from sft_job.errors import RunDirError, SupersededError
from sft_job.files import append_line, make_folder, read_records, write_atomically
from sft_job.rundir import RunDir

# Record files that every attempt has one of, and the run directory one that is made from them.
METRICS, STARTS = "metrics.jsonl", "attempts.jsonl"
# No number of a record is greater: damaged ones may be infinite, or no float can hold them.
MOST = 1e18


class Attempt:
    """One attempt, from the point of view of its own processes."""

    def __init__(self, run_dir: RunDir, number: int) -> None:
        self.run_dir, self.number = run_dir, number
        self.folder = run_dir.attempt(number)

    @classmethod
    def claim(cls, run_dir: RunDir) -> Attempt:
        """The next attempt: whoever makes its folder has its number.

        Raises:
            RunDirError: the run directory cannot be written.
        """
        number = run_dir.newest_attempt() + 1
        while True:
            try:
                make_folder(run_dir.attempt(number).parent)
                run_dir.attempt(number).mkdir()
                break
            except FileExistsError:  # a listing may be older than the folder
                number += 1
            except OSError as error:
                raise RunDirError(
                    f"cannot be written: {error.strerror}",
                    where=str(run_dir.path),
                    remedy="free some space, or choose a run.dir that this user may write to",
                ) from error
        attempt = cls(run_dir, number)
        # Of a run that was removed; before anybody can know of this attempt, and ask it to stop.
        run_dir.stop_file(number).unlink(missing_ok=True)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        write_atomically(run_dir.owner(number), json.dumps(owner) + "\n")
        return attempt

    def superseded_by(self) -> int | None:
        """A later attempt, if there is one; file servers may tell of it late, or not at all for
        a while: nothing rests on it."""
        try:
            newest = self.run_dir.newest_attempt()
        except OSError:
            return None
        return newest if newest > self.number else None

    def refuse_if_superseded(self) -> None:
        """
        Raises:
            SupersededError: a later attempt runs this job now.
        """
        if (newest := self.superseded_by()) is not None:
            raise SupersededError(
                f"attempt {newest} runs this job now; this one, attempt {self.number}, ends",
                where=str(self.run_dir.path),
                remedy=f"nothing: look at attempt {newest}",
            )

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add a record to METRICS or STARTS; for people it is also put where they look.

        Raises:
            OSError: it cannot be written, as on a full disk.
        """
        line = json.dumps({"attempt": self.number, **record})
        append_line(self.folder / name, line)
        # That file is made anew by every attempt, and nothing of ours is read from it.
        with contextlib.suppress(OSError):
            if self.superseded_by() is None:
                append_line(self.run_dir.path / name, line)

    def interrupt(self, message: str) -> None:
        """Leave the mark that this attempt was stopped on request and can be resumed."""
        write_atomically(
            self.run_dir.interrupted(self.number), json.dumps({"message": message}) + "\n"
        )

    def cannot_load(self, step: int, reason: str, identity: str) -> None:
        """Leave the mark that a checkpoint fails to load: the next attempt passes it over."""
        mark = self.run_dir.unloadable_mark(self.number, step)
        write_atomically(mark, f"{' '.join(reason.split())}\n{identity}\n")


def metric_records(run_dir: RunDir) -> list[dict[str, Any]]:
    """The logged steps that count, in their order: each as it was done by the attempt whose
    result the later ones went on from."""
    records = _valid(_gather(run_dir, METRICS), {"step": int, "seconds": (int, float)})
    resumed = [
        (entry["attempt"], entry["resumed"])
        for entry in start_records(run_dir)
        if isinstance(entry.get("resumed"), int)
    ]
    return [
        record
        for record in records
        if all(record["step"] <= step for later, step in resumed if later > record["attempt"])
    ]


def start_records(run_dir: RunDir) -> list[dict[str, Any]]:
    """What every attempt wrote about its start, oldest first."""
    return _valid(_gather(run_dir, STARTS), {})


def refresh(run_dir: RunDir) -> None:
    """Make the record files for people anew, without what does not count any more."""
    for name, records in ((METRICS, metric_records(run_dir)), (STARTS, start_records(run_dir))):
        if records:
            text = "".join(json.dumps(record) + "\n" for record in records)
            write_atomically(run_dir.path / name, text)


def _gather(run_dir: RunDir, name: str) -> Iterable[dict[str, Any]]:
    """All records of a name, by attempt; those of attempts that have no folder (made by earlier
    versions) are in the common file."""
    numbers = run_dir.attempts()
    own = {n: run_dir.attempt(n) / name for n in numbers if run_dir.attempt(n).is_dir()}
    records = [
        record
        for record in read_records(run_dir.path / name)
        if record.get("attempt") in [n for n in numbers if n not in own]
    ]
    for number, file in own.items():
        records += [record | {"attempt": number} for record in read_records(file)]
    return records


def _valid(records: Iterable[dict[str, Any]], fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those with these fields; a damaged file may hold anything."""
    return [
        record
        for record in records
        if all(
            isinstance(record.get(key), kind) and abs(record[key]) < MOST
            for key, kind in fields.items()
        )
    ]
