"""The edge that all entry points share: arguments, errors as messages, requests to stop."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from sft_job import __version__
from sft_job.errors import Interrupted, SftJobError
from sft_job.files import translated

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
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # the edge of the program: whatever it is, it is said in a sentence
        if debug:
            raise
        known = translated(error) if isinstance(error, OSError) else None
        said = known or SftJobError(unexpected(error), remedy=UNEXPECTED_REMEDY)
        print(f"error: {said}", file=sys.stderr)
        return said.exit_code


UNEXPECTED_REMEDY = "a fault of sft_job: run the same with --debug, and report what it prints"


def unexpected(error: BaseException) -> str:
    """An error that nobody has foreseen, in one line, with the place in this package."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).parent == Path(__file__).parent]
    place = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
    said = " ".join(str(error).split())
    return f"unexpected {type(error).__name__}: {said[:500]}{place}".replace(": (", " (")


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
    Asking again changes nothing here; `times` counts.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file  # looked for besides the signals
        self.reason: str | None = None
        self.signal = signal.SIGTERM
        self.times = 0

    def listen(self) -> None:
        """Install the handlers, then let through what the starting process held back.

        A terminal that is closed (SIGHUP) asks for nothing: output is lost, the job goes on.
        """
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.times += 1
        if self.reason is None:
            self.signal = signal.Signals(number)
            self.reason = f"signal {self.signal.name}"

    def request(self, reason: str) -> None:
        """Ask for the same from inside."""
        self.reason = self.reason or reason

    def requested(self) -> bool:
        # Not Path.exists: a file server that fails for a moment is no reason to fail.
        if self.reason is None and self.file is not None and os.path.exists(self.file):
            said = ""
            with contextlib.suppress(OSError):
                said = self.file.read_text(encoding="utf-8", errors="replace").strip()
            self.reason = said or f"stop file {self.file.name}"
        return self.reason is not None


def stop_at_once() -> None:
    """From here on a request to stop ends this process by an exception: what is half made is
    cleared away, and there is nothing that all ranks would have to agree on."""

    def handle(number: int, frame: FrameType | None) -> None:
        for other in STOP_SIGNALS:  # once is enough
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(
            f"interrupted by signal {signal.Signals(number).name}",
            remedy="run the same command again",
        )

    for number in STOP_SIGNALS:
        signal.signal(number, handle)


class BestEffort(io.TextIOBase):
    """A text stream whose loss ends nothing: nobody may be there any more to read it, or the disk
    under a log may be full. What cannot be written is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except ValueError:  # closed
            pass
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # the reader, or the terminal, has gone
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def isatty(self) -> bool:
        return not self._stream.closed and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @property
    def buffer(self) -> Any:
        return self._stream.buffer


def output_is_not_essential() -> None:
    """From here on standard output and error may fail: what this process does is more important
    than who looks at it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before the start
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if not isinstance(stream, BestEffort):
            setattr(sys, name, BestEffort(stream))
