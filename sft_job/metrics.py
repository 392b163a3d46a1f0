"""One record per logged step: to metrics.jsonl, and to people.

    {"step": 12, "loss": 1.5, "learning_rate": 2e-05, "grad_norm": 0.8, "tokens": 9216, ...}

Figures are of the steps since the record before, over all ranks unless said otherwise:

    tokens, supervised_tokens       in the steps; *_per_second over their wall time
    seconds, seconds_per_step       wall time, and its mean
    mfu                             needed operations (flops.needed) / (time x peak of all
                                    devices); null on hardware whose peak is not known
    idle_share                      of the ranks' time, spent waiting for the heaviest rank of each
                                    micro-batch: by the tokens and the attention that each rank had
    data_wait_share                 of the time, spent waiting for the next batch; of rank 0
    peak_memory_gib                 so far, of the rank that uses most
    goodput                         time of all steps that count / time since the first attempt
                                    began: what was lost to starting, saving, stopping and redoing
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import torch
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sft_job.attempt import METRICS
from sft_job.cli import BestEffort
from sft_job.errors import UserError
from sft_job.flops import Work

if TYPE_CHECKING:
    from transformers import TrainerCallback


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process has held: on its GPU, or its resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


@dataclass
class Meter:
    """Adds up what the steps between two records did.

    Args:
        operations: needed operations of some work (`flops.needed` for the model).
        peak_flops: operations per second of all devices together; None where unknown.
        useful_before: seconds of the steps of earlier attempts that still count.
        began: when the first attempt began (seconds since the epoch).
    """

    operations: Callable[[Work], float]
    peak_flops: float | None
    useful_before: float
    began: float

    def __post_init__(self) -> None:
        self._useful = self.useful_before
        self.reset()

    def reset(self) -> None:
        """Begin anew; the time so far belongs to no step."""
        self._tokens = self._supervised = self._steps = 0
        self._squares = self._idle = self._waited = 0.0
        self._since = time.perf_counter()

    def add(self, tokens: int, squares: int, supervised: int, idle_share: float) -> None:
        """One step: its tokens, sum of squared sample lengths, supervised tokens."""
        self._tokens += tokens
        self._squares += squares
        self._supervised += supervised
        self._idle += idle_share
        self._steps += 1

    def wait(self, seconds: float) -> None:
        """Time that this rank waited for a batch."""
        self._waited += seconds

    def take(self) -> dict[str, float | None]:
        """The figures since the last call."""
        seconds = time.perf_counter() - self._since
        steps = max(self._steps, 1)
        self._useful += seconds
        mfu = None
        if self.peak_flops is not None:
            work = Work(self._tokens, self._squares, self._supervised)
            mfu = round(self.operations(work) / (seconds * self.peak_flops), 4)
        figures: dict[str, float | None] = {
            "tokens": self._tokens,
            "supervised_tokens": self._supervised,
            "tokens_per_second": round(self._tokens / seconds, 1),
            "supervised_tokens_per_second": round(self._supervised / seconds, 1),
            "seconds": round(seconds, 4),
            "seconds_per_step": round(seconds / steps, 4),
            "mfu": mfu,
            "idle_share": round(self._idle / steps, 4),
            "data_wait_share": round(self._waited / seconds, 4),
            "goodput": round(self._useful / max(time.time() - self.began, seconds), 4),
        }
        self.reset()
        return figures


def useful_seconds(records: Iterable[Mapping[str, Any]], done: int) -> float:
    """Time of the steps that count: those up to `done`, each as it was done last.

    Args:
        records: of metrics.jsonl, in their order.
        done: steps in the checkpoint that is resumed; later ones are done again.
    """
    latest = {record["step"]: record["seconds"] for record in records if record["step"] <= done}
    return float(sum(latest.values()))


Append = Callable[[str, Mapping[str, Any]], None]


class Reporter:
    """Shows progress: a bar on a terminal, plain lines in a log. On the main rank only."""

    def __init__(self, terminal: IO[str], log: Path | None, append: Append) -> None:
        """
        Args:
            terminal: where people look; a bar is drawn if it is one.
            log: gets every line as well.
            append: adds a record to a record file of the attempt (`Attempt.append`).
        """
        self._console = RichConsole(file=terminal, highlight=False, soft_wrap=True)
        self._log = log
        self._append = append
        self._unwritten: list[tuple[str, Mapping[str, Any]]] = []
        self._bar: Progress | None = None

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)
        if self._log is not None:
            # A log on a full disk is no reason to end a training.
            with contextlib.suppress(OSError), open(self._log, "a", encoding="utf-8") as file:
                file.write(text + "\n")

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add a record; while the disk is full it is kept, and written with a later one."""
        first = not self._unwritten
        self._unwritten.append((name, record))
        try:
            while self._unwritten:
                self._append(*self._unwritten[0])
                del self._unwritten[0]
        except OSError as error:
            if first:
                self.say(
                    f"note: records cannot be written ({error.strerror}); kept and tried again"
                )

    def start(self, done: int, steps: int) -> None:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
            )
            self._bar.add_task("", total=steps, completed=done, figures="")
            self._bar.start()

    def record(self, record: dict[str, Any], steps: int) -> None:
        self.append(METRICS, record)
        norm = record["grad_norm"]
        figures = (
            f"loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}  "
            f"grad_norm {f'{norm:.3f}' if norm is not None else 'overflow'}  "
            f"{record['tokens_per_second']:,.0f} tok/s"
        )
        if record["mfu"] is not None:
            figures += f"  MFU {record['mfu']:.0%}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=record["step"], figures=figures)
            return
        left = (steps - record["step"]) * record["seconds_per_step"]
        self.say(f"step {record['step']}/{steps}  {figures}  {_minutes(left)} left")

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._unwritten:
            self.say(f"note: {len(self._unwritten)} records were never written: the disk is full")
            self._unwritten.clear()


class Silence(Reporter):
    """The reporter of the other ranks: what they would say is said by the main one."""

    def __init__(self) -> None:
        pass

    def say(self, text: str) -> None: ...

    def append(self, name: str, record: Mapping[str, Any]) -> None: ...

    def start(self, done: int, steps: int) -> None: ...

    def record(self, record: dict[str, Any], steps: int) -> None: ...

    def stop(self) -> None: ...


class Tracker:
    """A callback of `transformers.integrations`. It must begin, or the job does not; after that it
    is not essential: what a full disk or a server that is away make of it ends its reports alone.

    Args:
        say: takes one line for people.
    """

    def __init__(self, callback: TrainerCallback, say: Callable[[str], None]) -> None:
        self.callback, self.say = callback, say
        self.ended = False

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.callback, name)
        return functools.partial(self._call, name, method) if name.startswith("on_") else method

    def _call(self, event: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.ended:
            return None
        try:
            return method(*args, **kwargs)
        except Exception as error:  # each tracker raises kinds of its own
            who = type(self.callback).__name__.removesuffix("Callback")
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if event in ("on_init_end", "on_train_begin"):
                raise UserError(
                    f"logging.report_to: {who} cannot begin: {reason}",
                    remedy="log in to it, see that its server answers and its folder can be "
                    "written, or leave it out",
                ) from error
            self.ended = True
            self.say(f"note: {who} is reported to no further ({reason}); metrics.jsonl goes on")
            return None


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def take_terminal() -> IO[str]:
    """Keep standard output for ourselves; what libraries print goes to the log (stderr)."""
    sys.stdout.flush()
    terminal = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    return cast("IO[str]", BestEffort(terminal))
