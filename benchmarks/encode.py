"""Speed of tokenising and label-making: sft_job, the bare `tokenizers` library, FastChat.

    python -m benchmarks.encode [--out encode.json]          a few minutes
    python -m benchmarks.encode --quick                      to try the script

    raw       tokenizers' encode_batch on the texts of the exchanges, on all cores: nothing that
              uses this library can be faster
    encoder   sft_job.encode.Encoder on the same conversations: rendering, ids, labels, checks
    build     sft_job.dataset.build: reading, checking, encoding in processes, the token cache
    fastchat  FastChat's preprocess (its slow tokenizer, one core, padded), on fewer conversations

Each measurement is a process of its own, so that none finds the cache of another; the four take
turns.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from benchmarks import workload
from benchmarks.workload import MODEL, MODEL_FAST, SEQ_LEN, WORK, say

CHUNK = 512  # conversations per call of the encoder, as sft_job's own cache is built
WARM_UP = 64  # conversations


# --- measured, each in a process of its own -----------------------------------------------


def raw(job: Path) -> dict[str, Any]:
    """encode_batch on the exchanges' texts, chunk by chunk as the encoder gets them."""
    import tokenizers

    from sft_job.templates import VICUNA

    texts = [
        [segment.text for segment in VICUNA.render(c.system, c.exchanges)]
        for c in _conversations(job)
    ]
    backend = tokenizers.Tokenizer.from_file(str(MODEL_FAST / "tokenizer.json"))
    backend.encode_batch([exchanges[0] for exchanges in texts[:WARM_UP]], add_special_tokens=False)
    start = _now()
    tokens = 0
    for first in range(0, len(texts), CHUNK):
        batch = [text for exchanges in texts[first : first + CHUNK] for text in exchanges]
        tokens += sum(len(e) for e in backend.encode_batch(batch, add_special_tokens=False))
    return _result(start, len(texts), tokens, None)


def encoder(job: Path) -> dict[str, Any]:
    """sft_job's encoder in one process; the library uses all cores by its threads."""
    from sft_job import config, dataset
    from sft_job.tokenizer import load_tokenizer

    conversations = _conversations(job)
    made = dataset.encoder_of(config.load(job), load_tokenizer(MODEL_FAST))
    made.encode(conversations[:WARM_UP])
    start = _now()
    tokens = supervised = 0
    for first in range(0, len(conversations), CHUNK):
        samples, _ = made.encode(conversations[first : first + CHUNK])
        tokens += sum(len(s.input_ids) for each in samples for s in each)
        supervised += sum(int(s.supervised.sum()) for each in samples for s in each)
    return _result(start, len(conversations), tokens, supervised)


def build(job: Path) -> dict[str, Any]:
    """The whole token cache, as `sft-job data encode` makes it."""
    from sft_job import config, dataset
    from sft_job.tokenizer import load_tokenizer

    loaded = config.load(job)
    shutil.rmtree(loaded.cache_dir, ignore_errors=True)
    tokenizer = load_tokenizer(MODEL_FAST)
    start = _now()
    folder = dataset.build(loaded, tokenizer)
    took = _since(start)
    meta = json.loads((folder / "meta.json").read_text())
    result = _result(start, meta["conversations"], meta["tokens"], meta["supervised_tokens"])
    return result | took


def _conversations(job: Path) -> Any:
    from sft_job import config, conversations

    return conversations.read_trainable(config.load(job).data.files()).conversations


def _now() -> tuple[float, float]:
    """(time, CPU seconds of this process and of those that it has waited for)."""
    cpu = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        cpu += used.ru_utime + used.ru_stime
    return time.perf_counter(), cpu


def _since(start: tuple[float, float]) -> dict[str, float]:
    now = _now()
    return {"seconds": now[0] - start[0], "cpu_seconds": now[1] - start[1]}


def _result(
    start: tuple[float, float], conversations: int, tokens: int, supervised: int | None
) -> dict[str, Any]:
    return {
        **_since(start),
        "conversations": conversations,
        "tokens": tokens,
        "supervised": supervised,
    }


MEASURED: dict[str, Callable[[Path], dict[str, Any]]] = {
    "raw": raw,
    "encoder": encoder,
    "build": build,
}


# --- the driver ---------------------------------------------------------------------------


def _ask(command: list[str | Path]) -> dict[str, Any]:
    """Run a measuring process; its last line is its result."""
    answer = subprocess.run(
        [str(part) for part in command],
        cwd=workload.BENCHMARKS.parent,
        env=workload.process_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode:
        raise SystemExit(f"{shlex.join(map(str, command))} failed:\n{answer.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return result


def measure(name: str, job: Path, few: Path, fastchat: Path, quiet_s: float) -> dict[str, Any]:
    if name == "fastchat":
        program = workload.BENCHMARKS / "peer_fastchat.py"
        command: list[str | Path] = [fastchat, program, "preprocess", MODEL, few, str(SEQ_LEN)]
    else:
        command = [sys.executable, "-m", "benchmarks.encode", "--measure", name, job]
    workload.wait_for_quiet(quiet_s)
    before = workload.machine_seconds()
    result = _ask(command)
    result["others_share_of_cores"] = round(workload.others_since(before), 3)
    result["tokens_per_second"] = round(result["tokens"] / result["seconds"], 1)
    result["conversations_per_second"] = round(result["conversations"] / result["seconds"], 1)
    say(f"  {name:9} {result['tokens_per_second']:12,.0f} tokens/s"
        f"  (others use {result['others_share_of_cores']:.0%} of the cores)")  # fmt: skip
    return result


def prepare(count: int, fastchat_count: int, fastchat: Path) -> tuple[Path, Path]:
    """(job over all conversations, file of the few that FastChat gets)."""
    workload.make_model()
    workload.make_fast_model(fastchat)
    conversations = workload.make_conversations(count)
    data, few, job = (WORK / name for name in ("encode.json", "encode-few.json", "encode-job.yaml"))
    data.write_text(json.dumps(conversations, indent=1))
    few.write_text(json.dumps(conversations[:fastchat_count], indent=1))
    job.write_text(
        yaml.safe_dump(
            {
                "model": {"path": str(MODEL_FAST)},
                "data": {
                    "train": [str(data)],
                    "seq_len": SEQ_LEN,
                    "cache_dir": str(WORK / "encode-cache"),
                },
                "run": {"dir": str(WORK / "encode-run")},
            }
        )
    )
    return job, few


NOTES = (
    "raw is given the texts of the exchanges, already rendered; it makes offsets as always and "
    "no labels. encoder renders, tokenises with offsets, makes and checks labels, truncates.",
    "All tokenise conversations to their end, but only raw counts the tokens after seq_len; so "
    "shares of raw are by conversations, whose texts are the same.",
    "build also reads and checks the JSON file, compares the tokenizer with itself on 256 "
    "conversations, starts its processes and writes the cache.",
    "By CPU time: tokens per CPU second of all cores, which says the same on a machine that is "
    "not quiet. build's includes the start of its processes.",
    "fastchat is one process on one core: FastChat has no other way (lazily within the step, or "
    "all at the start on every rank). It pads to seq_len; its tokens are counted without.",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    parser.add_argument("--quick", action="store_true", help="few conversations, one round")
    parser.add_argument("--conversations", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--wait", type=float, default=30, help="at most so many seconds for quiet")
    parser.add_argument("--measure", choices=MEASURED, help=argparse.SUPPRESS)
    parser.add_argument("job", type=Path, nargs="?", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        print(json.dumps(MEASURED[args.measure](args.job)))
        return 0
    if args.quick:
        args.conversations, args.rounds, args.wait = 1024, 1, 5.0
    fastchat = workload.environment("fastchat")
    job, few = prepare(args.conversations, min(512, args.conversations // 4), fastchat)
    names = (*MEASURED, "fastchat")
    started = time.time()
    rounds = []
    for number in range(1, args.rounds + 1):
        say(f"round {number} of {args.rounds}")
        rounds.append({name: measure(name, job, few, fastchat, args.wait) for name in names})
    speed = {
        name: statistics.median(r[name]["tokens_per_second"] for r in rounds) for name in names
    }
    by_cpu = {
        name: statistics.median(
            (r[name]["conversations"] / r[name]["cpu_seconds"])
            / (r["raw"]["conversations"] / r["raw"]["cpu_seconds"])
            for r in rounds
        )
        for name in names
    }
    to_raw = {
        name: [
            r[name]["conversations_per_second"] / r["raw"]["conversations_per_second"]
            for r in rounds
        ]
        for name in names
    }
    report = {
        "what": "tokenising and label-making",
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "machine": workload.machine(),
        "sft_job": workload.code_state(),
        "versions": {
            "sft_job": workload.versions(),
            "fastchat": workload.versions(fastchat, "fschat", "sentencepiece"),
        },
        "conversations": args.conversations,
        "tokens_per_second": speed,
        "share_of_raw_per_round": {
            name: [round(value, 3) for value in values] for name, values in to_raw.items()
        },
        "share_of_raw": {
            name: round(statistics.median(values), 3) for name, values in to_raw.items()
        },
        "share_of_raw_by_cpu_time": {name: round(value, 3) for name, value in by_cpu.items()},
        "rounds": rounds,
        "notes": list(NOTES),
    }
    last = rounds[-1]
    rows = [
        [
            name,
            f"{speed[name]:,.0f}",
            f"{statistics.median(r[name]['conversations_per_second'] for r in rounds):,.0f}",
            f"{statistics.median(to_raw[name]):.2f}",
            f"{by_cpu[name]:.2f}",
            f"{last[name]['conversations']:,}",
            f"{last[name]['supervised'] or 0:,}",
        ]
        for name in names
    ]
    header = [
        "",
        "tokens/s",
        "conversations/s",
        "of raw",
        "of raw by CPU time",
        "conversations",
        "supervised tokens",
    ]
    workload.publish(report, workload.markdown(header, rows), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
