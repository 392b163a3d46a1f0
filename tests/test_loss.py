"""The chunked loss of supervised positions equals the plain one, in value and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sft_job import loss


@pytest.mark.parametrize("rows", [1, loss.CHUNK, 2 * loss.CHUNK + 3])
def test_equals_plain_cross_entropy(rows: int) -> None:
    """fp64 reference, fp32 loss: sums and both gradients agree, whatever the chunking."""
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 24, generator=generator)
    weight = torch.randn(57, 24, generator=generator)
    targets = torch.randint(0, 57, (rows,), generator=generator)
    results = []
    for dtype in (torch.float32, torch.float64):
        h, w = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
        if dtype is torch.float32:
            value = loss.cross_entropy_sum(h, w, targets)
        else:
            value = F.cross_entropy(h @ w.t(), targets, reduction="sum")
        (value * 0.25).backward()
        results.append((value, h.grad, w.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-5)


def test_nothing_supervised_keeps_the_graph() -> None:
    """A micro-batch without supervised tokens gives zero loss and zero gradients, not None."""
    hidden = torch.randn(0, 8, requires_grad=True)
    weight = torch.randn(5, 8, requires_grad=True)
    value = loss.cross_entropy_sum(hidden, weight, torch.zeros(0, dtype=torch.long))
    value.backward()
    assert value.item() == 0.0
    assert torch.equal(weight.grad, torch.zeros(5, 8))


def test_logits_exist_only_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No [rows, vocabulary] tensor is ever made."""
    sizes: list[int] = []
    linear = F.linear

    def watched(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        sizes.append(inputs.shape[0])
        return linear(inputs, weight)

    monkeypatch.setattr(loss.F, "linear", watched)
    hidden = torch.randn(1000, 8, requires_grad=True)
    weight = torch.randn(5, 8, requires_grad=True)
    loss.cross_entropy_sum(hidden, weight, torch.zeros(1000, dtype=torch.long)).backward()
    assert sum(sizes) == 1000
    assert max(sizes) == loss.CHUNK


def test_without_gradients_none_are_made() -> None:
    """Evaluation needs the value alone."""
    hidden, weight = torch.randn(4, 8), torch.randn(5, 8)
    value = loss.cross_entropy_sum(hidden, weight, torch.tensor([0, 1, 2, 3]))
    expected = F.cross_entropy(hidden @ weight.t(), torch.tensor([0, 1, 2, 3]), reduction="sum")
    torch.testing.assert_close(value, expected)


def test_a_sliding_window_is_refused_where_it_would_matter() -> None:
    """The kernel attends to the whole sample; a shorter window would be ignored silently."""
    from sft_job import varlen
    from sft_job.errors import ModelError

    heads = [torch.randn(1, 2, 9, 4) for _ in range(3)]
    varlen.sdpa(torch.nn.Identity(), *heads, None, seq_lens=[4, 5], sliding_window=5)
    with pytest.raises(ModelError, match="window 4, longest sample 5"):
        varlen.sdpa(torch.nn.Identity(), *heads, None, seq_lens=[4, 5], sliding_window=4)
    with pytest.raises(ModelError, match="sinks"):
        varlen.sdpa(torch.nn.Identity(), *heads, None, s_aux=torch.zeros(2))
