"""Training throughput on GPUs: tokens/s/GPU and MFU by attention kernel, engine and recomputation.

    python -m benchmarks.gpu [--shape llama-2-7b] [--seq-len 4096] [--out gpu.json]

Every combination that this machine can run trains a random model of the shape on all of its GPUs
through the trainer that `sft-job train` uses, without checkpoints: packed rows of `seq_len`
tokens, as the published figures that stand beside it. The first steps are not counted. MFU counts
needed operations only (sft_job/flops.py) against the product's dense peak; a GPU that is not in
the table has none. `--shape tiny` runs in seconds, also on a CPU, to try the script itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from sft_job import hardware
from sft_job.attention import KERNELS
from sft_job.facts import KNOWN_FACTS, ModelFacts
from sft_job.files import write_atomically
from sft_job.hardware import Hardware
from sft_job.launcher import GRACE_S, POLL_S, die_with_parent
from sft_job.place import find_place
from sft_job.workers import (
    LAUNCHED,
    Place,
    own_environment,
    say_warnings_once,
    training_environment,
)

ROOT = Path(__file__).resolve().parents[1]

SHAPES = {
    "llama-2-7b": KNOWN_FACTS["meta-llama/Llama-2-7b-hf"],
    "llama-2-13b": KNOWN_FACTS["meta-llama/Llama-2-13b-hf"],
    "llama-3.1-8b": KNOWN_FACTS["meta-llama/Llama-3.1-8B"],
    "1b": ModelFacts("llama", 16, 2048, 32000, 8192, None, True, None, 8192, 32, 8, 64),
    "tiny": ModelFacts("llama", 2, 64, 503, 4096, None, False, None, 128, 4, 2, 16),
}
# tokens/s/GPU and MFU that others publish, with their own counts of operations.
REFERENCES = {
    ("llama-2-7b", "a100-80"): "llm-foundry MPT-7B, 4,096 tokens, recomputing: 3,684 (54.8%)",
    ("llama-2-7b", "h100-sxm"): "llm-foundry MPT-7B, 4,096 tokens, recomputing: 8,611 (40.4%)",
    ("llama-2-13b", "a100-80"): "llm-foundry MPT-13B, 4,096 tokens, recomputing: 2,060 (57.6%)",
    ("llama-3.1-8b", "h100-sxm"): "torchtitan, 8,192 tokens, compiled: 6,667 (39%, 500 W parts)",
}
WARM_UP = 3
TIMEOUT_S = 3600.0
RANK = "--rank"  # before the arguments of `run_rank`
WORDS = ["sun", "moon", "star", "river", "stone", "leaf", "bird", "cloud", "rain", "wind"]


@dataclass(frozen=True)
class Combination:
    engine: str
    kernel: str
    recompute: str

    def overrides(self) -> list[str]:
        return [
            f"engine.type={self.engine}",
            f"model.attention={self.kernel}",
            f"train.activation_checkpointing={self.recompute}",
        ]


def combinations(args: argparse.Namespace) -> Iterator[Combination]:
    for engine in args.engines:
        for kernel in args.kernels:
            for recompute in args.recompute:
                yield Combination(engine, kernel, recompute)


# --- the job ---------------------------------------------------------------------------------


def write_job(folder: Path, facts: ModelFacts, args: argparse.Namespace, count: int) -> Path:
    """A random model in bf16, conversations enough for all steps, the job; encodes them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sft_job import data
    from sft_job.config import load
    from tests.runs import make_tokenizer

    config = LlamaConfig(
        hidden_size=facts.hidden, intermediate_size=facts.intermediate,
        num_hidden_layers=facts.layers, num_attention_heads=facts.heads,
        num_key_value_heads=facts.key_heads, head_dim=facts.head_dim,
        vocab_size=facts.vocabulary, max_position_embeddings=max(facts.context, args.seq_len),
        tie_word_embeddings=facts.tied,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "model", max_shard_size="5GB")
    del model
    make_tokenizer(folder / "model")
    rows = args.rows_per_gpu * count
    needed = int(1.1 * rows * (args.steps + WARM_UP) * args.seq_len)
    (folder / "data.json").write_text(json.dumps(list(_conversations(needed, args.seq_len))))
    job = {
        "model": {"path": str(folder / "model")},
        "data": {
            "train": [str(folder / "data.json")], "seq_len": args.seq_len, "batching": "rows",
        },
        "train": {
            "global_batch_size": rows, "max_steps": args.steps + WARM_UP,
            "micro_batch_tokens": args.micro_batch_tokens or "auto", "learning_rate": 1e-5,
        },
        "checkpoint": {"every_steps": 10**6},
        "run": {"dir": str(folder / "run")},
    }  # fmt: skip
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    data.encode_job(load(file))
    return file


def _conversations(tokens: int, seq_len: int) -> Iterator[dict[str, Any]]:
    """Lengths as of real chats: log-normal, a fifth of seq_len in the middle, at most seq_len."""
    rng = random.Random(0)
    while tokens > 0:
        length = min(int(rng.lognormvariate(0, 0.8) * seq_len / 5) + 40, seq_len)
        tokens -= length
        words = rng.choices(WORDS, k=length)
        half = len(words) // 3
        yield {
            "conversations": [
                {"from": "human", "value": " ".join(words[:half])},
                {"from": "gpt", "value": " ".join(words[half:])},
            ]
        }


# --- one combination -------------------------------------------------------------------------


def measure(job: Path, combination: Combination, count: int) -> dict[str, Any]:
    """Train on `count` ranks; the median of the counted steps, or why it could not be run."""
    answers = Path(tempfile.mkdtemp(prefix="answers-", dir=job.parent))
    fault = watch(start_ranks(job, combination, count, answers), answers)
    if fault is not None:
        return {"fault": fault}
    answer = json.loads(_answer(answers, 0).read_text())
    records = answer["records"]
    counted = records[WARM_UP:]
    rate = statistics.median(r["tokens_per_second"] for r in counted)
    shares = [r["mfu"] for r in counted if r["mfu"] is not None]
    return {
        "tokens_per_second_per_device": round(rate / count, 1),
        "mfu": statistics.median(shares) if shares else None,
        "peak_memory_gib": max(r["peak_memory_gib"] for r in counted),
        "idle_share": round(statistics.mean(r["idle_share"] for r in counted), 4),
        "micro_batch_tokens": answer["micro_batch_tokens"],
        "predicted_memory_gib": answer["predicted_memory_gib"],
        "losses": [round(r["loss"], 4) for r in records],
        "environment": answer["environment"],
    }


def start_ranks(
    job: Path, combination: Combination, count: int, answers: Path
) -> list[subprocess.Popen[bytes]]:
    """One process for each rank, with the environment that `sft-job train` gives its workers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    started = []
    for rank in range(count):
        place = Place(rank, rank, count, count, "127.0.0.1", port)
        words = [str(job), combination.engine, combination.kernel, combination.recompute]
        command = [sys.executable, "-m", "benchmarks.gpu", RANK, *words, str(answers)]
        environment = training_environment(place, os.environ)
        environment |= {"PYTHONPATH": path, LAUNCHED: str(os.getpid())}
        started.append(subprocess.Popen(command, env=environment, start_new_session=True))
    return started


def watch(
    ranks: Sequence[subprocess.Popen[bytes]],
    answers: Path,
    *,
    timeout_s: float = TIMEOUT_S,
    grace_s: float = GRACE_S,
) -> str | None:
    """Wait for all ranks: None, or why one has failed. None of them is left afterwards.

    Args:
        answers: the folder where a rank that fails says why.
        grace_s: one that aborts has seen another fail, which gets so long to say why.
    """
    deadline, patience = time.monotonic() + timeout_s, None
    try:
        while True:
            codes = [rank.poll() for rank in ranks]
            if all(code == 0 for code in codes):
                return None
            fault = _fault(codes, answers)
            if fault is not None:
                return fault
            now = time.monotonic()
            if any(codes) and patience is None:
                patience = now + grace_s
            if patience is not None and now >= patience:
                rank, code = next((rank, code) for rank, code in enumerate(codes) if code)
                return f"rank {rank}: {_ended(code)}"
            if now >= deadline:
                return f"no answer within {timeout_s:.0f} s"
            time.sleep(POLL_S)
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def _fault(codes: Sequence[int | None], answers: Path) -> str | None:
    """What is known to have come first: when a rank is killed, others fail for want of it."""
    failed = {rank: code for rank, code in enumerate(codes) if code}
    for rank, code in failed.items():
        if code < 0 and code != -signal.SIGABRT:
            return f"rank {rank}: {_ended(code)}"
    for rank in failed:
        if _answer(answers, rank).is_file():
            return f"rank {rank}: {json.loads(_answer(answers, rank).read_text())['fault']}"
    return None


def _ended(code: int) -> str:
    if code > 0:
        return f"ended with exit code {code} and without a word"
    number = signal.Signals(-code)
    hint = "; the kernel does that when memory runs out" if number is signal.SIGKILL else ""
    return f"ended by {number.name}{hint}"


def _answer(answers: Path, rank: int) -> Path:
    return answers / f"rank-{rank}.json"


def run_rank(arguments: Sequence[str]) -> NoReturn:
    """A rank's whole life; ends the process, without taking torch apart."""
    job, engine, kernel, recompute, answers = arguments
    die_with_parent(int(os.environ[LAUNCHED]))
    gc.disable()
    say_warnings_once()
    place, code = find_place(os.environ), 0
    assert place is not None
    try:
        answer = _train(Path(job), Combination(engine, kernel, recompute), place)
    except Exception as error:
        # Whatever it is: the table says it in the place of this combination's figures.
        traceback.print_exc()
        answer = {"fault": str(error).splitlines()[0] if str(error) else type(error).__name__}
        code = 1
    if code or place.rank == 0:
        write_atomically(_answer(Path(answers), place.rank), json.dumps(answer))
    sys.stdout.flush()
    os._exit(code)


def _train(job: Path, combination: Combination, place: Place) -> dict[str, Any]:
    """Train without saving; the records of metrics.jsonl and what they were made with."""
    from sft_job.config import load
    from sft_job.files import read_records

    run = job.parent / f"run-{combination.engine}-{combination.kernel}-{combination.recompute}"
    overrides = [f"run.dir={run}", *combination.overrides()]
    config = load(job, overrides)
    own = own_environment(config, os.environ)
    os.environ.update(own)
    from sft_job import world as worlds
    from tests.ranks import Setup

    world = worlds.join(place, hardware.detect(), config.run)
    if combination.engine == "zero3":
        from sft_job import zero3

        zero3.prepare_environment(world.device)
    gc.freeze()
    gc.enable()
    setup = Setup(world, job, *overrides)
    setup.record_to(run / "metrics.jsonl")
    setup.trainer.train()
    world.barrier()  # the first to leave would take the others' connections away
    told = {**own, **dict.fromkeys(training_environment(place, {}).keys() - place.environment())}
    return {
        "records": read_records(run / "metrics.jsonl"),
        "micro_batch_tokens": setup.plan.micro_batch_tokens,
        "predicted_memory_gib": round(setup.plan.memory.total / 2**30, 2)
        if setup.plan.memory
        else None,
        "environment": {name: os.environ[name] for name in sorted(told)},
    }


# --- the report ------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """The report as a table in Markdown."""
    lines = [
        f"{report['shape']}, {report['seq_len']:,} tokens a row, {report['device']}; "
        f"torch {report['torch']}",
        "",
        "| engine | attention | recomputation | micro-batch | tokens/s/GPU | MFU | peak GiB "
        "(predicted) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        name = f"| {row['engine']} | {row['kernel']} | {row['recompute']} |"
        if "fault" in row:
            lines.append(f"{name} {row['fault']} | | | |")
            continue
        mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
        lines.append(
            f"{name} {row['micro_batch_tokens']:,} | {row['tokens_per_second_per_device']:,.0f} | "
            f"{mfu} | {row['peak_memory_gib']:.1f} ({row['predicted_memory_gib']}) |"
        )
    if report["reference"]:
        lines += ["", f"Published: {report['reference']}."]
    return "\n".join(lines)


def parse(argv: Sequence[str], machine: Hardware) -> argparse.Namespace:
    kernels = _kernels(machine)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-2-7b")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=12, help="counted steps")
    parser.add_argument("--rows-per-gpu", type=int, default=8, help="rows of a step per GPU")
    parser.add_argument("--micro-batch-tokens", type=int, default=0, help="0: as the plan says")
    parser.add_argument("--engines", nargs="+", default=["fsdp", "zero3"])
    parser.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=kernels)
    parser.add_argument("--recompute", nargs="+", default=["auto", "full"])
    parser.add_argument("--count", type=int, default=machine.count, help="GPUs (CPU: processes)")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    return parser.parse_args(argv)


def _kernels(machine: Hardware) -> list[str]:
    """All kernels that have code for this device and are installed."""
    from sft_job import attention

    number = attention.sm(machine)
    packages = attention.installed()
    return [
        name
        for name, kernel in KERNELS.items()
        if kernel.packs
        and (not kernel.architectures or attention.base(number, kernel.architectures))
        and (kernel.distribution is None or kernel.distribution in packages)
        and not (kernel.architectures and number is None)
    ]


def main(argv: Sequence[str]) -> int:
    if argv[:1] == [RANK]:
        run_rank(argv[1:])
    machine = hardware.detect()
    args = parse(argv, machine)
    import torch

    report: dict[str, Any] = {
        "shape": args.shape,
        "seq_len": args.seq_len,
        "device": f"{args.count} x {machine.name}",
        "driver": machine.driver,
        "torch": torch.__version__,
        "time": time.strftime("%Y-%m-%d %H:%M"),
        "command": " ".join(["python -m benchmarks.gpu", *argv]),
        "reference": REFERENCES.get((args.shape, machine.gpu.key)) if machine.gpu else None,
        "environment": {},
        "rows": [],
    }
    with tempfile.TemporaryDirectory(prefix="gpu-benchmark-") as folder:
        job = write_job(Path(folder), SHAPES[args.shape], args, args.count)
        for combination in combinations(args):
            print(f"--- {combination}", flush=True)
            row = measure(job, combination, args.count)
            report["environment"] |= row.pop("environment", {})
            report["rows"].append(dataclasses.asdict(combination) | row)
    print(table(report))
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    return int(all("fault" in row for row in report["rows"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
