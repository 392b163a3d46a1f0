"""The display is not essential: whoever looks may leave, and a disk under a log may be full."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft_job.attempt import METRICS
from sft_job.cli import BestEffort
from sft_job.metrics import Reporter

ROOT = Path(__file__).parents[1]
RECORD = {
    "step": 1, "loss": 1.0, "learning_rate": 1e-5, "grad_norm": 1.0, "tokens_per_second": 1.0,
    "seconds_per_step": 1.0, "mfu": None,
}  # fmt: skip


def closed_pipe() -> BestEffort:
    """An unbuffered stream whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    return BestEffort(os.fdopen(writing, "w", buffering=1))


def test_a_reader_that_has_gone_ends_nothing() -> None:
    """Not at the first line, nor later, nor at the end; what comes after is dropped by the
    system, as of the libraries and processes that have the same output."""
    stream = closed_pipe()
    for _ in range(3):
        print("x" * 10_000, file=stream, flush=True)
    os.write(stream.fileno(), b"as a library would")
    stream.flush()


def test_a_full_disk_under_a_log_ends_nothing() -> None:
    """The output stays where it is: there may be room again later."""
    with contextlib.suppress(OSError), open("/dev/full", "w", buffering=1) as full:
        stream = BestEffort(full)
        for _ in range(3):
            print("x" * 10_000, file=stream, flush=True)
        assert os.readlink(f"/proc/self/fd/{full.fileno()}") == "/dev/full"


def test_a_closed_stream_ends_nothing() -> None:
    """A library may close standard output."""
    inner = io.StringIO()
    stream = BestEffort(inner)
    inner.close()
    print("x", file=stream, flush=True)
    assert stream.isatty() is False


@pytest.mark.parametrize("closed", ["1", "2", "1,2"])
def test_a_process_without_standard_streams_works(closed: str) -> None:
    """Started as `command >&-`: Python has None in their place."""
    code = (
        "import sys; from sft_job import cli; cli.output_is_not_essential()\n"
        "print('out'); print('err', file=sys.stderr); sys.stdout.flush()\n"
    )
    close = "; ".join(f"os.close({number})" for number in closed.split(","))
    outer = f"import os, sys; {close}; os.execv(sys.executable, [sys.executable, '-c', {code!r}])"
    done = subprocess.run([sys.executable, "-c", outer], cwd=ROOT, capture_output=True)
    assert done.returncode == 0


def test_nothing_is_said_at_the_exit_of_a_process_that_nobody_reads() -> None:
    """Python tries once more to write what is left, and would end with 120."""
    code = (
        "from sft_job import cli; cli.output_is_not_essential()\n"
        "for _ in range(3): print('x' * 100_000)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_a_hang_up_is_no_request_to_stop() -> None:
    """The terminal is closed, by the user or by a lost connection; the training goes on."""
    code = (
        "import os, signal; from sft_job.cli import StopRequest\n"
        "stop = StopRequest(); stop.listen(); os.kill(os.getpid(), signal.SIGHUP)\n"
        "print(stop.requested(), stop.times)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False 0\n")


def test_records_that_find_no_room_are_kept_and_written_later(tmp_path: Path) -> None:
    """In their order; it is said once, and the steps go on."""
    written, full = [], True
    said = io.StringIO()

    def append(name: str, record: object) -> None:
        if full:
            raise OSError(28, "No space left on device")
        written.append((name, record))

    reporter = Reporter(said, tmp_path, append)  # a folder: no log can be written either
    for step in (1, 2, 3):
        full = step < 3
        reporter.record({**RECORD, "step": step}, 3)
    assert [(name, record["step"]) for name, record in written] == [(METRICS, 1), (METRICS, 2),
                                                                    (METRICS, 3)]  # fmt: skip
    assert said.getvalue().count("records cannot be written (No space left on device)") == 1
    full = True
    reporter.record({**RECORD, "step": 4}, 4)
    reporter.stop()
    assert "1 records were never written" in said.getvalue()


@pytest.mark.parametrize("delay", [0.1, 0.2, 0.4, 0.8])
def test_ctrl_c_at_the_start_shows_no_traceback(delay: float, tmp_path: Path) -> None:
    """Before the program has handlers of its own, and while it reads a job file that is not
    there."""
    words = [sys.executable, "-m", "sft_job.train", str(tmp_path / "job.yaml")]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "Traceback" not in said
    assert process.returncode in (-signal.SIGINT, 2, 75, 130)
