"""Model families: which of them train here, and what keeps the others from it.

Tables of what the pinned transformers has, and rules about the keys of config.json, so that a
kind that is in no table is recognised as well. Read on a login node: no torch, no transformers.
`python -m tests.families` trains a tiny model of every family and compares; the tests compare
names and defaults with the installed release.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Obstacle:
    """What keeps a model from being trained, or from being packed.

    Args:
        what: as in "mixtral WHAT".
        key: of config.json, which says so.
        own: `model.attention: own` trains it, one sample per forward pass.
        code: it holds for models that bring their own Python code as well.
    """

    what: str
    key: str = "model_type"
    own: bool = False
    code: bool = False


# Decoders whose attention is a kernel of ours and whose samples share a row.
_PACKED = """
    apertus arcee biogpt cohere cohere2 cwm diffllama ernie4_5 exaone4 gemma gemma2 gemma3_text
    glm glm4 granite helium hunyuan_v1_dense hyperclovax internlm3 iquestcoder jais2
    llama ministral ministral3 mistral nanochat olmo olmo2 olmo3 opt persimmon phi3 qwen2 qwen3
    seed_oss smollm3 starcoder2 vaultgemma
"""

# What cannot share a row, and trains one sample at a time.
_OWN = {
    "has attention of its own, which no kernel here can replace": "falcon",
    "does not tell its attention where samples begin": "gpt_neox_japanese nemotron stablelm",
    "attends through sinks, which no kernel here does": "granite_swa",
    "mixes neighbouring tokens in convolutions or recurrent layers, which samples of a row would "
    "share": "bamba falcon_h1 lfm2 qwen3_5_text",
}

# What does not train here at all.
_NEVER = {
    "is a mixture of experts, which is not supported": """
        afmoe aria_text axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_v2 deepseek_v3
        deepseek_v32 deepseek_v4 doge dots1 dots3_note_text ernie4_5_moe exaone_moe flex_olmo flint
        glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss granitemoe granitemoe_swa granitemoehybrid
        granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 inkling2_text inkling_text jamba jetmoe
        kimi_linear kolibri1 laguna lfm2_moe llama4_text longcat_flash mellum mimo_v2_flash minimax
        minimax_m2 minimax_m3_vl_text mixtral nemotron_h olmoe phimoe qwen2_moe qwen3_5_moe_text
        qwen3_moe qwen3_next qwen4_exp_text solar_open zaya""",
    "is more than a language model (images, sound or video), which is not supported": """
        dots3_note emu3 fuyu gemma3 gemma3n gemma4 gemma4_assistant gemma4_unified
        gemma4_unified_assistant git got_ocr2 llama4 mllama moshi moss_transcribe_diarize musicgen
        musicgen_melody phi4_multimodal qwen3_5 qwen3_5_moe qwen4_exp""",
    "is not a decoder alone": """
        bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert
        data2vec-text electra ernie marian mbart megatron-bert mvp pegasus plbart prophetnet
        reformer rembert roberta roberta-prelayernorm roc_bert roformer trocr whisper xlm
        xlm-roberta xlm-roberta-xl xlnet xmod""",
    "has a bias in its language-model head, which the loss leaves out":
        "codegen ctrl gptj modernbert-decoder phi",
    "changes its logits before the loss": "gemma3n_text minicpm3 recurrent_gemma",
    "computes in a few bits while it is trained": "bitnet",
    "mixes tokens in recurrent layers, and is not of the LLaMA kind":
        "falcon_mamba lfm3 mamba mamba2 olmo_hybrid rwkv xlstm zamba zamba2",
    "is not of the LLaMA kind": """
        bloom blt cohere_compass_text cpmant gemma4_text gemma4_unified_text gpt-sw3 gpt2
        gpt_bigcode gpt_neo gpt_neox hrm_text mpt openai-gpt xglm youtu""",
}  # fmt: skip

PACKED = frozenset(_PACKED.split())
OWN = {name: what for what, names in _OWN.items() for name in names.split()}
NEVER = {name: what for what, names in _NEVER.items() for name in names.split()}
KNOWN = PACKED | OWN.keys() | NEVER.keys()

_GEMMA_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
# What a family takes for a key that its config.json leaves out, where that is not None or 0.
DEFAULTS: dict[str, dict[str, Any]] = {
    "biogpt": {"attention_probs_dropout_prob": 0.1, "tie_word_embeddings": True},
    "cohere": {"logit_scale": 0.0625, "tie_word_embeddings": True},
    "cohere2": {"logit_scale": 0.0625, "tie_word_embeddings": True, "sliding_window": 4096},
    "cwm": {"sliding_window": 8192},
    "ernie4_5": {"tie_word_embeddings": True},
    "exaone4": {"sliding_window": 4096},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {**_GEMMA_CAPS, "tie_word_embeddings": True, "sliding_window": 4096},
    "gemma3_text": {"tie_word_embeddings": True, "sliding_window": 4096},
    "ministral": {"sliding_window": 4096},
    "mistral": {"sliding_window": 4096},
    "nanochat": {"final_logit_softcapping": 15.0},
    "olmo3": {"sliding_window": 4096},
    "opt": {"tie_word_embeddings": True},
    "qwen2": {"sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"sliding_window": 4096, "max_window_layers": 28},
    "seed_oss": {"attention_dropout": 0.1},
    "smollm3": {"tie_word_embeddings": True},
    "starcoder2": {"tie_word_embeddings": True},
    "vaultgemma": {**_GEMMA_CAPS, "tie_word_embeddings": True, "sliding_window": 4096},
}

# Keys with which a family changes its logits, and the value that changes nothing.
LOGITS: dict[str, tuple[str, float | None]] = {
    "cohere": ("logit_scale", 1.0),
    "cohere2": ("logit_scale", 1.0),
    "gemma2": ("final_logit_softcapping", None),
    "gemma3_text": ("final_logit_softcapping", None),
    "granite": ("logits_scaling", 1.0),
    "granite_swa": ("logits_scaling", 1.0),
    "falcon_h1": ("lm_head_multiplier", 1.0),
    "hyperclovax": ("logits_scaling", 1.0),
    "nanochat": ("final_logit_softcapping", None),
    "vaultgemma": ("final_logit_softcapping", None),
}
CAPPED = frozenset({"gemma2", "vaultgemma"})  # attn_logit_softcapping; others do not read it

# Families whose positions cannot be scaled linearly, and why.
_LEARNED = "are learned, one vector each"
FIXED_POSITIONS = {
    "biogpt": _LEARNED,
    "opt": _LEARNED,
    "phi3": "can be scaled by LongRoPE alone",
}

# One RoPE for each type of layer, under `rope_parameters`.
NESTED_ROPE = frozenset({"gemma3_text", "olmo3"})

# Which layers attend through `sliding_window`: all of them; where `layer_types` does not say so,
# all, all but every n-th (the family's n; a key may say another), or as `_some_slide` has it.
WINDOWS: dict[str, str | int] = {
    "cohere2": 4, "cwm": 4, "exaone4": 4, "gemma2": 2, "gemma3_text": 6, "olmo3": 4,
    "vaultgemma": 2, "ministral": "types", "ministral3": "all", "mistral": "all", "phi3": "all",
    "starcoder2": "all", "qwen2": "upper", "qwen3": "upper", "smollm3": "nope",
}  # fmt: skip
_SWITCHED = ("qwen2", "qwen3", "smollm3")  # only with use_sliding_window
_PATTERN_KEYS = ("sliding_window_pattern", "_sliding_window_pattern")

# Names of models inside a model: vision_config, text_config, ...
_INNER = re.compile(
    r"(text|vision|visual|image|video|audio|speech|language|llm|thinker|talker|encoder|decoder|"
    r"patcher|vq|mm)\w*_config"
)
_EXPERTS = re.compile(r"(\w+_)?(num|n)_(\w+_)?experts|experts_num|zero_expert_num")
_OF_EXPERTS = re.compile(r"moe_\w+|\w*router\w*|\w*experts?(_\w+)?")


def settled(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what its family takes for keys that it leaves out."""
    return DEFAULTS.get(str(config.get("model_type")), {}) | dict(config)


def obstacles(config: Mapping[str, Any]) -> Iterator[Obstacle]:
    """Everything that keeps a model from being trained or packed, the most telling first."""
    name = str(config.get("model_type"))
    if config.get("is_encoder_decoder"):
        yield Obstacle(
            "is an encoder and a decoder, not a decoder alone", "is_encoder_decoder", code=True
        )
    for key, value in config.items():
        if isinstance(value, Mapping) and value and _INNER.fullmatch(key):
            yield Obstacle(
                "is a wrapper around a language model and others, which is not supported",
                key,
                code=True,
            )
    yield from _experts(name, config)
    if config.get("per_layer_config"):
        yield Obstacle("has layers of different shapes", "per_layer_config", code=True)
    if config.get("use_bidirectional_attention") or config.get("is_causal") is False:
        key = "is_causal" if config.get("is_causal") is False else "use_bidirectional_attention"
        yield Obstacle("lets tokens see later ones, which a decoder must not", key, code=True)
    if name in NEVER:
        yield Obstacle(NEVER[name])
    elif name not in KNOWN:
        yield Obstacle("is no causal language model that transformers knows")
    if (rule := LOGITS.get(name)) and (value := config.get(rule[0], rule[1])) != rule[1]:
        yield Obstacle(f"changes its logits before the loss ({rule[0]} {value})", rule[0])
    if name in OWN:
        yield Obstacle(OWN[name], own=True)
    if name in CAPPED and (cap := config.get("attn_logit_softcapping")):
        yield Obstacle(
            f"caps its attention scores (attn_logit_softcapping {cap}), which no kernel here does",
            "attn_logit_softcapping",
            own=True,
        )


def _experts(name: str, config: Mapping[str, Any]) -> Iterator[Obstacle]:
    """By the number of experts; in a family that is in no table also by any key about them."""
    what = "is a mixture of experts, which is not supported"
    numbers = {key: value for key, value in _flat(config) if _EXPERTS.fullmatch(key)}
    for key, value in numbers.items():
        several = value if isinstance(value, list) else [value]
        if any(isinstance(n, int | float) and n > 1 for n in several) and "shared" not in key:
            yield Obstacle(what, key, code=True)
    if name in KNOWN or numbers:
        return
    for key, value in _flat(config):
        if _OF_EXPERTS.fullmatch(key) and value not in (None, 0, False, "", [], {}):
            yield Obstacle(what, key, code=True)
    if "moe" in name:
        yield Obstacle(what, code=True)


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keys of config.json and of what lies in it, as DBRX has its ffn_config."""
    for key, value in config.items():
        yield key, value
        if isinstance(value, Mapping):
            yield from value.items()


def window(config: Mapping[str, Any], layers: int) -> int | None:
    """Tokens that a layer can look back, the least of all layers; None without a limit.

    Args:
        config: as from `settled`.
        layers: number of decoder layers.
    """
    name, types = str(config.get("model_type")), config.get("layer_types")
    rule = WINDOWS.get(name)
    if rule is None or (name in _SWITCHED and not config.get("use_sliding_window")):
        return None
    size = config.get("sliding_window")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        return None
    if isinstance(types, list) and rule != "all":
        return size if "sliding_attention" in types else None
    return size if _some_slide(config, rule, layers) else None


def _some_slide(config: Mapping[str, Any], rule: str | int, layers: int) -> bool:
    """Whether any layer does, by the family's own rule."""
    if rule == "upper":
        return layers > int(config["max_window_layers"])
    if rule == "nope":
        listed, every = config.get("no_rope_layers"), config.get("no_rope_layer_interval") or 4
        return 0 in listed if isinstance(listed, list) else layers >= every
    if isinstance(rule, int):
        given = (config.get(key) for key in _PATTERN_KEYS)
        return next((n for n in given if n is not None), rule) != 1
    return True
