"""What a run is made of: settings by value, data and base model by content, never by path.

A run directory is resumed only by the same job. Its settings are in job.json; this is about what
they name: a project may be moved, and a file may be changed under its name. Either file can be
made anew from the other, and every checkpoint says of which data and weights it is.

    identity.json   made once, by the first attempt that had everything ready
      settings      `JobConfig.identity`
      data_files    SHA-256 of each file of data.train, in order
      data          fingerprint of the encoded data
      config        config.json of the base model
      weights       SHA-256 over the seals of its weight files
      seal          SHA-256 of all this
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from sft_job import seal
from sft_job.errors import RunDirError
from sft_job.files import create, put_aside, read_json
from sft_job.prepared import Prepared, hub_snapshot
from sft_job.rundir import RunDir
from sft_job.schema import JobConfig

# Of config.json: what saving it again somewhere else changes.
INCIDENTAL = {"_name_or_path", "transformers_version"}
_NEW = "give the changed job a run.dir of its own, or put back what was changed to resume this one"


def refuse_changed_sources(run_dir: RunDir, config: JobConfig) -> None:
    """Before anything slow: the files that the job names, against those that the run began with.

    Raises:
        RunDirError: the data or the base model has changed.
    """
    before = _read(run_dir)
    if before is None:
        return
    files = [file for file in config.data.files() if file.is_file()]
    if _hashes(files) != before.get("data_files"):
        raise RunDirError(
            "the data has changed since this run began: other content, or another order, in "
            + ", ".join(map(str, files)),
            where=str(run_dir.path),
            remedy=_NEW,
        )
    if (now := _source_config(config)) is not None:
        _refuse_another_config(run_dir, before.get("config"), now)


def refuse_changed_content(run_dir: RunDir, config: JobConfig, prepared: Prepared) -> None:
    """What training will read, against what the run began with, which is written down here at
    the first time.

    Raises:
        RunDirError: the data, its encoding or the base model is another one.
    """
    now = {
        "settings": config.identity(),
        "data_files": _hashes(config.data.files()),
        "data": prepared.stats.fingerprint,
        "config": _source_config(config),
        "weights": weights(prepared),
    }
    if (before := _read(run_dir)) is None:
        create(run_dir.identity, json.dumps(seal.sealed(now), indent=1) + "\n")
        before = _read(run_dir) or now
    if before.get("data") != now["data"]:
        raise RunDirError(
            "the data or its encoding has changed since this run began (files, tokenizer, "
            "template, or the version of sft_job that encodes them)",
            where=str(run_dir.path),
            remedy=_NEW,
        )
    _refuse_another_config(run_dir, before.get("config"), now["config"])
    if before.get("weights") != now["weights"]:
        raise RunDirError(
            "the weights of the base model have changed since this run began",
            where=prepared.model_folder,
            remedy=_NEW,
        )


def _read(run_dir: RunDir) -> dict[str, Any] | None:
    """None where there is none yet, or where it is damaged: then it is put aside."""
    try:
        before = read_json(run_dir.identity)
    except FileNotFoundError:
        return None
    except (ValueError, IsADirectoryError):
        before = None
    if not seal.is_sealed(before):
        aside = put_aside(run_dir.identity)
        print(f"note: {run_dir.identity} was damaged: put aside as {aside.name}", file=sys.stderr)
        return None
    found: dict[str, Any] = before
    return found


def _refuse_another_config(run_dir: RunDir, before: Any, now: Any) -> None:
    if not isinstance(before, dict) or not isinstance(now, dict):
        return
    keys = sorted((before.keys() | now.keys()) - INCIDENTAL)
    changed = [
        f"{key}: {before.get(key)!r} before, {now.get(key)!r} now"
        for key in keys
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise RunDirError(
            "config.json of the base model has changed since this run began:\n  "
            + "\n  ".join(changed[:10]),
            where=str(run_dir.path),
            remedy=_NEW,
        )


def _source_config(config: JobConfig) -> Any:
    """config.json as the job's model has it; None where it is not a folder of this machine."""
    path = config.model.path
    folder = Path(path) if Path(path).is_absolute() else None
    if folder is None and config.model.on_hub:
        folder = hub_snapshot(config)
    if folder is None:
        return None
    try:
        return read_json(folder / "config.json")
    except (OSError, ValueError):
        return None  # said by whoever needs it


def _hashes(files: list[Path]) -> list[str]:
    digests = []
    for file in files:
        with open(file, "rb") as handle:
            digests.append(hashlib.file_digest(handle, "sha256").hexdigest())
    return digests


def weights(prepared: Prepared) -> str:
    """SHA-256 over the seals of the weight files."""
    sealed = prepared.model_seal
    if sealed is None:
        sealed = seal.read(Path(prepared.model_folder))
    files = {n: f for n, f in sealed["files"].items() if n.endswith(".safetensors")}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
