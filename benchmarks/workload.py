"""What the benchmarks share: the job that all sides do, their environments, the report.

    model           58 M parameters of LLaMA shape, random from a fixed seed, fp32 safetensors
    tokenizer       a real sentencepiece BPE model of 32,000 pieces (from mistral-common)
    conversations   English text of Python's own documentation, cut to log-normal lengths

All of it is made here from fixed seeds. Only Python's text differs between its releases, so the
report names the digest of the conversations.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import random
import re
import resource
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

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
ENVS = BENCHMARKS / ".envs"
WORK = BENCHMARKS / ".work"
# The same weights and vocabulary twice: FastChat takes sentencepiece's tokenizer.model
# (`use_fast=False`), sft_job and TRL take tokenizer.json.
MODEL = WORK / "model"
MODEL_FAST = WORK / "model-fast"

TORCH = "torch==2.13.0"
SEQ_LEN = 2048
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}

# Tokens of a conversation before truncation: log-normal. The mean of what is left after
# truncation at 2048 is about 860.
MEDIAN_TOKENS, SIGMA = 730.0, 0.86
CHARACTERS_PER_TOKEN = 3.25
USER_SHARE = 0.46  # of the text; the system text counts with the questions
MEAN_EXCHANGES = 3.5


# --- model, tokenizer, conversations ------------------------------------------------------


def make_model() -> Path:
    """The model folder in the layout of Llama 2: config, safetensors, bare tokenizer.model."""
    import torch
    from safetensors.torch import save_file

    if (MODEL / "model.safetensors").is_file():
        return MODEL
    MODEL.mkdir(parents=True, exist_ok=True)
    _write_tokenizer()
    config = SHAPE | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "max_position_embeddings": SEQ_LEN,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }
    (MODEL / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.ones(shape)
        if name.endswith("norm.weight")
        else torch.empty(shape).normal_(0.0, 0.02, generator=generator)
        for name, shape in _parameter_shapes().items()
    }
    beside = MODEL / "model.safetensors.tmp"
    save_file(weights, beside, metadata={"format": "pt"})
    beside.rename(MODEL / "model.safetensors")
    return MODEL


def _parameter_shapes() -> dict[str, list[int]]:
    vocabulary, hidden = SHAPE["vocab_size"], SHAPE["hidden_size"]
    wide = SHAPE["intermediate_size"]
    shapes = {"model.embed_tokens.weight": [vocabulary, hidden]}
    for layer in range(SHAPE["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{name}self_attn.{projection}.weight"] = [hidden, hidden]
        shapes[f"{name}mlp.gate_proj.weight"] = [wide, hidden]
        shapes[f"{name}mlp.up_proj.weight"] = [wide, hidden]
        shapes[f"{name}mlp.down_proj.weight"] = [hidden, wide]
        shapes[f"{name}input_layernorm.weight"] = [hidden]
        shapes[f"{name}post_attention_layernorm.weight"] = [hidden]
    return shapes | {"model.norm.weight": [hidden], "lm_head.weight": [vocabulary, hidden]}


def parameter_count() -> int:
    return sum(
        shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in _parameter_shapes().values()
    )


def _write_tokenizer() -> None:
    import mistral_common

    source = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    shutil.copyfile(source, MODEL / "tokenizer.model")
    # As published with LLaMA: FastChat's label offsets are made for this (legacy) behaviour.
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": SEQ_LEN,
        "clean_up_tokenization_spaces": False,
    }
    (MODEL / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def make_fast_model(fastchat: Path) -> Path:
    """The model folder with a tokenizer.json, as its own folder.

    Args:
        fastchat: Python of FastChat's environment. Its transformers release still writes the
            merges of a tokenizer.json in sentencepiece's order; releases of today do not.
    """
    if (MODEL_FAST / "tokenizer.json").is_file():
        return MODEL_FAST
    MODEL_FAST.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (MODEL_FAST / name).unlink(missing_ok=True)
        os.link(MODEL / name, MODEL_FAST / name)
    settings = json.loads((MODEL / "tokenizer_config.json").read_text())
    # A class of its own would build its normaliser anew over that of the file.
    settings = settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (MODEL_FAST / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    command = [fastchat, BENCHMARKS / "peer_fastchat.py", "tokenizer", MODEL]
    log = WORK / "logs" / "tokenizer.log"
    if run([*command, MODEL_FAST / "tokenizer.json"], log, timeout=120):
        raise RuntimeError(f"the tokenizer could not be converted: {log}")
    return MODEL_FAST


def make_conversations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """ShareGPT records whose lengths are the `count` evenly spaced quantiles of a log-normal.

    Quantiles and not draws: a few dozen conversations then have the same mean as thousands.
    """
    rng = random.Random(seed)
    text = _english()
    normal = statistics.NormalDist()
    sizes = [
        MEDIAN_TOKENS * pow(2.718281828459045, SIGMA * normal.inv_cdf((i + 0.5) / count))
        for i in range(count)
    ]
    rng.shuffle(sizes)
    return [
        {"id": f"c{number}", "conversations": _conversation(rng, text, size)}
        for number, size in enumerate(sizes)
    ]


def _english() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(body.strip() for _, body in sorted(topics.items()))


def _conversation(rng: random.Random, text: str, tokens: float) -> list[dict[str, str]]:
    """Exchanges of unequal length that add up to about `tokens`."""
    exchanges = 1
    while rng.random() > 1 / MEAN_EXCHANGES and exchanges < tokens / 60:
        exchanges += 1
    characters = tokens * CHARACTERS_PER_TOKEN
    weights = [rng.expovariate(1) + 0.1 for _ in range(2 * exchanges)]
    asked, answered = sum(weights[::2]), sum(weights[1::2])
    shares = [
        USER_SHARE * weight / asked if turn % 2 == 0 else (1 - USER_SHARE) * weight / answered
        for turn, weight in enumerate(weights)
    ]
    return [
        {
            "from": "gpt" if turn % 2 else "human",
            "value": _passage(rng, text, max(8, round(characters * share))),
        }
        for turn, share in enumerate(shares)
    ]


def _passage(rng: random.Random, text: str, characters: int) -> str:
    """A piece of the text from the beginning of a word, spacing and line breaks as they are."""
    start = rng.randrange(len(text) - characters - 200)
    word = re.compile(r"(?<=\s)[A-Za-z]").search(text, start)
    start = word.start() if word else start
    return text[start : start + characters].strip()


def digest(conversations: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(conversations).encode()).hexdigest()[:16]


# --- environments and processes -----------------------------------------------------------


def cores() -> int:
    return len(os.sched_getaffinity(0))


def environment(name: str) -> Path:
    """The Python of a peer's own virtual environment; made once, anew when its pins change."""
    requirements = BENCHMARKS / f"requirements-{name}.txt"
    folder = ENVS / name
    python, marker = folder / "bin" / "python", folder / "made-from"
    wanted = hashlib.sha256(TORCH.encode() + requirements.read_bytes()).hexdigest()
    if marker.is_file() and marker.read_text() == wanted:
        return python
    say(f"making the environment of {name} (once)")
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip: list[str | Path] = [
        python,
        "-m",
        "pip",
        "install",
        "-qq",
        "--disable-pip-version-check",
        TORCH,
    ]
    subprocess.run(pip, check=True)
    # torch is named again, so that no requirement can replace it by another build.
    subprocess.run([*pip, "--requirement", requirements], check=True)
    marker.write_text(wanted)
    return python


def process_environment(threads: int | None = None) -> dict[str, str]:
    """The same for all sides: a user's shell, as many threads as cores, no network."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "SLURM_", "OMP_", "MKL_", "MALLOC_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    return kept | {
        "OMP_NUM_THREADS": str(threads or cores()),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(WORK / "huggingface"),
        "HF_DATASETS_CACHE": str(WORK / "huggingface" / "datasets"),
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_CPU": "true",
        "TOKENIZERS_PARALLELISM": "true",
    }


def run(command: Sequence[str | Path], log: Path, *, timeout: float, **extra: str) -> int:
    """Run a command with its output in `log`; returns its exit code.

    Args:
        extra: further environment variables.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as output:
        return subprocess.run(
            [str(part) for part in command],
            env=process_environment() | extra,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            check=False,
        ).returncode


DISTURBED = 0.10
"""Share of the cores used by other processes from which a measurement does not count."""


def wait_for_quiet(limit_s: float) -> None:
    """Return when other processes leave the cores alone for three seconds, or after the limit."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        if psutil.cpu_percent(interval=3) < 100 * DISTURBED:
            return


@dataclass(frozen=True)
class Used:
    """Seconds of CPU time used by the whole machine and by some processes up to a moment."""

    time: float
    machine: float
    own: float


def machine_busy() -> float:
    used = psutil.cpu_times()
    return float(sum(used) - used.idle - used.iowait)


def machine_seconds() -> Used:
    """Now, with the children of this process (those that have ended) as its own."""
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    mine = resource.getrusage(resource.RUSAGE_SELF)
    used = own.ru_utime + own.ru_stime + mine.ru_utime + mine.ru_stime
    return Used(time.monotonic(), machine_busy(), used)


def others_since(before: Used, now: Used | None = None) -> float:
    """Share of the cores that other processes have used."""
    now = now or machine_seconds()
    foreign = (now.machine - before.machine) - (now.own - before.own)
    return max(0.0, foreign / ((now.time - before.time) * cores()))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- the report ---------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text()
    name = re.search(r"^model name\s*:\s*(.*)$", info, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.*)$", info, re.MULTILINE)
    known = {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile"}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": name[1] if name else platform.processor(),
        "cores": cores(),
        "vector_units": sorted(known & set(flags[1].split())) if flags else [],
        "memory_gib": round(memory, 1),
        "system": platform.platform(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "numpy")


def versions(python: Path | str = sys.executable, *more: str) -> dict[str, str]:
    """Versions of an environment's packages, asked from its own Python."""
    code = (
        "import sys, json, importlib.metadata as m; "
        "names = [d.metadata['Name'].lower() for d in m.distributions()]; "
        "print(json.dumps({'python': sys.version.split()[0], "
        "**{n: m.version(n) for n in sys.argv[1:] if n.lower() in names}}))"
    )
    command = [str(python), "-c", code, *more, *PACKAGES]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = json.loads(answer)
    return found


def code_state() -> dict[str, Any]:
    """What of sft_job was measured: the commit, and the digest of the files as they are."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.rstrip()

    content = hashlib.sha256()
    for file in sorted((ROOT / "sft_job").glob("*.py")):
        content.update(file.name.encode() + file.read_bytes())
    return {
        "version": importlib.metadata.version("sft_job"),
        "commit": git("rev-parse", "HEAD"),
        "changed_files": git("status", "--short", "--", "sft_job").splitlines(),
        "files_sha256": content.hexdigest()[:16],
    }


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; every column but the first is right-aligned."""
    lines = [" | ".join(header), " | ".join(["---", *["---:"] * (len(header) - 1)])]
    lines += [" | ".join(row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def publish(report: Mapping[str, Any], table: str, out: Path | None) -> None:
    """Print the table; write the JSON where it was asked for."""
    print(table, flush=True)
    if out is not None:
        out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        say(f"written: {out}")
