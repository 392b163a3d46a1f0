"""The attention and loss kernels that need a GPU, against the same references as on the CPU."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F

from sft_job import attention, hardware, loss, memory, varlen
from sft_job.attention import KERNELS
from tests.test_varlen import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        shutil.which("nvidia-smi") is None, reason="no NVIDIA GPU: nvidia-smi is not there"
    ),
]

LENGTHS = [70, 1, 300, 129]


def runnable(name: str, dtype: str) -> None:
    """Skip with the reason that the table gives for this machine."""
    machine = hardware.detect()
    kernel = KERNELS[name]
    wanted = {kernel.distribution} if kernel.distribution else set()
    packages = attention.installed(imported=wanted)
    obstacle = attention._obstacle(kernel, machine, dtype, None, packages)
    if obstacle:
        pytest.skip(f"{name}: {obstacle}")


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=["equal heads", "grouped"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "kernel", ["flash_attention_3", "flash_attention_2", "torch_varlen", "xformers", "sdpa"]
)
def test_kernel_equals_the_dense_reference(
    kernel: str, dtype: str, dim: int, heads: tuple[int, int]
) -> None:
    """Values and gradients of four samples in one row."""
    runnable(kernel, dtype)
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    generator = torch.Generator("cuda").manual_seed(0)
    ours = [
        torch.randn(
            1, n, sum(LENGTHS), dim, device="cuda", dtype=torch_dtype, generator=generator
        ).requires_grad_()
        for n in (heads[0], heads[1], heads[1])
    ]
    offsets = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).to(torch.int32)
    packed = varlen.Packed(LENGTHS, offsets, max(LENGTHS))
    attend = varlen.attention_function(varlen.FUNCTIONS[kernel]())
    result, _ = attend(torch.nn.Identity(), *ours, None, packed=packed)
    theirs = [x.detach().cpu().float().requires_grad_() for x in ours]
    rows = [x[0].transpose(0, 1) for x in theirs]
    expected = reference(*rows, LENGTHS, dim**-0.5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (result[0].float() * weights.cuda()).sum().backward()
    (expected * weights).sum().backward()
    tolerance = 4 * torch.finfo(torch_dtype).eps
    pairs = [(result[0], expected), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]
    for a, b in pairs:
        scale = float(b.abs().max())
        assert float((a.detach().cpu().double() - b.double()).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("function", ["torch", "liger"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cross_entropy_equals_the_plain_one(function: str, dtype: torch.dtype) -> None:
    """Value and gradients, more rows than one chunk, against fp64."""
    if dtype is torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("bf16 needs capability 8.0")
    if function == "liger":
        pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
        if torch.cuda.get_device_capability() < (8, 0):
            pytest.skip("Triton needs capability 8.0")
    vocabulary = 32_000
    rows = memory.chunk_rows(vocabulary, "cuda") + 100
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(rows, 256, device="cuda", generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, 256, device="cuda", generator=generator) / 16).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), device="cuda", generator=generator)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = loss.FUNCTIONS[function](h, w, targets)
    value.backward()
    h64, w64 = (x.double().requires_grad_() for x in (hidden, weight))
    expected = F.cross_entropy(h64 @ w64.t(), targets, reduction="sum")
    expected.backward()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(value.double(), expected, rtol=max(eps, 1e-6), atol=0)
    for a, b in ((h.grad, h64.grad), (w.grad, w64.grad)):
        assert float((a.double() - b).abs().max()) <= 8 * eps * float(b.abs().max())
