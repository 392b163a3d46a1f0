"""The tables of model families say what the installed transformers does."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sft_job import families
from sft_job import model as models
from sft_job.errors import ModelError
from sft_job.facts import read_facts
from sft_job.families import DEFAULTS, KNOWN, LOGITS, NEVER, OWN, PACKED, WINDOWS
from tests.families import tiny


def test_every_language_model_of_transformers_is_in_a_table() -> None:
    """And in one alone: a new release's families are looked at before they are trained."""
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() == KNOWN
    assert not (PACKED & OWN.keys()) | (PACKED & NEVER.keys()) | (OWN.keys() & NEVER.keys())
    for table in (DEFAULTS, WINDOWS, families.FIXED_POSITIONS, families.NESTED_ROPE):
        assert set(table) <= PACKED
    assert LOGITS.keys() <= PACKED | OWN.keys()


@pytest.mark.parametrize("family", sorted(PACKED))
def test_attention_of_packed_families_can_be_replaced(family: str) -> None:
    """It goes through transformers' AttentionInterface, and is handed what comes beside."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    module = importlib.import_module(getattr(transformers, name).__module__)
    assert "ALL_ATTENTION_FUNCTIONS.get_interface(" in inspect.getsource(module)


@pytest.mark.parametrize("family", sorted(PACKED | OWN.keys()))
def test_files_of_trained_families_have_the_models_own_names(family: str) -> None:
    """transformers renames nothing on the way in that an export would have to name back; where it
    takes away a prefix, files without it are as good."""
    changes = get_checkpoint_conversion_mapping(family) or []
    assert [change for change in changes if not isinstance(change, PrefixChange)] == []


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [(family, key, value) for family, table in DEFAULTS.items() for key, value in table.items()],
)
def test_defaults_are_those_of_transformers(family: str, key: str, value: Any) -> None:
    """What a configuration takes for a key that its file leaves out."""
    fields = {field.name: field.default for field in dataclasses.fields(CONFIG_MAPPING[family])}
    assert fields[key] == value


NEUTRAL = (None, False, 0, 0.0)


@pytest.mark.parametrize("family", sorted(PACKED))
def test_no_default_is_forgotten(family: str) -> None:
    """Ties, windows, caps, scales and dropout that a family has by default are in the table."""
    watched = {
        "tie_word_embeddings", "sliding_window", "attention_dropout", "logit_scale",
        "final_logit_softcapping", "attention_probs_dropout_prob", "logits_scaling",
    }  # fmt: skip
    if family in families.CAPPED:
        watched.add("attn_logit_softcapping")
    if family not in WINDOWS:
        watched.discard("sliding_window")
    neutral = (*NEUTRAL, 1.0) if family in LOGITS else NEUTRAL
    for field in dataclasses.fields(CONFIG_MAPPING[family]):
        if field.name in watched and field.default not in neutral:
            assert DEFAULTS[family][field.name] == field.default


# --- what is refused -----------------------------------------------------------------------


def written(folder: Path, description: Any, **changes: Any) -> Path:
    """A folder with a config.json alone."""
    folder.mkdir(exist_ok=True)
    content = json.loads(description.to_json_string(use_diff=False)) | changes
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("family", sorted(PACKED))
def test_what_trains_is_not_refused(family: str, tmp_path: Path) -> None:
    """A tiny configuration of every packed family, as transformers writes it."""
    description = tiny(family)
    if family == "ministral3":
        description = tiny(family, rope_parameters=None)
    facts = read_facts(written(tmp_path / "m", description))
    assert (facts.obstacles, facts.built_in, facts.model_type) == ((), True, family)


@pytest.mark.parametrize("family", sorted(OWN))
def test_what_trains_alone_says_how(family: str, tmp_path: Path) -> None:
    """One obstacle, which the model's own attention lifts."""
    facts = read_facts(written(tmp_path / "m", tiny(family)))
    assert [obstacle.own for obstacle in facts.obstacles] == [True]


@pytest.mark.parametrize("family", sorted(NEVER.keys() - {"gemma4_assistant"}))
def test_what_does_not_train_is_refused_by_name(family: str, tmp_path: Path) -> None:
    """From the configuration that its class makes by default, whatever keys it has."""
    description = AutoConfig.for_model(family)
    with pytest.raises(ModelError) as error:
        read_facts(written(tmp_path / "m", description))
    assert str(error.value).startswith(f"{tmp_path}/m/config.json: {description.model_type} ")
    assert "-> use a dense decoder of the LLaMA kind" in str(error.value)


LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 32,
         "max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"model_type": "mixtral"}, "is a mixture of experts"),
        ({"model_type": "new_moe"}, "is a mixture of experts"),
        ({"model_type": "new", "num_experts": 8}, "is a mixture of experts.*num_experts"),
        ({"model_type": "new", "n_routed_experts": 64}, "is a mixture of experts"),
        ({"model_type": "new", "num_local_experts": 8}, "is a mixture of experts"),
        ({"model_type": "new", "moe_num_experts": [8, 8]}, "is a mixture of experts"),
        ({"model_type": "new", "ffn_config": {"moe_num_experts": 4}}, "is a mixture of experts"),
        ({"model_type": "new", "moe_intermediate_size": 64}, "is a mixture of experts"),
        ({"model_type": "new", "router_aux_loss_coef": 0.1}, "is a mixture of experts"),
        ({"num_experts": 8}, "is a mixture of experts"),
        ({"is_encoder_decoder": True}, "is an encoder and a decoder"),
        ({"vision_config": {"depth": 2}}, "is a wrapper around a language model.*vision_config"),
        ({"text_config": {"model_type": "llama"}}, "is a wrapper around a language model"),
        ({"audio_encoder_config": {"a": 1}}, "is a wrapper around a language model"),
        ({"per_layer_config": {"0": {"head_dim": 4}}}, "has layers of different shapes"),
        ({"use_bidirectional_attention": True}, "lets tokens see later ones"),
        ({"is_causal": False}, "lets tokens see later ones"),
        ({"model_type": "new"}, "is no causal language model that transformers knows"),
        ({"model_type": "t5"}, "is no causal language model that transformers knows"),
        ({"model_type": "granite", "logits_scaling": 8.0}, "changes its logits.*logits_scaling 8"),
        ({"model_type": "cohere"}, "changes its logits before the loss .logit_scale 0.0625"),
        ({"model_type": "gemma2", "attn_logit_softcapping": None}, "final_logit_softcapping 30"),
        ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, "changes its logits"),
        ({"model_type": "nanochat"}, "changes its logits before the loss"),
        ({"model_type": "phi"}, "has a bias in its language-model head"),
        ({"model_type": "bitnet"}, "computes in a few bits"),
        ({"model_type": "mamba2"}, "mixes tokens in recurrent layers"),
    ],
)
def test_kinds_are_recognised_by_keys_too(
    config: dict[str, Any], what: str, tmp_path: Path
) -> None:
    """So that a family of tomorrow is met as well."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | config))
    with pytest.raises(ModelError, match=what):
        read_facts(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"num_experts": 1, "moe_topk": 1},
        {"num_local_experts": 0},
        {"num_experts": None, "num_shared_experts": 4},
        {"vision_config": None, "quantization_config": {"bits": 4}},
        {"model_type": "granite", "logits_scaling": 1.0},
        {"model_type": "cohere", "logit_scale": 1.0},
        {"model_type": "nanochat", "final_logit_softcapping": None},
        {"use_bidirectional_attention": False, "is_causal": True},
        {"attn_logit_softcapping": 50.0},  # of another family
    ],
)
def test_neutral_values_are_no_obstacle(config: dict[str, Any], tmp_path: Path) -> None:
    """One expert is none; a factor of 1 and a cap of null change nothing."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | config))
    assert read_facts(tmp_path).obstacles == ()


def test_code_of_their_own_is_asked_about_later(tmp_path: Path) -> None:
    """What the type alone says need not hold for it; what its keys say does."""
    code = {"auto_map": {"AutoModelForCausalLM": "modeling.X"}}
    for config in ({"model_type": "new"}, {"model_type": "phi"}):
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | config | code))
        facts = read_facts(tmp_path)
        assert facts.remote_code
        assert len(facts.obstacles) == 1
    (tmp_path / "config.json").write_text(
        json.dumps(LLAMA | {"model_type": "new", "num_experts": 8} | code)
    )
    with pytest.raises(ModelError, match="is a mixture of experts"):
        read_facts(tmp_path)


# --- windows -------------------------------------------------------------------------------

LAYERS = 4
_SETTINGS: dict[str, list[Any]] = {
    "sliding_window": [..., None, 16],
    "use_sliding_window": [..., True, False],
    "layer_types": [..., ["full_attention"] * LAYERS,
                    ["full_attention", "sliding_attention"] * (LAYERS // 2)],
    "max_window_layers": [..., 0, LAYERS],
    "sliding_window_pattern": [..., 1, 2],
    "no_rope_layers": [..., [1] * LAYERS, [1, 0] * (LAYERS // 2)],
}  # fmt: skip
READS = {
    "qwen2": ("use_sliding_window", "layer_types", "max_window_layers"),
    "qwen3": ("use_sliding_window", "layer_types", "max_window_layers"),
    "smollm3": ("use_sliding_window", "layer_types", "no_rope_layers"),
    "cohere2": ("layer_types", "sliding_window_pattern"),
    "gemma3_text": ("layer_types", "sliding_window_pattern"),
    "exaone4": ("layer_types", "sliding_window_pattern"),
    **dict.fromkeys(("mistral", "ministral3", "phi3", "starcoder2"), ()),
}


def window_of(model: Any) -> int | None:
    """What the layers of a model attend through, by what they hand to their attention."""
    found = []
    for module in model.modules():
        if not hasattr(module, "q_proj") and not hasattr(module, "qkv_proj"):
            continue
        size = module.__dict__.get("sliding_window", model.config.sliding_window)
        if module.__dict__.get("is_sliding", True) is False:
            size = None
        found.append(size)
    assert len(found) == LAYERS
    return min((size for size in found if size is not None), default=None)


@pytest.mark.parametrize("family", sorted(WINDOWS))
def test_windows_are_those_of_the_model(family: str) -> None:
    """Every combination of the keys that a family reads, against its attention layers."""
    keys = ["sliding_window", *READS.get(family, ("layer_types",))]
    unsaid = {"layer_types": None} if family == "gemma3_text" else {}  # `tiny` says it otherwise
    for values in itertools.product(*(_SETTINGS[key] for key in keys)):
        given = {k: v for k, v in zip(keys, values, strict=True) if v is not ...}
        try:
            description = tiny(family, **(unsaid | given))
        except (ZeroDivisionError, StrictDataclassError):  # which this family does not take
            continue
        model = models.empty(description, where=Path("m"), trust_remote_code=False)
        config = families.settled({"model_type": family} | given)
        assert families.window(config, LAYERS) == window_of(model), given
