"""Positions are what the plan says: set where it takes effect, and compared with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from sft_job import families, positions
from sft_job import model as models
from sft_job.errors import ModelError
from tests.families import tiny

ROTARY = sorted(families.PACKED - families.FIXED_POSITIONS.keys() - {"ministral3"})


def built(description: Any) -> Any:
    return models.empty(description, where=Path("m"), trust_remote_code=False)


def frequencies(model: Any) -> dict[str, torch.Tensor]:
    """Of the rotary embedding, by the name of the buffer."""
    return {
        name.rpartition(".")[2]: buffer
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and "original" not in name
    }


@pytest.mark.parametrize("family", ROTARY)
def test_linear_scaling_takes_effect_in_every_family(family: str) -> None:
    """The model's own frequencies are divided, and written into a configuration that says so."""
    native, description = frequencies(built(tiny(family))), tiny(family)
    if "rope_type" in description.rope_parameters:  # Apertus and CWM come scaled
        theta, share = description.rope_parameters["rope_theta"], "partial_rotary_factor"
        plain = {"rope_type": "default", "rope_theta": theta}
        if share in description.rope_parameters:
            plain[share] = description.rope_parameters[share]
        description.rope_parameters = dict(plain)
        native = frequencies(built(description))
    positions.scale(description, 2.0)
    model = built(description)
    positions.check(model, 2.0)
    scaled = frequencies(model)
    for name, values in native.items():
        divisor = 1.0 if name.startswith("sliding") else 2.0
        torch.testing.assert_close(scaled[name], values / divisor, rtol=1e-6, atol=0)
    assert any(not torch.equal(scaled[name], native[name]) for name in native)


@pytest.mark.parametrize(
    "table",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "longrope", "short_factor": [1.5] * 8, "long_factor": [4.0] * 8,
         "original_max_position_embeddings": 64},
    ],
)  # fmt: skip
def test_what_config_json_says_is_what_the_model_computes(table: dict[str, Any]) -> None:
    """Every kind by its own function, the factor of the cosines included."""
    model = built(tiny("llama", rope_parameters=table | {"rope_theta": 1e5}))
    positions.check(model, None)
    for name, buffer in model.named_buffers():
        if name.endswith("rotary_emb.inv_freq"):
            buffer[-1] *= 1.01
    with pytest.raises(ModelError, match=rf"the {table['rope_type']} positions of llama are not"):
        positions.check(model, None)


def test_the_factor_of_the_cosines_counts() -> None:
    """YaRN has one, whatever the frequencies are."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    model = built(tiny("llama", rope_parameters=yarn | {"rope_theta": 1e5}))
    model.model.rotary_emb.attention_scaling = 1.0
    with pytest.raises(ModelError, match="the yarn positions of llama are not what the model"):
        positions.check(model, None)


def test_a_scaling_without_effect_is_refused() -> None:
    """The plan says linear, and the model rotates as before: another model, silently."""
    with pytest.raises(ModelError, match=r"linear positions of llama.*slowest frequency is"):
        positions.check(built(tiny("llama")), 2.0)
    nested = tiny("gemma3_text")
    nested.rope_parameters = nested.rope_parameters | {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(ModelError, match=r"linear positions of gemma3_text .* of full_attention"):
        positions.check(built(nested), 2.0)


def test_positions_that_nobody_reads_are_not_scaled() -> None:
    """Learned ones, and those of code that a model brings."""
    with pytest.raises(ModelError, match=r"positions of opt cannot be scaled.*\n.*model.rope=none"):
        positions.scale(tiny("opt"), 2.0)

    class Own(nn.Module):
        config = tiny("llama")

    with pytest.raises(ModelError, match="positions of llama cannot be scaled: no rotary embeddi"):
        positions.check(Own(), 2.0)
    positions.check(Own(), None)


def test_hunyuans_stretched_base_is_its_own() -> None:
    """Its files call it dynamic; it depends on no length."""
    table = {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0, "rope_theta": 1e4}
    model = built(tiny("hunyuan_v1_dense", rope_parameters=table))
    positions.check(model, None)
    assert float(frequencies(model)["inv_freq"][-1]) < 1e-4


def test_both_places_of_the_base_frequency_are_one() -> None:
    """rope_theta beside or inside, the older name of the scaling, the base of local layers."""
    old = AutoConfig.for_model(
        "llama", rope_theta=1e6, rope_scaling={"type": "linear", "factor": 2}
    )
    model = built(old)
    positions.check(model, None)
    assert float(frequencies(model)["inv_freq"][-1]) == pytest.approx(1e6 ** (-126 / 128) / 2)
    local = AutoConfig.for_model("gemma3_text", rope_theta=2e6, rope_local_base_freq=3e4)
    found = frequencies(built(local))
    assert float(found["full_attention_inv_freq"][1]) == pytest.approx(2e6 ** (-2 / 256))
    assert float(found["sliding_attention_inv_freq"][1]) == pytest.approx(3e4 ** (-2 / 256))
