"""What the training tests share: tiny models, jobs, and real runs of the real commands."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from sft_job.paths import escape
from sft_job.rundir import RunDir
from sft_job.templates import VICUNA

ROOT = Path(__file__).parent.parent
WORDS = [
    "sun",
    "moon",
    "star",
    "river",
    "stone",
    "leaf",
    "bird",
    "cloud",
    "rain",
    "wind",
    "fire",
    "snow",
    "hill",
    "lake",
    "tree",
    "rose",
]


def make_tokenizer(folder: Path) -> Any:
    """A byte-level BPE tokenizer of 500 tokens, trained here."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS), VICUNA.system, "USER: ASSISTANT:"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(folder: Path, *, tied: bool = False, **shape: float) -> Path:
    """A small random LLaMA in fp32 with its tokenizer, in Hugging Face layout."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tokenizer(folder)
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 503,  # odd on purpose: not divisible by the number of ranks
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    config = LlamaConfig(**(sizes | shape), tie_word_embeddings=tied, initializer_range=0.1)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_conversations(file: Path, count: int, *, seed: int = 0, words: int = 14) -> Path:
    """`count` conversations of 1 to 2 short exchanges."""
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, words)))

    records = [
        {
            "id": f"c{number}",
            "conversations": [
                {"from": role, "value": text()}
                for _ in range(rng.randint(1, 2))
                for role in ("human", "gpt")
            ],
        }
        for number in range(count)
    ]
    file.write_text(json.dumps(records, indent=1))
    return file


def make_job(folder: Path, model: Path | str, data: Path, **changes: Any) -> Path:
    """A job file for a tiny model; `changes` are dotted keys, written as they are."""
    job: dict[str, Any] = {
        "model": {"path": escape(str(model))},
        "data": {"train": [escape(str(data))], "seq_len": 160},
        "train": {
            "global_batch_size": 16,
            "micro_batch_tokens": 4096,
            "max_steps": 10,
            "learning_rate": 1e-3,
            "warmup_ratio": 0.2,
            "precision": "fp32",
            "activation_checkpointing": "none",
        },
        "run": {"dir": escape(str(folder / "run"))},
    }
    for key, value in changes.items():
        *sections, last = key.replace("__", ".").split(".")
        inner = job
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    return file


def environment() -> dict[str, str]:
    """The environment of a user's shell: nothing that a launcher would set."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or (name not in dropped and not name.startswith("SLURM_"))
    }
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "sft_job", *map(str, arguments)]


def sft_job(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `sft-job ARGUMENTS` and wait."""
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        env=environment() | options.pop("env", {}),
        timeout=400,
        **options,
    )


def run_job(job: Path, *overrides: str) -> RunDir:
    """Train to the end; the test fails with the program's own words otherwise."""
    result = sft_job("train", job, *overrides)
    assert result.returncode == 0, result.stdout + result.stderr
    given = dict(override.split("=", 1) for override in overrides)
    run = RunDir(given.get("run.dir") or yaml.safe_load(job.read_text())["run"]["dir"])
    assert run.done.exists()
    return run


def interrupt_job(job: Path, *overrides: str, after: int, number: int = signal.SIGTERM) -> str:
    """Train, send a signal to the launcher when `after` steps are logged; must exit with 75."""
    given = dict(override.split("=", 1) for override in overrides)
    run = RunDir(given.get("run.dir") or yaml.safe_load(job.read_text())["run"]["dir"])
    process = subprocess.Popen(
        command("train", job, *overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )
    while process.poll() is None and len(metrics(run)) < after:
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    return output


def unfinished_copy(finished: RunDir, target: Path, step: int) -> RunDir:
    """The finished run as it was after a step that was saved, on disk."""
    shutil.copytree(finished.path, target)
    run = RunDir(target)
    run.done.unlink()
    shutil.rmtree(run.model)
    for later in run.checkpoint_steps():
        if later > step:
            shutil.rmtree(run.checkpoint(later))
    stored = json.loads(run.job_file.read_text())
    stored["run"]["dir"] = str(target)
    run.job_file.write_text(json.dumps(stored))
    return run


def metrics(run: RunDir) -> list[dict[str, Any]]:
    if not run.metrics_file.exists():
        return []
    return [json.loads(line) for line in run.metrics_file.read_text().splitlines()]


def weights(folder: Path) -> dict[str, Any]:
    """All tensors of an exported model."""
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    assert tensors
    return tensors


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _rank_main(
    function: Callable[..., Any], rank: int, size: int, port: int, queue: Any, arguments: Any
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        import torch

        from sft_job import hardware, world, zero3
        from sft_job.workers import Place

        torch.set_num_threads(1)
        zero3.prepare_environment(torch.device("cpu"))  # functions choose the engine later
        place = Place(rank, rank, size, size, "127.0.0.1", port)
        joined = world.join(place, hardware.detect())
        queue.put((rank, function(joined, *arguments), None))
        world.leave()
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
        raise


def on_ranks(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """Run `function(world, *arguments)` in `size` fresh processes of one gloo group.

    Returns:
        What each rank returned, by rank.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_rank_main, args=(function, rank, size, port, queue, arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        while len(results) < size:
            rank, value, error = queue.get(timeout=420)
            assert error is None, f"rank {rank}:\n{error}"
            results[rank] = value
    finally:
        for process in processes:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(size)]
