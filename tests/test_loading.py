"""While a model is loaded, no rank holds more of it than its own part."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
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


def private(pid: int) -> int:
    """Bytes that a process holds by itself: mapped files belong to the page cache."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kinds = ("RssAnon:", "RssShmem:")
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(kinds))


@dataclass
class Window:
    """A part of the start on one rank, from a moment when all ranks were there to another."""

    pid: int
    begin: float
    end: float = 0.0
    held: int = 0
    """Private bytes at the beginning."""
    left: int = 0
    """Private bytes at the end."""


class Sampler:
    """Reads what all children of this process hold, again and again, in a thread."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, dict[int, int]]] = []
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._enough.is_set():
            held = {}
            for child in multiprocessing.active_children():
                try:
                    held[child.pid or 0] = private(child.pid or 0)
                except FileNotFoundError:
                    continue  # ended meanwhile
            self.samples.append((time.time(), held))
            time.sleep(0.0005)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._enough.set()
        self._thread.join()

    def peak(self, windows: list[Window]) -> int:
        """Most bytes that the windows' processes held together, above what they began with."""
        begin, end = min(w.begin for w in windows), max(w.end for w in windows)
        found = [
            sum(held.get(window.pid, 0) for window in windows)
            for moment, held in self.samples
            if begin <= moment <= end
        ]
        assert len(found) > 5, "too few samples to tell anything"
        return max(found) - sum(window.held for window in windows)


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
    loading: Window
    engine: Window


class Begun(Exception):
    """The first forward pass would be next."""


def begin(world: World) -> Window:
    gc.collect()
    world.barrier()
    window = Window(os.getpid(), time.time())
    window.held = private(window.pid)
    return window


def end(world: World, window: Window) -> Window:
    world.barrier()
    window.end, window.left = time.time(), private(window.pid)
    return window


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
    load, windows = module.load, []

    def watched(folder: Path, *args: Any, **options: Any) -> Any:
        window = begin(world)
        files = WeightFiles(folder)
        whole = [files.read(name).clone() for name in files.shapes if case.greedy and world.is_main]
        model = load(folder, *args, **options)
        windows.append(end(world, window))
        del whole
        return model

    with mock.patch.object(module, "load", watched):
        setup = Setup(world, job, f"engine.type={case.engine}")
    parts = [
        p.ds_tensor if case.engine == "zero3" else p.to_local() for p in setup.model.parameters()
    ]
    shards = sum(part.numel() * part.element_size() for part in parts)
    del parts
    window = begin(world)
    with mock.patch.object(selftest, "run", side_effect=Begun), pytest.raises(Begun):
        setup.trainer.train()
    windows.append(end(world, window))
    setup.close()
    return Loaded(shards, *windows)


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
    with (
        # Freed memory goes back to the kernel, so that what a process has is what it holds.
        mock.patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536"),
        Sampler() as sampler,
    ):
        by_rank = on_ranks(start, ranks, model.small, model.large, cases)
    for case, found in zip(cases, zip(*by_rank, strict=True), strict=True):
        shards = sum(one.shards for one in found)
        above = sampler.peak([one.loading for one in found]) - shards
        engine = [one.engine for one in found]
        kept = sum(window.left - window.held for window in engine)
        passing = sampler.peak(engine) - kept
        figures = {"parts": shards, "above": above, "kept": kept, "passing": passing}
        print(ranks, case, *(f"{name} {value / MIB:.1f} MiB" for name, value in figures.items()))
        assert (above < model.file + model.layer) is not case.greedy
        assert passing < ranks * model.table + model.layer
