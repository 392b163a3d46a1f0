"""A submitted job from outside: where it is, its output, its end.

Files first, Slurm where it knows. Nothing here needs accounting: a job that Slurm has forgotten
has left its marks in the run directory.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sft_job import slurm
from sft_job.errors import EXIT_INTERRUPTED, RunDirError, SlurmError
from sft_job.files import read_json, read_records
from sft_job.rundir import RunDir

COMMANDS = ("status", "logs", "cancel")
ALIVE = {
    "PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED",
    "SPECIAL_EXIT", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING",
}  # fmt: skip
# The end, or the moment before Slurm puts the job back into the queue.
UNSURE = {"NODE_FAIL", "PREEMPTED"}
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
    if not run_dir.job_file.exists():
        raise RunDirError("no job in this folder", where=str(run_dir.path))
    if args.command == "status":
        print("\n".join(status(run_dir)))
        return 0
    if args.command == "logs":
        return logs(run_dir, to_the_end=args.follow)
    return cancel(run_dir)


def submissions(run_dir: RunDir) -> list[dict[str, Any]]:
    """One record for each job; a job that starts at once may have written itself down as well."""
    return list({record["job"]: record for record in read_records(run_dir.submissions)}.values())


def known_state(submission: dict[str, Any]) -> str | None:
    """What the batch system says of a submission; None when it does not know it any more."""
    if submission["cluster"] == "slurm":
        return slurm.state(submission["job"])
    return slurm.local_state(submission["job"], submission["time"])


def asked(run_dir: RunDir) -> list[tuple[dict[str, Any], str | None]]:
    """The newest submissions with what is known of each; in the order of submission."""
    return [(record, known_state(record)) for record in submissions(run_dir)[-NEWEST:]]


def live(run_dir: RunDir) -> list[tuple[dict[str, Any], str]]:
    """Those of them that are, or may come back."""
    return [(record, state) for record, state in asked(run_dir) if state in ALIVE | UNSURE]


def attempts(run_dir: RunDir) -> int:
    return run_dir.newest_attempt()


def job_state(run_dir: RunDir) -> str:
    """One word: of the marks in the run directory, else of Slurm."""
    return "DONE" if run_dir.done.exists() else observed(run_dir)[0]


def observed(run_dir: RunDir) -> tuple[str, str | None, dict[str, Any] | None]:
    """The state in one word, what the batch system says, and the submission of which it is: the
    one that runs, else the one that waits, else the last."""
    # Asked before looking at the marks: a job that ends between the two has left them.
    found = asked(run_dir)
    there = sorted(
        (job for job in found if job[1] in ALIVE | UNSURE),
        key=lambda job: (job[1] in UNSURE, job[1] in WAITING),
    )
    chosen = there[:1] or found[-1:]
    last, known = chosen[0] if chosen else (None, None)
    if run_dir.done.exists():
        return "DONE", known, last
    if last is None:
        stopped = run_dir.interruption(attempts(run_dir)) is not None
        return "INTERRUPTED" if stopped else "NOT SUBMITTED", None, None
    if known in ALIVE:
        return str(known), known, last
    attempt = attempts(run_dir)
    if attempt and run_dir.cause(attempt).exists():
        return "FAILED", known, last
    if run_dir.interruption(attempt) is not None:
        return "INTERRUPTED", known, last
    if known is None and last["cluster"] == "slurm":
        known = slurm.ending(last["job"])
    return known or "UNKNOWN", known, last


def time_used(run_dir: RunDir) -> float:
    """Seconds from the beginning of each attempt to the last word of its rank 0."""
    return sum(
        max(0.0, run_dir.log(entry["attempt"], 0).stat().st_mtime - float(entry["began"]))
        for entry in read_records(run_dir.attempts_file)
        if "began" in entry and run_dir.log(entry["attempt"], 0).exists()
    )


def status(run_dir: RunDir) -> Iterator[str]:
    """What a user wants to know, a line each."""
    attempt = attempts(run_dir)
    try:
        state, _, last = observed(run_dir)
    except SlurmError as error:  # the files tell most of it
        records = submissions(run_dir)
        last = records[-1] if records else None
        state = "DONE" if run_dir.done.exists() else f"not known: {error.what}"
    job = f", job {last['job']} ({last['via']})" if last else ""
    yield f"state        {state}{job}"
    used = time_used(run_dir)
    yield f"attempts     {attempt}{f', {_duration(used)} in all' if used else ''}"
    records = read_records(run_dir.metrics_file)
    if records:
        newest = records[-1]
        plan = read_json(run_dir.plan_file) if run_dir.plan_file.exists() else {}
        steps = plan.get("steps")
        yield f"step         {newest['step']}{f' of {steps}' if steps else ''}"
        yield (
            f"speed        {newest['tokens_per_second']:,.0f} tokens/s, "
            f"{newest['seconds_per_step']:.2f} s a step, loss {newest['loss']:.4f}"
        )
        if steps and state == "RUNNING":
            yield f"time left    {_duration((steps - newest['step']) * newest['seconds_per_step'])}"
    saved = [
        s for s in run_dir.checkpoint_steps() if (run_dir.checkpoint(s) / "manifest.json").exists()
    ]
    yield f"checkpoint   {run_dir.checkpoint(saved[0]) if saved else 'none yet'}"
    yield f"logs         {run_dir.logs(attempt) if attempt else 'none yet'}"
    reason = run_dir.interruption(attempt)
    if reason is not None and state != "DONE":
        yield f"interrupted  {reason}"
    if attempt and run_dir.cause(attempt).exists():
        first, *rest = run_dir.cause(attempt).read_text(errors="replace").splitlines() or [""]
        yield f"failed       {first.removeprefix('error: ')}"
        yield from (f"             {line}" for line in rest)
    if run_dir.done.exists():
        yield f"model        {run_dir.model}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def logs(run_dir: RunDir, *, to_the_end: bool) -> int:
    """Print the job script's output and that of rank 0, attempt by attempt."""
    shown: dict[Path, int] = {}
    ends = _states(run_dir)
    for second in itertools.count():
        over = not to_the_end or (second % ASK_S == 0 and next(ends) is not None)
        files = sorted(run_dir.path.glob("slurm-*.log"), key=lambda f: f.stat().st_mtime)
        for number in range(1, attempts(run_dir) + 1):
            files += [f for f in (run_dir.log(number, 0),) if f.exists()]
        for file in files:
            with open(file, "rb") as handle:
                handle.seek(shown.get(file, 0))
                content = handle.read()
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


def cancel(run_dir: RunDir) -> int:
    """A running job saves itself and ends; one that waits leaves the queue."""
    found = live(run_dir)
    if not found:
        print(f"nothing to cancel: {job_state(run_dir)}")
        return 0
    # The marker first: an attempt that begins just now looks for it alone. The job script looks
    # for the stop file, and wakes the ranks as soon as they can be.
    run_dir.cancelled.touch()
    for record, state in reversed(found):  # those that wait for another before it ends
        job = record["job"]
        if state in UNSURE:
            print(f"job {job} is {state}: should Slurm put it back, it ends at once")
        elif state in WAITING:
            slurm.ask("scancel", job)
            print(f"job {job} was {state}; it is out of the queue")
        else:
            run_dir.stop_file(attempts(run_dir)).write_text("cancelled by the user\n")
            print(f"job {job} saves a checkpoint and ends; sft-job submit status {run_dir.path}")
    return 0


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
        if state in ALIVE or known in ALIVE:
            unsure_since = None
        elif known not in UNSURE or state == "DONE":
            ended = state
        else:  # such a job is in no queue for some seconds, then in it again
            unsure_since = unsure_since or time.monotonic()
            if time.monotonic() - unsure_since > LOST_S:
                ended = state
        yield ended
