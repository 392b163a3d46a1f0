"""The result of a run: the model that DONE speaks of, and whether it is there as it was written.

attempts/N/model.json   seal of the model that attempt N wrote; before the model has its name
model/                  renamed, never replaced
DONE                    made once: step, attempt, and the seal
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from sft_job import seal
from sft_job.attempt import Attempt
from sft_job.files import (
    clear_unwritten,
    create,
    discard,
    publish,
    put_aside,
    read_json,
    write_atomically,
)
from sft_job.modelfiles import weight_files
from sft_job.rundir import RunDir


def model_fault(run_dir: RunDir) -> str | None:
    """Why the model of a run that is done is not what was written, or None.

    Runs of earlier versions have left no seal: of those the files are looked for.
    """
    try:
        record = read_json(run_dir.done)
    except (OSError, ValueError) as error:
        return f"DONE cannot be read ({error})"
    if isinstance(record, dict) and isinstance(record.get("model"), dict):
        return seal.fault(run_dir.model, record["model"])
    if any(run_dir.written_model(attempt).is_file() for attempt in run_dir.attempts()):
        return "DONE is damaged"
    try:
        weights = weight_files(run_dir.model)
    except (OSError, ValueError, LookupError) as error:
        return f"it cannot be read ({error})"
    missing = [f.name for f in (run_dir.model / "config.json", *weights) if not f.is_file()]
    if missing or not weights:
        return f"{missing[0] if missing else 'model.safetensors'} is missing"
    return None


def written_before(run_dir: RunDir) -> Any:
    """The seal of `model/` if some attempt wrote it as it is: one that ended before DONE."""
    for attempt in reversed(run_dir.attempts()):
        try:
            written = read_json(run_dir.written_model(attempt))
        except (OSError, ValueError):
            continue
        if run_dir.model.is_dir() and seal.fault(run_dir.model, written) is None:
            return written
    return None


def clear_left_over(attempt: Attempt) -> None:
    """Delete what attempts before this one have left half written. One of them may still be
    alive: it finds its folder gone and publishes nothing."""
    for left in attempt.run_dir.half_made(attempt.number):
        discard(left)
    run_dir = attempt.run_dir
    clear_unwritten(*(file for file in vars(run_dir).values() if file.parent == run_dir.path))


def publish_model(attempt: Attempt, beside: Path) -> Any:
    """Give a finished model its name. If another attempt has published one that is whole, that
    one stays; anything else of that name is put aside.

    Returns:
        The seal of the model that is there now.

    Raises:
        SupersededError: a later attempt runs this job.
    """
    run_dir, written = attempt.run_dir, seal.make(beside)
    write_atomically(run_dir.written_model(attempt.number), json.dumps(written) + "\n")
    attempt.refuse_if_superseded()
    if os.path.lexists(run_dir.model) and not run_dir.model.is_dir():
        put_aside(run_dir.model)
    while not publish(beside, run_dir.model):
        if (before := written_before(run_dir)) is not None:
            discard(beside)
            return before
        put_aside(run_dir.model)
    return written


def mark_done(attempt: Attempt, step: int, written: Any) -> None:
    """The last thing that a run does. A mark that is there already speaks of the same model."""
    record = {"step": step, "attempt": attempt.number, "time": time.time(), "model": written}
    create(attempt.run_dir.done, json.dumps(record) + "\n")


def mark_again(run_dir: RunDir, written: Any) -> None:
    """Make DONE anew, which is damaged beside a model that is as it was written."""
    unmark(run_dir)
    create(run_dir.done, json.dumps({"time": time.time(), "model": written}) + "\n")


def unmark(run_dir: RunDir) -> Path:
    """Take DONE back, whose model is damaged; returns where it is now."""
    return put_aside(run_dir.done)
