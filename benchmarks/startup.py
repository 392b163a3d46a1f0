"""From the command to the first forward pass, against the least that must happen before it.

    python -m benchmarks.startup [--out startup.json]        five to ten minutes

    bare       a process that imports torch and transformers' Trainer and loads the same model
    sft-job    `sft-job train` with everything encoded before: the launcher, its worker, and in it
               imports, process group, plan, data, sharded weights, Trainer, optimizer. The first
               forward pass is the self-test's; what comes after it is listed, but does not count

The model is SmolLM2-135M in fp32, which sft-job has prepared. Both take turns, the one that is
first in one round is second in the next; a round that is not counted warms the file cache. What
counts is the median of the rounds' ratios: the machine may be slower in one round than in another.
ZeRO-3 and two processes are measured a few times as well, for information.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks import workload
from sft_job.config import load
from sft_job.files import read_records
from sft_job.prepared import find_prepared
from sft_job.rundir import RunDir

FOLDER = workload.WORK / "startup"
BOUND = 1.5
LAST = "engine"  # of the parts before the first forward pass
TIMEOUT_S = 300.0

# The process's own beginning, as the kernel has it, is where sft-job's clock starts too.
BARE = """
import time
from transformers import AutoModelForCausalLM, Trainer
import torch
imported = time.time()
model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.float32)
loaded = time.time()
import json
from sft_job.workers import began
parts = {{"imports": imported - began(), "weights": loaded - imported}}
print(json.dumps(parts))
"""


@dataclass(frozen=True)
class Side:
    """`sft-job train` in one configuration."""

    engine: str
    processes: int

    def __str__(self) -> str:
        return f"{self.engine}, {self.processes} process{'es' if self.processes > 1 else ''}"


MEASURED = Side("fsdp", 1)
INFORMATION = (Side("zero3", 1), Side("fsdp", 2), Side("zero3", 2))


def before_first_forward(parts: Mapping[str, float]) -> float:
    """Seconds of the parts up to and with the last one before the first forward pass."""
    names = list(parts)
    return sum(parts[name] for name in names[: names.index(LAST) + 1])


def ratios(bare: Sequence[Mapping[str, float]], ours: Sequence[Mapping[str, float]]) -> list[float]:
    """Ours against bare, round by round."""
    return [
        before_first_forward(mine) / sum(theirs.values())
        for theirs, mine in zip(bare, ours, strict=True)
    ]


def prepare() -> tuple[Path, Path]:
    """(job, folder of the prepared model); what a first run of the job would encode is there."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    conversations = FOLDER / "conversations.json"
    conversations.write_text(json.dumps(workload.make_conversations(16)))
    job = FOLDER / "job.yaml"
    settings = {
        "model": {"path": "bundled:smollm2-135m"},
        "data": {
            "train": [str(conversations)],
            "seq_len": 256,
            "cache_dir": str(FOLDER / "cache"),
        },
        # A first step as short as may be: it has to end before the times are written.
        "train": {"global_batch_size": 2, "max_steps": 100},
        "run": {"dir": str(FOLDER / "run")},
    }
    job.write_text(yaml.safe_dump(settings))
    log = FOLDER / "encode.log"
    if workload.run([*sft_job("data"), "encode", job], log, timeout=TIMEOUT_S):
        raise SystemExit(f"the data could not be prepared:\n{log.read_text()[-2000:]}")
    prepared = find_prepared(load(job))
    if prepared is None:
        raise SystemExit("data encode has left nothing")
    return job, Path(prepared.model_folder)


def sft_job(command: str) -> list[str | Path]:
    """The command as installed beside this Python."""
    return [Path(sys.executable).with_name("sft-job"), command]


def environment() -> dict[str, str]:
    """As many threads as torch, or sft-job's launcher, chooses by itself."""
    chosen = workload.process_environment()
    del chosen["OMP_NUM_THREADS"]
    return chosen


def run_bare(folder: Path) -> dict[str, float]:
    command = [sys.executable, "-c", BARE.format(folder=str(folder))]
    said = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S
    )
    if said.returncode:
        raise SystemExit(f"the bare process failed:\n{said.stderr[-2000:]}")
    parts: dict[str, float] = json.loads(said.stdout.splitlines()[-1])
    return parts


def run_ours(job: Path, side: Side) -> dict[str, float]:
    """Start a job, take the times of its start, end it after its first step."""
    run = RunDir(FOLDER / "run")
    shutil.rmtree(run.path, ignore_errors=True)
    overrides = [f"engine.type={side.engine}", f"run.processes={side.processes}"]
    with open(FOLDER / "train.log", "wb") as log:
        command = [*map(str, sft_job("train")), str(job), *overrides]
        launcher = psutil.Popen(
            command, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while time.monotonic() < deadline and launcher.poll() is None:
                for record in read_records(run.attempts_file):
                    if "start" in record:
                        parts: dict[str, float] = record["start"]
                        return parts
                time.sleep(0.1)
        finally:
            _end(launcher)
    said = (FOLDER / "train.log").read_text(errors="replace")[-2000:]
    raise SystemExit(f"the job has not started:\n{said}")


def _end(launcher: psutil.Popen) -> None:
    """End a launcher and its workers at once: a checkpoint would cost the next run its memory."""
    try:
        workers = launcher.children(recursive=True)
    except psutil.NoSuchProcess:
        workers = []
    for process in (launcher, *workers):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(workers, timeout=30)
    launcher.wait()


def table(bare: Sequence[Mapping[str, float]], ours: Mapping[str, list[dict[str, float]]]) -> str:
    """Median seconds of each part; the parts in bare's column are those of the same name."""

    def median(runs: Sequence[Mapping[str, float]], part: str) -> str:
        found = [run[part] for run in runs if part in run]
        return f"{statistics.median(found):.2f}" if found else ""

    parts = list(next(iter(ours.values()))[0])
    rows = [[part, median(bare, part), *(median(r, part) for r in ours.values())] for part in parts]
    totals = [statistics.median(map(before_first_forward, runs)) for runs in ours.values()]
    total = [f"{statistics.median(sum(run.values()) for run in bare):.2f}"]
    total += [f"{value:.2f}" for value in totals]
    rows.insert(parts.index(LAST) + 1, ["**to the first forward pass**", *total])
    return workload.markdown(["seconds", "bare", *ours], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when the bound is broken."""
    parser = argparse.ArgumentParser(description="Time from the command to the first forward pass.")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--information-rounds", type=int, default=3)
    parser.add_argument("--wait", type=float, default=20, help="at most so many seconds for quiet")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    job, folder = prepare()
    run_bare(folder)
    run_ours(job, MEASURED)
    bare: list[dict[str, float]] = []
    ours: dict[str, list[dict[str, float]]] = {str(MEASURED): []}
    others: list[float] = []
    for number in range(args.rounds):
        workload.wait_for_quiet(args.wait)
        before = workload.machine_seconds()
        for is_bare in (True, False) if number % 2 == 0 else (False, True):
            if is_bare:
                bare.append(run_bare(folder))
            else:
                ours[str(MEASURED)].append(run_ours(job, MEASURED))
        others.append(round(workload.others_since(before), 3))
        ratio = ratios(bare[-1:], ours[str(MEASURED)][-1:])[0]
        workload.say(f"round {number + 1}: {ratio:.3f}")
    for side in INFORMATION if args.information_rounds else ():
        run_ours(job, side)  # DeepSpeed's first use on a machine
        ours[str(side)] = [run_ours(job, side) for _ in range(args.information_rounds)]
        workload.say(f"{side}: done")
    shutil.rmtree(FOLDER / "run", ignore_errors=True)
    found = ratios(bare, ours[str(MEASURED)])
    ratio = statistics.median(found)
    report: dict[str, Any] = {
        "benchmark": "startup",
        "ratio": round(ratio, 3),
        "ratio_per_round": [round(value, 3) for value in found],
        "bound": BOUND,
        "bare": bare,
        "ours": ours,
        "others_share_of_cores": others,
        "seconds": round(time.perf_counter() - started, 1),
        "machine": workload.machine(),
        "versions": workload.versions(sys.executable, "deepspeed"),
        "code": workload.code_state(),
    }
    summary = (
        f"\nratio {ratio:.2f}, median of {len(found)} rounds from {min(found):.2f} to "
        f"{max(found):.2f}; bound {BOUND}"
    )
    workload.publish(report, table(bare, ours) + "\n" + summary, args.out)
    return 0 if ratio <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
