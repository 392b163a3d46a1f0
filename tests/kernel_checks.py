"""The attention and loss kernels against exact references, on the device that is there.

    python -m tests.kernel_checks

prints one line for each combination that this machine runs, and why it does not run the others;
ends with 1 if one is wrong. `tests/gpu` holds the same comparisons for pytest, which an image does
not have.
"""

from __future__ import annotations

import itertools
import sys

import torch
import torch.nn.functional as F

from sft_job import attention, choices, hardware, loss, memory, varlen
from sft_job.attention import KERNELS

LENGTHS = [70, 1, 300, 129]
ATTENTION = ("flash_attention_3", "flash_attention_2", "torch_varlen", "xformers", "sdpa")
HEADS = {"equal heads": (8, 8), "grouped": (8, 2)}
DIMENSIONS = (64, 128)
SUMS = 4e-6
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], scale: float
) -> torch.Tensor:
    """Softmax over a dense block-diagonal causal mask, fp64. q, k, v: [T, heads, dim]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = (owner[:, None] == owner[None]).tril()
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


def obstacle(name: str, dtype: str) -> str | None:
    """Why this machine does not run a kernel, in the words of the table of kernels, or None."""
    machine, kernel = hardware.detect(), KERNELS[name]
    if dtype == "bf16" and not machine.bf16:
        return f"{machine.name} has no bf16 arithmetic"
    wanted = {kernel.distribution} if kernel.distribution else set()
    packages = attention.installed(imported=wanted)
    return attention._obstacle(kernel, machine, dtype, None, packages)


def loss_obstacle(function: str, dtype: str) -> str | None:
    machine = hardware.detect()
    if dtype == "bf16" and not machine.bf16:
        return f"{machine.name} has no bf16 arithmetic"
    if function == "liger":
        packages = attention.installed(imported={attention.LIGER})
        return choices.liger_obstacle(machine, dtype, packages)
    return None


def attention_error(name: str, dtype: str, dim: int, heads: tuple[int, int]) -> float:
    """The largest difference of values and gradients of four samples in one row, in units of what
    rounding explains (4 eps of the largest); above 1 it is wrong."""
    device = hardware.detect().device
    generator = torch.Generator(device).manual_seed(0)
    ours = [
        torch.randn(
            1, n, sum(LENGTHS), dim, device=device, dtype=DTYPES[dtype], generator=generator
        ).requires_grad_()
        for n in (heads[0], heads[1], heads[1])
    ]
    offsets = torch.tensor([0, *LENGTHS], device=device).cumsum(0).to(torch.int32)
    packed = varlen.Packed(LENGTHS, offsets, max(LENGTHS))
    attend = varlen.attention_function(varlen.FUNCTIONS[name]())
    result, _ = attend(torch.nn.Identity(), *ours, None, packed=packed)
    theirs = [x.detach().cpu().float().requires_grad_() for x in ours]
    expected = reference(*(x[0].transpose(0, 1) for x in theirs), LENGTHS, dim**-0.5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (result[0].float() * weights.to(device)).sum().backward()
    (expected * weights).sum().backward()
    pairs = [(result[0], expected), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]
    return max(_share(a, b, 4 * torch.finfo(DTYPES[dtype]).eps) for a, b in pairs)


def loss_error(function: str, dtype: str) -> float:
    """The same of value (eps) and gradients (8 eps) of the loss, with more rows than one chunk;
    4e-6 where that is less, since fp32 sums of thousands of rows round that much."""
    device, kind = hardware.detect().device, DTYPES[dtype]
    vocabulary = 32_000
    rows = memory.chunk_rows(vocabulary, device) + 100
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, 256, device=device, generator=generator).to(kind)
    weight = (torch.randn(vocabulary, 256, device=device, generator=generator) / 16).to(kind)
    targets = torch.randint(0, vocabulary, (rows,), device=device, generator=generator)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = loss.FUNCTIONS[function](h, w, targets)
    value.backward()
    h64, w64 = (x.double().requires_grad_() for x in (hidden, weight))
    expected = F.cross_entropy(h64 @ w64.t(), targets, reduction="sum")
    expected.backward()
    eps = torch.finfo(kind).eps
    return max(
        _share(value, expected, max(eps, SUMS)),
        _share(h.grad, h64.grad, max(8 * eps, SUMS)),
        _share(w.grad, w64.grad, max(8 * eps, SUMS)),
    )


def _share(ours: torch.Tensor | None, exact: torch.Tensor | None, tolerance: float) -> float:
    assert ours is not None
    assert exact is not None
    ours, exact = (x.detach().cpu().double() for x in (ours, exact))
    return float((ours - exact).abs().max() / (tolerance * exact.abs().max()))


def main() -> int:
    wrong = ran = 0
    for name, dtype in itertools.product(ATTENTION, ("bf16", "fp16")):
        reason = obstacle(name, dtype)
        if reason:
            print(f"- {name} {dtype}: not run, {reason}")
            continue
        for dim, (words, heads) in itertools.product(DIMENSIONS, HEADS.items()):
            error = attention_error(name, dtype, dim, heads)
            ran, wrong = ran + 1, wrong + (not error <= 1)
            print(f"{_verdict(error)} {name} {dtype}, head dimension {dim}, {words}: {error:.2f}")
    for function, dtype in itertools.product(("torch", "liger"), DTYPES):
        reason = loss_obstacle(function, dtype)
        if reason:
            print(f"- loss {function} {dtype}: not run, {reason}")
            continue
        error = loss_error(function, dtype)
        ran, wrong = ran + 1, wrong + (not error <= 1)
        print(f"{_verdict(error)} loss {function} {dtype}: {error:.2f}")
    print(f"{ran} comparisons, {wrong} wrong (error in units of what rounding explains)")
    return 1 if wrong or not ran else 0


def _verdict(error: float) -> str:
    return "ok   " if error <= 1 else "WRONG"


if __name__ == "__main__":
    sys.exit(main())
