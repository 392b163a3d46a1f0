"""The error kinds, and the exit code that each one ends the program with.

    SftJobError                 1   something of ours went wrong
    ├── UserError               2   the caller can mend it; printed without a traceback
    │   ├── FaultList           2   several faults of one input, all at once
    │   │   ├── ConfigError         the job file or an override
    │   │   ├── DataError           conversations
    │   │   └── SubmitError         what a job would fail of on the cluster
    │   ├── ModelError              weights, tokenizer, architecture
    │   ├── LaunchError             how the processes were started
    │   ├── HardwareError           processors, precision, kernels
    │   ├── RunDirError             the run directory belongs to something else
    │   ├── FileError               a file or folder that the system does not let us use
    │   └── SlurmError              the cluster does not take the job
    ├── CheckpointError         1   saving or resuming
    │   └── DiskSpaceError      1   no room for what must be written
    ├── TrainingError           1   the numbers went wrong
    ├── ExportError             1   the written model is not the trained one
    ├── WorkerError             1   a training process ended by itself
    ├── SupersededError         1   a later attempt runs the job
    └── Interrupted            75   stopped on request, can be resumed (EX_TEMPFAIL)

Every message says what, where, why and what next; `where` and `remedy` keep those
parts apart so that no call site forgets them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

EXIT_INTERRUPTED = 75


class SftJobError(Exception):
    """Base of all errors that the user is shown as one message.

    Args:
        what: what is wrong and why, one sentence.
        where: file and line, conversation and turn, or directory.
        remedy: what to do next.
    """

    exit_code = 1
    of_another_rank = False
    """Another process has failed with it, and says so; this one ends for want of its result."""

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(what, where, remedy)
        self.what, self.where, self.remedy = what, where, remedy

    def __reduce__(self) -> tuple[Any, ...]:
        # An error of an encoding process must reach the parent as it is; the default would
        # call the class with the message alone.
        return _rebuild, (type(self), self.args, self.__dict__)

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  -> {self.remedy}" if self.remedy else head


def _rebuild(kind: type[SftJobError], args: tuple[Any, ...], state: dict[str, Any]) -> SftJobError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class UserError(SftJobError):
    exit_code = 2


class FaultList(UserError):
    """Several faults of one input, all shown at once.

    Args:
        faults: one line each, each with its own place.
        shown: at most so many lines are printed; the rest is counted.
        count: how many there are, where `faults` has only the first of them.
    """

    noun = "faults"

    def __init__(
        self,
        faults: Sequence[str],
        *,
        remedy: str | None = None,
        shown: int = 30,
        count: int | None = None,
    ) -> None:
        if not faults:
            raise ValueError("a FaultList needs at least one fault")
        count = len(faults) if count is None else count
        lines = list(faults[:shown])
        if count > len(lines):
            lines.append(f"... and {count - len(lines):,} more")
        if count > 1:
            lines = [f"{count:,} {self.noun}:", *(f"  {line}" for line in lines)]
        super().__init__("\n".join(lines), remedy=remedy)
        self.faults = list(faults)


class ConfigError(FaultList):
    noun = "faults of the job file"


class DataError(FaultList):
    noun = "faults of the data"


class SubmitError(FaultList):
    noun = "reasons not to submit this job"


class ModelError(UserError):
    pass


class LaunchError(UserError):
    pass


class HardwareError(UserError):
    pass


class RunDirError(UserError):
    pass


class FileError(UserError):
    pass


class SlurmError(UserError):
    pass


class CheckpointError(SftJobError):
    pass


class DiskSpaceError(CheckpointError):
    pass


class TrainingError(SftJobError):
    pass


class ExportError(SftJobError):
    pass


class WorkerError(SftJobError):
    pass


class SupersededError(SftJobError):
    pass


class Interrupted(SftJobError):
    exit_code = EXIT_INTERRUPTED
