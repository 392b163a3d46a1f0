"""One record per logged step: to metrics.jsonl, and to people.

    {"step": 12, "loss": 1.5, "learning_rate": 2e-05, "grad_norm": 0.8, "tokens": 9216, ...}

tokens and supervised_tokens are those of the logged steps over all ranks; seconds_per_step
is their mean; peak_memory_gib is of the rank that uses most.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process has held: on its GPU, or its resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


class Meter:
    """Adds up what the steps between two records did."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.tokens = self.supervised_tokens = self.steps = 0
        self._since = time.perf_counter()

    def add(self, tokens: int, supervised_tokens: int) -> None:
        self.tokens += tokens
        self.supervised_tokens += supervised_tokens
        self.steps += 1

    def take(self) -> dict[str, float]:
        """The figures since the last call."""
        seconds = time.perf_counter() - self._since
        figures = {
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "tokens_per_second": round(self.tokens / seconds, 1),
            "seconds_per_step": round(seconds / max(self.steps, 1), 4),
        }
        self._reset()
        return figures


class Reporter:
    """Shows progress: a bar on a terminal, plain lines in a log. On the main rank only."""

    def __init__(self, terminal: IO[str], log: Path | None, metrics_file: Path) -> None:
        """
        Args:
            terminal: where people look; a bar is drawn if it is one.
            log: gets every line as well.
        """
        self._console = RichConsole(file=terminal, highlight=False, soft_wrap=True)
        self._log = log
        self._metrics_file = metrics_file
        self._bar: Progress | None = None

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)
        if self._log is not None:
            with open(self._log, "a", encoding="utf-8") as file:
                file.write(text + "\n")

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
        with open(self._metrics_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        norm = record["grad_norm"]
        figures = (
            f"loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}  "
            f"grad_norm {f'{norm:.3f}' if norm is not None else 'overflow'}  "
            f"{record['tokens_per_second']:,.0f} tok/s"
        )
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=record["step"], figures=figures)
            return
        left = (steps - record["step"]) * record["seconds_per_step"]
        self.say(f"step {record['step']}/{steps}  {figures}  {_minutes(left)} left")

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Silence(Reporter):
    """The reporter of the other ranks: what they would say is said by the main one."""

    def __init__(self) -> None:
        pass

    def say(self, text: str) -> None: ...

    def start(self, done: int, steps: int) -> None: ...

    def record(self, record: dict[str, Any], steps: int) -> None: ...

    def stop(self) -> None: ...


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def take_terminal() -> IO[str]:
    """Keep standard output for ourselves; what libraries print goes to the log (stderr)."""
    import os

    sys.stdout.flush()
    terminal = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    return terminal
