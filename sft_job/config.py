"""Reading a job file: its values, overrides, and all its faults at once.

Precedence: defaults < job file < key=value overrides.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from sft_job.errors import ConfigError
from sft_job.schema import Apptainer, Fsdp, JobConfig, Pyxis, Slurm, Zero3, expand

# Keys of the design that this version does not act on yet. A key that is accepted and then
# ignored is worse than one that is refused, so they are refused by name.
NOT_YET = {
    "data.eval": "evaluation during training",
    "checkpoint.asynchronous": "asynchronous saving",
}


# The classes of a section that is not a plain one.
VARIANTS: dict[str, list[type[BaseModel]]] = {
    "engine": [Fsdp, Zero3],
    "container": [Apptainer, Pyxis],
    "slurm": [Slurm],
}

# Their discriminators.
TAGS = {"engine": ["fsdp", "zero3"], "container": ["apptainer", "pyxis"]}


def _conflicts(config: JobConfig) -> Iterator[tuple[str, str]]:
    """Values that are good by themselves and cannot stand together, by key."""
    data, train, slurm = config.data, config.train, config.slurm
    if slurm and slurm.gpus_per_node and config.run.processes not in (None, slurm.gpus_per_node):
        yield (
            "run.processes",
            f"processes ({config.run.processes}) differs from slurm.gpus_per_node "
            f"({slurm.gpus_per_node}): a submitted job has one process for each GPU; leave it out",
        )
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


def load(
    path: str | Path, overrides: Sequence[str] = (), *, without_files: bool = False
) -> JobConfig:
    """Read, merge and check a job file.

    Args:
        path: the YAML file; relative paths in it are taken from its folder.
        overrides: `section.key=value`, parsed as YAML; relative paths are taken from the
            working directory.
        without_files: data and model need not be there.

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

    if not without_files:
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
    container = values.get("container")
    if isinstance(container, dict):
        image = container.get("image")
        # docker://..., or for Pyxis nvcr.io#nvidia/pytorch: no file of this machine
        if container.get("type") == "apptainer" or str(image).endswith(".sqsh"):
            container["image"] = image if "://" in str(image) else absolute(image)
        if isinstance(container.get("bind"), list):
            container["bind"] = [absolute(item) for item in container["bind"]]
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


def _explain(item: Any, place: Any) -> list[str]:
    # pydantic puts the tag of a union after the union's key; it is not a key of the file.
    keys = [str(part) for part in item["loc"]]
    if keys[:1] in (["engine"], ["container"]):
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
        case "model_type" | "model_attributes_type" if key in TAGS:
            forms = " or ".join(f"{{type: {tag}}}" for tag in TAGS[key])
            return [f"{place(key)}: must be {forms}, not {given!r}"]
        case "literal_error":
            expected = item["ctx"]["expected"]
            return [f"{place(key)}: {given!r} is not one of {expected}"]
        case "union_tag_invalid" | "union_tag_not_found":
            return [f"{place(key)}: {key}.type must be {' or '.join(TAGS[key])}, not {given!r}"]
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
            if name in VARIANTS:
                variants = VARIANTS[name]
            elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                variants = [field.annotation]
            else:
                variants = []
            for variant in variants:
                yield from walk(variant, f"{prefix}{name}.")

    return iter(dict.fromkeys(walk(JobConfig, "")))
