"""What is already on this machine for a job: facts of its model, its encoded data.

Read on a login node too: no torch, no numpy.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_job.config import JobConfig
from sft_job.errors import ModelError
from sft_job.rundir import CacheDir, read_json

# Raised whenever encoding or conversion changes what it writes: older caches are made anew.
PREPARED_VERSION = 1


@dataclass(frozen=True)
class ModelFacts:
    """What config.json and the headers of the weight files say.

    Args:
        context: native context in tokens.
        rope: an existing RoPE scaling of the model, as in its config.json, or None.
        parameters: number of elements, tied ones once; None when the weights are not here.
    """

    model_type: str
    layers: int
    hidden: int
    vocabulary: int
    context: int
    rope: Mapping[str, Any] | None
    tied: bool
    parameters: int | None

    @property
    def attention_scale(self) -> float:
        """See `batching.cost`. Without a count of parameters: 12 x hidden, the LLaMA shape."""
        if self.parameters is None:
            return 12.0 * self.hidden
        tables = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return (self.parameters - tables) / (self.layers * self.hidden)


# config.json of SmolLM2-135M-Instruct: the plan is there before the weights are.
_SMOLLM2 = ModelFacts("llama", 30, 576, 49152, 8192, None, True, 134_515_008)
BUNDLED_FACTS = {"bundled:smollm2-135m": _SMOLLM2}


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
    """What `sft-job data encode` has made ready for a job: paths and statistics."""

    model_folder: str
    data_folder: str
    stats: DataStats


def read_facts(folder: Path) -> ModelFacts:
    """Facts of a model folder in Hugging Face layout.

    Raises:
        ModelError: no config.json, or not one of a decoder with these fields.
    """
    try:
        config = read_json(folder / "config.json")
    except FileNotFoundError as error:
        raise ModelError(
            "no config.json in the model folder",
            where=str(folder),
            remedy="model.path must be a folder in Hugging Face layout",
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"config.json cannot be read: {error}", where=str(folder)) from error
    try:
        scaling = config.get("rope_parameters") or config.get("rope_scaling")
        kind = (scaling or {}).get("rope_type") or (scaling or {}).get("type")
        return ModelFacts(
            model_type=config["model_type"],
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            vocabulary=config["vocab_size"],
            context=config["max_position_embeddings"],
            rope=scaling if kind not in (None, "default") else None,
            tied=config.get("tie_word_embeddings", False),
            parameters=_count_parameters(folder),
        )
    except KeyError as error:
        raise ModelError(
            f"config.json has no {error.args[0]}: not a decoder of the LLaMA kind",
            where=str(folder),
        ) from error


def _count_parameters(folder: Path) -> int | None:
    """Elements in the safetensors headers (8 bytes of length, then JSON)."""
    total = 0
    for file in weight_files(folder):
        try:
            with open(file, "rb") as handle:
                (size,) = struct.unpack("<Q", handle.read(8))
                if size > file.stat().st_size:
                    raise ValueError("its header is longer than the file")
                header = json.loads(handle.read(size))
        except (OSError, struct.error, ValueError) as error:
            raise ModelError(
                f"not a safetensors file: {error}",
                where=str(file),
                remedy="fetch it again (a small text file is a pointer of git-lfs)",
            ) from error
        header.pop("__metadata__", None)
        total += sum(math.prod(tensor["shape"]) for tensor in header.values())
    return total or None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: those of its index, else all of the folder.

    Some models come with a second copy of their weights in one consolidated file.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return sorted(folder / name for name in set(read_json(index)["weight_map"].values()))
    single = folder / "model.safetensors"
    return [single] if single.exists() else sorted(folder.glob("*.safetensors"))


def model_facts(config: JobConfig, prepared: Prepared | None) -> ModelFacts | None:
    """Facts of the job's model from wherever they are; None when it is not on this machine."""
    if prepared is not None:
        return read_facts(Path(prepared.model_folder))
    if config.model.path in BUNDLED_FACTS:
        return BUNDLED_FACTS[config.model.path]
    if config.model.path.startswith("bundled:"):
        raise ModelError(
            f"unknown bundled model {config.model.path!r}",
            remedy=f"known: {', '.join(BUNDLED_FACTS)}",
        )
    if Path(config.model.path).is_absolute():
        return read_facts(Path(config.model.path))
    folder = _hub_snapshot(config)
    return read_facts(folder) if folder else None


def _hub_snapshot(config: JobConfig) -> Path | None:
    """The folder of a hub model in the local hub cache (its documented layout)."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    repository = cache / f"models--{config.model.path.replace('/', '--')}"
    revision = config.model.revision or "main"
    reference = repository / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    folder = repository / "snapshots" / commit
    return folder if (folder / "config.json").is_file() else None


def prepared_key(config: JobConfig) -> str:
    """Names everything that preparing a job reads; changes when a file does."""
    files = config.data.files()
    model = Path(config.model.path)
    if model.is_absolute():
        files += sorted(path for path in model.iterdir() if path.is_file())
    stamps = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    data = config.data.model_dump(exclude={"cache_dir", "batching"}, mode="json")
    model_keys = config.model.model_dump(include={"path", "revision", "trust_remote_code"})
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


def read_prepared(stamp: Mapping[str, str]) -> Prepared:
    """Read what a stamp of the cache (folders of model and data) points to."""
    stats = read_stats(Path(stamp["data_folder"]))
    return Prepared(stamp["model_folder"], stamp["data_folder"], stats)


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
