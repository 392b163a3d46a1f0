"""The training processes of one machine: their start, their end, and whose error is shown."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sft_job import cli, workers
from sft_job.cli import StopRequest
from sft_job.errors import (
    DataError,
    HardwareError,
    Interrupted,
    SftJobError,
    TrainingError,
    UserError,
    WorkerError,
)
from sft_job.place import find_place
from sft_job.rundir import RunDir, read_json
from sft_job.workers import Workers, report_failure

# --- report_failure and the choice of the first --------------------------------------------


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    """A run directory with the logs of attempt 1."""
    run = RunDir(tmp_path / "run")
    run.logs(1).mkdir(parents=True)
    return run


def raised(error: BaseException) -> BaseException:
    """The error with a traceback."""
    try:
        raise error
    except BaseException as caught:
        return caught


def chosen(run_dir: RunDir, *codes: int | None) -> SftJobError:
    """What the launcher shows after the workers of attempt 1 ended with these codes."""
    return Workers(run_dir, 1, len(codes))._first_failure(codes)


def at(monkeypatch, moment: float) -> None:
    """Set the clock."""
    monkeypatch.setattr(workers.time, "time", lambda: moment)


def test_an_expected_error_is_left_as_its_message(run_dir):
    """With its exit code; the traceback is kept for --debug and for us."""
    error = raised(DataError(["d.json:3: wrong"], remedy="mend it"))
    assert report_failure(run_dir, 1, 0, error) == 2
    record = read_json(run_dir.error(1, 0))
    assert record["exit_code"] == 2
    assert record["message"] == "error: d.json:3: wrong\n  -> mend it"
    assert record["traceback"].startswith("Traceback (most recent call last):")


def test_an_unexpected_error_is_left_with_its_traceback(run_dir):
    """It is ours: exit code 1 and no message."""
    assert report_failure(run_dir, 1, 3, raised(ZeroDivisionError("a bug"))) == 1
    record = read_json(run_dir.error(1, 3))
    assert (record["exit_code"], record["message"]) == (1, None)
    assert "ZeroDivisionError: a bug" in record["traceback"]


@pytest.mark.parametrize("code", [1, 2, 75])
def test_a_worker_ends_with_the_code_of_its_error(code, run_dir):
    """1 ours, 2 the user's, 75 interrupted."""
    kind = {1: TrainingError, 2: HardwareError, 75: Interrupted}[code]
    assert report_failure(run_dir, 1, 0, kind("x")) == code


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_earliest_error_is_shown(order, run_dir, monkeypatch):
    """When one rank fails, the others fail for want of it a moment later."""
    first, second = order
    at(monkeypatch, 100.5)
    report_failure(run_dir, 1, second, raised(RuntimeError("connection closed by peer")))
    at(monkeypatch, 100.0)
    report_failure(run_dir, 1, first, raised(TrainingError("the loss is not finite")))
    error = chosen(run_dir, 1, 1)
    assert (type(error), str(error)) == (WorkerError, "the loss is not finite")


def test_a_users_mistake_in_a_worker_is_shown_as_in_the_launcher(run_dir):
    """The same text and exit code 2, no traceback."""
    original = HardwareError("no bf16", where="GPU", remedy="use fp32")
    report_failure(run_dir, 1, 0, raised(original))
    error = chosen(run_dir, 2, None)
    assert isinstance(error, UserError)
    assert (str(error), error.exit_code) == (str(original), 2)


def test_a_bug_in_a_worker_is_shown_with_rank_and_traceback(run_dir):
    """Nothing else says where to look."""
    report_failure(run_dir, 1, 1, raised(ZeroDivisionError("a bug")))
    error = chosen(run_dir, 0, 1)
    assert str(error).startswith("rank 1 failed:\nTraceback (most recent call last):")
    assert str(error).endswith("ZeroDivisionError: a bug")
    assert error.exit_code == 1


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (9, r"rank 1 was ended by signal SIGKILL; the kernel does that when memory runs out"),
        (11, r"rank 1 was ended by signal SIGSEGV\n"),
        (15, r"rank 1 was ended by signal SIGTERM\n"),
    ],
)
def test_a_worker_that_was_killed_is_named_with_the_signal(number, expected, run_dir):
    """A killed process leaves no message; its last output is pointed to."""
    with pytest.raises(WorkerError, match=rf"{expected}(.|\n)*-> .*attempt-1/rank-1\.log"):
        raise chosen(run_dir, None, -number)


def test_a_killed_worker_is_the_cause_of_what_the_others_report(run_dir):
    """The others only say that their peer has gone."""
    report_failure(run_dir, 1, 0, raised(RuntimeError("connection closed by peer")))
    assert "rank 1 was ended by signal SIGKILL" in str(chosen(run_dir, 1, -9))


def test_a_worker_without_message_is_shown_by_the_end_of_its_log(run_dir):
    """The last 20 lines: where the interpreter itself gives up."""
    run_dir.log(1, 1).write_bytes(b"".join(b"line %d \xff\n" % n for n in range(100)))
    text = str(chosen(run_dir, None, 3))
    assert text.startswith("the process of rank 1 ended with exit code 3 and no message:\nline 80 ")
    assert text.splitlines()[-1].startswith("line 99 ")


def test_errors_of_earlier_attempts_are_not_shown(run_dir):
    """Each attempt has a folder of its own."""
    report_failure(run_dir, 1, 0, raised(ZeroDivisionError("old")))
    run_dir.logs(2).mkdir()
    run_dir.log(2, 0).write_text("new\n")
    assert "old" not in str(Workers(run_dir, 2, 1)._first_failure([4]))


# --- processes -----------------------------------------------------------------------------


@pytest.fixture
def crew(run_dir, tmp_path, monkeypatch):
    """Start workers that run the given code instead of a training."""
    monkeypatch.setattr(Workers._end_others, "__defaults__", (0.2,))
    crews = []

    def start(code: str, count: int = 2, arguments=("job.yaml",)) -> Workers:
        fake = tmp_path / "python"
        head = "import json, os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
        fake.write_text(f"#!{os.path.realpath(sys.executable)} -S\n{head}{code}\n")
        fake.chmod(0o755)
        monkeypatch.setattr(workers.sys, "executable", str(fake))
        crews.append(Workers(run_dir, 1, count))
        crews[-1].start(arguments)
        return crews[-1]

    yield start
    for workers_ in crews:
        for process in workers_._processes:
            process.kill()
            process.wait()


WRITE_DOWN = """
record = {"argv": sys.argv[1:], "environ": dict(os.environ), "session": os.getsid(0)}
with open(os.environ["OUT"] + str(rank), "w") as file:
    json.dump(record, file)
"""


def test_every_worker_is_given_its_place(crew, tmp_path, monkeypatch):
    """One rank each, the same rendezvous, the attempt, and a session of its own."""
    monkeypatch.setenv("OUT", f"{tmp_path}/out")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    crew(WRITE_DOWN, arguments=["job.yaml", "train.seed=1"]).wait(StopRequest())
    found = [json.loads((tmp_path / f"out{rank}").read_text()) for rank in range(2)]
    assert [item["argv"] for item in found] == [
        ["-m", "sft_job.train", "job.yaml", "train.seed=1"]
    ] * 2
    places = [find_place(item["environ"]) for item in found]
    assert [(p.rank, p.local_rank, p.world_size, p.local_world_size) for p in places] == [
        (0, 0, 2, 2),
        (1, 1, 2, 2),
    ]
    assert len({(p.master_addr, p.master_port) for p in places}) == 1
    assert {item["environ"][workers.ATTEMPT] for item in found} == {"1"}
    assert all(workers.LAUNCHED in item["environ"] for item in found)
    assert all(int(item["environ"]["OMP_NUM_THREADS"]) >= 1 for item in found)
    assert len({os.getsid(0), *(item["session"] for item in found)}) == 3


def test_the_users_environment_wins_over_our_defaults(crew, tmp_path, monkeypatch):
    """OMP_NUM_THREADS and malloc's settings are proposals; ranks are not."""
    monkeypatch.setenv("OUT", f"{tmp_path}/out")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "8")
    monkeypatch.setenv("RANK", "41")
    crew(WRITE_DOWN, count=1).wait(StopRequest())
    environ = json.loads((tmp_path / "out0").read_text())["environ"]
    assert (environ["OMP_NUM_THREADS"], environ["MALLOC_TRIM_THRESHOLD_"]) == ("7", "8")
    assert environ["RANK"] == "0"


def test_rank_0_speaks_and_everything_else_goes_to_logs(crew, run_dir, capfd):
    """One process writes to the terminal; errors of all are in the logs."""
    crew("print('out', rank); print('err', rank, file=sys.stderr)").wait(StopRequest())
    assert capfd.readouterr() == ("out 0\n", "")
    assert run_dir.log(1, 0).read_text() == "err 0\n"
    assert sorted(run_dir.log(1, 1).read_text().splitlines()) == ["err 1", "out 1"]


def test_a_failed_worker_ends_the_others(crew):
    """They wait for it in a collective and would never end by themselves."""
    started = crew("sys.exit('no memory') if rank else time.sleep(600)")
    with pytest.raises(WorkerError, match="rank 1 ended with exit code 1 and no message:\nno memo"):
        started.wait(StopRequest())
    assert [process.returncode for process in started._processes] == [-signal.SIGKILL, 1]


def test_a_killed_worker_is_noticed(crew):
    """As the kernel does when memory runs out."""
    started = crew("os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(600)")
    with pytest.raises(WorkerError, match="rank 1 was ended by signal SIGKILL"):
        started.wait(StopRequest())


HANDLE = """
signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
time.sleep(600)
"""


def test_a_request_to_stop_reaches_workers_that_have_just_been_started(crew):
    """The signal is held back until their handlers stand, so that none dies of it."""
    stop = StopRequest()
    stop.reason = "signal SIGUSR1"
    started = crew(HANDLE)
    started.wait(stop)
    assert [process.returncode for process in started._processes] == [0, 0]


def test_the_launcher_hears_signals_again_after_the_start(crew):
    """They are held back only while the workers are started."""
    crew("pass").wait(StopRequest())
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, cli.STOP_SIGNALS)
    assert not blocked & set(cli.STOP_SIGNALS)


# --- requests to stop ----------------------------------------------------------------------


@pytest.fixture
def handlers():
    """Put the handlers back that a test replaces."""
    before = {number: signal.getsignal(number) for number in cli.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", cli.STOP_SIGNALS)
def test_a_signal_is_remembered_and_ends_nothing(number, handlers):
    """The first one is the reason; asking again changes nothing."""
    stop = StopRequest()
    stop.listen()
    assert not stop
    signal.raise_signal(number)
    signal.raise_signal(signal.SIGTERM)
    assert stop
    assert stop.reason == f"signal {number.name}"


def test_a_file_is_a_request_to_stop(tmp_path):
    """Made at any time; it counts from then on, also when it is taken away again."""
    stop = StopRequest(tmp_path / "stop-1")
    assert not stop
    (tmp_path / "stop-1").touch()
    assert stop
    (tmp_path / "stop-1").unlink()
    assert stop
    assert stop.reason == "stop file stop-1"


def test_a_worker_does_not_outlive_its_launcher():
    """Killed without a chance to say anything, the launcher leaves nobody behind."""
    worker = (
        "import os, time\n"
        "from sft_job.workers import die_with_parent\n"
        "die_with_parent(os.getppid())\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(600)\n"
    )
    launcher = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {worker!r}])\n"
        "time.sleep(600)\n"
    )
    package = str(Path(workers.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", launcher],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": package},
    ) as process:
        pid = int(process.stdout.readline())
        process.kill()
        process.wait()
        # The pipe ends when the last process that holds it has ended.
        ended, _, _ = select.select([process.stdout], [], [], 60)
        if not ended:
            os.kill(pid, signal.SIGKILL)
        assert ended
        assert process.stdout.read() == b""
