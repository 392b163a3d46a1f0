"""Both engines really shard, compute in the dtype asked for, and compute the right thing."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sft_job import world
from sft_job.schema import Run
from tests import ranks
from tests.runs import (
    GLOO_TIMEOUT_S,
    encode,
    make_conversations,
    make_job,
    make_model,
    on_ranks,
)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny job, encoded; dimensions divisible by two, so that shares are exact."""
    folder = tmp_path_factory.mktemp("engines")
    model = make_model(folder / "model", vocab_size=504)
    data = make_conversations(folder / "data.json", 32)
    file = make_job(folder, model, data, train__max_steps=2, train__warmup_ratio=0.0)
    encode(file)
    return file


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_every_rank_holds_its_half_and_computes_in_half_precision(
    job: Path, engine: str, precision: str
) -> None:
    """Parameters and Adam's state are exactly 1/2 each; the layers really run in 16 bits."""
    options = [f"engine.type={engine}", f"train.precision={precision}"]
    if engine == "zero3":
        options.append("engine.stage3_param_persistence_threshold=0")
    for result in on_ranks(ranks.sharding, 2, job, *options):
        assert result["kinds"] == (["DTensor"] if engine == "fsdp" else ["ds:NOT_AVAILABLE"]), (
            result
        )
        assert result["local"] * 2 == result["whole"]
        assert result["adam"] == 2 * result["local"]
        dtype = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}[precision]
        assert (result["hidden"], result["weight"]) == ([dtype], [dtype])
        assert engine == "zero3" or result["masters"] == ["torch.float32"]
        # DeepSpeed by itself would start from rounded weights.
        assert result["start"] == 0.0
        # DeepSpeed makes a group of its own as well, with torch's own limit.
        assert result["groups"] >= (2 if engine == "fsdp" else 3)
        assert result["waits"] == [GLOO_TIMEOUT_S]


class Backend:
    """A backend of a group, as torch has them: its limit can be set and not read."""

    def __init__(self, name: str) -> None:
        self.name = lambda: name
        self.limit: timedelta | None = None

    def _set_default_timeout(self, limit: timedelta) -> None:
        self.limit = limit


def test_each_backend_has_its_own_limit() -> None:
    """A group for both kinds of devices is made with one; what is no network has none."""
    run = Run(dir="run", start_timeout_s=1, nccl_timeout_s=20, gloo_timeout_s=300)
    timeouts = world.Timeouts.of(run)
    assert timeouts.start == timedelta(seconds=1)
    both = {"cuda": Backend("nccl"), "cpu": Backend("gloo")}
    hosts = dict.fromkeys(("cuda", "cpu"), Backend("gloo"))  # as a group of gloo alone is
    fake = {"cpu": Backend("fake")}
    groups: list[Any] = [
        SimpleNamespace(
            _device_types=[torch.device(kind) for kind in backends],
            _get_backend=lambda device, backends=backends: backends[device.type],
        )
        for backends in (both, hosts, fake)
    ]
    timeouts.apply(groups)
    assert both["cuda"].limit == timedelta(seconds=20)
    assert both["cpu"].limit == timedelta(seconds=300)
    assert hosts["cuda"].limit == timedelta(seconds=300)
    assert fake["cpu"].limit is None


def test_masters_start_at_the_files_whatever_the_shapes(tmp_path: Path) -> None:
    """Three ranks: no dimension is divisible by them, and of some tensors one rank gets nothing."""
    shape = {"hidden_size": 4, "intermediate_size": 7, "num_attention_heads": 2}
    model = make_model(tmp_path / "model", num_key_value_heads=1, **shape)
    data = make_conversations(tmp_path / "data.json", 16)
    job = make_job(tmp_path, model, data, train__max_steps=2, train__warmup_ratio=0.0)
    encode(job)
    variants = [
        [f"engine.type={engine}", f"train.precision={precision}"]
        for engine in ("fsdp", "zero3")  # in this order: accelerate remembers DeepSpeed
        for precision in ("fp32", "fp16")
    ]
    results = on_ranks(ranks.starts, 3, job, variants)
    assert all(result == results[0] for result in results)
    exact = results[0][0][1]
    for (_, precision), (difference, records) in zip(variants, results[0], strict=True):
        assert difference == 0.0
        tolerance = 1e-5 if precision.endswith("fp32") else 2e-2
        for ours, theirs in zip(records, exact, strict=True):
            assert ours == pytest.approx(theirs, rel=tolerance)


def test_fp32_is_fp32(job: Path) -> None:
    """The check above can tell the dtypes apart."""
    (result,) = on_ranks(ranks.sharding, 1, job)
    assert result["hidden"] == ["torch.float32"]
    assert result["local"] == result["whole"]


def test_zero3_releases_and_gathers_again(job: Path) -> None:
    """With thresholds of 0 every parameter is gathered for the forward and the backward pass."""
    limits = "stage3_max_live_parameters: 0, stage3_max_reuse_distance: 0"
    options = f"engine={{type: zero3, {limits}, stage3_param_persistence_threshold: 0}}"
    result = on_ranks(ranks.released, 2, job, options)[0]
    # twice a step, and the norm behind the last layer and the head once at least
    assert result["gathered"] >= 2 * result["steps"] * (result["parameters"] - 2)
    assert result["released"] >= result["gathered"] * 0.9


@pytest.fixture(scope="module")
def large_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 M parameters with a tiny vocabulary, so that the shards are what counts."""
    folder = tmp_path_factory.mktemp("memory")
    shape = {"vocab_size": 504, "hidden_size": 1024, "intermediate_size": 2816}
    model = make_model(folder / "model", num_hidden_layers=9, **shape)
    data = make_conversations(folder / "data.json", 8)
    job = make_job(folder, model, data, train__max_steps=2, train__global_batch_size=2)
    encode(job)
    return job


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_two_ranks_need_less_memory_each(large_job: Path, engine: str) -> None:
    """A rank's peak with two ranks is at most 0.85 of one rank's."""
    (one,) = on_ranks(ranks.peak_rss_mib, 1, large_job, f"engine.type={engine}")
    two = on_ranks(ranks.peak_rss_mib, 2, large_job, f"engine.type={engine}")
    assert max(two) <= 0.85 * one, (one, two)


@pytest.fixture(scope="module")
def single(job: Path) -> dict:
    (result,) = on_ranks(ranks.single, 1, job, "train.micro_batch_tokens=200")
    return result


def test_one_step_equals_the_plain_loop(job: Path, single: dict) -> None:
    """Loss and gradients of a packed step equal a plain loop over one padded batch."""
    from transformers import AutoModelForCausalLM

    ours = single
    model = AutoModelForCausalLM.from_pretrained(job.parent / "model")
    samples = ours["samples"]
    longest = max(len(ids) for ids, _ in samples)
    ids = torch.tensor([i + [0] * (longest - len(i)) for i, _ in samples])
    labels = torch.tensor([i + [-100] * (longest - len(i)) for _, i in samples])
    mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i, _ in samples])
    logits = model(input_ids=ids, attention_mask=mask).logits
    loss = torch.nn.CrossEntropyLoss()(
        logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
    )
    loss.backward()

    assert ours["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            torch.from_numpy(ours["gradients"][name]), gradient, rtol=0, atol=1e-5 * scale
        )


def test_samples_do_not_see_each_other(single: dict) -> None:
    """Logits of five samples in one row equal those of each alone."""
    assert single["packed_and_alone"] <= 1e-5
