"""Reading a job file: its values, overrides, and all its faults at once.

Precedence: defaults < job file < key=value overrides.
"""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from sft_job import extras, paths
from sft_job.errors import ConfigError
from sft_job.schema import (
    MOST_PROCESSES,
    Apptainer,
    Fsdp,
    JobConfig,
    LinearRope,
    Pyxis,
    Zero3,
    shown,
)
from sft_job.yamltext import DEEPEST, MOST_BYTES, TILDE, Plain, Source, as_text, resolved

# Keys of the design that this version does not act on yet. A key that is accepted and then
# ignored is worse than one that is refused, so they are refused by name.
NOT_YET = {
    "data.eval": "evaluation during training",
    "checkpoint.asynchronous": "asynchronous saving",
}


# Sections of which there are several kinds, by their discriminator `type`.
VARIANTS: dict[str, dict[str, type[BaseModel]]] = {
    "engine": {"fsdp": Fsdp, "zero3": Zero3},
    "container": {"apptainer": Apptainer, "pyxis": Pyxis},
    "model.rope": {"linear": LinearRope},
}


# As `validate_repo_id` of huggingface_hub has it: name or owner/name.
_HUB_ID = re.compile(r"(?!.*(--|\.\.|\.git$))(\b[\w.-]{1,96}\b/)?\b[\w.-]{1,96}\b", re.ASCII)

# Keys that take values of several types, and what is said of every other.
UNIONS = {
    "train.micro_batch_tokens": "a whole number of at least 8, or auto",
    "slurm.extra.*": "text, a number, true or false",
}


def _conflicts(config: JobConfig) -> Iterator[tuple[str, str]]:
    """Values that are good by themselves and cannot stand together, by key."""
    data, train, slurm = config.data, config.train, config.slurm
    if config.model.on_hub and not _HUB_ID.fullmatch(config.model.path):
        yield "model.path", f"{config.model.path} is no folder here, and no name that a hub takes"
    if config.model.revision is not None and not config.model.on_hub:
        yield "model.revision", f"a revision is of a hub model, and {config.model.path} is none"
    if slurm and slurm.gpus_per_node and config.run.processes not in (None, slurm.gpus_per_node):
        yield (
            "run.processes",
            f"processes ({config.run.processes}) differs from slurm.gpus_per_node "
            f"({slurm.gpus_per_node}): a submitted job has one process for each GPU; leave it out",
        )
    if slurm and slurm.nodes * slurm.tasks_per_node(config.run) > MOST_PROCESSES:
        yield (
            "slurm.nodes",
            f"{slurm.nodes:,} nodes with {slurm.tasks_per_node(config.run):,} tasks each are more "
            f"than {MOST_PROCESSES:,} processes",
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
    if len(set(config.logging.report_to)) < len(config.logging.report_to):
        yield "logging.report_to", "names a tracker twice"
    if config.cache_dir.is_relative_to(config.run.dir):
        # What is encoded ahead would make it somebody else's folder, in which no run begins.
        yield "data.cache_dir", "lies in the run directory; it must be a folder of its own"
    beside = config.cache_dir
    if data.cache_dir is None and os.path.lexists(beside) and not beside.is_dir():
        yield "data.cache_dir", f"{beside}, beside run.dir, is not a folder; set it"
    if len(stored(config).encode()) > MOST_BYTES:
        yield "data.train", "these names are too long for a job file; use patterns"
    yield from extras.faults(train, config.engine)


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
    source = Source(str(path), _text(path))
    if not isinstance(source.value, dict):
        raise ConfigError([f"{path}: the job file must hold keys such as model:, data:, run:"])
    faults = list(source.faults)
    values: dict[str, Any] = source.value
    layers: dict[str, Any] = {}
    overridden: list[str] = []

    def place(key: str, *, inner: bool = True) -> str:
        """Args: inner: an override of a part of it makes it wrong, and not what is missing."""
        whole = re.sub(r"^(data.train|container.bind)\.\d+$", r"\1", key)
        for other in overridden:
            if f"{key}.".startswith(f"{other}.") or (inner and other.startswith(f"{key}.")):
                return f"override {whole}"
        at = source.place(key)
        return f"{at}: {whole}" if key else at

    unknown = _absolute(values, path.resolve().parent)
    for override in overrides:
        try:
            key, layer = _layer(override)
        except ConfigError as error:
            faults += error.faults
            continue
        overridden.append(key)
        # What an override replaces need not be good.
        unknown = {at: why for at, why in unknown.items() if not f"{at}.".startswith(f"{key}.")}
        unknown |= _absolute(layer, _here(), _container_type(layers) or _container_type(values))
        _merge(layers, layer)
    faults += [f"{place(key)}: {why}" for key, why in unknown.items()]
    before, now = _engine_type(values), _engine_type(layers)
    if before is not None and now not in (None, before):
        del values["engine"]  # the options of another type do not apply to this one
    _merge(values, layers)
    values = _typed(values)
    if not without_files:
        faults += [
            f"{place(key)}: {why}" for key, why in _path_faults(values) if key not in unknown
        ]
    try:
        config = JobConfig.model_validate(values)
    except ValidationError as error:
        faults += [fault for item in error.errors() for fault in _explain(item, place, values)]
        raise ConfigError(list(dict.fromkeys(faults))) from error
    faults += [f"{place(key)}: {why}" for key, why in _conflicts(config) if key not in unknown]
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))
    return config


def stored(config: JobConfig) -> str:
    """The text of job.json: read again by `load`, in any environment, as the same job."""
    values = config.model_dump(mode="json")
    paths.change(values, lambda key, path: paths.escape(path))
    text = json.dumps(values, indent=2, ensure_ascii=False)
    # What YAML takes for the end of a line, or not for text, is escaped as JSON has it.
    return _NOT_YAML.sub(lambda match: f"\\u{ord(match[0]):04x}", text) + "\n"


_NOT_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def read_stored(text: str) -> JobConfig:
    """What `stored` has written.

    Raises:
        ValueError: it is not that.
    """
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if isinstance(values, dict):
        paths.change(values, lambda key, path: paths.unescape(path))
    return JobConfig.model_validate(values)


def _text(path: Path) -> str:
    """Of a job file.

    Raises:
        ConfigError: not a file, not readable, no text, or too large for a job.
    """
    try:
        # Anything else than a file would be read without end, or wait for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            why = "Is a directory" if path.is_dir() else "not a file"
            raise ConfigError([f"{path}: cannot be read: {why}"])
        with open(path, "rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError([f"{path}: cannot be read: {reason}"]) from error
    if len(raw) > MOST_BYTES:
        raise ConfigError(
            [f"{path}: cannot be read: more than {MOST_BYTES // 1024} KiB; is it a job file?"]
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{path}: cannot be read: not UTF-8 text (line {line})"]) from error


def _here() -> Path:
    try:
        return Path.cwd()
    except OSError as error:
        raise ConfigError([f"the working directory cannot be used: {error.strerror}"]) from error


def _layer(override: str) -> tuple[str, dict[str, Any]]:
    """An override as (key, nested values).

    Raises:
        ConfigError: it is not section.key=value, or its value is none that can be meant.
    """
    key, equals, raw = override.partition("=")
    if not equals or not all(key.split(".")) or len(key.split(".")) > DEEPEST:
        raise ConfigError([f"{shown(override)}: an override is written section.key=value"])
    name = f"override {key[:80]}"
    source = Source(name, raw)
    if source.faults:
        raise ConfigError(source.faults)
    rest = raw[source.end :].strip()
    if not raw.strip():
        raise ConfigError([f"{name}: has no value; write null where none is meant"])
    if rest or (isinstance(source.value, Plain) and source.value != raw.strip()):
        # A comment, an anchor, folded lines
        raise ConfigError(
            [f"{name}: YAML would read {shown(raw)} as {shown(source.value)}; put it in quotes"]
        )
    layer: Any = source.value
    for part in reversed(key.split(".")):
        layer = {part: layer}
    return key, layer


def _typed(values: dict[str, Any]) -> dict[str, Any]:
    """Text as it was written, except where a key takes anything (train.extra, slurm.extra)."""
    typed: dict[str, Any] = as_text(values)
    for name in ("train", "slurm"):
        section = values.get(name)
        extra = section.get("extra") if isinstance(section, dict) else None
        if isinstance(extra, dict):
            typed[name]["extra"] = {
                key: resolved(value) if name == "train" else _sbatch_option(value)
                for key, value in extra.items()
            }
    return typed


def _sbatch_option(written: Any) -> Any:
    """true and false say whether an option is there; sbatch reads everything else itself."""
    value = resolved(written)
    return value if isinstance(value, bool) or str(value) == written else as_text(written)


def _engine_type(values: dict[str, Any]) -> Any:
    engine = values.get("engine")
    return engine.get("type") if isinstance(engine, dict) else None


def _merge(values: dict[str, Any], layer: dict[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def _container_type(values: dict[str, Any]) -> Any:
    container = values.get("container")
    return container.get("type") if isinstance(container, dict) else None


def _absolute(values: dict[str, Any], base: Path, container: Any = None) -> dict[str, str]:
    """Expand the paths among raw values and make them absolute, in place; what cannot be is
    returned with its key.

    Args:
        container: type of the job's container, where these values do not say it.
    """
    faults: dict[str, str] = {}
    kind = _container_type(values) or container
    data = values.get("data")
    if isinstance(data, dict) and isinstance(data.get("train"), str):
        data["train"] = [data["train"]]  # one file may be written without the brackets

    def absolute(key: str, text: str) -> str:
        if isinstance(text, Plain) and text == TILDE:
            faults[key] = "~ alone is null to YAML; write ~/ for the home folder, or null"
            return str(text)
        try:
            path = paths.substitute(text, os.environ)
        except ValueError as error:
            faults[key] = str(error)
            return text
        if not path or not _is_path(key, path, base, kind):
            return path
        folder = str(base)
        if (
            key.startswith("data.train")
            and glob.has_magic(path)
            and not os.path.isfile(base / path)
        ):
            folder = glob.escape(folder)  # its name is no pattern
        return os.path.normpath(os.path.join(folder, path))

    paths.change(values, absolute)
    return faults


def _is_path(key: str, text: str, base: Path, container: Any) -> bool:
    """Whether a text is a path of this machine, and not a name of something else."""
    if key == "container.python":
        return False  # of the image, and often only a name
    if key == "container.image":  # docker://..., or for Pyxis nvcr.io#nvidia/pytorch
        return "://" not in text and (container == "apptainer" or text.endswith(".sqsh"))
    if key == "model.path":
        # "org/name" is a hub id unless such a folder exists; a hub id never starts with . or /
        return text[0] in "./" or os.path.isdir(base / text)
    return True


def _path_faults(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Of absolute paths among raw values, so that they are reported with the faults of
    validation: names that nothing can have, files that are not there, folders that cannot be
    made."""
    for key, path in paths.given(values):
        if (why := paths.fault(path)) is not None:
            yield key, why
        elif key.startswith("data.train") and not paths.expand(path):
            yield key, paths.unreadable(path) or f"no file matches {path}"
        elif key == "model.path" and os.path.isabs(path) and not os.path.isdir(path):
            yield key, paths.unreadable(path) or f"no such folder: {path}"
        elif (
            key in ("run.dir", "data.cache_dir")
            and os.path.isabs(path)
            and (why := paths.folder_fault(Path(path))) is not None
        ):
            yield key, why


def _keys(item: Any) -> list[str] | None:
    """The key of the file that a fault is about; None for the wrong side of a union.

    pydantic puts the name of a union's side after its key, and has a fault for each side.
    """
    match keys := [str(part) for part in item["loc"]]:
        case ["engine" | "container", _, *rest]:
            return [keys[0], *rest]
        case ["model", "rope", _, *rest]:
            other = isinstance(item["input"], dict) == (item["type"] == "literal_error")
            return None if other and not rest else ["model", "rope", *rest]
        case ["train", "micro_batch_tokens", *_]:
            return keys[:2]
        case ["slurm", "extra", _, *_]:
            return keys[:3]
    return keys


def _explain(item: Any, place: Any, values: dict[str, Any]) -> list[str]:
    keys = _keys(item)
    if keys is None:
        return []
    key = ".".join(keys)
    given = shown(item["input"])
    must = UNIONS.get(key) or UNIONS.get(".".join([*keys[:-1], "*"]))
    if must is not None:
        return [f"{place(key)}: must be {must}, not {given}"]
    if key in NOT_YET or (keys[:1] and keys[0] in NOT_YET):
        name = key if key in NOT_YET else keys[0]
        return [f"{place(key)}: {NOT_YET[name]} is not available in this version; remove the key"]
    match item["type"]:
        case "extra_forbidden":
            return [f"{place(key)}: unknown key{_did_you_mean(keys, values)}"]
        case "missing":
            return [f"{place('.'.join(keys[:-1]), inner=False)}: {key} is missing"]
        case "model_type" | "model_attributes_type" if key in VARIANTS:
            forms = " or ".join(f"{{type: {tag}}}" for tag in VARIANTS[key])
            return [f"{place(key)}: must be {forms}, not {given}"]
        case "literal_error":
            expected = item["ctx"]["expected"]
            return [f"{place(key)}: {given} is not one of {expected}"]
        case "union_tag_invalid" | "union_tag_not_found":
            kinds = f"{key}.type must be {' or '.join(VARIANTS[key])}, not {given}"
            return [f"{place(key)}: {kinds}{_type_of(key, item['input'])}"]
        case "value_error":
            return [f"{place(key) if key else 'job file'}: {item['ctx']['error']}"]
    return [f"{place(key)}: {item['msg'][0].lower()}{item['msg'][1:]}, not {given}"]


def _type_of(key: str, given: dict[str, Any]) -> str:
    """Which kind of section has the keys that are given without a type."""
    kinds = VARIANTS[key].items()
    kind = [name for name, model in kinds if given.keys() <= model.model_fields.keys()]
    return f"; {key}.type={kind[0]} has {', '.join(given)}" if given and len(kind) == 1 else ""


def _did_you_mean(keys: list[str], values: dict[str, Any]) -> str:
    section, asked = ".".join(keys[:-1]), keys[-1]
    known = known_keys()
    siblings = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == section]
    others: dict[str, str] = {}
    of = ""
    if section in VARIANTS:
        given: Any = values
        for part in [*keys[:-1], "type"]:
            given = given.get(part) if isinstance(given, dict) else None
        kind = given if given in list(VARIANTS[section]) else next(iter(VARIANTS[section]))
        siblings, of = list(VARIANTS[section][kind].model_fields), f" of type {kind}"
        others = {
            name: other
            for other, model in VARIANTS[section].items()
            for name in model.model_fields
            if name not in siblings
        }
    if asked in others:
        return f"{of}; it belongs to type {others[asked]}"
    if near := difflib.get_close_matches(asked, siblings, n=1, cutoff=0.5):
        return f"; did you mean {'.'.join([*keys[:-1], near[0]])}?"
    if near := difflib.get_close_matches(asked, others, n=1, cutoff=0.5):
        return f"{of}; did you mean {section}.{near[0]} of type {others[near[0]]}?"
    if elsewhere := [key for key in known if key.rpartition(".")[2] == asked]:
        return f"; did you mean {elsewhere[0]}?"
    return f"; {section or 'the job file'} has: {', '.join(siblings)}" if siblings else ""


@cache
def known_keys() -> tuple[str, ...]:
    """Every key of the job file, dotted, sections included."""

    def walk(model: type[BaseModel], prefix: str) -> Iterator[str]:
        for name, field in model.model_fields.items():
            key = f"{prefix}{name}"
            yield key
            for inner in _models(field.annotation):
                yield from walk(inner, f"{key}.")

    return tuple(dict.fromkeys(walk(JobConfig, "")))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections of an annotation such as `Slurm | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)
