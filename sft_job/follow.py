"""A submitted job from outside: where it is, its output, its end.

Files first, Slurm where it knows. Nothing here needs accounting: a job that Slurm has forgotten
has left its marks in the run directory.
"""

from __future__ import annotations

import argparse
import itertools
import re
import socket
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sft_job import slurm
from sft_job.attempt import MOST, metric_records, start_records
from sft_job.errors import EXIT_INTERRUPTED, RunDirError, SlurmError
from sft_job.files import read_json, read_records
from sft_job.rundir import RunDir

COMMANDS = ("status", "logs", "cancel")
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"}
NEWEST = 10  # submissions that Slurm is asked about; those before have ended
ASK_S = 5  # between two questions to Slurm, whose controller serves everybody
LOST_S = 120.0
SILENT_S = 900.0  # how long a controller may be away, as while it is restarted


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="sft-job submit", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="state, attempt, step, speed, what is left")
    commands.add_parser("logs", help="the output").add_argument(
        "-f", "--follow", action="store_true", help="until the job ends"
    )
    commands.add_parser("cancel", help="save a checkpoint, then end the job")
    for command in commands.choices.values():
        command.add_argument("run_dir", type=Path, metavar="RUN_DIR")
        command.add_argument("--debug", action="store_true", help="show the traceback of any error")
    args = parser.parse_args(argv)
    run_dir = RunDir(args.run_dir.absolute())
    try:
        _refuse_no_run(run_dir)
        if args.command == "status":
            print("\n".join(status(run_dir)))
            return 0
        if args.command == "logs":
            return logs(run_dir, to_the_end=args.follow)
        return cancel(run_dir)
    except BrokenPipeError:
        raise
    except OSError as error:
        write = args.command == "cancel"
        raise RunDirError(
            f"cannot be {'written' if write else 'read'}: {error.strerror or error}",
            where=str(error.filename or run_dir.path),
            remedy="call it as the user who has submitted the job",
        ) from error


def _refuse_no_run(run_dir: RunDir) -> None:
    """
    Raises:
        RunDirError: there is no run, and what is there instead.
        OSError: nobody may look.
    """
    if not stat.S_ISDIR(run_dir.path.stat().st_mode):
        raise RunDirError("not a run directory, but a file", where=str(run_dir.path))
    try:
        run_dir.job_file.stat()
    except FileNotFoundError as error:
        raise RunDirError(
            "no job in this folder",
            where=str(run_dir.path),
            remedy="give the run.dir of the job, with which it was submitted or started",
        ) from error


def submissions(run_dir: RunDir) -> list[dict[str, Any]]:
    """One record for each job; a job that starts at once may have written itself down as well.
    Whatever else is in the file is left out."""
    found: dict[str, dict[str, Any]] = {}
    for record in read_records(run_dir.submissions):
        kinds: dict[str, Any] = {"job": str, "via": str, "cluster": str, "time": (int, float)}
        whole = all(isinstance(record.get(key), kind) for key, kind in kinds.items())
        if whole and re.fullmatch(r"[0-9]+(_[0-9]+)?", record["job"]):
            found[record["job"]] = found.get(record["job"], {}) | record
    return list(found.values())


def known_state(submission: dict[str, Any]) -> str | None:
    """What the batch system says of a submission; None when it does not know it any more.

    Raises:
        SlurmError: it does not say.
    """
    if submission["cluster"] == "slurm":
        return slurm.state(submission["job"], _cluster(submission))
    return slurm.local_state(submission["job"], submission["time"])


def _cluster(submission: dict[str, Any]) -> str:
    """Of several that are joined, the one that has the job."""
    return str(submission.get("of") or slurm.HERE)


def asked(run_dir: RunDir) -> list[tuple[dict[str, Any], str | None]]:
    """The newest submissions with what is known of each; in the order of submission."""
    return [(record, known_state(record)) for record in submissions(run_dir)[-NEWEST:]]


def live(run_dir: RunDir) -> list[tuple[dict[str, Any], str]]:
    """Those of them that are, or may come back.

    Raises:
        SlurmError: of one of them that is not known.
    """
    there = slurm.ALIVE | slurm.UNSURE
    return [(record, state) for record, state in asked(run_dir) if state in there]


def attempts(run_dir: RunDir) -> int:
    return run_dir.newest_attempt()


def by_hand(run_dir: RunDir) -> tuple[str, str] | None:
    """(state, process and machine) of the newest attempt, if `sft-job train` has started it on a
    machine; None where it was Slurm, or nobody."""
    try:
        owner = read_json(run_dir.owner(attempts(run_dir)))
    except (OSError, ValueError):
        return None
    if not isinstance(owner, dict) or "job" in owner:
        return None
    host, pid, began = owner.get("host"), owner.get("pid"), owner.get("time")
    if not isinstance(pid, int) or not isinstance(began, (int, float)):
        return None
    if host != socket.gethostname():
        state = "UNKNOWN"
    else:
        state = slurm.local_state(str(pid), began) or "ENDED"
    return state, f"process {pid} on {host}"


def job_state(run_dir: RunDir) -> str:
    """One word: of the marks in the run directory, else of Slurm."""
    return "DONE" if run_dir.done.exists() else observed(run_dir)[0]


def observed(run_dir: RunDir) -> tuple[str, str | None, dict[str, Any] | None]:
    """The state in one word, what the batch system says, and the submission of which it is: the
    one that runs, else the one that waits, else the last."""
    # Asked before looking at the marks: a job that ends between the two has left them.
    found = asked(run_dir)
    there = sorted(
        (job for job in found if job[1] in slurm.ALIVE | slurm.UNSURE),
        key=lambda job: (job[1] in slurm.UNSURE, job[1] in WAITING),
    )
    chosen = there[:1] or found[-1:]
    last, known = chosen[0] if chosen else (None, None)
    if run_dir.done.exists():
        return "DONE", known, last
    if known in slurm.ALIVE:
        return str(known), known, last
    attempt, here = attempts(run_dir), by_hand(run_dir)
    if here is not None and here[0] == "RUNNING":
        return "RUNNING", known, last
    if attempt and run_dir.cause(attempt).exists():
        return "FAILED", known, last
    if run_dir.interruption(attempt) is not None:
        return "INTERRUPTED", known, last
    if last is None:
        return here[0] if here else "NOT SUBMITTED", None, None
    if known is None and last["cluster"] == "slurm":
        known = slurm.ending(last["job"], _cluster(last))
    return known or "UNKNOWN", known, last


def time_used(run_dir: RunDir) -> float:
    """Seconds from the beginning of each attempt to the last word of its rank 0."""
    used = 0.0
    for entry in start_records(run_dir):
        log = run_dir.log(entry["attempt"], 0)
        if _is_number(entry.get("began")) and log.exists():
            used += max(0.0, log.stat().st_mtime - float(entry["began"]))
    return used


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < MOST  # not NaN either


def status(run_dir: RunDir) -> Iterator[str]:
    """What a user wants to know, a line each; whatever is damaged is left out."""
    attempt = attempts(run_dir)
    try:
        state, known, last = observed(run_dir)
    except SlurmError as error:  # the files tell most of it
        records, known = submissions(run_dir), None
        last = records[-1] if records else None
        state = "DONE" if run_dir.done.exists() else f"not known: {error.what}"
    here = by_hand(run_dir)
    job = f", job {last['job']} ({last['via']})" if last else ""
    if here is not None and (last is None or (here[0] == "RUNNING" and known is None)):
        job = f", {here[1]}"
    yield f"state        {state}{job}"
    used = time_used(run_dir)
    yield f"attempts     {attempt}{f', {_duration(used)} in all' if used else ''}"
    yield from _progress(run_dir, state)
    saved = [
        s for s in run_dir.checkpoint_steps() if (run_dir.checkpoint(s) / "manifest.json").exists()
    ]
    yield f"checkpoint   {run_dir.checkpoint(saved[0]) if saved else 'none yet'}"
    yield f"logs         {run_dir.logs(attempt) if attempt else 'none yet'}"
    reason = run_dir.interruption(attempt)
    if reason is not None and state != "DONE":
        yield f"interrupted  {reason}"
    if attempt and run_dir.cause(attempt).is_file() and state != "DONE":
        first, *rest = run_dir.cause(attempt).read_text(errors="replace").splitlines() or [""]
        yield f"failed       {first.removeprefix('error: ')}"
        yield from (f"             {line}" for line in rest)
    if run_dir.done.exists():
        yield f"model        {run_dir.model}"


def _progress(run_dir: RunDir, state: str) -> Iterator[str]:
    records = metric_records(run_dir)
    if not records:
        return
    newest = records[-1]
    try:
        steps = read_json(run_dir.plan_file)["steps"]
    except (OSError, ValueError, LookupError, TypeError):
        steps = None
    if not isinstance(steps, int):
        steps = None
    yield f"step         {newest['step']}{f' of {steps}' if steps else ''}"
    speed, seconds, loss = (
        newest.get(key) for key in ("tokens_per_second", "seconds_per_step", "loss")
    )
    if _is_number(speed) and _is_number(seconds) and isinstance(loss, (int, float)):
        yield f"speed        {speed:,.0f} tokens/s, {seconds:.2f} s a step, loss {loss:.4f}"
    if steps and _is_number(seconds) and state == "RUNNING":
        yield f"time left    {_duration((steps - newest['step']) * seconds)}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def logs(run_dir: RunDir, *, to_the_end: bool) -> int:
    """Print the job script's output and that of rank 0, attempt by attempt."""
    shown: dict[Path, int] = {}
    ends = _states(run_dir)
    for second in itertools.count():
        over = not to_the_end or (second % ASK_S == 0 and next(ends) is not None)
        files = sorted(run_dir.path.glob("slurm-*.log"), key=_written)
        files += [run_dir.log(number, 0) for number in run_dir.attempts()]
        for file in files:
            try:
                with open(file, "rb") as handle:
                    handle.seek(shown.get(file, 0))
                    content = handle.read()
            except FileNotFoundError:
                continue
            if content:
                if file not in shown:
                    print(f"--- {file}")
                shown[file] = shown.get(file, 0) + len(content)
                sys.stdout.write(content.decode(errors="replace"))
                sys.stdout.flush()
        if over:
            break
        time.sleep(1)
    return 0


def _written(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def cancel(run_dir: RunDir) -> int:
    """A running job saves itself and ends; one that waits leaves the queue."""
    try:
        found = live(run_dir)
    except SlurmError as error:
        # Whether it runs or waits: it looks for the marks.
        run_dir.cancelled.touch()
        _ask_to_stop(run_dir)
        print(f"Slurm does not say what the job does: {error}\n"
              "marked as cancelled: running, it saves a checkpoint and ends; waiting, it ends when "
              "it begins")  # fmt: skip
        return 0
    here = by_hand(run_dir)
    if not found and here is not None and here[0] == "RUNNING":
        _ask_to_stop(run_dir)
        print(f"{here[1]} saves a checkpoint and ends")
        return 0
    if not found:
        print(f"nothing to cancel: {job_state(run_dir)}")
        return 0
    # The marker first: an attempt that begins just now looks for it alone. The job script looks
    # for the stop file, and wakes the ranks as soon as they can be.
    run_dir.cancelled.touch()
    for record, state in reversed(found):  # those that wait for another before it ends
        job = record["job"]
        if state in slurm.UNSURE:
            print(f"job {job} is {state}: should Slurm put it back, it ends at once")
        elif state in WAITING:
            slurm.ask("scancel", job, cluster=_cluster(record))
            print(f"job {job} was {state}; it is out of the queue")
        else:
            _ask_to_stop(run_dir)
            print(f"job {job} saves a checkpoint and ends; sft-job submit status {run_dir.path}")
    return 0


def _ask_to_stop(run_dir: RunDir) -> None:
    if attempt := attempts(run_dir):
        run_dir.stop_file(attempt).write_text("cancelled by the user\n")


def wait(run_dir: RunDir) -> int:
    """Return when the job has ended, for Slurm too: 0 done, 75 interrupted, 1 failed."""
    for state in _states(run_dir):
        if state is not None:
            break
        time.sleep(ASK_S)
    print("\n".join(status(run_dir)))
    return {"DONE": 0, "INTERRUPTED": EXIT_INTERRUPTED}.get(str(state), 1)


def _states(run_dir: RunDir) -> Iterator[str | None]:
    """At each call: None while the job lives; its last state when it has ended, for good.

    Raises:
        SlurmError: nothing has been heard of the controller for a quarter of an hour.
    """
    unsure_since = silent_since = None
    while True:
        ended = None
        try:
            state, known, _ = observed(run_dir)
        except SlurmError as error:
            if silent_since is None:
                print(f"Slurm is not heard: {error}; asked again", file=sys.stderr)
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > SILENT_S:
                raise
            yield None
            continue
        silent_since = None
        if state in slurm.ALIVE or known in slurm.ALIVE:
            unsure_since = None
        elif known not in slurm.UNSURE or state == "DONE":
            ended = state
        else:  # such a job is in no queue for some seconds, then in it again
            unsure_since = unsure_since or time.monotonic()
            if time.monotonic() - unsure_since > LOST_S:
                ended = state
        yield ended
