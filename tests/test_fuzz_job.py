"""Whatever a job file and its overrides hold, `sft-job plan` ends with 0 or with a message and 2.

`SFT_JOB_FUZZ=2000 pytest tests/test_fuzz_job.py` tries so many of each kind.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft_job import cli, plan
from sft_job.config import known_keys, load, stored

EXAMPLES = int(os.environ.get("SFT_JOB_FUZZ", "50"))
fuzz = settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

GOOD = """\
model: {path: "bundled:smollm2-135m", rope: {type: linear, factor: 2}, attention: auto}
data:
  train: [conversations.json, "*.json"]
  seq_len: 512
  cache_dir: cache
train: &train
  learning_rate: 2e-5
  num_train_epochs: 3
  warmup_ratio: 0.03
  extra: {adam_beta2: 0.95, optim: adamw_torch, lr_scheduler_kwargs: {num_cycles: 0.5}}
engine: {type: zero3, offload: none}
checkpoint: {every_steps: 200, keep: null}
logging: {report_to: [tensorboard]}
run: {dir: $HOME/run, online: false}
container: {type: pyxis, image: "registry.example.org#sft_job", bind: []}
slurm: {nodes: 2, gpus_per_node: 4, time_min: 1-12, extra: {mem: 0, begin: 16:00}, setup: []}
"""

# What has meant something else, or nothing, to one reader of YAML or another.
AWKWARD = [
    "", "~", "null", "yes", "no", "on", "true", "0", "-1", "010", "0o17", "0x1F", "0b1", "1_000",
    "1:30", "24:00:00", "1-0", "1e3", "1e999", "1e-320", ".inf", "-.INF", ".nan", "9" * 50,
    "9" * 5000, "1e20", "2026-10-10", "2026-10-10 12:00:00", "=", "<<", "*train", "*x", "&x", "!",
    "!!int 010", "!!binary aGk=", "!!python/none", "!!set {a}", "!!timestamp 2026-10-10", "@", "`",
    "%", "|", ">", "|\n   x", "? a", "- a", "[", "]", "{", "}", "[]", "{}", "[[1]]", "{a: 1}",
    "{a: {b: 1}}",
    '"', "'", '"\\ud800"', '"\\UFFFFFFFF"', '"\\0"', "$", "$$", "$NOT_SET", "${HOME}",
    "${", "$(x)", "$1", "~nobody-at-all/x", "~/x", "/", ".", "..", "x" * 300, "/x" * 3000, "\x00",
    "\x07", "\x7f", "\x85", "\u2028", "\ufeff", "é", "名", "\U0001f600", "#", " # x", ": ", "a: b",
    "- - - - ", "[" * 40, "{a: " * 40, "---", "...", "\n", "\r\n", "\t", "  ", "auto", "none",
    "conversations.json/below", "/dev/null", "/dev/null/x", "/proc/1/cwd/x", "docker://x/y",
]  # fmt: skip

MARKS = " \t\n:,[]{}&*!|>'\"%@`#-?.$~/=abc019"
# What may stand there, so that the rest is looked at as well.
PLAUSIBLE = ["runs/x", "conversations.json", "5", "0.5", "auto", "true", "16", "fsdp", "zero3",
             "pyxis", "cosine", "linear"]  # fmt: skip


def anything(rng: random.Random) -> str:
    match rng.choice("aaaapptni"):
        case "a":
            return rng.choice(AWKWARD)
        case "p":
            return rng.choice(PLAUSIBLE)
        case "t":
            return "".join(rng.choices(MARKS, k=rng.randint(0, 12)))
        case "n":
            return repr(rng.uniform(-1, 1) * 10.0 ** rng.randint(-320, 308))
    return str(rng.randint(-1, 1) * 10 ** rng.randint(0, 25) + rng.randint(-9, 9))


def damaged(rng: random.Random) -> str:
    """A good job file after a few slips of the keyboard."""
    text = GOOD
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        start = rng.randint(0, len(text))
        match rng.choice("vvvvidx"):
            case "v":  # another value
                colon = text.find(": ", start)
                end = min((e for m in ",}\n" if (e := text.find(m, colon)) > 0), default=len(text))
                text = text[: colon + 2] + anything(rng) + text[end:]
            case "i":
                text = text[:start] + anything(rng) + text[start:]
            case "d":
                text = text[:start] + text[start + rng.randint(1, 30) :]
            case "x":
                text = text[:start] + text[start : start + rng.randint(1, 60)] + text[start:]
    return text


KEYS = [*known_keys(), "a.b.c.d", "", ".", "train.", ".seed", "train.seed.x", "train.extra.optim",
        "train.extra.lr_scheduler_kwargs.timescale", "slurm.extra.mem", "data.train.0",
        "a." * 99]  # fmt: skip


def overrides(rng: random.Random) -> list[str]:
    count = rng.choice((0, 0, 1, 1, 2, 3, 5))
    return [f"{rng.choice(KEYS)}={anything(rng)}" for _ in range(count)]


def ends_well(job: Path, given_overrides: list[str]) -> None:
    said = io.StringIO()
    words = [str(job), *(word for word in given_overrides if not word.startswith("-"))]
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = cli.run(plan.main, words)
    told = f"{words}\n{job.read_bytes()!r}\n{said.getvalue()}"
    assert code in (0, 2), told
    assert (code == 2) == said.getvalue().startswith("error: "), told
    assert len(said.getvalue()) < 20_000


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a job file lies, its one file of data, and the home folder."""
    (tmp_path / "conversations.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NOT_SET", raising=False)
    return tmp_path


def test_the_job_that_is_damaged_is_good(folder: Path) -> None:
    job = folder / "job.yaml"
    job.write_text(GOOD)
    ends_well(job, [])
    assert load(job).slurm.time_min == 36 * 60


# A generator of our own: its slips meet in one example more often than hypothesis's, which
# prefers simple ones. Hypothesis gives the seed, and with it the same examples in every run.
@fuzz
@given(rng=st.randoms(use_true_random=True))
def test_a_damaged_job(folder: Path, rng: random.Random) -> None:
    job = folder / "job.yaml"
    job.write_bytes(damaged(rng).encode("utf-8", "surrogatepass"))
    ends_well(job, overrides(rng))


@fuzz
@given(given_overrides=st.lists(st.text(max_size=12), min_size=1, max_size=2))
def test_any_arguments(folder: Path, given_overrides: list[str]) -> None:
    job = folder / "job.yaml"
    job.write_text(GOOD)
    ends_well(job, given_overrides)


@fuzz
@given(raw=st.one_of(st.text(), st.text(st.sampled_from(MARKS)), st.binary()))
def test_any_file(folder: Path, raw: str | bytes) -> None:
    job = folder / "job.yaml"
    job.write_bytes(raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogatepass"))
    ends_well(job, [])


names = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=40
)


@fuzz
@given(parts=st.lists(names, min_size=1, max_size=3))
def test_what_is_stored_is_the_same_job(folder: Path, parts: list[str]) -> None:
    """Any name of a folder comes back out of job.json, dollars and ends of lines too."""
    job = folder / "job.yaml"
    job.write_text(GOOD)
    config = load(job)
    run = config.run.model_copy(update={"dir": f"/{'/'.join(parts)}/x\n\t$HOME ~ $$"})
    config = config.model_copy(update={"run": run})
    (folder / "job.json").write_text(stored(config), encoding="utf-8")
    again = load(folder / "job.json")
    assert again == config.model_copy(
        update={"run": run.model_copy(update={"dir": os.path.normpath(run.dir)})}
    )
