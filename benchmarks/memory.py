"""Peak memory of one training step against the plain Hugging Face Trainer.

    python -m benchmarks.memory [--out memory.json]

Eight conversations of exactly 1,024 tokens are one step of 8,192; the vocabulary is Llama 3's,
128,256; the body is tiny, so that the language-model head is nearly all there is. Conversations
of equal length are the plain Trainer's best case: it pads nothing.

    sft_job    `sft-job train`'s own worker as its launcher starts it, one rank
    Trainer    LlamaForCausalLM and Trainer, ids and labels from sft_job's token cache

Weights, data, optimizer and its settings are the same, and nothing is recomputed. Both take the
eight at once (a batch of 8 rows, a micro-batch of 8,192 tokens), which is what the bound is for;
and beside it one after the other (8 batches of 1 row accumulated, micro-batches of 1,024 tokens).
Each run is a process of its own on the CPU and takes two steps, of which the second is measured:
Adam's state is there by then.

    step       most bytes that torch's CPU allocator held at once during the second step, beyond
               what it held before: every allocation and release, from torch's profiler
    process    most resident bytes of the process, beyond what it had when Python and all libraries
               were imported. Weights, Adam's state, what libraries take past torch's allocator,
               what malloc does not give back, and sft_job's self-test are in it
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks import workload

VOCABULARY = 128_256
BODY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
ROWS, ROW_TOKENS = 8, 1024

# sft_job / plain Trainer, at most; and how far their fp32 losses may lie apart, relative.
BOUND = 0.4
SAME_LOSS = 1e-5

# Taken by both sides: nothing is warmed up or decayed, so that two steps are two equal steps.
LEARNING_RATE = 2e-5
STEPS = 2
MIB = 2**20


@dataclass(frozen=True)
class Workload:
    """The step that all sides take: `rows` conversations of `row_tokens` tokens each."""

    rows: int = ROWS
    row_tokens: int = ROW_TOKENS
    vocabulary: int = VOCABULARY
    hidden: int = BODY["hidden_size"]


# --- model and conversations ----------------------------------------------------------------


def write_job(folder: Path, work: Workload) -> Path:
    """Model, conversations and job file; encodes the conversations. Returns the job file."""
    _write_model(folder / "model", work)
    data = folder / "conversations.json"
    data.write_text(json.dumps(_conversations(work)))
    job = {
        "model": {"path": str(folder / "model"), "attention": "sdpa"},
        "data": {"train": [str(data)], "seq_len": work.row_tokens, "cache_dir": "cache"},
        "train": {
            "global_batch_size": work.rows,
            "micro_batch_tokens": work.rows * work.row_tokens,
            "max_steps": STEPS,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0,
            "activation_checkpointing": "none",
        },
        "run": {"dir": "run"},
    }
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    command = [sys.executable, "-m", "sft_job", "data", "encode", str(file)]
    subprocess.run(command, check=True, env=_environment(), capture_output=True)
    return file


def _write_model(folder: Path, work: Workload) -> None:
    """A random LLaMA in fp32, and a tokenizer that makes one token of every byte."""
    import tokenizers
    import torch
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    shape = BODY | {"hidden_size": work.hidden, "intermediate_size": 2 * work.hidden}
    config = LlamaConfig(
        vocab_size=work.vocabulary, max_position_embeddings=work.row_tokens, **shape
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_only = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    backend = tokenizers.Tokenizer(bytes_only)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def _conversations(work: Workload) -> list[dict[str, Any]]:
    """Each longer than a row, so that it is cut to exactly one. About half is answers."""
    rng = random.Random(0)

    def turn(role: str, length: int) -> dict[str, str]:
        return {"from": role, "value": "".join(rng.choices(string.ascii_lowercase, k=length))}

    exchanges = work.row_tokens // 150
    return [
        {
            "id": str(number),
            "conversations": [
                turn(*of) for _ in range(exchanges) for of in (("human", 50), ("gpt", 150))
            ],
        }
        for number in range(work.rows)
    ]


# --- one side, in a process of its own --------------------------------------------------------


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process in memory now; with VmHWM, the most until now.

    From Linux's /proc. getrusage's maximum begins with that of the process that started us.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(kib) * 1024


def highest(changes: Iterable[int]) -> int:
    """The highest sum on the way: of bytes allocated (positive) and released (negative)."""
    now = most = 0
    for change in changes:
        now += change
        most = max(most, now)
    return most


def recorder(file: Path, baseline: int) -> Any:
    """A TrainerCallback that measures the second step, writes what it saw and ends the process.

    Nothing is saved or exported: that is not the step.
    """
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.step_bytes = self.peak = 0
            self.losses: list[float] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == STEPS - 1:
                self.profile.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == STEPS:
                self.peak = resident("VmHWM")  # before the profiler's records are gathered
                self.profile.stop()
                self.step_bytes = highest(allocations(self.profile))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
            self.losses.append(logs["loss"])
            if state.global_step == STEPS:
                record = {
                    "step_bytes": self.step_bytes,
                    "process_bytes": self.peak - baseline,
                    "baseline_bytes": baseline,
                    "losses": self.losses,
                }
                file.write_text(json.dumps(record))
                os._exit(0)

    return Recorder()


def allocations(profile: Any) -> list[int]:
    """Bytes allocated and released, in the order of time."""
    events = profile.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return [size for _, size in sorted(changes, key=lambda change: change[0])]


def run_ours(folder: Path, record: Path, precision: str, rows: int) -> None:
    """`sft-job train` as its launcher starts it on one rank."""
    from transformers import trainer as trainer_module

    from sft_job import checkpoint, dataset, export, fsdp, trainer, zero3  # noqa: F401 (baseline)
    from sft_job.config import load
    from sft_job.train import main as train

    job = folder / "job.yaml"
    tokens = rows * load(job).data.seq_len
    trainer_module.DEFAULT_CALLBACKS.append(recorder(record, resident()))
    run_dir = record.with_suffix("")
    overrides = [f"train.precision={precision}", f"train.micro_batch_tokens={tokens}"]
    train([str(job), *overrides, f"run.dir={run_dir}"])


def run_plain(folder: Path, record: Path, precision: str, rows: int) -> None:
    """The Trainer as its documentation has it, on the ids and labels of sft_job's cache."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        Trainer,
        TrainingArguments,
        default_data_collator,
    )

    from sft_job.config import load
    from sft_job.dataset import TokenCache
    from sft_job.prepared import find_prepared

    baseline = resident()
    prepared = find_prepared(load(folder / "job.yaml"))
    if prepared is None:
        raise FileNotFoundError("the conversations are not encoded")
    cache = TokenCache(Path(prepared.data_folder))
    samples = [cache[i] for i in range(len(cache))]
    arguments = TrainingArguments(
        output_dir=str(record.with_suffix("")),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=len(samples) // rows,
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        bf16=precision == "bf16",
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=arguments,
        train_dataset=[
            {"input_ids": sample.input_ids.astype("int64"), "labels": sample.labels}
            for sample in samples
        ],
        data_collator=default_data_collator,
        callbacks=[recorder(record, baseline)],
    )
    trainer.train()


SIDES = {"sft_job": run_ours, "Trainer": run_plain}


# --- all sides --------------------------------------------------------------------------------


def _environment() -> dict[str, str]:
    """A user's shell, with the checkout importable."""
    return workload.process_environment() | {"PYTHONPATH": str(workload.ROOT)}


def _as_rank_0(environment: dict[str, str]) -> dict[str, str]:
    """As sft_job's launcher makes it of another one."""
    from sft_job.workers import Place, training_environment

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = Place(0, 0, 1, 1, "127.0.0.1", probe.getsockname()[1])
    # A rank is believed to be one where a launcher says that it has started it: torchrun, with one.
    return training_environment(place, environment) | {"TORCHELASTIC_RUN_ID": "benchmark"}


def measure(folder: Path, side: str, precision: str, rows: int) -> dict[str, Any]:
    """Two steps of a side in a fresh process; what `recorder` saw.

    Args:
        folder: as from `write_job`.
        rows: conversations in a micro-batch (sft_job) or in a batch (Trainer).

    Raises:
        RuntimeError: the process failed.
    """
    record = folder / f"{side}-{precision}-{rows}.json"
    command = [sys.executable, "-m", "benchmarks.memory", "--side", side, str(folder), str(record)]
    result = subprocess.run(
        [*command, precision, str(rows)],
        env=_as_rank_0(_environment()) if side == "sft_job" else _environment(),
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    if result.returncode or not record.is_file():
        raise RuntimeError(f"{side} {precision}:\n{result.stdout}\n{result.stderr}")
    figures = json.loads(record.read_text())
    return {"side": side, "precision": precision, "rows": rows, **figures}


def compare(ours: dict[str, Any], plain: dict[str, Any]) -> dict[str, float]:
    """Ratios of the two kinds of peak, and the largest relative difference of the losses."""
    pairs = zip(ours["losses"], plain["losses"], strict=True)
    return {
        "step": ours["step_bytes"] / plain["step_bytes"],
        "process": ours["process_bytes"] / plain["process_bytes"],
        "loss": max(abs(a - b) / abs(b) for a, b in pairs),
    }


def holds(precision: str, ratios: dict[str, float]) -> bool:
    """Whether sft_job keeps its promise: both peaks, and in fp32 the losses."""
    same = precision != "fp32" or ratios["loss"] <= SAME_LOSS
    return same and max(ratios["step"], ratios["process"]) <= BOUND


def table(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    header = [
        "precision, batches x rows", "sft_job step, MiB", "Trainer step, MiB", "ratio",
        "sft_job process, MiB", "Trainer process, MiB", "ratio", "loss differs by",
    ]  # fmt: skip
    lines = []
    for ours, plain in pairs:
        ratios = compare(ours, plain)
        line = [f"{ours['precision']}, {plain['batches']} x {plain['rows']}"]
        for kind in ("step", "process"):
            line += [f"{one[f'{kind}_bytes'] / MIB:,.0f}" for one in (ours, plain)]
            line.append(f"{ratios[kind]:.3f}")
        lines.append([*line, f"{ratios['loss']:.1e}"])
    return workload.markdown(header, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when the bound is broken."""
    parser = argparse.ArgumentParser(description="Compare the memory of a training step.")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args(argv)
    work, started = Workload(), time.perf_counter()
    pairs, bounded = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_job(folder, work)
        for precision in ("fp32", "bf16"):
            for rows in (work.rows, 1):
                found = []
                for side in SIDES:
                    workload.say(f"{side}, {precision}, {rows} rows at a time")
                    figures = measure(folder, side, precision, rows)
                    found.append(figures | {"batches": work.rows // rows})
                pairs.append((found[0], found[1]))
                if rows == work.rows:
                    bounded.append(holds(precision, compare(*found)))
    report = {
        "benchmark": "memory",
        "step": {
            "tokens": work.rows * work.row_tokens,
            "vocabulary": work.vocabulary,
            "body": BODY,
        },
        "bound": BOUND,
        "holds": all(bounded),
        "pairs": [
            {"sft_job": ours, "trainer": plain, "ratios": compare(ours, plain)}
            for ours, plain in pairs
        ],
        "seconds": round(time.perf_counter() - started, 1),
        "machine": workload.machine(),
        "versions": workload.versions(),
        "code": workload.code_state(),
    }
    workload.publish(report, table(pairs), args.out)
    return 0 if all(bounded) else 1


def _run_side(arguments: Sequence[str]) -> None:
    side, folder, record, precision, rows = arguments
    SIDES[side](Path(folder), Path(record), precision, int(rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        _run_side(sys.argv[2:])
    else:
        sys.exit(main())
