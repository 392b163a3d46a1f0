"""Everything of an exported model but its weights: for transformers 4 and 5, and vLLM.

    config.json                use_cache true, RoPE and dtype in the keys of both releases
    generation_config.json     ends at the token that was trained as the end
    tokenizer.json, ...        chat template equal to the training template

It is rehearsed while the data is encoded: written to a temporary folder and loaded back, so that
no training ends with a model that cannot be written.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from sft_job.conversations import Exchange
from sft_job.encode import Encoder
from sft_job.errors import ExportError, ModelError
from sft_job.modelfiles import read_by_library, read_object

# Generation settings that mean something only when tokens are sampled.
SAMPLED = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff",
           "eta_cutoff")  # fmt: skip
# What generate makes of a setting, where it looks at its value for the first time.
PROCESSORS: dict[str, type[LogitsProcessor]] = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
}
# Those that switch such a setting off.
OFF = {"top_k": 0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "no_repeat_ngram_size": 0,
       "typical_p": 1.0}  # fmt: skip
# How a tokenizer was read, not what it is.
OF_THE_CALL = ("is_local", "local_files_only", "name_or_path")


def write(
    folder: Path,
    source: Path,
    description: Any,
    tokenizer: Any,
    encoder: Encoder,
    dtype: torch.dtype,
    *,
    architecture: str | None,
    trust_remote_code: bool,
) -> list[str]:
    """Write all settings into the folder of an exported model; returns what was mended.

    Args:
        source: the folder that the model came from; its generation settings are kept.
        description: the model's configuration, as it was trained.
        architecture: name of the model's class, if it is one of transformers'; None keeps what
            config.json says.

    Raises:
        ExportError: no chat template gives the ids of the training.
        ModelError: the generation settings are beyond mending.
    """
    if trust_remote_code:  # config.json names the model's own code
        for file in source.glob("*.py"):
            shutil.copyfile(file, folder / file.name)
    description = copy.deepcopy(description)
    description.use_cache = True
    description.dtype = dtype  # else dtype="auto" would load it as float32
    if architecture is not None and not trust_remote_code:
        description.architectures = [architecture]
    # Plain numbers are written, whatever the base model's were once made of.
    dropped = ("quantization_config", *(() if trust_remote_code else ("auto_map",)))
    for key in dropped:
        vars(description).pop(key, None)
    description.save_pretrained(folder)
    rewrite(folder / "config.json", for_transformers_4)
    generation, notes = generation_settings(source)
    generation.eos_token_id = encoder.spec.end
    generation.bos_token_id = tokenizer.bos_token_id
    generation.pad_token_id = (
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else encoder.spec.end
    )
    generation.save_pretrained(folder)
    tokenizer.chat_template = chat_template(tokenizer, encoder)
    tokenizer.save_pretrained(folder)
    own_code = trust_remote_code and "auto_map" in read_object(folder / "tokenizer_config.json")
    if not own_code:
        rewrite(folder / "tokenizer_config.json", tokenizer_for_transformers_4)
    return notes


def rewrite(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the JSON object in a file."""
    content = change(read_object(file))
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def for_transformers_4(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of transformers 5 with the keys that transformers 4, and vLLM built on it, read
    instead of `rope_parameters` and `dtype`. Transformers 5 reads the same from it as before:
    `settings.rehearse` compares."""
    both = dict(config)
    if "dtype" in config:
        both["torch_dtype"] = config["dtype"]
    found = config.get("rope_parameters")
    if not isinstance(found, dict) or not found:
        return both
    layers = {name: table for name, table in found.items() if isinstance(table, dict)}
    table = layers.get("full_attention", found)
    theta, share = table.get("rope_theta"), table.get("partial_rotary_factor")
    both["rope_theta"] = theta
    if isinstance(local := layers.get("sliding_attention"), dict):
        both["rope_local_base_freq"] = local.get("rope_theta")
    if share is not None:
        both["partial_rotary_factor"] = share
    both["rope_scaling"] = _scaling(str(config.get("model_type")), table)
    if table.get("rope_type") == "longrope":  # which transformers 4 looks for beside it
        key = "original_max_position_embeddings"
        both[key] = table.get(key, config.get(key))
    return both


def _scaling(model_type: str, table: Mapping[str, Any]) -> dict[str, Any] | None:
    """`rope_scaling` of transformers 4: RoPE without the base and the rotated share."""
    if table.get("rope_type", "default") == "default":
        return None
    # In older files the kind was `type`, and some carry both.
    outside = ("rope_theta", "partial_rotary_factor", "type")
    scaling = {key: value for key, value in table.items() if key not in outside}
    # These take the older name, and nothing beside what they know.
    takes = {
        ("phi3", "longrope"): ("short_factor", "long_factor"),
        ("olmo", "linear"): ("factor",), ("olmo", "dynamic"): ("factor",),
        ("olmo2", "linear"): ("factor",), ("olmo2", "dynamic"): ("factor",),
    }.get((model_type, scaling["rope_type"]), ())  # fmt: skip
    if takes and scaling.keys() - {"rope_type", "original_max_position_embeddings"} == set(takes):
        return {"type": scaling["rope_type"], **{key: scaling[key] for key in takes}}
    return scaling


def tokenizer_for_transformers_4(settings: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with names that both releases know. All that a tokenizer does is in
    tokenizer.json, which PreTrainedTokenizerFast reads as it is."""
    both = {key: value for key, value in settings.items() if key not in OF_THE_CALL}
    both.pop("auto_map", None)
    both["tokenizer_class"] = "PreTrainedTokenizerFast"
    both.setdefault("clean_up_tokenization_spaces", False)  # older releases took true
    extra = both.pop("extra_special_tokens", None)
    if isinstance(extra, list):
        both["additional_special_tokens"] = extra
    elif extra is not None:
        both["extra_special_tokens"] = extra
    return both


def generation_settings(source: Path) -> tuple[GenerationConfig, list[str]]:
    """The generation settings of a model folder, mended where transformers would not save them;
    and what was mended.

    Raises:
        ModelError: generation_config.json is no JSON object.
    """
    file = source / "generation_config.json"
    if not file.is_file():
        return GenerationConfig(), []
    settings = read_object(file)
    reason = _generation_fault(settings)
    if reason is None:
        return GenerationConfig.from_dict(settings), []
    named = [key for key in SAMPLED if settings.get(key) is not None]
    sampled = settings | {"do_sample": True}
    if named and not settings.get("do_sample") and _generation_fault(sampled) is None:
        said = f"{', '.join(named)} set without do_sample: do_sample is set to true"
        return GenerationConfig.from_dict(sampled), [f"generation_config.json has {said}"]
    kept: dict[str, Any] = {}
    for key, value in settings.items():
        if _generation_fault(kept | {key: value}) is None:
            kept[key] = value
    left_out = ", ".join(sorted(settings.keys() - kept.keys()))
    note = f"generation_config.json is invalid ({reason}); left out: {left_out}"
    return GenerationConfig.from_dict(kept), [note]


def _generation_fault(settings: Mapping[str, Any]) -> str | None:
    """Why transformers would not save these generation settings, or generate with them, or None.
    Token ids are left out: those of the training are written."""
    ours = ("eos_token_id", "bos_token_id", "pad_token_id")
    try:
        with read_by_library("invalid", Path("generation_config.json")):
            kept = {key: value for key, value in settings.items() if key not in ours}
            generation = GenerationConfig.from_dict(kept)
            generation.validate(strict=True)
            generation.to_json_string()
            for key, processor in PROCESSORS.items():
                if (value := settings.get(key)) not in (None, OFF.get(key)):
                    processor(value)
    except ModelError as error:
        return error.what.removeprefix("invalid: ")
    return None


def chat_template(tokenizer: Any, encoder: Encoder) -> str:
    """The Jinja template under which this tokenizer gives the training ids.

    Raises:
        ExportError: none does.
    """
    begin = tokenizer.bos_token if encoder.spec.begin else ""
    # After a control token some tokenizers read the first word without its leading space.
    for start in (begin, f"{begin} "):
        template = encoder.template.jinja(start)
        if not template_faults(tokenizer, encoder, template):
            return template
    raise ExportError(
        "the tokenizer gives other ids for the chat template than for training: "
        + template_faults(tokenizer, encoder, encoder.template.jinja(begin))[0]
    )


_PROBE = (Exchange("Hi there", "1. one\n2. two"), Exchange("And\n code?", "```\n  x\n```"))


def template_faults(tokenizer: Any, encoder: Encoder, template: str) -> list[str]:
    """Prefixes of a probe conversation, with and without a system turn, that differ."""
    faults = []
    for system in (None, "Be brief."):
        for count in range(len(_PROBE)):
            ours = encoder.prompt(system, _PROBE[:count], _PROBE[count].user)
            messages = as_messages(system, _PROBE[:count], _PROBE[count].user)
            theirs = tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=True, return_dict=False
            )
            if ours != theirs:
                faults.append(f"{theirs} instead of {ours}")
    return faults


def as_messages(
    system: str | None, exchanges: Sequence[Exchange], question: str
) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    for exchange in exchanges:
        messages.append({"role": "user", "content": exchange.user})
        messages.append({"role": "assistant", "content": exchange.assistant})
    return [*messages, {"role": "user", "content": question}]


# --- the rehearsal -----------------------------------------------------------------------


def rehearse(
    source: Path,
    description: Any,
    tokenizer: Any,
    encoder: Encoder,
    *,
    trust_remote_code: bool,
) -> list[str]:
    """Do with the settings what the end of the training will do, and what a user does then.

    Args:
        source: the prepared folder of the model.
        description: its configuration, as it will be trained.

    Returns:
        What was mended, to be shown in the plan.

    Raises:
        ModelError: the model could not be exported, or its token ids have no embedding.
    """
    refuse_ids_without_rows(source, description.vocab_size, tokenizer, encoder)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            with read_by_library("the trained model could not be written", source):
                notes = write(
                    folder, source, description, tokenizer, encoder, torch.bfloat16,
                    architecture=None, trust_remote_code=trust_remote_code,
                )  # fmt: skip
        except ExportError as error:
            raise ModelError(
                f"the trained model could not be written: {error.what}",
                where=str(source),
                remedy="use a model with another tokenizer, or another data.template",
            ) from error
        _compare(folder, source, description, tokenizer, encoder, trust_remote_code)
    return notes


def refuse_ids_without_rows(source: Path, rows: int, tokenizer: Any, encoder: Encoder) -> None:
    """
    Raises:
        ModelError: the tokenizer gives ids that the embedding table does not have.
    """
    vocabulary = tokenizer.get_vocab()
    token, highest = max(vocabulary.items(), key=lambda item: int(item[1]))
    named = {"eos_token": encoder.spec.end, "bos_token": tokenizer.bos_token_id,
             "pad_token": tokenizer.pad_token_id}  # fmt: skip
    for what, number in {**named, f"token {token!r}": highest}.items():
        if number is not None and not 0 <= number < rows:
            raise ModelError(
                f"the {what} of the tokenizer has id {number:,}, and vocab_size is {rows:,}: it "
                "has no row in the embedding table",
                where=str(source),
                remedy="take tokenizer and weights of one model; embeddings are never resized here",
            )


def _compare(
    folder: Path,
    source: Path,
    description: Any,
    tokenizer: Any,
    encoder: Encoder,
    trust_remote_code: bool,
) -> None:
    """Load what was written as a user would, and compare it with what it was made from."""
    with read_by_library("the trained model could not be loaded again", source):
        loaded = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        read = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        generation = GenerationConfig.from_pretrained(folder)
        probe = "Hi there, 1. one\n2. two été 谢谢"
        pairs = {
            "rope_parameters": (_rope(loaded), _rope(description)),
            "the end of a text": (generation.eos_token_id, encoder.spec.end),
            "the ids of a text": (read(probe).input_ids, tokenizer(probe).input_ids),
            "special tokens": (read.special_tokens_map, tokenizer.special_tokens_map),
            "the ids of a chat": (template_faults(read, encoder, read.chat_template), []),
        }  # fmt: skip
    for what, (found, expected) in pairs.items():
        if found != expected:
            raise ModelError(
                f"the trained model would not be read as it was trained: {what} would be {found} "
                f"instead of {expected}",
                where=str(source),
                remedy="report this model",
            )


def _rope(description: Any) -> dict[str, Any]:
    """What is in the RoPE parameters, whatever the name of the kind: `type` of older files says
    the same as `rope_type`."""
    found = vars(description).get("rope_parameters") or {}

    def bare(table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        return {key: bare(value) for key, value in table.items() if key != "type"}

    kept: dict[str, Any] = bare(found)
    return kept
