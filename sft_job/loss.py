"""Cross-entropy of the supervised positions, in chunks: full logits never exist.

The language-model head takes its own loss (`LossHead`), so that the engines gather its
weight once per micro-batch, by the same hooks as for any other module.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sft_job.dataset import collate
from sft_job.encode import IGNORE_INDEX, Sample
from sft_job.errors import ModelError

# Rows of logits that exist at a time.
CHUNK = 256


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies; gradients are made chunk by chunk in the forward pass.

    That saves computing the logits again in the backward pass (the way of Liger-Kernel's
    fused linear cross-entropy, arXiv:2410.10989, section 3.2).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        train = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if train else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if train else None
        for start in range(0, hidden.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            h, t = hidden[rows], targets[rows]
            logits = F.linear(h, weight).float()
            norm = logits.logsumexp(-1, keepdim=True)
            total += (norm - logits.gather(1, t[:, None])).sum()
            if grad_hidden is not None and grad_weight is not None:
                grad = logits.sub_(norm).exp_()
                grad.scatter_add_(1, t[:, None], grad.new_full((len(t), 1), -1.0))
                narrow = grad.to(h.dtype)
                grad_hidden[rows] = narrow @ weight
                grad_weight += (narrow.t() @ h).float()
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), (grad_weight * grad), None


def cross_entropy_sum(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Sum of the cross-entropies of `targets` under `hidden @ weight.T`, in fp32.

    Args:
        hidden: `[n, hidden]`, supervised positions only; n may be 0.
        weight: `[vocabulary, hidden]`.
        targets: int64 `[n]`.
    """
    if targets.numel() == 0:
        # Part of the graph all the same: the engines wait for every parameter's gradient.
        return (hidden.sum() + weight.sum()).float() * 0.0
    total: torch.Tensor = _ChunkedCrossEntropy.apply(hidden, weight, targets)
    return total


class LossHead(nn.Linear):
    """A language-model head that can take the loss itself."""

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        if targets is None:
            return F.linear(hidden, self.weight)
        return cross_entropy_sum(hidden, self.weight, targets)


def supervised_loss(
    decoder: nn.Module,
    head: nn.Module,
    *,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    shift_labels: torch.Tensor,
    seq_lens: list[int],
) -> torch.Tensor:
    """Summed loss of one micro-batch (arguments as from `dataset.collate`)."""
    output = decoder(
        input_ids=input_ids, position_ids=position_ids, use_cache=False, seq_lens=seq_lens
    )
    supervised = shift_labels != IGNORE_INDEX
    loss: torch.Tensor = head(output.last_hidden_state[supervised], shift_labels[supervised])
    return loss


# Relative difference of the two losses below: rounding of fp32, and of bf16 activations.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


def self_test(
    call: Callable[..., dict[str, torch.Tensor]],
    *,
    vocabulary: int,
    precision: str,
    place: Callable[[Any], Any],
) -> None:
    """Our loss of packed samples against the model's own logits of each sample alone.

    Finds families whose own forward pass scales or caps the logits, and kernels under which
    samples of a row see each other. All ranks must call it.

    Args:
        call: the sharded model (`model.make_trainable`).
        place: moves a batch to the device.

    Raises:
        ModelError: the two differ; training would optimise something else.
    """
    random = np.random.default_rng(0)
    samples = [
        Sample(random.integers(0, vocabulary, n, dtype=np.uint32), np.arange(n) >= n // 2)
        for n in (6, 11)
    ]
    with torch.no_grad():
        ours = float(call(**place(collate(samples)))["loss"])
        theirs = 0.0
        for sample in samples:
            batch = place(collate([sample]))
            targets = batch.pop("shift_labels")[0]
            logits = call(own_forward=True, **batch)["logits"][0].float()
            theirs += float(
                F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
            )
    if not math.isfinite(ours) and not math.isfinite(theirs):
        return  # the two agree; the first training step refuses it and names what it saw
    if not abs(ours - theirs) <= TOLERANCE[precision] * abs(theirs):
        raise ModelError(
            f"self-test: the loss of packed samples is {ours:.4f}, the model's own forward pass "
            f"gives {theirs:.4f}",
            remedy="this model computes its logits in a way that is not supported "
            "(it scales or caps them), or its attention mixes samples; it cannot be trained here",
        )
