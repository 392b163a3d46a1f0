"""The model: built from its configuration, given a forward pass that returns a loss."""

from __future__ import annotations

import functools
import types
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_utils import set_zero3_state

from sft_job import loss, positions, varlen
from sft_job.attention import KERNELS
from sft_job.errors import ModelError
from sft_job.loss import LossHead
from sft_job.modelfiles import read_by_library
from sft_job.plan import Plan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def describe(folder: Path, *, trust_remote_code: bool) -> Any:
    """The configuration of a model folder as transformers reads it.

    Raises:
        ModelError: it cannot.
    """
    remedy = "compare it with the file that was published with the model"
    with read_by_library("transformers cannot read it", folder / "config.json", remedy):
        description = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    description.use_cache = False
    return description


def empty(
    description: Any,
    *,
    where: Path,
    trust_remote_code: bool,
    attention: str | None = None,
    meta: bool = True,
) -> PreTrainedModel:
    """A model without weights.

    Args:
        attention: name of an attention function of transformers; None takes the model's own.
        meta: parameters on the meta device, otherwise real. Buffers are always real.

    Raises:
        ModelError: transformers cannot make one of this configuration.
    """
    with ExitStack() as stack:
        stack.enter_context(no_init_weights())
        # Else, in its ZeRO-3 mode, transformers makes every parameter whole on every rank, and
        # then gathers each again to give it random values.
        stack.enter_context(set_zero3_state())
        if meta:
            stack.enter_context(init_empty_weights(include_buffers=False))
        stack.enter_context(
            read_by_library("transformers cannot build the model", where / "config.json")
        )
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            description,
            dtype=torch.float32,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
        )
    model.tie_weights()  # not above: there every parameter that is set becomes a new one
    # Nothing is ever padded: every row of the table is trained, whatever config.json calls a pad.
    model.get_input_embeddings().padding_idx = None
    return model


def build(folder: Path, plan: Plan, *, trust_remote_code: bool, meta: bool) -> PreTrainedModel:
    """The model of a plan without weights, ready to be sharded and filled.

    Raises:
        ModelError: it is not what the plan says.
    """
    description = describe(folder, trust_remote_code=trust_remote_code)
    if plan.rope_factor is not None:
        positions.scale(description, plan.rope_factor)
    model = empty(
        description,
        where=folder,
        trust_remote_code=trust_remote_code,
        attention=varlen.register(plan.attention.value),
        meta=meta,
    )
    positions.check(model, plan.rope_factor)
    return model


def parts(model: PreTrainedModel) -> tuple[nn.Linear, nn.Module]:
    """The language-model head and the decoder below it.

    Raises:
        ModelError: the model has no such parts, or others.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        raise ModelError(
            f"the language-model head is a {type(head).__name__}, expected a Linear without bias",
            remedy="this architecture is not supported",
        )
    decoder = getattr(model, model.base_model_prefix or "model", None)
    if decoder is None:
        raise ModelError(
            f"{type(model).__name__} has no decoder named {model.base_model_prefix!r} "
            "(base_model_prefix)",
            remedy="this architecture is not supported",
        )
    return head, decoder


def make_trainable(model: PreTrainedModel, plan: Plan) -> None:
    """Give the model a forward pass that returns the summed loss of a micro-batch."""
    head: Any
    head, decoder = parts(model)
    head.__class__ = LossHead  # the same parameter under the same name, tied or not
    head.cross_entropy_sum = loss.FUNCTIONS[plan.cross_entropy.value]
    own = model.forward
    packs = KERNELS[plan.attention.value].packs
    inputs_of: Any = functools.partial(_packed_inputs, plan.longest) if packs else _single_inputs

    def forward(
        self: PreTrainedModel,
        *,
        own_forward: bool = False,
        supervised: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        **row: Any,
    ) -> dict[str, torch.Tensor]:
        """Arguments as from `dataset.collate`."""
        inputs = inputs_of(**row)
        if own_forward:
            return {"logits": own(**inputs).logits}
        hidden = decoder(**inputs)[0][0]
        # By index: a mask would ask the device how many there are.
        return {"loss": head(hidden.index_select(0, supervised), targets)}

    model.forward = types.MethodType(forward, model)
    recompute(model, plan)
    model.train()


def _packed_inputs(
    longest: int | None,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    seq_lens: list[int],
) -> dict[str, Any]:
    packed = varlen.Packed(seq_lens, cu_seqlens, max(seq_lens), longest)
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "packed": packed,
        "use_cache": False,
    }


def _single_inputs(
    input_ids: torch.Tensor, seq_lens: list[int], **unused: torch.Tensor
) -> dict[str, Any]:
    if len(seq_lens) != 1:
        raise ValueError(f"expected one sample, not {len(seq_lens)}: this model cannot pack")
    # Nothing else: code that a model brings may not know more.
    return {"input_ids": input_ids}


# What selective activation checkpointing keeps: matrix products, and operators whose first
# output is attention's result. Of an operator that calls another, the outer one is seen.
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
ATTENTION_OPERATORS = {
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward",
    "aten::_cudnn_attention_forward",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::fwd",
    "flash_attn_3::_flash_attn_forward",
    # xformers takes the first of these that fits, then aten::_efficient_attention_forward.
    "xformers_flash3::flash_fwd",
    "xformers_flash::flash_fwd",
}


def recompute(model: PreTrainedModel, plan: Plan) -> None:
    """Activation checkpointing of every decoder layer, as the plan says.

    The recomputation ends with the last tensor that the backward pass needs, so that a layer's
    last matrix product is never done twice.
    """
    if plan.activation_checkpointing.value == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if plan.activation_checkpointing.value == "selective":
        options["context_fn"] = functools.partial(_selective, plan.saved_products or 0)
    for layer in decoder_layers(model):
        # Not the call but what it calls: the engines' hooks, which gather weights, stay outside.
        # And not by transformers' way: models with code of their own may not know it.
        layer.forward = functools.partial(checkpoint, layer.forward, **options)


def _selective(saved_products: int) -> tuple[Any, Any]:
    """Contexts that keep attention's results and the first matrix products of a layer.

    Per byte kept, all of them save the same work but attention, which saves more.
    """
    # torch 2.10 asks again during the recomputation, later releases do not.
    seen = {False: 0, True: 0}

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        save = True
        if operator in PRODUCTS:
            seen[context.is_recompute] += 1
            save = seen[context.is_recompute] <= saved_products
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    keep, recall = create_selective_checkpoint_contexts(policy)
    return _OnlyCostly(keep), _OnlyCostly(recall)


class _OnlyCostly(TorchDispatchMode):
    """Hands matrix products and attention to a mode of torch's. That one wants to see the same
    operators in the recomputation as before, and DeepSpeed gathers weights in the midst of them,
    if they are not there yet."""

    def __init__(self, mode: TorchDispatchMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS or func.name().partition(".")[0] in ATTENTION_OPERATORS:
            return self.mode.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers, found from the model itself: the longest list of equal modules."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ModelError(
            f"{type(model).__name__} has no list of layers, it cannot be sharded by layer"
        )
    return max(lists, key=len)
