"""Training throughput on this CPU: sft_job, FastChat's train.py and TRL's SFTTrainer.

    python -m benchmarks.train_cpu [--out train_cpu.json]    15 to 20 minutes, once the environments
                                                             are there
    python -m benchmarks.train_cpu --quick                   one round, to try the script

Every side trains the same weights on the same conversations in the same order, in a process of
its own, one after the other. TRL is first tried in each of its configurations that could be the
fastest; then the sides take turns. What is not equal is said in the report (`notes`).

A step on two cores takes several times longer when anything else runs, far more than its share.
So each run waits for a quiet machine, the share of other work is measured with every run, and a
run that was disturbed is made once more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks import workload
from benchmarks.workload import DISTURBED, MODEL, MODEL_FAST, SEQ_LEN, WORK, Used, say
from sft_job import config as job_config
from sft_job.plan import schedule_of
from sft_job.prepared import Prepared, find_prepared
from sft_job.templates import VICUNA
from sft_job.workers import MALLOC

PER_STEP = 8  # conversations per optimizer step
WARM_UP = 1  # steps at the beginning that are not counted
LEARNING_RATE = 1e-3
RUN_TIMEOUT_S = 1500.0
APART = 1e-3  # hidden states of samples together and alone may differ by so much in fp32
TARGETS = {"fastchat": 4.0, "trl": 2.0}

OURS, FASTCHAT, TRL = "sft_job", "fastchat", "trl"


@dataclass(frozen=True)
class Setup:
    """One side in one configuration."""

    side: str
    name: str
    recomputes: bool
    """Activation checkpointing of whole decoder layers."""
    settings: dict[str, Any] = field(default_factory=dict, compare=False)
    environment: dict[str, str] = field(default_factory=dict, compare=False)
    """Variables that a user would have to set."""


@dataclass
class Run:
    """What one run of a setup measured; `steps` without those of the warm-up."""

    setup: Setup
    round: int
    steps: list[dict[str, Any]]
    losses: list[float]
    others: float
    """Share of the cores that other processes used meanwhile."""
    cpu_seconds: float
    """CPU time that the run itself used meanwhile, all threads, spinning at barriers included."""
    peak_rss_gib: float
    same_samples: float
    """Share of the samples whose ids and labels are exactly those of sft_job."""
    apart: float | None = None

    @property
    def tokens_per_second(self) -> float:
        return self._sum("tokens") / self._sum("seconds")

    @property
    def tokens_per_cpu_second(self) -> float:
        return self._sum("tokens") / self.cpu_seconds

    @property
    def supervised_per_second(self) -> float:
        return self._sum("supervised") / self._sum("seconds")

    @property
    def padding(self) -> float:
        return 1 - self._sum("tokens") / self._sum("computed")

    @property
    def undisturbed(self) -> bool:
        return self.others <= DISTURBED

    def _sum(self, key: str) -> float:
        return float(sum(step[key] for step in self.steps))

    def as_json(self) -> dict[str, Any]:
        return {
            "round": self.round,
            "side": self.setup.side,
            "configuration": self.setup.name,
            "activation_checkpointing": "full" if self.setup.recomputes else "none",
            "tokens_per_second": round(self.tokens_per_second, 1),
            "supervised_tokens_per_second": round(self.supervised_per_second, 1),
            "tokens_per_cpu_second": round(self.tokens_per_cpu_second, 1),
            "padding_share": round(self.padding, 4),
            "peak_rss_gib": self.peak_rss_gib,
            "others_share_of_cores": round(self.others, 3),
            "samples_as_in_sft_job": round(self.same_samples, 4),
            "largest_difference_together_and_alone": self.apart,
            "losses": [round(loss, 4) for loss in self.losses],
            "steps": [
                {key: step[key] for key in ("seconds", "tokens", "supervised", "computed")}
                for step in self.steps
            ],
        }


# --- what is trained ----------------------------------------------------------------------


@dataclass(frozen=True)
class Material:
    """Data and model, ready for all sides."""

    job: Path
    ordered: Path
    """The conversations in the order in which sft_job trains on them."""
    overrides: tuple[str, ...]
    digests: frozenset[str]
    """Ids and labels of every sample as sft_job encodes it."""
    steps: int
    facts: dict[str, Any]


def prepare(steps: int, pythons: dict[str, Path]) -> Material:
    """Make model and conversations, encode them, fix the order."""
    workload.make_model()
    workload.make_fast_model(pythons[FASTCHAT])
    conversations = workload.make_conversations(steps * PER_STEP)
    data, job = WORK / "conversations.json", WORK / "job.yaml"
    data.write_text(json.dumps(conversations, indent=1))
    job.write_text(yaml.safe_dump(_job(data)))
    command: list[str | Path] = [_sft_job(), "data", "encode", job]
    if workload.run(command, WORK / "logs" / "encode.log", timeout=300):
        raise SystemExit(f"sft-job data encode failed: {WORK / 'logs' / 'encode.log'}")
    prepared = find_prepared(job_config.load(job))
    if prepared is None or prepared.stats.lengths is None:
        raise SystemExit("sft-job data encode left nothing")
    seed, order = _balanced_order(job, prepared, steps)
    ordered = WORK / "conversations-ordered.json"
    ordered.write_text(json.dumps([conversations[i] for i in order], indent=1))
    lengths = prepared.stats.lengths
    return Material(
        job=job,
        ordered=ordered,
        overrides=(f"train.seed={seed}",),
        digests=frozenset(_digests(Path(prepared.data_folder))),
        steps=steps,
        facts={
            "conversations": len(conversations),
            "digest": workload.digest(conversations),
            "tokens": sum(lengths),
            "supervised_tokens": prepared.stats.supervised_tokens,
            "mean_tokens_truncated": round(statistics.fmean(lengths), 1),
            "median_tokens": statistics.median(lengths),
            "truncated": sum(length == SEQ_LEN for length in lengths),
            "exchanges_per_conversation": statistics.fmean(
                len(c["conversations"]) / 2 for c in conversations
            ),
            "seq_len": SEQ_LEN,
            "conversations_per_step": PER_STEP,
            "steps": steps,
            "warm_up_steps": WARM_UP,
            "learning_rate": LEARNING_RATE,
            "order_seed": seed,
            "parameters": workload.parameter_count(),
            "model": workload.SHAPE,
        },
    )


def _job(data: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(MODEL_FAST)},
        "data": {
            "train": [str(data)],
            "seq_len": SEQ_LEN,
            "cache_dir": str(WORK / "cache"),
        },
        "train": {
            "global_batch_size": PER_STEP,
            "num_train_epochs": 1,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0,
            "precision": "bf16",
        },
        "run": {"dir": str(WORK / "run"), "processes": 1},
    }


def _balanced_order(job: Path, prepared: Prepared, steps: int) -> tuple[int, list[int]]:
    """The seed under which the steps differ least in tokens, and the order that it gives.

    FastChat pays for every conversation alike; in steps of unequal length its tokens per second
    would depend on which steps are counted.
    """
    lengths = prepared.stats.lengths
    if lengths is None:
        raise SystemExit("the lengths are not known")
    best: tuple[int, int, list[int]] | None = None
    for seed in range(1000):
        config = job_config.load(job, [f"train.seed={seed}"])
        schedule = schedule_of(config, prepared.stats)
        dealt = [[i for unit in schedule.step(step) for i in unit] for step in range(steps)]
        totals = [sum(lengths[i] for i in indices) for indices in dealt]
        spread = max(totals) - min(totals)
        if best is None or spread < best[0]:
            best = (spread, seed, [i for indices in dealt for i in indices])
    if best is None:
        raise SystemExit("no order was found")
    return best[1], best[2]


def _digests(folder: Path) -> list[str]:
    from benchmarks.recorder import sample_digest
    from sft_job.dataset import TokenCache

    cache = TokenCache(folder)
    samples = [cache[index] for index in range(len(cache))]
    return [sample_digest(s.input_ids.tolist(), s.labels.tolist()) for s in samples]


def _sft_job() -> Path:
    return Path(sys.executable).parent / "sft-job"


# --- the sides ----------------------------------------------------------------------------


def ours(recomputes: bool) -> Setup:
    mode = "full" if recomputes else "none"
    return Setup(OURS, f"micro-batches of 16,384 tokens, recompute {mode}", recomputes)


def fastchat(recomputes: bool) -> Setup:
    return Setup(FASTCHAT, f"2 padded rows x 4, gradient_checkpointing {recomputes}", recomputes)


def trl(name: str, recomputes: bool = False, **arguments: Any) -> Setup:
    return Setup(TRL, name + (", gradient checkpointing" if recomputes else ""), recomputes,
                 arguments)  # fmt: skip


# What could be TRL's fastest on a CPU. `loss_type` has one value that fits in this release:
# nll, which is its chunked loss. Of a packed row of 2,048 tokens, 3.4 hold 8 conversations.
TRL_CANDIDATES = (
    trl("1 sample per forward x 8", per_device_train_batch_size=1, gradient_accumulation_steps=8),
    trl(
        "packing bfd (padding-free), 1 row x 4",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        packing=True,
    ),
    trl(
        "padding_free, 8 samples flattened",
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        padding_free=True,
    ),
    trl(
        "padding_free, 2 samples flattened x 4",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        padding_free=True,
    ),
    trl(
        "padded to the longest of 2, group_by_length, x 4",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        train_sampling_strategy="group_by_length",
    ),
    trl(
        "padded to the longest, batch_rebalance, x 4",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        train_sampling_strategy="batch_rebalance",
    ),
)


def with_our_malloc(setup: Setup) -> Setup:
    """The same with the allocator's settings that sft_job gives its workers by itself."""
    return dataclasses.replace(
        setup, name=f"{setup.name}, sft_job's malloc settings", environment=dict(MALLOC)
    )


def command_of(setup: Setup, material: Material, pythons: dict[str, Path], *, check: bool) -> Any:
    """(command, file that gets a line per step)."""
    if setup.side == OURS:
        shutil.rmtree(WORK / "run", ignore_errors=True)
        mode = f"train.activation_checkpointing={'full' if setup.recomputes else 'none'}"
        command = [_sft_job(), "train", material.job, *material.overrides, mode]
        return command, WORK / "run" / "metrics.jsonl"
    record = WORK / "record.jsonl"
    record.unlink(missing_ok=True)
    if setup.side == FASTCHAT:
        program = workload.BENCHMARKS / "peer_fastchat.py"
        command = [pythons[FASTCHAT], program, "train", record, *_fastchat(setup, material)]
        return command, record
    settings = WORK / "trl.json"
    settings.write_text(json.dumps(_trl(setup, material, check=check), indent=1))
    program = workload.BENCHMARKS / "peer_trl.py"
    return [pythons[TRL], program, record, settings], record


def _fastchat(setup: Setup, material: Material) -> list[str]:
    """The README's command, with the flags that a CPU needs and the benchmark's schedule."""
    options = {
        "model_name_or_path": MODEL,
        "data_path": material.ordered,
        "bf16": True,
        "use_cpu": True,
        "output_dir": WORK / "fastchat-out",
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": PER_STEP // 2,
        "save_strategy": "no",
        "learning_rate": LEARNING_RATE,
        "weight_decay": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "model_max_length": SEQ_LEN,
        "gradient_checkpointing": setup.recomputes,
        "lazy_preprocess": True,
        "optim": "adamw_torch_fused",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


def _trl(setup: Setup, material: Material, *, check: bool) -> dict[str, Any]:
    arguments = {
        "output_dir": str(WORK / "trl-out"),
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "bf16": True,
        "use_cpu": True,
        "gradient_checkpointing": setup.recomputes,
        "optim": "adamw_torch_fused",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": "float32", "attn_implementation": "sdpa"},
    }
    return {
        "model": str(MODEL_FAST),
        "data": str(material.ordered),
        "template": jinja_with_marks(),
        "max_length": SEQ_LEN,
        "arguments": arguments | setup.settings,
        "check": check,
    }


def jinja_with_marks() -> str:
    """The Vicuna template with the marks from which TRL finds the assistant's tokens."""
    answer = VICUNA.answer + "{{ message['content'] }}{{ eos_token }}"
    return (
        "{{ bos_token }}" + VICUNA.system + " {% for message in messages %}"
        "{% if message['role'] == 'user' %}"
        + VICUNA.user + "{{ message['content'] }}" + VICUNA.assistant
        + "{% else %}{% generation %}" + answer + "{% endgeneration %}{% endif %}{% endfor %}"
    )  # fmt: skip


# --- running and watching -----------------------------------------------------------------


class Watch(threading.Thread):
    """Notes the CPU time of the machine and of one process tree whenever a step is written."""

    def __init__(self, process: subprocess.Popen[bytes], file: Path) -> None:
        super().__init__(daemon=True)
        self.process, self.file = process, file
        self.sights: list[Used] = []
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.1):
            lines = self.file.read_bytes().count(b"\n") if self.file.is_file() else 0
            while len(self.sights) < lines:
                self.sights.append(self._look())

    def _look(self) -> Used:
        own = 0.0
        try:
            root = psutil.Process(self.process.pid)
            for member in [root, *root.children(recursive=True)]:
                used = member.cpu_times()
                own += used.user + used.system
        except psutil.NoSuchProcess:
            pass  # it has just ended; the last sight is then of no use
        return Used(time.monotonic(), workload.machine_busy(), own)

    def used(self) -> tuple[float, float]:
        """Between the warm-up and the last step: share of the cores that other processes used,
        and CPU seconds that this one used."""
        sights = [sight for sight in self.sights if sight.own > 0]
        if len(sights) <= WARM_UP:
            return 1.0, math.nan
        first, last = sights[WARM_UP - 1], sights[-1]
        return workload.others_since(first, last), last.own - first.own


def measure(
    setup: Setup,
    material: Material,
    pythons: dict[str, Path],
    *,
    number: int,
    quiet_s: float,
    threads: int,
    check: bool = False,
) -> Run:
    """Run one setup and read what it wrote.

    Raises:
        SystemExit: the program failed; its log is named.
    """
    command, file = command_of(setup, material, pythons, check=check)
    workload.wait_for_quiet(quiet_s)
    log = WORK / "logs" / f"{setup.side}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            env=workload.process_environment(threads) | setup.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        watch = Watch(process, file)
        watch.start()
        try:
            code = process.wait(RUN_TIMEOUT_S)
        finally:
            if process.poll() is None:
                process.kill()
            watch.over.set()
            watch.join()
    if code or not file.is_file():
        raise SystemExit(f"{setup.side} ({setup.name}) failed with exit code {code}: see {log}")
    steps = [json.loads(line) for line in file.read_text().splitlines()]
    run = _read(setup, steps, material, number, watch.used())
    say(
        f"  {setup.side:9} {setup.name:58} {run.tokens_per_second:7.0f} tokens/s"
        f" {run.tokens_per_cpu_second:7.0f} /CPU s  (others use {run.others:.0%} of the cores)"
    )
    return run


def _read(
    setup: Setup,
    steps: list[dict[str, Any]],
    material: Material,
    number: int,
    used: tuple[float, float],
) -> Run:
    if setup.side == OURS:
        steps = [
            {
                "seconds": step["seconds_per_step"],
                "tokens": step["tokens"],
                "supervised": step["supervised_tokens"],
                "computed": step["tokens"],  # flattened rows, nothing is padded
                "loss": step["loss"],
                "peak_rss_gib": step["peak_memory_gib"],
            }
            for step in steps
        ]
    seen = [digest for step in steps for digest in step.get("samples", ())]
    same = sum(digest in material.digests for digest in seen) / len(seen) if seen else 1.0
    return Run(
        setup=setup,
        round=number,
        steps=steps[WARM_UP:],
        losses=[step["loss"] for step in steps],
        others=used[0],
        cpu_seconds=used[1],
        peak_rss_gib=max(step["peak_rss_gib"] for step in steps),
        same_samples=same,
        apart=steps[0].get("apart"),
    )


def measure_undisturbed(measure_once: Callable[[], Run], again: int) -> Run:
    """The first undisturbed of up to 1 + `again` runs, else the least disturbed one."""
    runs = [measure_once()]
    while not runs[-1].undisturbed and len(runs) <= again:
        runs.append(measure_once())
    return min(runs, key=lambda run: run.others)


# --- the report ---------------------------------------------------------------------------


def figures(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Medians of each setup over its undisturbed runs (over all, where none was undisturbed)."""
    result = []
    for setup in dict.fromkeys(run.setup for run in runs):
        all_runs = [run for run in runs if run.setup == setup]
        good = [run for run in all_runs if run.undisturbed] or all_runs

        def median(values: Sequence[float]) -> float:
            return round(statistics.median(values), 3)

        result.append(
            asdict(setup)
            | {
                "runs": len(all_runs),
                "undisturbed_runs": sum(run.undisturbed for run in all_runs),
                "tokens_per_second": median([run.tokens_per_second for run in good]),
                "supervised_tokens_per_second": median([run.supervised_per_second for run in good]),
                "tokens_per_cpu_second": median([run.tokens_per_cpu_second for run in all_runs]),
                "best_tokens_per_second": max(run.tokens_per_second for run in all_runs),
                "padding_share": median([run.padding for run in good]),
                "peak_rss_gib": max(run.peak_rss_gib for run in all_runs),
                "losses": [round(loss, 4) for loss in good[-1].losses],
            }
        )
    return result


def ratios(runs: Sequence[Run], best_trl: str, threads: int) -> list[dict[str, Any]]:
    """sft_job against each peer, round by round, like with like in recomputation.

    `target_met` is judged by the rounds that nothing disturbed; without such a round by CPU
    time where each side had one thread, else not at all (None).
    """
    result = []
    for recomputes in (False, True):
        for peer in (FASTCHAT, TRL):
            mine = {r.round: r for r in runs if r.setup == ours(recomputes)}
            theirs = {
                r.round: r
                for r in runs
                if r.setup.side == peer
                and r.setup.recomputes == recomputes
                and (peer != TRL or r.setup.name.startswith(best_trl))
            }
            rounds = sorted(mine.keys() & theirs.keys())
            if not rounds:
                continue
            each = [mine[n].tokens_per_second / theirs[n].tokens_per_second for n in rounds]
            cpu = [mine[n].tokens_per_cpu_second / theirs[n].tokens_per_cpu_second for n in rounds]
            calm = [
                ratio
                for ratio, n in zip(each, rounds, strict=True)
                if mine[n].undisturbed and theirs[n].undisturbed
            ]
            by_time = statistics.median(calm) if calm else None
            by_cpu = statistics.median(cpu)
            # Spinning at barriers makes CPU time of several threads useless on a busy machine.
            judged = by_time if by_time is not None else by_cpu if threads == 1 else None
            result.append(
                {
                    "peer": peer,
                    "activation_checkpointing": "full" if recomputes else "none",
                    "per_round": [round(ratio, 2) for ratio in each],
                    "undisturbed_rounds": len(calm),
                    "median_of_undisturbed": None if by_time is None else round(by_time, 2),
                    "per_cpu_second_per_round": [round(ratio, 2) for ratio in cpu],
                    "per_cpu_second_median": round(by_cpu, 2),
                    "target": TARGETS[peer],
                    "target_met": None if judged is None else judged >= TARGETS[peer],
                }
            )
    return result


NOTES = (
    "Equal: weights, conversations and their order (but see packing), conversations per step, "
    "bf16 computation with fp32 master weights, fused AdamW of torch, learning rate, gradient "
    "clipping at 1.0, one process, OMP_NUM_THREADS, torch release.",
    "bf16: FastChat and TRL use torch autocast over fp32 weights (it keeps softmax and norms in "
    "fp32 and casts a weight when it is used); sft_job casts each layer once per micro-batch "
    "through FSDP2's mixed precision.",
    "Learning rate, constant schedule and a random model are chosen so that a few steps show "
    "learning; they do not change the work of a step.",
    "The random sampler of FastChat's Trainer is replaced by the file's order, which is "
    "sft_job's order of the epoch; no other line of FastChat's is touched. TRL has an option "
    "for it. The steps of TRL's group_by_length, batch_rebalance and packing hold other "
    "conversations of the same epoch.",
    "TRL's packing: a step is 4 rows of 2,048 tokens, about as many tokens as 8 conversations.",
    "TRL's padding_free without packing refuses to truncate, so its conversations come "
    "tokenised and truncated (by the same template).",
    "FastChat tokenises within the step (lazy_preprocess, a few ms per conversation); sft_job "
    "and TRL before the training.",
    "sft_job sets MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ in its workers by itself; "
    "the peers run as a user's shell starts them, without. trl_candidates has TRL's best with "
    "them too; it is not what the ratios are made with.",
    "The model's vocabulary is a large part of it (56 % of 58 M parameters), so the loss weighs "
    "more here than in a model of 7 B parameters: computing logits for supervised tokens only "
    "gains more, the attention and the layers count less.",
    "Peak RSS is of the training process, from its start to the end of the last step, with the "
    "imports of each side; of TRL in the rounds, without the check that samples are kept apart.",
    "Seconds of a step go from the end of one step to the end of the next: data, forward, "
    "backward, optimizer, logging. No checkpoint is written meanwhile.",
)


def render(figure_list: list[dict[str, Any]], ratio_list: list[dict[str, Any]]) -> str:
    names = {OURS: "sft_job", FASTCHAT: "FastChat", TRL: "TRL"}
    rows = [
        [
            f"{names[f['side']]}: {f['name']}",
            f"{f['tokens_per_second']:,.0f}",
            f"{f['supervised_tokens_per_second']:,.0f}",
            f"{f['tokens_per_cpu_second']:,.0f}",
            f"{f['padding_share']:.0%}",
            f"{f['peak_rss_gib']:.1f}",
            " ".join(f"{loss:.3f}" for loss in f["losses"]),
        ]
        for f in figure_list
    ]
    header = ["", "tokens/s", "supervised/s", "tokens/CPU s", "padding", "peak RSS GiB", "losses"]
    compared = [
        [
            f"sft_job / {names[r['peer']]}, recompute {r['activation_checkpointing']}",
            "disturbed"
            if r["median_of_undisturbed"] is None
            else f"{r['median_of_undisturbed']:.1f}",
            f"{r['per_cpu_second_median']:.1f}",
            " ".join(f"{ratio:.1f}" for ratio in r["per_round"]),
            f"{r['target']:g}",
        ]
        for r in ratio_list
    ]
    return (
        workload.markdown(header, rows)
        + "\n\n"
        + workload.markdown(
            ["times the tokens/s", "median", "by CPU time", "rounds", "target"], compared
        )
    )


def choose_trl(runs: Sequence[Run]) -> Setup:
    """The fastest configuration under which no sample sees another."""
    apart = [run for run in runs if run.apart is not None and run.apart < APART]
    if not apart:
        raise SystemExit("no configuration of TRL kept the samples apart")
    good = [run for run in apart if run.undisturbed] or apart
    return max(good, key=lambda run: run.tokens_per_second).setup


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    parser.add_argument("--quick", action="store_true", help="one round, to try the script")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="steps per run, one to warm up")
    parser.add_argument("--wait", type=float, default=60, help="at most so many seconds for quiet")
    parser.add_argument(
        "--again", type=int, default=1, help="how often a disturbed run is repeated"
    )
    parser.add_argument(
        "--no-survey",
        action="store_true",
        help="of TRL's configurations take the first, the fastest when this was written",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=workload.cores(),
        help="of each side; with 1, CPU time is a fair measure on a machine that is not quiet",
    )
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.steps, args.wait, args.again = 1, 2, 10.0, 0
    started = time.time()
    pythons = {name: workload.environment(name) for name in (FASTCHAT, TRL)}
    material = prepare(args.steps, pythons)

    def measured(setup: Setup, number: int, *, check: bool = False) -> Run:
        return measure_undisturbed(
            lambda: measure(
                setup,
                material,
                pythons,
                number=number,
                quiet_s=args.wait,
                threads=args.threads,
                check=check,
            ),
            args.again,
        )

    say("TRL's configurations")
    candidates = TRL_CANDIDATES[:1] if args.quick or args.no_survey else TRL_CANDIDATES
    tried = [measured(setup, 0, check=True) for setup in candidates]
    best = choose_trl(tried)
    if not args.quick:
        tried.append(measured(with_our_malloc(best), 0, check=True))
    turns = [ours(False), fastchat(False), best]
    recomputing = [ours(True), fastchat(True), trl(best.name, True, **best.settings)]
    runs: list[Run] = []
    for number in range(1, args.rounds + 1):
        say(f"round {number} of {args.rounds}")
        runs += [
            measured(setup, number) for setup in [*turns, *([] if args.quick else recomputing)]
        ]
    figure_list, ratio_list = figures(runs), ratios(runs, best.name, args.threads)
    report = {
        "what": "training throughput on a CPU, side by side",
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started),
        "machine": workload.machine(),
        "threads": args.threads,
        "sft_job": workload.code_state(),
        "versions": {
            OURS: workload.versions(),
            FASTCHAT: workload.versions(pythons[FASTCHAT], "fschat"),
            TRL: workload.versions(pythons[TRL], "trl", "datasets"),
        },
        "workload": material.facts,
        "figures": figure_list,
        "ratios": ratio_list,
        "trl_best": best.name,
        "trl_candidates": [run.as_json() for run in tried],
        "runs": [run.as_json() for run in runs],
        "notes": list(NOTES),
    }
    table = render(figure_list, ratio_list)
    tried_table = workload.markdown(
        ["TRL's configurations", "tokens/s", "padding", "together/alone"],
        [
            [r.setup.name, f"{r.tokens_per_second:,.0f}", f"{r.padding:.0%}", f"{r.apart:.1e}"]
            for r in tried
        ],
    )
    workload.publish(report, f"{table}\n\n{tried_table}", args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
