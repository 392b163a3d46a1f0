"""What the training tests share: tiny models, jobs, and real runs of the real commands."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import pickle
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
from queue import Empty
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
        **options,
    )


def encode(job: Path, *overrides: str) -> None:
    """What `sft-job data encode` does, in this process."""
    from sft_job import data
    from sft_job.config import load

    data.encode_job(load(job, overrides))


def run_job(job: Path, *overrides: str) -> RunDir:
    """Train to the end; the test fails with the program's own words otherwise."""
    result = sft_job("train", job, *overrides)
    assert result.returncode == 0, result.stdout + result.stderr
    given = dict(override.split("=", 1) for override in overrides)
    run = RunDir(given.get("run.dir") or yaml.safe_load(job.read_text())["run"]["dir"])
    assert run.done.exists()
    return run


# Ranks that wait for a request to stop, so that it comes where a test wants it to come, however
# late: before torch is imported ("start"), or when the batches of a step (from 0) are asked for.
HELD = """
import os
if "RANK" in os.environ:
    import time
    from sft_job import cli
    requests, listen = [], cli.StopRequest.listen
    def remembered(request):
        requests.append(request)
        listen(request)
    cli.StopRequest.listen = remembered
    def held(whole, *arguments):
        while not any(one.requested() for one in requests):
            time.sleep(0.01)
        return whole(*arguments)
    if os.environ["HELD_AT"] == "start":
        from sft_job import hardware
        detect = hardware.detect_for_training
        hardware.detect_for_training = lambda: held(detect)
    else:
        from sft_job import dataset
        at, get = int(os.environ["HELD_AT"]), dataset.Steps.__getitem__
        dataset.Steps.__getitem__ = lambda steps, step: (
            held(get, steps, step) if step == at else get(steps, step)
        )
"""


def held_at(folder: Path, place: str | int) -> dict[str, str]:
    """The environment of a command whose ranks wait there for a request to stop."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(HELD)
    return environment() | {"PYTHONPATH": f"{folder}:{ROOT}", "HELD_AT": str(place)}


def interrupt_job(job: Path, *overrides: str, after: int, number: int = signal.SIGTERM) -> str:
    """Train, send a signal to the launcher when `after` steps are logged; must exit with 75."""
    given = dict(override.split("=", 1) for override in overrides)
    run = RunDir(given.get("run.dir") or yaml.safe_load(job.read_text())["run"]["dir"])
    process = subprocess.Popen(
        command("train", job, *overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # The batches of a step are asked for while the one before it has yet to be trained on.
        env=held_at(job.parent / "held", after + 1),
    )
    while process.poll() is None and len(metrics(run)) < after:
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate()
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


# Not torch's default, to see that it reaches every group.
GLOO_TIMEOUT_S = 1799


def _rank_main(
    function: Callable[..., Any], rank: int, size: int, port: int, queue: Any, arguments: Any
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        import torch

        from sft_job import hardware, world, zero3
        from sft_job.schema import Run
        from sft_job.workers import Place

        torch.set_num_threads(1)
        zero3.prepare_environment(torch.device("cpu"))  # functions choose the engine later
        place = Place(rank, rank, size, size, "127.0.0.1", port)
        joined = world.join(
            place, hardware.detect(), Run(dir="/nowhere", gloo_timeout_s=GLOO_TIMEOUT_S)
        )
        # Of a tensor the queue would send a handle, good for as long as this process lives.
        queue.put((rank, pickle.dumps(function(joined, *arguments)), None))
        world.leave()
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
        raise


@functools.cache
def _warm_context() -> Any:
    """Processes forked from one that has imported everything and done nothing: importing torch,
    transformers and DeepSpeed takes longer than what most tests do with them."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm"])
    return context


def on_ranks(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """Run `function(world, *arguments)` in `size` processes of their own, of one gloo group.

    Returns:
        What each rank returned, by rank.
    """
    context = _warm_context()
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
            try:
                rank, value, error = queue.get(timeout=1)
            except Empty:
                codes = {rank: process.exitcode for rank, process in enumerate(processes)}
                killed = {r: code for r, code in codes.items() if code and r not in results}
                assert not killed, f"ended without a word (rank: exit code): {killed}"
                continue
            assert error is None, f"rank {rank}:\n{error}"
            results[rank] = pickle.loads(value)
    finally:
        for process in processes:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(size)]
