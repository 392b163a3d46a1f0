"""Attention over flattened samples: one contract for all kernels.

A kernel gets queries, keys and values of one flattened row and the lengths of its samples
as Python ints, and attends causally inside each sample only. Nothing is ever masked by a
dense [T, T] tensor. Kernels are registered with transformers' AttentionInterface; each has a
registered mask function too, because a name without one gets no mask and no warning.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from sft_job.errors import ModelError

PREFIX = "sft_job_"


def sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    seq_lens: list[int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention, each sample by itself.

    Args:
        query: `[1, heads, T, head_dim]`; key, value: `[1, kv_heads, T, head_dim]`.
        seq_lens: lengths of the samples, sum T; None means one sample of length T.

    Returns:
        `[1, T, heads, head_dim]` and no attention weights.
    """
    if query.shape[0] != 1:
        raise ValueError(f"expected one flattened row, not a batch of {query.shape[0]}")
    lengths = seq_lens or [query.shape[2]]
    window = kwargs.get("sliding_window")
    unsupported = kwargs.get("softcap") or kwargs.get("s_aux") is not None
    if unsupported or (window is not None and max(lengths) > window):
        raise ModelError(
            "the model attends through a sliding window, capped scores or sinks, "
            f"which this kernel does not do (window {window}, longest sample {max(lengths)})",
            remedy="use a data.seq_len of at most the window, or another base model",
        )
    grouped = query.shape[1] != key.shape[1]
    parts = [
        F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=grouped
        )
        for q, k, v in zip(
            query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True
        )
    ]
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The kernels know the samples from their lengths."""


def register(kernel: str) -> str:
    """Make a kernel of `attention.KERNELS` known to transformers; returns its name there."""
    functions = {"sdpa": sdpa}
    name = PREFIX + kernel
    AttentionInterface.register(name, functions[kernel])
    AttentionMaskInterface.register(name, _no_mask)
    return name
