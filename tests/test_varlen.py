"""Every attention function keeps samples apart and equals the dense reference.

Kernels that need a GPU are called against stand-ins of the same signature that compute the
reference from what they are given; `tests/kernel_checks.py` holds the same checks for the
real ones.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from sft_job import varlen
from sft_job.errors import ModelError
from tests.kernel_checks import reference

LENGTHS = [5, 1, 9, 2]
HEADS, KEY_HEADS, DIM = 4, 2, 8


def packed(lengths: list[int] = LENGTHS) -> varlen.Packed:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return varlen.Packed(lengths, ends, max(lengths))


def inputs(seed: int = 0) -> list[torch.Tensor]:
    """Query, key, value as transformers gives them: [1, heads, T, dim]."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, n, sum(LENGTHS), DIM, generator=generator, requires_grad=True)
        for n in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def lengths_of(offsets: torch.Tensor) -> list[int]:
    assert offsets.dtype == torch.int32
    assert offsets[0] == 0
    return (offsets[1:] - offsets[:-1]).tolist()


# --- stand-ins, with the signatures of the real functions ------------------------------------


def flash_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    assert causal
    assert isinstance(max_seqlen_q, int)
    assert max_seqlen_q == max_seqlen_k == max(lengths_of(cu_seqlens_q))
    assert cu_seqlens_q is cu_seqlens_k
    return reference(q, k, v, lengths_of(cu_seqlens_q), softmax_scale).to(q.dtype)


def flash_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
    seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
    pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    return flash_2(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale=softmax_scale, causal=causal,
    )  # fmt: skip


def flash_3_of_2024(*args: Any, **kwargs: Any):
    return flash_3(*args, **kwargs), torch.zeros(1)


def varlen_of_2_10(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None
):
    return flash_2(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal=is_causal,
        softmax_scale=query.shape[-1] ** -0.5,
    )  # fmt: skip


def varlen_of_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert window_size == (-1, 0)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return flash_2(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal=True, softmax_scale=scale
    )


def efficient(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    """xformers' function, the mask materialised by xformers itself."""
    assert query.shape[2] == key.shape[2] == value.shape[2]
    bias = attn_bias.materialize((1, 1, query.shape[1], key.shape[1]), dtype=torch.float64)
    q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))
    scores = q @ k.transpose(2, 3) * scale + bias
    return (scores.softmax(-1) @ v).transpose(1, 2).to(query.dtype)


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, name: str, function: Any) -> None:
    if module in ("xformers.ops", "torch.nn.attention.varlen"):  # installed: one name replaced
        monkeypatch.setattr(pytest.importorskip(module), name, function)
        return
    fake = types.ModuleType(module)
    setattr(fake, name, function)
    monkeypatch.setitem(sys.modules, module, fake)


CASES = [
    ("flash_attention_2", "flash_attn", "flash_attn_varlen_func", flash_2),
    ("flash_attention_3", "flash_attn_interface", "flash_attn_varlen_func", flash_3),
    ("flash_attention_3", "flash_attn_interface", "flash_attn_varlen_func", flash_3_of_2024),
    ("torch_varlen", "torch.nn.attention.varlen", "varlen_attn", varlen_of_2_10),
    ("torch_varlen", "torch.nn.attention.varlen", "varlen_attn", varlen_of_2_13),
    ("xformers", "xformers.ops", "memory_efficient_attention", efficient),
    ("sdpa", None, None, None),
]


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize(("kernel", "module", "name", "function"), CASES)
def test_equals_the_dense_reference(
    kernel: str, module: str, name: str, function: Any, scale: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Values and gradients, grouped queries, four samples in a row, any scale."""
    if module:
        stand_in(monkeypatch, module, name, function)
    attend = varlen.attention_function(varlen.FUNCTIONS[kernel]())
    ours = inputs()
    result, none = attend(torch.nn.Identity(), *ours, None, scaling=scale, packed=packed())
    assert none is None
    assert result.shape == (1, sum(LENGTHS), HEADS, DIM)
    theirs = inputs()
    rows = [x[0].transpose(0, 1) for x in theirs]
    expected = reference(*rows, LENGTHS, scale if scale is not None else DIM**-0.5)
    torch.testing.assert_close(result[0].double(), expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (result[0] * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_the_real_signatures_still_take_our_arguments() -> None:
    """What is installed here of the real functions is called with names they know."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    names = set(inspect.signature(varlen_attn).parameters)
    assert names >= {"query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"}
    assert "is_causal" in names or {"window_size", "scale", "enable_gqa"} <= names
    xformers = pytest.importorskip("xformers.ops", reason="xformers is not installed")
    known = set(inspect.signature(xformers.memory_efficient_attention).parameters)
    assert known >= {"query", "key", "value", "attn_bias", "p", "scale"}


def test_torchs_own_kernel_is_called_as_it_wants_to_be() -> None:
    """The real operator on fake tensors: shapes, dtypes and the arguments of this release."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    attend = varlen.attention_function(varlen.FUNCTIONS["torch_varlen"]())
    with FakeTensorMode():
        q, k, v = (
            torch.empty(1, n, 16, 64, dtype=torch.bfloat16, device="cuda") for n in (8, 2, 2)
        )
        row = varlen.Packed([7, 9], torch.empty(3, dtype=torch.int32, device="cuda"), 9)
        result, _ = attend(torch.nn.Identity(), q, k, v, None, packed=row)
    assert (result.shape, result.dtype, result.device.type) == (
        (1, 16, 8, 64), torch.bfloat16, "cuda",
    )  # fmt: skip


def test_the_operator_behind_xformers_takes_fp16_rows() -> None:
    """torch's own efficient attention on fake CUDA tensors, with the offsets of two samples."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(1, 16, 8, 64, dtype=torch.float16, device="cuda")
        offsets = torch.empty(3, dtype=torch.int32, device="cuda")
        out, *_ = torch.ops.aten._efficient_attention_forward(
            q, q, q, None, offsets, offsets, 9, 9, 0.0, 1, True, scale=0.1
        )
    assert (out.shape, out.dtype) == (q.shape, torch.float16)


@pytest.mark.parametrize(
    ("dtype", "capability", "repeated"),
    [
        (torch.bfloat16, (8, 0), False),
        (torch.float16, (12, 0), False),
        (torch.float32, (9, 0), True),
        (torch.float16, (7, 0), True),
    ],
)
def test_sdpa_repeats_keys_where_only_the_dense_kernel_shares_them(
    dtype: torch.dtype, capability: tuple[int, int], repeated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake CUDA tensors: what SDPA is called with, by GPU and dtype."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    calls = []

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append((k.shape[1], options["enable_gqa"]))
        return torch.empty_like(q)

    monkeypatch.setattr(varlen.F, "scaled_dot_product_attention", sdpa)
    with FakeTensorMode():
        q = torch.empty(5, 8, 16, dtype=dtype, device="cuda")
        k = torch.empty(5, 2, 16, dtype=dtype, device="cuda")
        out = varlen.sdpa()(q, k, k, varlen.Packed([2, 3], torch.empty(3), 3), 0.1, 0.0)
    assert calls == [(8, False) if repeated else (2, True)] * 2
    assert out.shape == q.shape


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA operators")
@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_xformers_dispatches_to_cutlass_on_old_gpus(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faked capability, fake tensors, the real dispatcher: forward and backward operators."""
    pytest.importorskip("xformers", reason="xformers is not installed")
    from torch._subclasses.fake_tensor import FakeTensorMode
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask
    from xformers.ops.fmha.common import Inputs
    from xformers.ops.fmha.dispatch import _dispatch_bw, _dispatch_fw

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with FakeTensorMode():
        q = torch.empty(1, 16, 8, 64, dtype=torch.float16, device="cuda")
        mask = BlockDiagonalCausalMask.from_seqlens([7, 9], device=torch.device("cpu"))
        given = Inputs(q, q, q, mask)
        assert _dispatch_fw(given, False).NAME == "cutlassF-pt"
        assert _dispatch_bw(given, varlen_lse_packed=False).NAME == "cutlassB-pt"


def test_xformers_mask_is_the_dense_block_diagonal_one() -> None:
    """Built once for a row, and kept."""
    pytest.importorskip("xformers", reason="xformers is not installed")
    row = packed()
    mask = row.xformers_mask.materialize((sum(LENGTHS), sum(LENGTHS)))
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    allowed = (owner[:, None] == owner[None]).tril()
    assert torch.equal(mask == 0, allowed)
    assert row.xformers_mask is row.xformers_mask


def test_a_model_that_does_not_hand_on_where_samples_begin_is_refused() -> None:
    """A row taken for one sample would be a leak."""
    attend = varlen.attention_function(varlen.FUNCTIONS["sdpa"]())
    with pytest.raises(ModelError, match=r"Identity is not told where samples begin.*\n.*=own"):
        attend(torch.nn.Identity(), *inputs(), None)


def test_deterministic_training_asks_for_the_deterministic_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """flash-attn's backward pass is not deterministic unless told."""
    seen: list[bool] = []

    def spy(q, k, v, *, deterministic, **kwargs):
        seen.append(deterministic)
        return q

    stand_in(monkeypatch, "flash_attn", "flash_attn_varlen_func", spy)
    stand_in(monkeypatch, "flash_attn_interface", "flash_attn_varlen_func", spy)
    for kernel in ("flash_attention_2", "flash_attention_3"):
        attend = varlen.attention_function(varlen.FUNCTIONS[kernel]())
        attend(torch.nn.Identity(), *inputs(), None, packed=packed())
        torch.use_deterministic_algorithms(True)
        try:
            attend(torch.nn.Identity(), *inputs(), None, packed=packed())
        finally:
            torch.use_deterministic_algorithms(False)
    assert seen == [False, True] * 2


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"softcap": 50.0}, "caps its attention scores"),
        ({"s_aux": torch.zeros(2)}, "attends through sinks"),
        ({"sinks": torch.zeros(2)}, "attends through sinks"),
        ({"position_bias": torch.zeros(2)}, "adds a bias to its attention scores"),
        ({"indices": torch.zeros(2)}, "attends to chosen tokens only"),
        ({"is_causal": False}, "lets tokens see later ones"),
        ({"attention_mask": torch.zeros(2)}, "makes an attention mask of its own"),
    ],
)
def test_what_no_kernel_does_is_refused_by_its_name(given: dict[str, Any], what: str) -> None:
    """Each cause for itself, with the attention that does it; None is nothing."""
    sdpa = varlen.attention_function(varlen.FUNCTIONS["sdpa"]())
    module, row = torch.nn.Identity(), {"attention_mask": None, "packed": packed()}
    with pytest.raises(ModelError) as error:
        sdpa(module, *inputs(), **(row | given))
    assert str(error.value) == (
        f"the model {what}, which no kernel here does\n"
        "  -> use model.attention=own: one sample per forward pass"
    )
    sdpa(module, *inputs(), **(row | dict.fromkeys(given)))


def test_a_window_is_measured_against_the_longest_sample_of_the_job() -> None:
    """Not against those of this row: the self-test finds it, not step 31."""
    sdpa = varlen.attention_function(varlen.FUNCTIONS["sdpa"]())
    module, heads = torch.nn.Identity(), inputs()
    sdpa(module, *heads, None, packed=packed(), sliding_window=9)
    with pytest.raises(ModelError, match=r"window of 8 tokens, .* the longest sample has 9\n.*=8"):
        sdpa(module, *heads, None, packed=packed(), sliding_window=8)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    job = varlen.Packed(LENGTHS, ends, max(LENGTHS), longest=30)
    sdpa(module, *heads, None, packed=job, sliding_window=30)
    with pytest.raises(ModelError, match=r"window of 29 tokens, .* the longest sample has 30"):
        sdpa(module, *heads, None, packed=job, sliding_window=29)


def test_what_a_kernel_cannot_be_called_with_is_refused() -> None:
    """Dropout where the kernel has none, batches."""
    sdpa = varlen.attention_function(varlen.FUNCTIONS["sdpa"]())
    module, heads = torch.nn.Identity(), inputs()
    own = varlen.attention_function(varlen.FUNCTIONS["torch_varlen"]())
    with pytest.raises(ModelError, match=r"attention_dropout 0.1.*torch_varlen cannot do"):
        own(module, *heads, None, dropout=0.1, packed=packed())
    with pytest.raises(ValueError, match="not a batch of 2"):
        sdpa(module, *(torch.cat([x, x]) for x in heads), None)
