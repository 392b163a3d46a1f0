"""What is written beside the weights, rehearsed before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GenerationConfig

from sft_job import settings
from sft_job.encode import Encoder, spec_of
from sft_job.errors import ModelError
from sft_job.model import describe
from sft_job.settings import for_transformers_4, generation_settings, tokenizer_for_transformers_4
from sft_job.tokenizer import load_tokenizer
from tests.runs import make_model

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [2.0],
        "original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0}  # fmt: skip
FULL = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def without(table: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in keys}


# --- both releases -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "rope", "added"),
    [
        (
            "llama",
            {"rope_type": "default", "rope_theta": 1e6},
            {"rope_theta": 1e6, "rope_scaling": None},
        ),
        ("llama", LLAMA3, {"rope_theta": 5e5, "rope_scaling": without(LLAMA3, "rope_theta")}),
        (
            "llama",
            {"rope_type": "linear", "type": "linear", "rope_theta": 1e4, "factor": 2.0},
            {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        (
            "glm4",
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            {"rope_theta": 1e4, "rope_scaling": None, "partial_rotary_factor": 0.5},
        ),
        (
            "gemma3_text",
            {"full_attention": FULL, "sliding_attention": LOCAL},
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4,
             "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        ),
        (
            "phi3",
            LONG,
            {"rope_theta": 1e4, "partial_rotary_factor": 1.0,
             "original_max_position_embeddings": 4096,
             "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        ),
        (
            "olmo2",
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        ),
        # what the older release does not know is refused there, not read as something else
        ("olmo2", LLAMA3, {"rope_theta": 5e5, "rope_scaling": without(LLAMA3, "rope_theta")}),
        ("opt", None, {}),
    ],
)  # fmt: skip
def test_rope_and_dtype_in_the_keys_of_both_releases(
    family: str, rope: Any, added: dict[str, Any]
) -> None:
    """Nothing is taken away; the older keys come beside the newer ones."""
    config = {"model_type": family, "dtype": "bfloat16"}
    if rope is not None:
        config["rope_parameters"] = rope
    assert for_transformers_4(config) == config | {"torch_dtype": "bfloat16"} | added


def test_a_tokenizer_with_names_of_both_releases() -> None:
    """The class and the key of further special tokens; how it was read is nobody's business."""
    given = {"tokenizer_class": "TokenizersBackend", "eos_token": "</s>", "is_local": True,
             "local_files_only": True, "extra_special_tokens": ["<a>"], "auto_map": {}}  # fmt: skip
    assert tokenizer_for_transformers_4(given) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "additional_special_tokens": ["<a>"],
        "clean_up_tokenization_spaces": False,
    }


# --- generation settings -------------------------------------------------------------------


def generation(folder: Path, content: Any) -> tuple[GenerationConfig, list[str]]:
    folder.mkdir(exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(content))
    return generation_settings(folder)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"temperature": 0.6, "do_sample": True},
        {"top_k": 0, "typical_p": 1.0, "eta_cutoff": 0.0, "do_sample": True},
        {"max_length": 4096, "eos_token_id": [1, 2], "pad_token_id": -1},
        {"transformers_version": "4.31.0", "_from_model_config": True},
    ],
)
def test_valid_generation_settings_are_kept(content: dict[str, Any], tmp_path: Path) -> None:
    """Token ids of others are no fault: those of the training are written."""
    found, notes = generation(tmp_path / "m", content)
    assert notes == []
    assert found.to_dict() == GenerationConfig.from_dict(content).to_dict()


@pytest.mark.parametrize(
    ("content", "sampled", "note"),
    [
        (
            {"temperature": 0.9, "top_p": 0.6},
            True,
            "generation_config.json has temperature, top_p set without do_sample: do_sample is set",
        ),
        ({"top_k": 5, "do_sample": False}, True, "has top_k set without do_sample"),
        ({"early_stopping": True}, None, "left out: early_stopping"),
        ({"num_return_sequences": 3}, None, "left out: num_return_sequences"),
        ({"max_new_tokens": "many", "min_p": 0.1, "do_sample": True}, True, "out: max_new_tokens"),
        ({"cache_implementation": "none such"}, None, "left out: cache_implementation"),
        # saved without a word, and found by whoever generates with the trained model
        ({"temperature": "hot", "do_sample": True}, True, "left out: temperature"),
        ({"temperature": 0.0, "do_sample": True}, True, "left out: temperature"),
        ({"top_p": 1.5, "do_sample": True}, True, "left out: top_p"),
        ({"top_k": 2.5, "do_sample": True}, True, "left out: top_k"),
        ({"repetition_penalty": -1.0}, None, "left out: repetition_penalty"),
    ],
)
def test_invalid_generation_settings_are_mended(
    content: dict[str, Any], sampled: bool | None, note: str, tmp_path: Path
) -> None:
    """transformers reads them and refuses to save them, which an export would find out last."""
    found, notes = generation(tmp_path / "m", content)
    assert len(notes) == 1
    assert note in notes[0]
    assert found.do_sample is sampled
    found.eos_token_id = 2  # now it is not as it was read, and would be checked strictly
    found.save_pretrained(tmp_path / "out")


def test_generation_settings_that_are_no_object_are_refused(tmp_path: Path) -> None:
    """A damaged file is not mended but fetched again."""
    with pytest.raises(ModelError, match=r"generation_config\.json: a JSON list is in it"):
        generation(tmp_path / "m", [1])


# --- the rehearsal -------------------------------------------------------------------------


def rehearse(folder: Path, **changes: Any) -> list[str]:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    tokenizer = load_tokenizer(folder)
    encoder = Encoder(spec_of(tokenizer), "vicuna", 128, "truncate")
    description = describe(folder, trust_remote_code=False)
    return settings.rehearse(folder, description, tokenizer, encoder, trust_remote_code=False)


def test_a_good_model_has_nothing_to_be_said(model: Path) -> None:
    """Nor is anything left behind in its folder."""
    before = sorted(path.name for path in model.iterdir())
    assert rehearse(model) == []
    assert sorted(path.name for path in model.iterdir()) == before


def test_what_is_mended_is_said(model: Path) -> None:
    """Before step 1, to be shown in the plan."""
    (model / "generation_config.json").write_text('{"temperature": 0.5}')
    assert rehearse(model) == [
        "generation_config.json has temperature set without do_sample: do_sample is set to true"
    ]


@pytest.mark.parametrize(
    "left_over",
    [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}},
    ],
)
def test_what_the_export_does_not_need_is_not_in_it(
    left_over: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    """Quantisation of the weights' past, and code that was not run, would keep it from loading."""
    rehearse(model, **left_over)
    tokenizer = load_tokenizer(model)
    encoder = Encoder(spec_of(tokenizer), "vicuna", 128, "truncate")
    (tmp_path / "out").mkdir()
    settings.write(
        tmp_path / "out", model, describe(model, trust_remote_code=False), tokenizer, encoder,
        torch.bfloat16, architecture="LlamaForCausalLM", trust_remote_code=False,
    )  # fmt: skip
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not left_over.keys() & written.keys()
    assert (written["use_cache"], written["dtype"], written["torch_dtype"]) == (
        True, "bfloat16", "bfloat16",
    )  # fmt: skip
    assert written["architectures"] == ["LlamaForCausalLM"]


def test_the_description_is_not_changed_by_being_written(model: Path) -> None:
    """The rehearsal comes before the training, which goes on with it."""
    description = describe(model, trust_remote_code=False)
    before = description.to_dict()
    tokenizer = load_tokenizer(model)
    encoder = Encoder(spec_of(tokenizer), "vicuna", 128, "truncate")
    settings.rehearse(model, description, tokenizer, encoder, trust_remote_code=False)
    assert description.to_dict() == before


def test_ids_without_rows_are_refused(model: Path) -> None:
    """A token that was added to the tokenizer alone: a worker would find an index out of range."""
    rows = json.loads((model / "config.json").read_text())["vocab_size"]
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens([f"<new{n}>" for n in range(rows - len(tokenizer) + 1)])
    tokenizer.eos_token = "<new0>"
    tokenizer.save_pretrained(model)
    with pytest.raises(ModelError, match=rf"has id {rows}, and vocab_size is {rows}"):
        rehearse(model)


def test_the_stop_token_without_a_row_is_named(model: Path) -> None:
    """By what it is, before the rest of the vocabulary."""
    tokenizer = load_tokenizer(model)
    rows = tokenizer.eos_token_id
    encoder = Encoder(spec_of(tokenizer), "vicuna", 128, "truncate")
    with pytest.raises(
        ModelError, match=r"eos_token of the tokenizer has id 2, and vocab_size is 2"
    ):
        settings.refuse_ids_without_rows(model, rows, tokenizer, encoder)


@pytest.mark.parametrize("rope", [LLAMA3, {"type": "linear", "factor": 2.0}, None])
def test_positions_are_read_again_as_they_were_trained(rope: Any, model: Path) -> None:
    """Both forms in one file mean one thing, old names included."""
    changes = {"rope_scaling": rope, "rope_parameters": None, "rope_theta": 1e6}
    assert rehearse(model, **changes) == []
    loaded = AutoConfig.from_pretrained(model)
    assert loaded.rope_parameters["rope_theta"] == (5e5 if rope is LLAMA3 else 1e6)
