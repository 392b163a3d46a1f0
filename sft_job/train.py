"""`sft-job train job.yaml`: fine-tune a model on conversations.

Without RANK or SLURM step variables this process is the launcher: it imports no torch, makes
everything ready, starts one worker per GPU and passes signals on. With them it is a worker.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from sft_job import cli, hardware, start
from sft_job.attempt import Attempt
from sft_job.cli import StopRequest
from sft_job.config import load
from sft_job.errors import ConfigError, Interrupted, SftJobError, WorkerError
from sft_job.files import make_folder
from sft_job.launcher import Workers
from sft_job.place import find_place
from sft_job.plan import processes
from sft_job.rundir import RunDir


def main(argv: Sequence[str]) -> int:
    parser = cli.job_parser("train", "Fine-tune a model on conversations, as the job file says.")
    args = parser.parse_intermixed_args(argv)
    cli.output_is_not_essential()
    place = find_place(os.environ)
    if place is not None:
        from sft_job import worker

        return worker.work(args.job, args.overrides, place)
    return launch(args.job, args.overrides, argv)


def launch(job: Path, overrides: Sequence[str], argv: Sequence[str]) -> int:
    """Make ready, start the workers, wait for them; returns the exit code."""
    stop = StopRequest()
    stop.listen()
    try:
        config = load(job, overrides)
    except ConfigError as error:
        if _was_done(job, overrides):
            return 0
        raise error
    machine = hardware.detect_for_training()  # before an hour of tokenising
    with ExitStack() as held:
        if not start.enter(held, config, job, overrides, machine, stop):
            return 0
        while not _attempt(RunDir(config.run.dir), processes(config, machine), argv, stop):
            pass
    return 0


def _was_done(job: Path, overrides: Sequence[str]) -> bool:
    """Whether only the files are gone that a finished run was made from."""
    try:
        config = load(job, overrides, without_files=True)
    except ConfigError:
        return False
    run_dir = RunDir(config.run.dir)
    if not run_dir.done.exists():
        return False
    run_dir.refuse_foreign(config)
    return start.is_done(run_dir)


def _attempt(run_dir: RunDir, count: int, argv: Sequence[str], stop: StopRequest) -> bool:
    """One attempt with all workers; returns whether the job is done with it.

    False: a checkpoint could not be loaded. The next attempt passes it over.

    Raises:
        Interrupted: it was stopped.
        SftJobError: it failed.
    """
    attempt = Attempt.claim(run_dir)
    number = attempt.number
    try:
        make_folder(run_dir.logs(number).parent)
        make_folder(run_dir.logs(number))
        crew = Workers(run_dir, number, count)
        crew.start(argv)
        crew.wait(stop)
        if (message := run_dir.interruption(number)) is not None:
            raise Interrupted(message)
        if not run_dir.done.exists():
            raise WorkerError(
                "all workers ended, but the job is not done",
                where=str(run_dir.path),
                remedy=f"look into {run_dir.logs(number)}",
            )
    except Interrupted as error:
        if run_dir.interruption(number) is None:
            with contextlib.suppress(OSError):  # the exit code says it too; the disk may be full
                attempt.interrupt(error.what)
        raise _interrupted(run_dir, error.what) from error
    except SftJobError as error:
        # The marks are the last that ranks write: what fails after them has lost nothing.
        if run_dir.done.exists():
            return True
        if (message := run_dir.interruption(number)) is not None:
            raise _interrupted(run_dir, message) from error
        attempt.refuse_if_superseded()
        if unloadable := sorted(attempt.folder.glob("unloadable-*")):
            reason = unloadable[0].read_text(errors="replace").partition("\n")[0]
            step = int(unloadable[0].name.rpartition("-")[2])
            print(
                f"note: the checkpoint of step {step} could not be loaded ({reason}); "
                "going on without it",
                file=sys.stderr,
            )
            return False
        with contextlib.suppress(OSError):  # shown by `sft-job submit status`; the disk may be full
            run_dir.cause(number).write_text(f"error: {error}\n", encoding="utf-8")
        raise
    return True


def _interrupted(run_dir: RunDir, what: str) -> Interrupted:
    return Interrupted(what, where=str(run_dir.path), remedy="run the same command again to go on")


if __name__ == "__main__":
    sys.exit(cli.run(main))
