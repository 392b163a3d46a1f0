"""The job file: its schema, how it is read, and what makes two jobs the same.

Precedence: defaults < job file < key=value overrides. Nothing is rewritten after
validation; what is derived from these values is in `plan.py`.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from sft_job.errors import ConfigError

# Keys of the design that this version does not act on yet. A key that is accepted and then
# ignored is worse than one that is refused, so they are refused by name.
NOT_YET = {
    "data.eval": "evaluation during training",
    "checkpoint.asynchronous": "asynchronous saving",
    "container": "containers",
    "slurm": "SLURM submission",
}


def _not_a_bool(value: Any) -> Any:
    """YAML reads `yes` and `on` as true, and Python takes true for 1."""
    if isinstance(value, bool):
        raise ValueError(f"input should be a number, not {value}")
    return value


Text = Annotated[str, Field(min_length=1)]
Whole = Annotated[int, BeforeValidator(_not_a_bool)]
Number = Annotated[float, BeforeValidator(_not_a_bool)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class LinearRope(Section):
    type: Literal["linear"]
    factor: Number = Field(ge=1)
    """Positions are divided by this factor; the context grows by it."""


class Model(Section):
    path: Text
    """Hub id, local folder, or bundled:smollm2-135m."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; null means the default branch."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: such models are refused."""
    rope: Literal["auto", "none"] | LinearRope = "auto"
    """auto scales positions linearly by ceil(seq_len / native context) when the native
    context is too short, as the published Vicuna-16k recipe did."""
    attention: Literal[
        "auto",
        "flash_attention_3",
        "flash_attention_2",
        "torch_varlen",
        "xformers",
        "sdpa",
        "own",
    ] = "auto"
    """The attention kernel; auto takes the best one that the GPU and the installed packages
    have. own is the model's own attention, one sample per forward pass."""
    cross_entropy: Literal["auto", "torch", "liger"] = "auto"
    """What computes the loss from hidden states; auto takes Liger's kernel on GPUs that run
    Triton (capability 8.0 and newer) where it is installed."""


class Data(Section):
    train: Annotated[list[str], Field(min_length=1)]
    """Files and globs, ShareGPT or messages form, .json or .jsonl."""
    template: Literal["vicuna"] = "vicuna"
    """How a conversation becomes text."""
    seq_len: Whole = Field(2048, ge=8)
    """Longest sample in tokens; with batching: rows also the length of a row."""
    batching: Literal["conversations", "rows"] = "conversations"
    """What global_batch_size counts: conversations (the published recipe) or packed rows of
    seq_len tokens (fixed shapes, most tokens per step)."""
    preprocess: Literal["cached", "lazy"] = "cached"
    """cached tokenises everything once before the start; lazy tokenises each step as it comes."""
    overlong: Literal["truncate", "split", "drop", "error"] = "truncate"
    """What happens to a conversation of more than seq_len tokens."""
    cache_dir: Text | None = None
    """Token cache and converted weights; null means .sft_job_cache beside run.dir."""

    def files(self) -> list[Path]:
        """The files of `train`, each once, in the order given."""
        return list(dict.fromkeys(path for pattern in self.train for path in expand(pattern)))


class Train(Section):
    global_batch_size: Whole = Field(128, ge=1)
    """Conversations (or rows) per optimizer step, over all ranks and micro-batches."""
    micro_batch_tokens: Annotated[Whole, Field(ge=8)] | Literal["auto"] = 16384
    """At most so many tokens per rank and forward: the memory knob. Does not change the result.
    auto takes what the plan says is fastest and fits."""
    num_train_epochs: Whole = Field(3, ge=1)
    max_steps: Whole | None = Field(None, ge=1)
    """Stop after so many optimizer steps instead of after num_train_epochs."""
    learning_rate: Number = Field(2e-5, gt=0)
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = "cosine"
    warmup_ratio: Number = Field(0.03, ge=0, le=1)
    """Share of all steps over which the learning rate rises from 0."""
    weight_decay: Number = Field(0.0, ge=0)
    max_grad_norm: Number = Field(1.0, ge=0)
    """Gradients are scaled down to this global norm; 0 never scales."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """dtype of the computation; master weights and reductions are always fp32. auto is bf16
    where the hardware computes in it, fp16 with dynamic loss scaling on older GPUs, fp32 on
    other CPUs."""
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """full recomputes every decoder layer in the backward pass: about a quarter more time,
    least memory. selective keeps the results of attention and of as many matrix products as
    there is room for, and recomputes the rest. auto takes the least recomputation that the
    plan says fits."""
    deterministic: bool = False
    """Refuse kernels whose result depends on the order of execution."""
    seed: Whole = Field(0, ge=0)
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further Hugging Face TrainingArguments by name."""


class Fsdp(Section):
    type: Literal["fsdp"]


class Zero3(Section):
    type: Literal["zero3"]
    offload: Literal["none", "cpu"] = "none"
    """cpu keeps masters and Adam's state in host memory and steps there (DeepSpeed's CPU Adam)."""
    stage3_max_live_parameters: Whole | None = Field(None, ge=0)
    """Gathered parameters kept at a time; null derives it from the model's layers, 0 frees at
    once."""
    stage3_max_reuse_distance: Whole | None = Field(None, ge=0)
    """A parameter needed again within so many elements is not freed; null as above."""
    stage3_param_persistence_threshold: Whole | None = Field(None, ge=0)
    """Parameters smaller than this stay whole on every rank; null as above."""


class Checkpoint(Section):
    every_steps: Whole = Field(200, ge=1)
    """Optimizer steps between two checkpoints; the last step is always saved."""
    keep: Whole | None = Field(None, ge=1)
    """Keep only the newest so many checkpoints; null deletes nothing."""


class Logging(Section):
    every_steps: Whole = Field(1, ge=1)
    """Optimizer steps between two records."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(default_factory=list)
    """Handed to the Trainer's own integrations."""


class Run(Section):
    dir: Text
    """The run directory: configuration, logs, checkpoints, exported model."""
    processes: Whole | None = Field(None, ge=1)
    """Training processes on this machine; null means one per GPU, or one on a CPU."""
    online: bool = False
    """May fetch from the model hub. Compute nodes usually cannot."""


class JobConfig(Section):
    """One training job. Precedence: defaults < job file < overrides."""

    model: Model
    data: Data
    train: Train = Field(default_factory=Train)
    engine: Annotated[Fsdp | Zero3, Field(discriminator="type")] = Fsdp(type="fsdp")
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    logging: Logging = Field(default_factory=Logging)
    run: Run

    @property
    def cache_dir(self) -> Path:
        if self.data.cache_dir is not None:
            return Path(self.data.cache_dir)
        return Path(self.run.dir).parent / ".sft_job_cache"

    def identity(self) -> dict[str, Any]:
        """The values that decide which numbers come out, by dotted key.

        A run directory is resumed only by a job with the same identity. Left out: how much
        is done at a time, how often something is written, how many processes share the work.
        """
        given = self.model_dump(mode="json")
        for section in ("checkpoint", "logging", "run"):
            del given[section]
        for key in ("micro_batch_tokens", "activation_checkpointing"):
            del given["train"][key]
        del given["data"]["cache_dir"]
        given["engine"] = {"type": self.engine.type}
        return dict(_flatten(given))


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _conflicts(config: JobConfig) -> Iterator[tuple[str, str]]:
    """Values that are good by themselves and cannot stand together, by key."""
    data, train = config.data, config.train
    if isinstance(train.micro_batch_tokens, int) and train.micro_batch_tokens < data.seq_len:
        yield (
            "train.micro_batch_tokens",
            f"micro_batch_tokens ({train.micro_batch_tokens}) is smaller than seq_len "
            f"({data.seq_len}): "
            "a sample of full length would fit nowhere",
        )
    if data.preprocess == "lazy" and data.batching == "rows":
        yield (
            "data.preprocess",
            "lazy cannot be combined with data.batching: rows, because rows are packed from the "
            "lengths of the whole epoch; use cached or conversations",
        )
    if data.preprocess == "lazy" and data.overlong in ("split", "error"):
        yield (
            "data.preprocess",
            f"lazy cannot be combined with data.overlong: {data.overlong}, because lengths are "
            "not known before the start; use cached, or truncate or drop",
        )


class _Loader(yaml.SafeLoader):
    """Reads 2e-5 as a number; YAML 1.1, and so PyYAML, wants 2.0e-5."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse(text: str) -> Any:
    """A value as the job file reads it."""
    return yaml.load(text, Loader=_Loader)


class _Source:
    """A parsed job file with the line of every key."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.lines: dict[str, int] = {}
        self.faults: list[str] = []
        try:
            node = yaml.compose(text, Loader=_Loader)
            self.values = parse(text)
        except yaml.YAMLError as error:
            raise ConfigError([_yaml_fault(name, error)]) from error
        if not isinstance(self.values, dict):
            raise ConfigError([f"{name}: the job file must hold keys such as model:, data:, run:"])
        self._walk(node, "")

    def _walk(self, node: Any, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                path = f"{prefix}{key.value}"
                line = key.start_mark.line + 1
                if path in self.lines:
                    first = self.lines[path]
                    self.faults.append(
                        f"{self.name}:{line}: {path}: given twice (first in line {first})"
                    )
                self.lines[path] = line
                self._walk(value, f"{path}.")

    def place(self, path: str) -> str:
        parts = path.split(".")
        while parts and ".".join(parts) not in self.lines:
            parts.pop()
        return f"{self.name}:{self.lines['.'.join(parts)]}" if parts else self.name


def _yaml_fault(name: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"{name}:{mark.line + 1}" if mark else name
    return f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}"


def load(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read, merge and check a job file.

    Args:
        path: the YAML file; relative paths in it are taken from its folder.
        overrides: `section.key=value`, parsed as YAML; relative paths are taken from the
            working directory.

    Raises:
        ConfigError: with every fault at once, each with file, line and key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError([f"{path}: cannot be read: {reason}"]) from error
    source = _Source(str(path), text)
    faults = list(source.faults)
    values = source.values
    _absolute(values, path.resolve().parent)
    layers: dict[str, Any] = {}
    overridden: list[str] = []
    for override in overrides:
        key, equals, raw = override.partition("=")
        if not equals or not key:
            faults.append(f"{override!r}: an override is written section.key=value")
            continue
        try:
            value = parse(raw)
        except yaml.YAMLError as error:
            faults.append(_yaml_fault(f"override {key}", error))
            continue
        layer: dict[str, Any] = {}
        inner = layer
        *sections, last = key.split(".")
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
        _absolute(layer, Path.cwd())
        _merge(layers, layer)
        overridden.append(key)
    before, now = _engine_type(values), _engine_type(layers)
    if before is not None and now not in (None, before):
        del values["engine"]  # the options of another type do not apply to this one
    _merge(values, layers)

    def place(key: str) -> str:
        parts = key.split(".")
        if any(".".join(parts[: i + 1]) in overridden for i in range(len(parts))):
            return f"override {key}"
        at = source.place(key)
        return f"{at}: {key}" if key else at

    faults += [f"{place(key)}: {why}" for key, why in _missing_files(values)]
    try:
        config = JobConfig.model_validate(values)
    except ValidationError as error:
        faults += [fault for item in error.errors() for fault in _explain(item, place)]
        raise ConfigError(list(dict.fromkeys(faults))) from error
    faults += [f"{place(key)}: {why}" for key, why in _conflicts(config)]
    if faults:
        raise ConfigError(faults)
    return config


def _engine_type(values: dict[str, Any]) -> Any:
    engine = values.get("engine")
    return engine.get("type") if isinstance(engine, dict) else None


def _merge(values: dict[str, Any], layer: dict[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def _absolute(values: dict[str, Any], base: Path) -> None:
    """Make the paths among raw values absolute; anything of a wrong type is left to validation."""

    def absolute(value: Any) -> Any:
        if not isinstance(value, str) or not value:
            return value
        return os.path.normpath(base / Path(value).expanduser())

    for section, key in (("data", "cache_dir"), ("run", "dir")):
        inner = values.get(section)
        if isinstance(inner, dict) and key in inner:
            inner[key] = absolute(inner[key])
    data = values.get("data")
    if isinstance(data, dict) and "train" in data:
        # One file may be written without the brackets.
        train = [data["train"]] if isinstance(data["train"], str) else data["train"]
        data["train"] = [absolute(item) for item in train] if isinstance(train, list) else train
    model = values.get("model")
    if isinstance(model, dict) and isinstance(model.get("path"), str):
        path = model["path"]
        # "org/name" is a hub id unless such a folder exists; a hub id never starts with . / or ~
        if path and (path[0] in "./~" or (base / path).is_dir()):
            model["path"] = absolute(path)


def _missing_files(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Looked for among raw values, so that they are reported with the faults of validation."""
    data, model = values.get("data"), values.get("model")
    patterns = data.get("train") if isinstance(data, dict) else None
    for pattern in patterns if isinstance(patterns, list) else []:
        if isinstance(pattern, str) and not expand(pattern):
            yield "data.train", f"no file matches {pattern}"
    path = model.get("path") if isinstance(model, dict) else None
    if isinstance(path, str) and Path(path).is_absolute() and not Path(path).is_dir():
        yield "model.path", f"no such folder: {path}"


def expand(pattern: str) -> list[Path]:
    """The files of one entry of `data.train`, sorted."""
    if Path(pattern).is_file():
        return [Path(pattern)]
    return sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())


def _explain(item: Any, place: Any) -> list[str]:
    # pydantic puts the tag of a union after the union's key; it is not a key of the file.
    keys = [str(part) for part in item["loc"]]
    if keys[:1] == ["engine"]:
        del keys[1:2]
    elif keys[:2] == ["model", "rope"]:
        del keys[2:3]
    elif keys[:2] == ["train", "micro_batch_tokens"]:  # a union: one fault for each of its sides
        why = f"must be a whole number of at least 8, or auto, not {item.get('input')!r}"
        return [f"{place('.'.join(keys[:2]))}: {why}"]
    key = ".".join(keys)
    given = item.get("input")
    if key in NOT_YET or (keys[:1] and keys[0] in NOT_YET):
        name = key if key in NOT_YET else keys[0]
        return [f"{place(key)}: {NOT_YET[name]} is not available in this version; remove the key"]
    match item["type"]:
        case "extra_forbidden":
            return [f"{place(key)}: unknown key{_did_you_mean(keys)}"]
        case "missing":
            return [f"{place('.'.join(keys[:-1]))}: {key} is missing"]
        case "model_type" | "model_attributes_type" if key == "engine":
            return [f"{place(key)}: must be {{type: fsdp}} or {{type: zero3}}, not {given!r}"]
        case "literal_error":
            expected = item["ctx"]["expected"]
            return [f"{place(key)}: {given!r} is not one of {expected}"]
        case "union_tag_invalid" | "union_tag_not_found":
            return [f"{place(key)}: {key}.type must be fsdp or zero3, not {given!r}"]
        case "value_error":
            return [f"{place(key) if key else 'job file'}: {item['ctx']['error']}"]
    return [f"{place(key)}: {item['msg'][0].lower()}{item['msg'][1:]}, not {given!r}"]


def _did_you_mean(keys: list[str]) -> str:
    known = list(known_keys())
    asked = ".".join(keys)
    siblings = [k for k in known if k.rpartition(".")[0] == asked.rpartition(".")[0]]
    names = [k.rpartition(".")[2] for k in siblings]
    near = difflib.get_close_matches(keys[-1], names, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {siblings[names.index(near[0])]}?"
    elsewhere = [k for k in known if k.rpartition(".")[2] == keys[-1]]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; {'.'.join(keys[:-1]) or 'the job file'} has: {', '.join(names)}" if names else ""


def known_keys() -> Iterator[str]:
    """Every key of the job file, dotted, sections included."""

    def walk(model: type[BaseModel], prefix: str) -> Iterator[str]:
        for name, field in model.model_fields.items():
            yield f"{prefix}{name}"
            if name == "engine":
                variants: list[type[BaseModel]] = [Fsdp, Zero3]
            elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                variants = [field.annotation]
            else:
                variants = []
            for variant in variants:
                yield from walk(variant, f"{prefix}{name}.")

    return iter(dict.fromkeys(walk(JobConfig, "")))
