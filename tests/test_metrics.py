"""What a record says: rates, utilisation, waiting, and what restarts have cost."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerCallback

from sft_job import worker, workers
from sft_job.attention import Choice
from sft_job.errors import Interrupted, TrainingError, UserError
from sft_job.files import append_line, read_records
from sft_job.flops import Work
from sft_job.metrics import Meter, Tracker, useful_seconds
from sft_job.trainer import SftTrainer
from sft_job.workers import Phases
from tests import ranks
from tests.runs import make_conversations, make_job, make_model, on_ranks, run_job


class Clock:
    """Time that passes when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(time, "time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def operations(work: Work) -> float:
    return 10 * work.tokens + work.squares + 100 * work.supervised


def test_a_record_is_of_the_steps_since_the_last_one(clock: Clock) -> None:
    """Sums, rates over wall time, shares, and nothing carried over."""
    meter = Meter(operations, peak_flops=1000.0, useful_before=0.0, began=1000.0)
    meter.add(60, 200, 5, idle_share=0.1)
    meter.add(40, 100, 15, idle_share=0.3)
    meter.wait(1.0)
    clock.now += 4
    figures = meter.take()
    assert figures == {
        "tokens": 100,
        "supervised_tokens": 20,
        "tokens_per_second": 25.0,
        "supervised_tokens_per_second": 5.0,
        "seconds": 4.0,
        "seconds_per_step": 2.0,
        "mfu": (1000 + 300 + 2000) / (4 * 1000),
        "idle_share": pytest.approx(0.2),
        "data_wait_share": 0.25,
        "goodput": 1.0,
    }
    clock.now += 2
    assert meter.take()["tokens"] == 0


def test_unknown_hardware_has_no_utilisation(clock: Clock) -> None:
    """null, never somebody else's peak."""
    meter = Meter(operations, peak_flops=None, useful_before=0.0, began=1000.0)
    meter.add(60, 200, 5, 0.0)
    clock.now += 1
    assert meter.take()["mfu"] is None


def test_goodput_counts_starts_and_lost_steps_over_all_attempts(clock: Clock) -> None:
    """30 s of an earlier attempt still count; since the first began, 200 s have passed."""
    meter = Meter(operations, None, useful_before=30.0, began=clock.now - 180)
    meter.reset()
    meter.add(1, 1, 1, 0.0)
    clock.now += 20
    assert meter.take()["goodput"] == pytest.approx(50 / 200)
    clock.now += 100  # saving, say, and a reset after it
    meter.reset()
    meter.add(1, 1, 1, 0.0)
    clock.now += 100
    assert meter.take()["goodput"] == pytest.approx(150 / 400)


def test_steps_that_are_done_again_count_once() -> None:
    """Steps after the checkpoint are lost; a repeated step counts as it was done last."""
    records = [
        {"step": 2, "seconds": 10.0},
        {"step": 4, "seconds": 11.0},
        {"step": 6, "seconds": 12.0},  # the checkpoint was of step 4
        {"step": 6, "seconds": 5.0},
        {"step": 8, "seconds": 6.0},
    ]
    assert useful_seconds(records, 4) == 21.0
    assert useful_seconds(records, 8) == 10 + 11 + 5 + 6
    assert useful_seconds(records, 0) == 0.0
    assert useful_seconds([], 10) == 0.0


def test_a_killed_attempt_may_leave_half_a_line(tmp_path: Path) -> None:
    """It is passed over, and the next line does not continue it."""
    file = tmp_path / "metrics.jsonl"
    assert read_records(file) == []
    append_line(file, json.dumps({"step": 1}))
    with open(file, "a") as half:
        half.write('{"step": 2, "lo')
    append_line(file, json.dumps({"step": 3}))
    append_line(file, json.dumps({"step": 4}))
    assert read_records(file) == [{"step": 1}, {"step": 3}, {"step": 4}]


def test_phases_add_up(clock: Clock) -> None:
    """From the command on, each part ends where the next begins."""
    phases = Phases(clock.now)
    for name, seconds in (("launch", 1.5), ("imports", 2.0)):
        clock.now += seconds
        phases.end(name)
    assert phases.seconds == {"launch": 1.5, "imports": 2.0}
    assert str(phases) == "3.5 s to the end of the first step: launch 1.5, imports 2.0"


def test_the_command_began_when_its_process_did(clock: Clock) -> None:
    """As the kernel counts, from its own start; a worker takes its launcher's word."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    booted = 500.0
    uptime = f"{clock.now - booted:.2f} 1.00\n"
    read = Path.read_text
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(workers.BEGAN, raising=False)
        patch.setattr(
            Path, "read_text", lambda file: uptime if file.name == "uptime" else read(file)
        )
        assert workers.began() == booted + ticks / os.sysconf("SC_CLK_TCK")
        patch.setenv(workers.BEGAN, "123.5")
        assert workers.began() == 123.5


def test_records_and_attempts_of_a_real_run(tmp_path: Path) -> None:
    """All figures are there; a second attempt counts the time of the first."""
    model = make_model(tmp_path / "model")
    data = make_conversations(tmp_path / "data.json", 32)
    job = make_job(tmp_path, model, data, train__max_steps=2)
    run = run_job(job)
    records = read_records(run.metrics_file)
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        assert record["mfu"] is None
        assert 0 < record["goodput"] < 1
        assert 0 <= record["data_wait_share"] < 1
        assert record["supervised_tokens_per_second"] < record["tokens_per_second"]
    begun, started = read_records(run.attempts_file)
    assert begun.keys() == {"attempt", "began", "resumed"}
    assert list(started["start"]) == [
        "launch", "torch and process group", "imports", "data", "weights", "engine", "self-test",
        "first step",
    ]  # fmt: skip


def test_ranks_agree_or_say_why_not(tmp_path: Path) -> None:
    """A job that they resolve differently is refused with the first difference; what the main
    one does for all is told to the others, its errors and requests to stop too."""
    model = make_model(tmp_path / "model")
    data = make_conversations(tmp_path / "data.json", 8)
    job = make_job(tmp_path, model, data)
    (differences, main), (_, other) = on_ranks(ranks.agreement, 2, job)
    same, different, other_job = differences
    assert same is None
    assert different.startswith("the ranks resolve the job differently: attention is 'sdpa' on ")
    assert "and 'torch_varlen' on rank 1 (" in different
    assert "leave the job file alone while it starts" in different
    assert "the job is " in other_job
    refusal = ("ConfigError", "job.yaml:3: wrong\n  -> mend it")
    request = "a request to another process"
    assert main == [7, (*refusal, True), ("ZeroDivisionError", "a bug", True), request]
    bug = ("WorkerError", "rank 0 has failed: ZeroDivisionError: a bug", False)
    assert other == [7, (*refusal, False), bug, request]


def test_gradients_of_exactly_0_are_said_and_end_the_training() -> None:
    """Weights so large that bf16 leaves nothing of them: once is said, five in a row are no
    accident, and one that is not 0 begins the count anew."""
    said: list[str] = []

    class Still:
        _still = 0
        reporter = SimpleNamespace(say=said.append)
        state = SimpleNamespace(global_step=0)
        plan = SimpleNamespace(precision=Choice("bf16", "asked for"))

        def _failure(self, what: str) -> TrainingError:
            return TrainingError(what)

    def step(norm: float) -> None:
        SftTrainer._refuse_stillness(still, norm)
        still.state.global_step += 1

    still: Any = Still()
    for norm in (1.0, 0.0, 0.0, 1e-30, 0.0, 0.0, 0.0, 0.0):
        step(norm)
    assert [line.partition(":")[0] for line in said] == [
        "note", "note"
    ]  # fmt: skip
    assert "the gradient of step 2 is exactly 0" in said[0]
    with pytest.raises(TrainingError, match="exactly 0 in 5 steps in a row, the last of them 9"):
        step(0.0)


class FullDisk(TrainerCallback):
    """A tracker whose disk is full from its first report on."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None: ...

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")


def test_a_tracker_that_fails_ends_its_reports_alone() -> None:
    """Said once; the training goes on."""
    said: list[str] = []
    tracker = Tracker(FullDisk(), said.append)
    for event in ("on_train_begin", "on_log", "on_log", "on_train_end"):
        assert getattr(tracker, event)(None, None, None) is None
    (line,) = said
    assert line.startswith("note: FullDisk is reported to no further (OSError: [Errno 28] No space")


def test_a_tracker_that_cannot_begin_ends_the_job_before_its_first_step() -> None:
    """It was asked for by name."""

    class Unknown(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            raise ConnectionError("no server at localhost")

    with pytest.raises(UserError, match="Unknown cannot begin: ConnectionError: no server at loc"):
        Tracker(Unknown(), print).on_train_begin(None, None, None)


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (0, "no checkpoint has been saved yet"),
        (14, "the last checkpoint, of step 14, is whole, but was not looked at for what went"),
    ],
)
def test_a_failure_says_of_checkpoints_only_what_was_looked_at(saved: int, said: str) -> None:
    """Numbers that are finite may have gone wrong long before: none is called good."""
    trainer: Any = SimpleNamespace(
        steps=SimpleNamespace(cache=SimpleNamespace(sources=lambda samples: ["a (d.json:2)"])),
        _samples=[0],
        last_saved=saved,
        _scales_loss=False,
        run_dir=SimpleNamespace(path="run"),
    )
    error = SftTrainer._failure(trainer, "the loss of step 15 is nan")
    assert said in str(error)
    assert "a (d.json:2)" in str(error)
    assert "good" not in str(error)


@pytest.mark.parametrize(
    ("environ", "code"), [({}, 75), ({"TORCHELASTIC_RUN_ID": "1"}, 0)], ids=["srun", "torchrun"]
)
def test_a_stop_under_torchrun_says_that_it_cannot_end_with_75(
    environ: dict[str, str], code: int, monkeypatch: Any, capsys: Any
) -> None:
    """It would start the ranks again; srun hands the code on."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    place = workers.Place(0, 0, 2, 2, "localhost", 1)
    assert worker._stopped_without_launcher(Interrupted("interrupted by SIGTERM"), place) == code
    assert ("torchrun cannot end with 75" in capsys.readouterr().out) == (code == 0)
