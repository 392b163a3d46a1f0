"""Cross-entropy of the supervised positions, in chunks: full logits never exist.

The language-model head takes its own loss (`LossHead`), so that the engines gather its
weight once per micro-batch, by the same hooks as for any other module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sft_job.memory import chunk_rows

CrossEntropySum = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


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
        # The loss scale comes too late for what is narrowed here: fp16 ends at 6e-8, and a
        # probability below that would push nothing away.
        shift = 2.0**12 if hidden.dtype == torch.float16 else 1.0
        rows = min(chunk_rows(weight.shape[0], hidden.device.type), len(hidden))
        # One piece of memory for all chunks: the next one's must not wait for the last one's.
        memory = hidden.new_empty((rows, weight.shape[0]), dtype=torch.float32)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            h, t = hidden[part], targets[part]
            logits = _product_fp32(h, weight.t(), memory[: len(h)])
            top = logits.amax(-1, keepdim=True)
            total -= logits.gather(1, t[:, None]).sum()
            exponents = logits.sub_(top).exp_()  # in place: logits are needed no more
            sums = exponents.sum(-1, keepdim=True)
            total += (sums.log() + top).sum()
            if grad_hidden is not None and grad_weight is not None:
                grad = exponents.div_(sums / shift)
                grad.scatter_add_(1, t[:, None], grad.new_full((len(t), 1), -shift))
                narrow = grad.to(h.dtype)
                torch.mm(narrow, weight, out=grad_hidden[part])
                _add_product(grad_weight, narrow.t(), h)
                del narrow
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype, ctx.shift = weight.dtype, shift
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad = grad / ctx.shift
        # In place: the head's gradient is the largest tensor of the step.
        return grad_hidden.mul_(grad), grad_weight.mul_(grad).to(ctx.dtype), None


def _product_fp32(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`a @ b` into `out`, fp32; on a GPU straight out of the tensor cores' fp32 sums."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        product: torch.Tensor = torch.mm(a, b, out_dtype=torch.float32, out=out)
        return product
    return out.copy_(a @ b)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`total += a @ b`, total fp32; on a GPU without a product of its own."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    elif a.dtype == torch.bfloat16:
        total += a @ b
    else:  # a sum of tokens may be too large for fp16
        total.addmm_(a.float(), b.float())


def chunked(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies of `targets` under `hidden @ weight.T`, in fp32.

    Args:
        hidden: `[n, hidden]`, supervised positions only; n >= 1.
        weight: `[vocabulary, hidden]`.
        targets: int64 `[n]`.
    """
    total: torch.Tensor = _ChunkedCrossEntropy.apply(hidden, weight, targets)
    return total


def liger(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The same by Liger's Triton kernel, which makes one pass over a chunk of logits."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    total: torch.Tensor = liger_fused_linear_cross_entropy(
        hidden, weight, targets, reduction="sum", accum_dtype=torch.float32
    )
    return total


FUNCTIONS: dict[str, CrossEntropySum] = {"torch": chunked, "liger": liger}


class LossScale:
    """Dynamic loss scaling of fp16, the same under both engines: halved at every overflow,
    doubled after `window` steps without one. An overflow at `least` ends the training."""

    initial = 2.0**16
    window = 1000
    least = 2.0


class LossHead(nn.Linear):
    """A language-model head that can take the loss itself."""

    cross_entropy_sum: CrossEntropySum

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        if targets is None:
            return F.linear(hidden, self.weight)
        if targets.numel() == 0:
            # Part of the graph all the same: the engines wait for every parameter's gradient.
            # Of no rows, because the sum of all would overflow in fp16.
            return (hidden.sum() + self.weight[:0].sum()).float()
        return self.cross_entropy_sum(hidden, self.weight, targets)
