"""The training processes of one machine: their start, their end, and whose error is shown."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft_job import cli, launcher, workers
from sft_job.cli import StopRequest
from sft_job.config import load
from sft_job.errors import (
    DataError,
    HardwareError,
    Interrupted,
    SftJobError,
    TrainingError,
    UserError,
    WorkerError,
)
from sft_job.files import read_json
from sft_job.launcher import Workers, report_failure
from sft_job.place import find_place
from sft_job.rundir import RunDir

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
    monkeypatch.setattr(launcher.time, "time", lambda: moment)


def test_an_expected_error_is_left_as_its_message(run_dir):
    """With its exit code; the traceback is kept for --debug and for us."""
    error = raised(DataError(["d.json:3: wrong"], remedy="mend it"))
    assert report_failure(run_dir, 1, 0, error) == 2
    record = read_json(run_dir.error(1, 0))
    assert record["exit_code"] == 2
    assert record["message"] == "error: d.json:3: wrong\n  -> mend it"
    assert record["traceback"].startswith("Traceback (most recent call last):")


def test_an_unexpected_error_is_left_with_its_traceback(run_dir):
    """It is ours: exit code 1, a message of one line, and the traceback for us."""
    assert report_failure(run_dir, 1, 3, raised(ZeroDivisionError("a bug"))) == 1
    record = read_json(run_dir.error(1, 3))
    assert record["exit_code"] == 1
    assert record["message"] == "error: rank 3: unexpected ZeroDivisionError: a bug"
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
    """In one line; the traceback stays in the log, whose place is said."""
    report_failure(run_dir, 1, 1, raised(ZeroDivisionError("a bug")))
    error = chosen(run_dir, 0, 1)
    log = run_dir.log(1, 1)
    expected = f"rank 1: unexpected ZeroDivisionError: a bug\n  -> the traceback is in {log}"
    assert str(error) == expected
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


@pytest.mark.parametrize("text", ["[]", "null", "7", '"x"', "{}", '{"time"'])
def test_an_error_file_that_is_damaged_is_no_message(text, run_dir):
    """The end of the log is shown instead."""
    run_dir.logs(1).mkdir(parents=True, exist_ok=True)
    run_dir.error(1, 0).write_text(text)
    run_dir.log(1, 0).write_text("the last words")
    assert "the last words" in str(Workers(run_dir, 1, 1)._first_failure([4]))


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
        monkeypatch.setattr(launcher.sys, "executable", str(fake))
        crews.append(Workers(run_dir, 1, count))
        crews[-1].start(arguments)
        return crews[-1]

    yield start
    for workers_ in crews:
        for process in workers_.processes:
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


@pytest.mark.parametrize(
    ("overrides", "environ", "told"),
    [
        ([], {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1"}),
        ([], {"PYTORCH_ALLOC_CONF": "", "HF_HUB_OFFLINE": "0"}, {"HF_HUB_OFFLINE": "1"}),
        ([], {"PYTORCH_CUDA_ALLOC_CONF": "x:1"}, {"HF_HUB_OFFLINE": "1"}),
        (["run.online=true"], {"PYTORCH_ALLOC_CONF": "x:1"}, {}),
        (
            ["run.online=true", "train.deterministic=true"],
            {"PYTORCH_ALLOC_CONF": "x:1"},
            {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
        ),
        (
            ["run.online=true", "train.deterministic=true"],
            {"PYTORCH_ALLOC_CONF": "x:1", "CUBLAS_WORKSPACE_CONFIG": ":16:8"},
            {},
        ),
    ],
)
def test_a_process_tells_its_libraries_what_the_job_says(job_file, overrides, environ, told):
    """The allocator and cuBLAS as the user has them; offline is the job's to say."""
    assert workers.own_environment(load(job_file, overrides), environ) == told


def test_libraries_are_told_before_torch_is_imported(job_file):
    """torch reads it once. The order of a rank itself, in a process that has no torch yet."""
    code = (
        "import sys\n"
        "from sft_job import worker, workers\n"
        "from sft_job.config import load\n"
        "def told(config, environ):\n"
        "    raise SystemExit('torch' in sys.modules)\n"
        "workers.own_environment = told\n"
        f"worker.Rank(load({str(job_file)!r}), *[None] * 6, launched=False).run()\n"
    )
    environ = os.environ | {"PYTHONPATH": str(Path(workers.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=environ).returncode == 0


WARNS = """
import sys, warnings
from sft_job import workers
{start}
def collective(name):
    warnings.warn(f"`{{name}}` is deprecated", FutureWarning, stacklevel=2)
def step(number):
    with warnings.catch_warnings():  # as torch does: Python forgets what it has shown
        warnings.simplefilter("ignore", ResourceWarning)
    for name in ("gather", "scatter"):
        collective(name)
    warnings.filterwarnings("always", category=UserWarning)  # as a library that insists
    warnings.warn("this again", UserWarning)
    warnings.warn(f"step {{number}} was slow", RuntimeWarning)
for number in range(100):
    step(number)
with warnings.catch_warnings(record=True) as caught:  # nobody's log: everything is caught
    for _ in range(2):
        warnings.warn("this again", UserWarning)
print(len(caught))
"""


def said(start: str) -> tuple[str, list[str]]:
    """Standard output of a process that warns in 100 steps, and its warnings."""
    environ = os.environ | {"PYTHONPATH": str(Path(workers.__file__).parents[1])}
    command = [sys.executable, "-c", WARNS.format(start=start)]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    return result.stdout, [line for line in result.stderr.splitlines() if "Warning:" in line]


def test_a_warning_is_said_once_in_a_log():
    """Whatever libraries do to the filters; of one with a number in it the first are enough."""
    caught, lines = said("workers.say_warnings_once()")
    assert caught == "2\n"
    texts = [line.partition(" ")[2] for line in lines]
    assert [text for text in texts if "slow" not in text][:3] == [
        "FutureWarning: `gather` is deprecated",
        "FutureWarning: `scatter` is deprecated",
        "UserWarning: this again",
    ]
    assert len(lines) == 3 + workers.WARNINGS_OF_A_LINE + 1
    slow = [line for line in lines if "RuntimeWarning" in line]
    assert len(slow) == workers.WARNINGS_OF_A_LINE + 1
    assert slow[-1].endswith("more of these are not shown")
    # By itself Python says them in every step.
    assert len(said("")[1]) == 400


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
    assert [process.returncode for process in started.processes] == [-signal.SIGKILL, 1]


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
    assert [process.returncode for process in started.processes] == [0, 0]


def test_the_launcher_hears_signals_again_after_the_start(crew):
    """They are held back only while the workers are started."""
    crew("pass").wait(StopRequest())
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, cli.STOP_SIGNALS)
    assert not blocked & set(cli.STOP_SIGNALS)


def test_a_failure_is_heard_where_nothing_can_be_written(monkeypatch):
    """A full disk, say: its message comes through a pipe, however long it is."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    monkeypatch.setenv(launcher.REPORT_TO, str(writing))
    error = raised(DataError(["x" * 4000] * 30, remedy="mend it"))
    assert report_failure(RunDir("/proc/nowhere"), 1, 0, error) == 2
    os.close(writing)
    started = Workers(RunDir("/proc/nowhere"), 1, 1)
    process = subprocess.Popen(["true"])
    process.wait()
    started._workers.append(launcher._Worker(process, reading))
    said = started._first_failure([2])
    assert said.exit_code == 2
    assert str(said).startswith("30 faults of the data:\n  xxxx")


STOPPED = "os.kill(os.getpid(), signal.SIGSTOP) if rank else time.sleep(600)"


def test_a_silent_worker_is_named_and_not_waited_for(crew, monkeypatch, capsys):
    """Something has stopped it, and all others wait for it: said at once, and a request to stop
    is not held up by it."""
    monkeypatch.setattr(launcher, "SILENT_S", 0.0)
    started = crew(STOPPED)
    while not started._workers[1].is_stopped():
        time.sleep(0.01)
    stop = StopRequest()
    stop.request("signal SIGTERM")
    pid = started.processes[1].pid
    with pytest.raises(Interrupted, match=rf"without a checkpoint.*rank 1 \(process {pid}\) is st"):
        started.wait(stop)
    assert f"note: the process of rank 1 (process {pid}) is stopped" in capsys.readouterr().err
    assert all(process.returncode is not None for process in started.processes)


def test_asking_again_and_again_ends_without_a_checkpoint(crew):
    """Nobody wants to wait any longer."""
    stop = StopRequest()
    stop.request("signal SIGINT")
    stop.times = 3
    with pytest.raises(Interrupted, match="asked 3 times: not waiting for a checkpoint"):
        crew("time.sleep(600)").wait(stop)


def test_rank_0_listens_on_the_socket_that_was_handed_on(crew, tmp_path, monkeypatch):
    """Nobody can take the port in between; the others have its number."""
    monkeypatch.setenv("OUT", f"{tmp_path}/out")
    code = (
        "import socket\n"
        "handle = os.environ.get('SFT_JOB_LISTENER')\n"
        "port = socket.socket(fileno=int(handle)).getsockname()[1] if handle else None\n"
        "open(os.environ['OUT'] + str(rank), 'w').write(f\"{port} {os.environ['MASTER_PORT']}\")\n"
    )
    crew(code).wait(StopRequest())
    (port, same), (none, known) = [(tmp_path / f"out{r}").read_text().split() for r in range(2)]
    assert port == same == known
    assert none == "None"


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
    assert not stop.requested()
    signal.raise_signal(number)
    signal.raise_signal(signal.SIGTERM)
    assert stop.requested()
    assert stop.reason == f"signal {number.name}"


def test_a_file_server_that_fails_for_a_moment_is_no_request(tmp_path):
    """Nor an error: it is looked for after every step."""
    assert not StopRequest(tmp_path / ("x" * 300)).requested()


def test_a_file_is_a_request_to_stop(tmp_path):
    """Made at any time; it counts from then on, also when it is taken away again."""
    stop = StopRequest(tmp_path / "stop-1")
    assert not stop.requested()
    (tmp_path / "stop-1").touch()
    assert stop.requested()
    (tmp_path / "stop-1").unlink()
    assert stop.requested()
    assert stop.reason == "stop file stop-1"


@pytest.mark.parametrize("stopped", [False, True])
def test_a_worker_does_not_outlive_its_launcher(stopped):
    """Killed without a chance to say anything, the launcher leaves nobody behind; one that
    something has stopped would go on later, beside the next attempt."""
    worker = (
        "import os, time\n"
        "from sft_job.launcher import die_with_parent\n"
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
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        process.kill()
        process.wait()
        try:
            # The pipe ends when the last process that holds it has ended.
            assert process.stdout.read() == b""
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            raise
