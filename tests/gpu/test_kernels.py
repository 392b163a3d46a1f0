"""The attention and loss kernels that need a GPU, against the same references as on the CPU."""

from __future__ import annotations

import shutil

import pytest

from tests import kernel_checks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        shutil.which("nvidia-smi") is None, reason="no NVIDIA GPU: nvidia-smi is not there"
    ),
]


@pytest.mark.parametrize("heads", kernel_checks.HEADS)
@pytest.mark.parametrize("dim", kernel_checks.DIMENSIONS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kernel", kernel_checks.ATTENTION)
def test_kernel_equals_the_dense_reference(kernel: str, dtype: str, dim: int, heads: str) -> None:
    """Values and gradients of four samples in one row."""
    if reason := kernel_checks.obstacle(kernel, dtype):
        pytest.skip(f"{kernel}: {reason}")
    assert kernel_checks.attention_error(kernel, dtype, dim, kernel_checks.HEADS[heads]) <= 1


@pytest.mark.parametrize("function", ["torch", "liger"])
@pytest.mark.parametrize("dtype", kernel_checks.DTYPES)
def test_cross_entropy_equals_the_plain_one(function: str, dtype: str) -> None:
    """Value and gradients, more rows than one chunk, against fp64."""
    if reason := kernel_checks.loss_obstacle(function, dtype):
        pytest.skip(f"{function}: {reason}")
    assert kernel_checks.loss_error(function, dtype) <= 1
