"""Attempts: a number is had by one alone, and the records of a run are those that count."""

import errno
import json
import threading
from pathlib import Path

import pytest

from sft_job import attempt as attempts
from sft_job.attempt import METRICS, STARTS, Attempt, metric_records, refresh
from sft_job.errors import RunDirError, SupersededError
from sft_job.files import append_line, read_records
from sft_job.rundir import RunDir


def record(step: int, loss: float = 1.0) -> dict[str, float]:
    """What one logged step leaves."""
    return {"step": step, "loss": loss, "seconds": 1.0}


def steps(run: RunDir) -> list[tuple[int, int]]:
    """(attempt, step) of the records that count."""
    return [(r["attempt"], r["step"]) for r in metric_records(run)]


def test_every_number_is_had_by_one_alone(tmp_path: Path) -> None:
    """Eight at once; numbers have no gaps."""
    run, claimed = RunDir(tmp_path), []
    threads = [
        threading.Thread(target=lambda: claimed.append(Attempt.claim(run).number)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == list(range(1, 9))


def test_a_listing_from_memory_gives_no_number_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file server may show a folder long after it was made; making it again is refused."""
    run = RunDir(tmp_path)
    Attempt.claim(run)
    monkeypatch.setattr(RunDir, "attempts", lambda self: [])
    assert Attempt.claim(run).number == 2


def test_a_run_directory_that_cannot_be_written_is_said() -> None:
    """With the reason of the system."""
    with pytest.raises(RunDirError, match=r"cannot be written: .*\n  -> free some"):
        Attempt.claim(RunDir("/proc/nowhere"))


def test_a_file_in_the_place_of_a_folder_is_put_aside(tmp_path: Path) -> None:
    """Nothing that somebody has done to our own names makes a run that cannot be finished."""
    (tmp_path / "attempts").write_text("a file")
    (tmp_path / "metrics.jsonl").mkdir()
    one = Attempt.claim(RunDir(tmp_path))
    one.append(METRICS, record(1))
    assert len(read_records(one.folder / METRICS)) == 1
    refresh(one.run_dir)
    one.append(METRICS, record(2))
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == [1, 2]
    assert (tmp_path / "replaced-1-attempts").read_text() == "a file"


def test_an_older_attempt_is_told_so(tmp_path: Path) -> None:
    """The newest is not."""
    run = RunDir(tmp_path)
    older, newer = Attempt.claim(run), Attempt.claim(run)
    newer.refuse_if_superseded()
    with pytest.raises(SupersededError, match="attempt 2 runs this job now; this one, attempt 1"):
        older.refuse_if_superseded()


def test_records_of_steps_that_were_done_again_do_not_count(tmp_path: Path) -> None:
    """Whenever the older attempt writes them: it may wake up after the next has begun."""
    run = RunDir(tmp_path)
    older = Attempt.claim(run)
    older.append(STARTS, {"began": 1.0, "resumed": 0})
    for step in (1, 2, 3, 4, 5):
        older.append(METRICS, record(step))
    newer = Attempt.claim(run)
    newer.append(STARTS, {"began": 2.0, "resumed": 4})
    newer.append(METRICS, record(5))
    older.append(METRICS, record(6))
    newer.append(METRICS, record(6))
    assert steps(run) == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 5), (2, 6)]
    refresh(run)
    assert [(r["attempt"], r["step"]) for r in read_records(run.metrics_file)] == steps(run)


def test_an_attempt_that_never_resumed_takes_nothing_away(tmp_path: Path) -> None:
    """It ended before it knew from where it would go on."""
    run = RunDir(tmp_path)
    Attempt.claim(run).append(METRICS, record(1))
    Attempt.claim(run)
    assert steps(run) == [(1, 1)]


def test_records_of_earlier_versions_are_kept(tmp_path: Path) -> None:
    """They have no folder for each attempt, and all records in one file."""
    run = RunDir(tmp_path)
    run.logs(1).mkdir(parents=True)
    for step in (1, 2, 3):
        append_line(run.metrics_file, json.dumps({"attempt": 1, **record(step)}))
    append_line(run.attempts_file, json.dumps({"attempt": 1, "began": 1.0}))
    newer = Attempt.claim(run)
    newer.append(STARTS, {"began": 2.0, "resumed": 2})
    newer.append(METRICS, record(3))
    refresh(run)
    refresh(run)
    assert steps(run) == [(1, 1), (1, 2), (2, 3)]
    assert [entry["began"] for entry in attempts.start_records(run)] == [1.0, 2.0]


@pytest.mark.parametrize(
    "damage", [b"3\n", b"{}\n", b"\xff\xfe\n", b'{"step": "x"}\n', b"[1]", b"nu"]
)
def test_a_damaged_record_is_passed_over(damage: bytes, tmp_path: Path) -> None:
    """And what follows it is read, in the files of an attempt and in those for people."""
    run = RunDir(tmp_path)
    one = Attempt.claim(run)
    one.append(METRICS, record(1))
    for file in (one.folder / METRICS, run.metrics_file):
        with open(file, "ab") as handle:
            handle.write(damage)
    one.append(METRICS, record(2))
    assert steps(run) == [(1, 1), (1, 2)]
    refresh(run)
    assert [r["step"] for r in read_records(run.metrics_file)] == [1, 2]


@pytest.mark.parametrize(
    "record",
    [
        {"attempt": []}, {"attempt": {}}, {"attempt": 7, "resumed": 0}, {"attempt": "1"},
        {"step": 10**400, "seconds": 1}, {"step": 1, "seconds": float("inf")}, {"began": "x"},
        {"began": None, "resumed": []},
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", [METRICS, STARTS])
def test_a_record_with_anything_in_it_takes_nothing_away(
    record: dict[str, object], name: str, tmp_path: Path
) -> None:
    """An attempt's file is about that attempt, whatever number a damaged line has."""
    run = RunDir(tmp_path)
    one = Attempt.claim(run)
    one.append(METRICS, {"step": 1, "loss": 1.0, "seconds": 1.0})
    for file in (one.folder / name, tmp_path / name):
        append_line(file, json.dumps(record))
    assert steps(run)[0] == (1, 1)
    assert {r["attempt"] for r in attempts.start_records(run)} <= {1}
    refresh(run)


def test_a_request_to_stop_belongs_to_an_attempt_that_is_known(tmp_path: Path) -> None:
    """One of a run that was removed is taken away before anybody can ask the new one to stop."""
    run = RunDir(tmp_path)
    run.stop_file(1).touch()
    Attempt.claim(run)
    assert not run.stop_file(1).exists()


def test_a_file_server_that_fails_for_a_moment_ends_no_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking whether there is a later attempt only ends this one sooner."""
    one = Attempt.claim(RunDir(tmp_path))

    def fail(path: object) -> list[str]:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(attempts.os, "listdir", fail)
    one.refuse_if_superseded()
    monkeypatch.undo()
