"""The edge that all entry points share: arguments, errors as messages, requests to stop."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from sft_job import __version__
from sft_job.errors import SftJobError

COMMANDS = {
    "train": "run a job: fine-tune, checkpoint, resume, export",
    "submit": "check a job and put it into a SLURM queue; follow it",
    "plan": "show what a job will do, without doing it",
    "data": "check, encode and look at conversations",
    "chat": "talk to a run's model, or to any model",
}

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def job_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser for `COMMAND job.yaml [key=value ...] [--debug]`."""
    parser = argparse.ArgumentParser(prog=f"sft-job {command}", description=description)
    add_job_arguments(parser)
    return parser


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", type=Path, metavar="job.yaml", help="the job file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. train.learning_rate=1e-5"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of any error")


def run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Call an entry point; turn an SftJobError into its message and exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in argv
    try:
        return main(argv) or 0
    except SftJobError as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def main(argv: Sequence[str] | None = None) -> int:
    """`sft-job COMMAND ...`, the same as `python -m sft_job.COMMAND ...`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in COMMANDS:
        return run(importlib.import_module(f"sft_job.{argv[0]}").main, argv[1:])
    if argv in (["--version"], ["-V"]):
        print(f"sft-job {__version__}")
        return 0
    lines = [f"  {name:<8} {text}" for name, text in COMMANDS.items()]
    usage = "usage: sft-job COMMAND [arguments]   (sft-job COMMAND --help)\n\n" + "\n".join(lines)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return 0
    print(f"error: unknown command {argv[0]!r}\n\n{usage}", file=sys.stderr)
    return 2


class StopRequest:
    """Remembers that this process was asked to stop, by a signal or by a file.

    A handler only sets a flag: work is stopped at places where all ranks can agree and save.
    Asking again changes nothing.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file  # looked for besides the signals
        self.reason: str | None = None
        self.signal = signal.SIGTERM

    def listen(self) -> None:
        """Install the handlers, then let through what the starting process held back."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason is None:
            self.signal = signal.Signals(number)
            self.reason = f"signal {self.signal.name}"

    def __bool__(self) -> bool:
        if self.reason is None and self.file is not None and self.file.exists():
            self.reason = self.file.read_text().strip() or f"stop file {self.file.name}"
        return self.reason is not None
