"""Rotary positions: scaled as the plan says, and compared with what the model computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sft_job.errors import ModelError

# The layers that reach as far as a sample is long: the others see no distance beyond their window.
FULL = "full_attention"
# Rounding of fp32; the smallest factor that is worth setting changes far more.
TOLERANCE = 1e-5


def scale(description: Any, factor: float) -> None:
    """Set linear scaling in a model's configuration, where it takes effect.

    Raises:
        ModelError: it has no rotary positions that can be set.
    """
    found = vars(description).get("rope_parameters")
    if not isinstance(found, dict) or not found:
        raise _without_effect(description)
    linear = {"rope_type": "linear", "factor": factor}
    if any(isinstance(value, dict) for value in found.values()):
        if not isinstance(found.get(FULL), dict):
            raise _without_effect(description)
        description.rope_parameters = found | {FULL: found[FULL] | linear}
    else:
        description.rope_parameters = found | linear


def _without_effect(description: Any) -> ModelError:
    return ModelError(
        f"the positions of {description.model_type} cannot be scaled: no rotary embedding of the "
        "model reads a scaling from its config.json",
        remedy="use model.rope=none with a data.seq_len of at most the model's native context",
    )


def check(model: nn.Module, factor: float | None) -> None:
    """Compare the frequencies that the model rotates by with those that were decided.

    Args:
        factor: the linear scaling of the plan; None leaves what config.json says.

    Raises:
        ModelError: they differ, or there are none to scale.
    """
    description: Any = model.config
    scaled = False
    for module, table, layer, frequencies, strength in _computed(model):
        decided = factor is not None and layer in (None, FULL)
        if not decided and not type(module).__module__.startswith("transformers."):
            continue  # code of its own may rotate as it likes, as long as nothing is to be scaled
        kind = "linear" if decided else table.get("rope_type", "default")
        # HunYuan's own: a base that is stretched once for all.
        alpha = float(table.get("alpha") or 1.0) if kind == "dynamic" else 1.0
        if kind in ("default", "linear") or alpha != 1:
            size = 2 * len(frequencies)
            steps = torch.arange(0, size, 2, dtype=torch.float64) / size
            divisor = factor if decided and factor is not None else table.get("factor", 1.0)
            base = table["rope_theta"] * alpha ** (size / max(size - 2, 1))
            expected = base**-steps / (divisor if kind == "linear" else 1.0)
            expected_strength = 1.0
        else:
            options = {} if layer is None else {"layer_type": layer}
            expected, expected_strength = ROPE_INIT_FUNCTIONS[kind](
                description, torch.device("cpu"), **options
            )
        same = torch.allclose(frequencies.double(), expected.double(), rtol=TOLERANCE, atol=0)
        if not same or abs(strength - expected_strength) > TOLERANCE:
            raise _differs(description, kind, layer, frequencies, expected)
        scaled |= decided
    if factor is not None and not scaled:
        raise _without_effect(description)


def _computed(
    model: nn.Module,
) -> Iterator[tuple[nn.Module, dict[str, Any], str | None, torch.Tensor, float]]:
    """Every rotary embedding: its RoPE parameters, layer type, inverse frequencies, and the factor
    of its cosines."""
    for module in model.modules():
        table = vars(vars(module).get("config") or object).get("rope_parameters")
        if not isinstance(table, dict):
            continue
        for name, frequencies in module.named_buffers(recurse=False):
            if not name.endswith("inv_freq") or name.endswith("original_inv_freq"):
                continue
            layer = name.removesuffix("inv_freq").removesuffix("_") or None
            prefix = f"{layer}_" if layer else ""
            strength = float(vars(module).get(f"{prefix}attention_scaling", 1.0))
            own = table.get(layer, table) if layer else table
            if isinstance(own, dict) and "rope_theta" in own:
                yield module, own, layer, frequencies, strength


def _differs(
    description: Any, kind: str, layer: str | None, found: torch.Tensor, expected: torch.Tensor
) -> ModelError:
    where = f" in layers of {layer}" if layer else ""
    return ModelError(
        f"the {kind} positions of {description.model_type} are not what the model computes{where}: "
        f"its slowest frequency is {float(found[-1]):.4g}, and should be {float(expected[-1]):.4g}",
        remedy="use model.rope=none with a data.seq_len of at most the model's native context, "
        "and report this model",
    )
