"""What is compiled at its first use is compiled once, whoever is killed meanwhile."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_job import compiled
from sft_job.errors import HardwareError
from tests.runs import ROOT

WORDS = {
    "what": "the library",
    "asked": "it is asked for",
    "remedy": "install a compiler",
}
# Stand for a compiler: one that is quick, one that never ends. Each writes down that it began.
HEAD = """
import os, sys, time
file = os.path.join(*sys.argv[1:])
with open(os.environ["BEGAN"], "a") as began:
    print(os.getpid(), file=began)
"""
QUICK = HEAD + "open(file, 'w').write('made')\n"
ENDLESS = (
    HEAD
    + """
open(file, "w").write("half")
os.fork()
with open(os.environ["BEGAN"] + "-processes", "a") as processes:
    print(os.getpid(), file=processes)
time.sleep(600)
"""
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the library belongs; BEGAN is written to by each compiler."""
    monkeypatch.setenv("BEGAN", str(tmp_path / "began"))
    return tmp_path / "built" / "library-1.so"


def began(place: Path, name: str = "began") -> list[int]:
    file = place.parents[1] / name
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def alive(pid: int) -> bool:
    """Not ended, nor ended and forgotten by its parent."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def in_a_process(place: Path, code: str) -> subprocess.Popen[str]:
    """Another process that wants the same library."""
    call = f"compiled.once(Path({str(place)!r}), {code!r}, **{WORDS!r})"
    program = f"from pathlib import Path\nfrom sft_job import compiled\n{call}\nprint('there')\n"
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], Any]) -> None:
    while not condition():
        time.sleep(0.01)


def left(place: Path) -> set[str]:
    """What there is beside the library and the lock."""
    return {p.name for p in place.parent.iterdir()} - {place.name, f"{place.name}.lock"}


def test_the_first_of_many_makes_it(place: Path) -> None:
    """All get it, one has compiled, and nothing else is left."""
    processes = [in_a_process(place, QUICK) for _ in range(4)]
    for process in processes:
        said, _ = process.communicate()
        assert process.returncode == 0
        assert said.endswith("there\n")
    assert place.read_text() == "made"
    assert len(began(place)) == 1
    assert left(place) == set()
    compiled.once(place, "raise SystemExit(1)", **WORDS)  # nothing is run any more


def test_a_killed_compilation_is_begun_anew(place: Path) -> None:
    """Killed as the launcher kills, without a chance to clear away: compilers end with it, what
    they left is gone, and neither this job nor a waiting one hangs."""
    first = in_a_process(place, ENDLESS)
    wait_for(lambda: len(began(place, "began-processes")) == 2)
    waiting = in_a_process(place, QUICK)
    assert waiting.stdout is not None
    holder = f"{first.pid} on {socket.gethostname()}"
    assert waiting.stdout.readline() == f"waiting for process {holder} to compile the library\n"
    first.kill()
    first.communicate()
    wait_for(lambda: not any(map(alive, began(place, "began-processes"))))
    said, _ = waiting.communicate()
    assert (waiting.returncode, said) == (0, "there\n")
    assert place.read_text() == "made"
    assert len(began(place)) == 2
    assert left(place) == set()


def test_what_a_killed_one_has_left_does_not_matter(place: Path) -> None:
    """Half a library, a lock file that nobody holds, torch's own lock; another machine's work in
    the same home folder is left alone."""
    place.parent.mkdir()
    place.with_name(f"{place.name}.lock").write_bytes(b"4711 on els\xff\xfe\n")
    for host in (socket.gethostname(), "elsewhere"):
        half = place.parent / f".{place.name}.{host}.abc" / "cpu_adam"
        half.mkdir(parents=True)
        (half / "lock").touch()
        (half / "cpu_adam.so").touch()
    compiled.once(place, QUICK, **WORDS)
    assert place.read_text() == "made"
    assert left(place) == {f".{place.name}.elsewhere.abc"}


def test_waiting_has_an_end(place: Path) -> None:
    """For one that is stopped, say; it is named."""
    place.parent.mkdir()
    with open(place.with_name(f"{place.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711 on node7\n")
        lock.flush()
        with pytest.raises(
            HardwareError, match=r"process 4711 on node7 has been compiling the lib"
        ):
            compiled.once(place, QUICK, **WORDS, limit_s=0)
        lock.truncate(0)
        lock.buffer.write(b"\xff")  # damaged
        lock.flush()
        with pytest.raises(HardwareError, match="has been compiling the lib"):
            compiled.once(place, QUICK, **WORDS, limit_s=0)
    assert began(place) == []


def test_compiling_has_an_end(place: Path) -> None:
    """A compiler that hangs is ended, and the next one is not hindered."""
    with pytest.raises(
        HardwareError, match="cannot be compiled on this machine: it takes more tha"
    ):
        compiled.once(place, ENDLESS, **WORDS, limit_s=0)
    assert left(place) == set()
    compiled.once(place, QUICK, **WORDS)


def test_a_compiler_that_fails_says_why(place: Path) -> None:
    """The line that names the cause, in the midst of a long output; nothing is left."""
    lines = ["[1/2] c++ -o x", "x.cpp:1: error: no such header", "ninja: stopped"]
    code = f"print({chr(10).join(lines)!r})\nraise SystemExit(1)"
    expected = (
        "it is asked for, but the library cannot be compiled on this machine: x.cpp:1: error: no "
        "such header\n  -> install a compiler"
    )
    with pytest.raises(HardwareError) as refused:
        compiled.once(place, code, **WORDS)
    assert str(refused.value) == expected
    with pytest.raises(HardwareError, match="on this machine: exit code 3\n"):
        compiled.once(place, "raise SystemExit(3)", **WORDS)
    assert left(place) == set()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HardwareError, match=r"file/x: it is asked for, and the library.*Not a dir"):
        compiled.once(tmp_path / "file" / "x" / "library.so", QUICK, **WORDS)


def test_without_locks_the_first_to_publish_wins(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at once on a file system without locks: nobody's work is removed or replaced."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    inner = threading.Thread(target=compiled.once, args=(place, QUICK), kwargs=WORDS)
    run = compiled._run

    def beside_another(code: str, arguments: list[str], limit_s: float) -> str | None:
        if not inner.ident:
            inner.start()
            inner.join()
            place.write_text("the other's")
        return run(code, arguments, limit_s)

    monkeypatch.setattr(compiled, "_run", beside_another)
    compiled.once(place, QUICK, **WORDS)
    assert place.read_text() == "the other's"
    assert len(began(place)) == 2
    assert left(place) == set()


def test_a_file_system_without_links_will_do(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    compiled.once(place, QUICK, **WORDS)
    assert place.read_text() == "made"


def test_signals_for_ranks_do_not_end_a_compiler(place: Path) -> None:
    """A batch system sends them to every process of a job."""
    tough = HEAD + "os.kill(0, 10)\nos.kill(0, 12)\nopen(file, 'w').write('made')\n"
    compiled.once(place, tough, **WORDS)
    assert place.read_text() == "made"
    assert {signal.SIGUSR1, signal.SIGUSR2} == {10, 12}


def test_the_name_tells_what_the_code_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions and processor: machines of several kinds share a home folder."""
    name = compiled.name_of("cpu_adam", ["2.10.0", "0.19.8"])
    assert name == compiled.name_of("cpu_adam", ["2.10.0", "0.19.8"])
    assert name != compiled.name_of("cpu_adam", ["2.11.0", "0.19.8"])
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self: read(self).replace("flags\t\t: ", "flags\t\t: new ", 1)
    )
    assert name != compiled.name_of("cpu_adam", ["2.10.0", "0.19.8"])
