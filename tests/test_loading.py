"""While a model is loaded, no rank holds more of it than its own part."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from sft_job import fsdp, selftest, zero3
from sft_job.weights import WeightFiles
from sft_job.world import World
from tests.ranks import Setup
from tests.runs import make_conversations, make_job, make_model, make_tokenizer, on_ranks, sft_job

ENGINES: dict[str, ModuleType] = {"fsdp": fsdp, "zero3": zero3}
# A large vocabulary on purpose: table and head are the largest tensors by far.
SHAPE = {
    "vocab_size": 32003, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8,
    "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 256,
}  # fmt: skip
FILE = "120MB"
MIB = 2**20


def private() -> int:
    """Bytes that this process holds by itself: mapped files belong to the page cache."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kinds = ("RssAnon:", "RssShmem:")
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(kinds))


class Window(TorchDispatchMode):
    """A part of the start on one rank, from a moment when all ranks were there to another: what it
    holds is read before and after every operator, however fast the machine is."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world, self.figures = world, Figures()

    def __enter__(self) -> Window:
        gc.collect()
        self.world.barrier()
        self.figures.held = self.figures.most = private()
        super().__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        self.world.barrier()
        self.figures.left = self._look()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._look()
        result = func(*args, **(kwargs or {}))
        self._look()
        return result

    def _look(self) -> int:
        now = private()
        self.figures.most = max(self.figures.most, now)
        self.figures.looks += 1
        return now


@dataclass
class Figures:
    """Private bytes of a rank: at a window's beginning, at its end, and the most between."""

    held: int = 0
    left: int = 0
    most: int = 0
    looks: int = 0


# --- on the ranks ------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An engine; with `greedy`, rank 0 reads the whole model before its own part."""

    engine: str
    greedy: bool = False


@dataclass
class Loaded:
    """What one rank tells of one case.

    Args:
        shards: bytes of its part of the parameters.
        loading: from the weight files to the sharded model.
        engine: from there to the first forward pass.
    """

    shards: int
    loading: Figures
    engine: Figures


class Begun(Exception):
    """The first forward pass would be next."""


def start(world: World, small: Path, job: Path, cases: list[Case]) -> list[Loaded]:
    """Everything up to the first forward pass, each case first with a small model: what is
    imported and made once is there then."""
    found = []
    for case in cases:
        start_once(world, small, case)
        found.append(start_once(world, job, case))
    return found


def start_once(world: World, job: Path, case: Case) -> Loaded:
    module = ENGINES[case.engine]
    load, figures = module.load, []

    def watched(folder: Path, *args: Any, **options: Any) -> Any:
        with Window(world) as window:
            files = WeightFiles(folder)
            greedy = case.greedy and world.is_main
            whole = [files.read(name).clone() for name in files.shapes if greedy]
            model = load(folder, *args, **options)
        figures.append(window.figures)
        del whole
        return model

    with mock.patch.object(module, "load", watched):
        setup = Setup(world, job, f"engine.type={case.engine}")
    parts = [
        p.ds_tensor if case.engine == "zero3" else p.to_local() for p in setup.model.parameters()
    ]
    shards = sum(part.numel() * part.element_size() for part in parts)
    del parts
    with (
        Window(world) as window,
        mock.patch.object(selftest, "run", side_effect=Begun),
        pytest.raises(Begun),
    ):
        setup.trainer.train()
    figures.append(window.figures)
    setup.close()
    return Loaded(shards, *figures)


# --- the test ----------------------------------------------------------------------------


@dataclass
class Model:
    """A job of a tiny model, one of a large model, and bytes of parts of the large one."""

    small: Path
    large: Path
    file: int
    layer: int
    table: int


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """100 M parameters, fp32, in four files."""
    folder = tmp_path_factory.mktemp("loading")
    torch.manual_seed(0)
    large = LlamaForCausalLM(LlamaConfig(**SHAPE))
    layer = sum(parameter.nbytes for parameter in large.model.layers[0].parameters())
    table = large.get_input_embeddings().weight.nbytes
    large.save_pretrained(folder / "large", max_shard_size=FILE)
    del large
    make_tokenizer(folder / "large")
    make_model(folder / "small")
    jobs = []
    for name in ("small", "large"):
        (folder / f"job-{name}").mkdir()
        data = make_conversations(folder / f"job-{name}" / "data.json", 16)
        job = make_job(folder / f"job-{name}", folder / name, data, train__precision="bf16")
        result = sft_job("data", "encode", job)
        assert result.returncode == 0, result.stderr
        jobs.append(job)
    files = [file.stat().st_size for file in (folder / "large").glob("*.safetensors")]
    assert len(files) >= 4
    assert sum(files) > 2 * (max(files) + layer)
    return Model(jobs[0], jobs[1], max(files), layer, table)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_model_passes_through_memory_in_parts(model: Model, ranks: int) -> None:
    """Above their final parts all ranks together hold less than a file and a layer, under both
    engines; a rank that reads everything is found out. Then DeepSpeed starts: beyond what it
    keeps, it gathers a table on every rank, as training does."""
    cases = [Case("fsdp"), Case("fsdp", greedy=True), Case("zero3")]
    # Freed memory goes back to the kernel, so that what a process has is what it holds.
    with mock.patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536"):
        by_rank = on_ranks(start, ranks, model.small, model.large, cases)
    for case, found in zip(cases, zip(*by_rank, strict=True), strict=True):
        shards = sum(one.shards for one in found)
        above = sum(one.loading.most - one.loading.held for one in found) - shards
        kept = sum(one.engine.left - one.engine.held for one in found)
        passing = sum(one.engine.most - one.engine.held for one in found) - kept
        figures = {"parts": shards, "above": above, "kept": kept, "passing": passing}
        print(ranks, case, *(f"{name} {value / MIB:.1f} MiB" for name, value in figures.items()))
        assert min(one.loading.looks for one in found) > 100
        assert (above < model.file + model.layer) is not case.greedy
        assert passing < ranks * model.table + model.layer
