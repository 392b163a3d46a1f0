"""Which model families train: a tiny random model of every one that transformers knows is trained.

    python -m tests.families [--engine zero3] [TYPE ...]

Takes about half an hour for all; prints a line for each and ends with 1 where `sft_job.families`
says otherwise.
"""

from __future__ import annotations

from typing import Any

VOCABULARY = 504
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Where these sizes do not fit, or logits would be changed.
_UNCAPPED = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
CHANGES: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "gemma2": _UNCAPPED,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "nanochat": {"final_logit_softcapping": None},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "qwen3_5_text": {"linear_num_key_heads": 2, "linear_num_value_heads": 4,
                     "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "vaultgemma": _UNCAPPED,
    "youtu": {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
              "qk_nope_head_dim": 8, "num_key_value_heads": 4},
}  # fmt: skip


def tiny(family: str, **changes: Any) -> Any:
    """A configuration of a family with small sizes."""
    from transformers import AutoConfig

    known = AutoConfig.for_model(family).to_dict()
    fitting = {key: value for key, value in SIZES.items() if key in known}
    if family in ("youtu", "falcon"):  # derived there
        fitting.pop("head_dim", None)
    return AutoConfig.for_model(family, **(fitting | CHANGES.get(family, {}) | changes))
