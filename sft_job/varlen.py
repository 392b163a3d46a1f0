"""Attention over flattened samples: one contract for all kernels.

A kernel gets queries, keys and values of one flattened row and where its samples begin, and
attends causally inside each sample only:

    row          a0 a1 a2 b0 b1 b2 b3
    seq_lens     [3, 4]                 Python ints: no device is asked
    cu_seqlens   [0, 3, 7]              int32, made on the host, moved with the batch
    max_seqlen   4                      Python int

Nothing is ever masked by a dense [T, T] tensor. Kernels are registered with transformers'
AttentionInterface, and on purpose without a mask function: a name that has none gets no mask.
With one, transformers would ask the device in every forward pass where samples begin.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from sft_job.attention import KERNELS
from sft_job.errors import ModelError

# One name whatever the kernel: transformers looks for "flash", "flex" and "sdpa" inside a name,
# and then loads and checks kernels of its own.
NAME = "sft_job_packed"


class Packed:
    """The samples of a row, made once per micro-batch and shared by all layers.

    Not a dataclass: FSDP2 makes a copy of those for every layer, and the mask with it.

    Args:
        longest: tokens of the longest sample that will come; None is this row's. A window that is
            too short for it is found in the first row, by the self-test.
    """

    def __init__(
        self,
        seq_lens: list[int],
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        longest: int | None = None,
    ) -> None:
        self.seq_lens, self.cu_seqlens, self.max_seqlen = seq_lens, cu_seqlens, max_seqlen
        self.longest = max(max_seqlen, longest or 0)

    @functools.cached_property
    def xformers_mask(self) -> Any:
        """The block-diagonal causal mask of xformers; it keeps offsets, not a matrix."""
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

        return BlockDiagonalCausalMask.from_seqlens(self.seq_lens, device=self.cu_seqlens.device)


# (query [T, heads, dim], key and value [T, kv_heads, dim], samples, softmax scale, dropout)
# -> [T, heads, dim]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Packed, float, float], torch.Tensor]


def flash_attention_2() -> Attend:
    from flash_attn import flash_attn_varlen_func

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        packed: Packed,
        scale: float,
        dropout: float,
    ) -> torch.Tensor:
        result: torch.Tensor = flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=packed.cu_seqlens,
            cu_seqlens_k=packed.cu_seqlens,
            max_seqlen_q=packed.max_seqlen,
            max_seqlen_k=packed.max_seqlen,
            dropout_p=dropout,
            softmax_scale=scale,
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return result

    return attend


def flash_attention_3() -> Attend:
    from flash_attn_interface import flash_attn_varlen_func

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        packed: Packed,
        scale: float,
        dropout: float,
    ) -> torch.Tensor:
        _refuse_dropout("flash_attention_3", dropout)
        result = flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=packed.cu_seqlens,
            cu_seqlens_k=packed.cu_seqlens,
            max_seqlen_q=packed.max_seqlen,
            max_seqlen_k=packed.max_seqlen,
            softmax_scale=scale,
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        # Its first releases gave the log-sum-exp as well.
        attended: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return attended

    return attend


def torch_varlen() -> Attend:
    """torch 2.10 says `is_causal`, has no scale of its own and needs no word about grouped
    queries; later releases say `window_size`, `scale` and `enable_gqa`."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = (
        {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    )

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        packed: Packed,
        scale: float,
        dropout: float,
    ) -> torch.Tensor:
        _refuse_dropout("torch_varlen", dropout)
        options = dict(causal)
        if "scale" in known:
            options["scale"] = scale
        elif scale != (usual := q.shape[-1] ** -0.5):
            q = q * (scale / usual)
        if "enable_gqa" in known:
            options["enable_gqa"] = q.shape[1] != k.shape[1]
        offsets, longest = packed.cu_seqlens, packed.max_seqlen
        result: Any = varlen_attn(q, k, v, offsets, offsets, longest, longest, **options)
        attended: torch.Tensor = result
        return attended

    return attend


def xformers() -> Attend:
    from xformers.ops import memory_efficient_attention

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        packed: Packed,
        scale: float,
        dropout: float,
    ) -> torch.Tensor:
        if (groups := q.shape[1] // k.shape[1]) > 1:
            k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        result: torch.Tensor = memory_efficient_attention(
            q[None], k[None], v[None], attn_bias=packed.xformers_mask, p=dropout, scale=scale
        )
        return result[0]

    return attend


def sdpa() -> Attend:
    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        packed: Packed,
        scale: float,
        dropout: float,
    ) -> torch.Tensor:
        grouped = q.shape[1] != k.shape[1]
        if grouped and not _shares_keys(q):
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            grouped = False
        parts = []
        for sample in zip(*(x.split(packed.seq_lens) for x in (q, k, v)), strict=True):
            query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in sample)
            attended = F.scaled_dot_product_attention(
                query,
                key,
                value,
                dropout_p=dropout,
                is_causal=True,
                scale=scale,
                enable_gqa=grouped,
            )
            parts.append(attended.squeeze(0).transpose(0, 1))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    return attend


def _shares_keys(q: torch.Tensor) -> bool:
    """Whether SDPA has a kernel for grouped queries: on a GPU only flash attention, in half
    precision from capability 8.0 on; otherwise it would write out the whole matrix of scores."""
    if not q.is_cuda:
        return True
    return q.dtype != torch.float32 and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _refuse_dropout(kernel: str, dropout: float) -> None:
    if dropout:
        raise ModelError(
            f"the model drops attention weights (attention_dropout {dropout:g}), which "
            f"{kernel} cannot do",
            remedy="use model.attention=sdpa, or set attention_dropout to 0 in its config.json",
        )


FUNCTIONS: dict[str, Callable[[], Attend]] = {
    "flash_attention_3": flash_attention_3,
    "flash_attention_2": flash_attention_2,
    "torch_varlen": torch_varlen,
    "xformers": xformers,
    "sdpa": sdpa,
}


def attention_function(attend: Attend) -> Callable[..., tuple[torch.Tensor, None]]:
    """A kernel in the form that transformers calls."""

    def function(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        packed: Packed | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """
        Args:
            query: `[1, heads, T, head_dim]`; key, value: `[1, kv_heads, T, head_dim]`.
            packed: the samples, of T tokens together.

        Returns:
            `[1, T, heads, head_dim]` and no attention weights.

        Raises:
            ModelError: the model's attention is more than causal attention inside each sample.
        """
        if query.shape[0] != 1:
            raise ValueError(f"expected one flattened row, not a batch of {query.shape[0]}")
        if packed is None:
            raise ModelError(
                f"{type(module).__name__} is not told where samples begin: the model's layers do "
                "not hand that on to their attention",
                remedy=OWN,
            )
        _refuse_what_no_kernel_does(attention_mask, kwargs, packed)
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        return attend(q, k, v, packed, scale, dropout).unsqueeze(0), None

    return function


OWN = "use model.attention=own: one sample per forward pass"
# What transformers' models hand to their attention beyond causal attention, and what it is.
BEYOND = {
    "softcap": "caps its attention scores",
    "s_aux": "attends through sinks",
    "sinks": "attends through sinks",
    "position_bias": "adds a bias to its attention scores",
    "indices": "attends to chosen tokens only",
    "block_indices": "attends to chosen tokens only",
}


def _refuse_what_no_kernel_does(
    attention_mask: torch.Tensor | None, kwargs: dict[str, Any], packed: Packed
) -> None:
    found = [what for name, what in BEYOND.items() if kwargs.get(name) is not None]
    if attention_mask is not None:
        found.append("makes an attention mask of its own")
    if kwargs.get("is_causal") is False:
        found.append("lets tokens see later ones")
    if found:
        raise ModelError(f"the model {found[0]}, which no kernel here does", remedy=OWN)
    window = kwargs.get("sliding_window")
    if window is not None and packed.longest > window:
        raise ModelError(
            f"the model attends through a sliding window of {window} tokens, which no kernel here "
            f"does, and the longest sample has {packed.longest}",
            remedy=f"use data.seq_len={window}, or model.attention=own: one sample per forward "
            "pass",
        )


@contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model with its own, plain attention: for one sample at a time."""
    kernel, model.config._attn_implementation = model.config._attn_implementation, "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = kernel


def register(kernel: str) -> str | None:
    """Make a kernel ours in transformers; returns its name there, None for the model's own."""
    if not KERNELS[kernel].packs:
        return None
    AttentionInterface.register(NAME, attention_function(FUNCTIONS[kernel]()))
    return NAME
