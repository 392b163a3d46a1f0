"""What has to be true before a job's processes train; nothing is claimed before it is."""

import json
import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from sft_job import cli, data, hardware, start, train
from sft_job.attempt import Attempt
from sft_job.cli import StopRequest
from sft_job.config import load
from sft_job.errors import Interrupted, RunDirError, SftJobError, UserError
from sft_job.rundir import RunDir
from tests.runs import make_conversations, make_job, make_model


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job whose model and data are ready."""
    folder = tmp_path_factory.mktemp("start")
    job = make_job(folder, make_model(folder / "model"), make_conversations(folder / "d.json", 8))
    data.encode_job(load(job))
    return job


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> RunDir:
    """Where the job shall run; the cache is found."""
    return RunDir(tmp_path / "run")


def enter(job: Path, run: RunDir, *overrides: str, held: ExitStack | None = None) -> bool:
    """As the launcher does."""
    changes = [f"run.dir={run.path}", f"data.cache_dir={job.parent}/.sft_job_cache", *overrides]
    config = load(job, changes)
    machine = hardware.detect()
    with ExitStack() as own:
        return start.enter(held or own, config, job, changes, machine, StopRequest())


def test_a_job_that_may_run_claims_its_directory(prepared: Path, run: RunDir) -> None:
    """Once; the same command finds it its own."""
    assert enter(prepared, run)
    assert run.job_file.exists()
    assert run.identity.exists()
    assert enter(prepared, run)


@pytest.mark.parametrize(
    ("override", "code"),
    [("data.seq_len=100000", 2), ("train.precision=bf16", 0), ("model.attention=xformers", 2)],
)
def test_what_is_refused_claims_nothing(
    override: str, code: int, prepared: Path, run: RunDir
) -> None:
    """The corrected command is not held up by the first one's leftovers."""
    try:
        enter(prepared, run, override, "model.rope=none")
        refused = 0
    except SftJobError as error:
        refused = error.exit_code
    assert refused == code
    assert run.path.exists() is (code == 0)


def test_of_two_starts_one_runs_and_the_other_says_who(prepared: Path, run: RunDir) -> None:
    """Host and process; while the first one lives."""
    with ExitStack() as held:
        assert enter(prepared, run, held=held)
        with pytest.raises(RunDirError, match=rf"running this job: process {os.getpid()} on "):
            enter(prepared, run)
    assert enter(prepared, run)


def test_starts_at_the_same_moment_end_in_one(prepared: Path, run: RunDir) -> None:
    """In an empty place; none of them takes the other for a foreign folder."""
    together, ends = threading.Barrier(3), []

    def begin() -> None:
        together.wait()
        with ExitStack() as held:
            try:
                ends.append(enter(prepared, run, held=held))
            except RunDirError as error:
                ends.append(str(error))
            together.wait()

    threads = [threading.Thread(target=begin) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends.count(True) == 1
    assert all("another process is running this job" in end for end in ends if end is not True)


@pytest.mark.parametrize("left", [".lock", ".job.json.k3d9", ".config.yaml.x_1"])
def test_leftovers_of_a_killed_start_are_ours(left: str, prepared: Path, run: RunDir) -> None:
    """They make no foreign folder of it."""
    run.path.mkdir()
    (run.path / left).write_text("half")
    assert enter(prepared, run)


def test_a_folder_for_a_lock_is_put_aside_in_a_run_of_ours(prepared: Path, run: RunDir) -> None:
    """In any other place it is refused, as below."""
    assert enter(prepared, run)
    (run.path / ".lock").unlink()
    (run.path / ".lock").mkdir()
    assert enter(prepared, run)


def test_a_folder_for_a_lock_is_said_in_any_other_place(prepared: Path, run: RunDir) -> None:
    """Nothing of somebody else's is renamed."""
    (run.path / ".lock").mkdir(parents=True)
    with pytest.raises(RunDirError, match=r"\.lock: cannot be written: Is a directory"):
        enter(prepared, run)


@pytest.mark.parametrize("kind", ["dangling link", "file", "file above"])
def test_a_place_that_cannot_be_a_run_directory_is_said(
    kind: str, prepared: Path, run: RunDir, tmp_path: Path
) -> None:
    """With the place and the reason, by the reader of the job file and by who would claim it:
    it may become one in between."""
    config = load(prepared, [f"run.dir={run.path}"])
    if kind == "dangling link":
        run.path.symlink_to(tmp_path / "nowhere")
        said = (r"run is a link to .*nowhere", r"run: a link to .*nowhere, which is not there\n")
    elif kind == "file":
        run.path.write_text("x")
        said = (r"run is a file", r"run: run\.dir is a file")
    else:
        (tmp_path / "above").write_text("x")
        run = RunDir(tmp_path / "above" / "run")
        said = (r"above is a file", r"above/run: cannot be written: Not a directory")
    with pytest.raises(UserError, match=said[0]):
        enter(prepared, run)
    with pytest.raises(RunDirError, match=said[1]):
        run.claim(config, "text")


def finished(job: Path, run: RunDir) -> None:
    """The run as it is after its last step."""
    enter(job, run)
    attempt = Attempt.claim(run)
    run.model.mkdir()
    (run.model / "config.json").write_text("{}")
    (run.model / "model.safetensors").write_text("weights")
    from sft_job import result, seal

    result.mark_done(attempt, 10, seal.make(run.model))


def test_a_job_that_is_done_says_so_without_its_data(
    prepared: Path, run: RunDir, tmp_path: Path, capsys
) -> None:
    """The files that it was made from may be gone; the model is looked at."""
    finished(prepared, run)
    job = tmp_path / "job.yaml"
    job.write_text(prepared.read_text().replace("d.json", "gone.json"))
    assert cli.run(train.main, [str(job), f"run.dir={run.path}"]) == 0
    assert capsys.readouterr().out == f"this job is done; its model is in {run.model}\n"


def test_a_job_whose_model_is_damaged_is_not_done(prepared: Path, run: RunDir, capsys) -> None:
    """It is written again from the last checkpoint; without one nothing begins."""
    finished(prepared, run)
    (run.model / "model.safetensors").write_text("weighTs")
    with pytest.raises(RunDirError, match="no checkpoint is left to write it again from"):
        enter(prepared, run)
    run.checkpoint(10).mkdir(parents=True)
    assert enter(prepared, run)
    assert not run.done.exists()
    assert (run.path / "replaced-1-model").is_dir()
    assert "its model is damaged (model.safetensors was changed" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["", "{}", "null", '{"model": {}}', "[", "folder"])
def test_a_damaged_mark_beside_a_whole_model_is_made_anew(
    damage: str, prepared: Path, run: RunDir, capsys
) -> None:
    """Nothing is trained or written again, also without any checkpoint."""
    from sft_job import result, seal

    finished(prepared, run)
    run.written_model(1).write_text(json.dumps(seal.make(run.model)))
    run.done.unlink()
    if damage == "folder":
        run.done.mkdir()
    else:
        run.done.write_text(damage)
    assert not enter(prepared, run)
    assert "DONE was damaged and is made anew" in capsys.readouterr().err
    assert result.model_fault(run) is None


@pytest.mark.parametrize(
    "left", ["checkpoints/.step-00000004.attempt-1.tmp", ".model.attempt-1.tmp"]
)
def test_what_is_left_half_written_counts_as_free(
    left: str, prepared: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks delete it before they write anything: nobody has to find it."""
    assert enter(prepared, run)
    usage = start.shutil.disk_usage(run.path)
    monkeypatch.setattr(start.shutil, "disk_usage", lambda path: usage._replace(free=0))
    with pytest.raises(SftJobError, match="no room: one checkpoint and the model need"):
        enter(prepared, run)
    (run.path / left).mkdir(parents=True)
    (run.path / left / "part").write_bytes(bytes(50 * 2**20))
    assert enter(prepared, run)


def test_a_preparation_that_is_stopped_is_ended(tmp_path: Path) -> None:
    """It cannot clear away anything, and is not waited for."""
    import signal

    stop, child = StopRequest(), subprocess.Popen(["sleep", "1000"], start_new_session=True)
    os.kill(child.pid, signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)
    stop.times = 3
    start._end(child, stop)
    assert child.returncode in (-signal.SIGKILL, -signal.SIGTERM)


def test_a_preparation_ends_with_whoever_waits_for_it(prepared: Path) -> None:
    """Of a launcher that was killed nothing goes on encoding for an hour."""
    from sft_job.launcher import ENCODES_FOR

    done = subprocess.run(
        [sys.executable, "-m", "sft_job.data", "encode", str(prepared)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True,
        env=os.environ | {ENCODES_FOR: "1"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "the process that has started this one has gone" in done.stderr


@pytest.mark.parametrize("damage", ["", "null", "[]", "gone", "folder", '{"files": {}}'])
def test_a_damaged_seal_of_a_converted_model_is_made_anew(
    damage: str, prepared: Path, tmp_path: Path, capsys
) -> None:
    """It is asked for before the ranks look at the model, and names the weights of the run."""
    import shutil

    from sft_job import source
    from sft_job.files import publish_dir
    from sft_job.prepared import find_prepared, write_stamp

    job = make_job(tmp_path, prepared.parent / "model", prepared.parent / "d.json")
    ready = data.encode_job(load(job))
    converted = tmp_path / ".sft_job_cache/models/m"
    with publish_dir(converted) as beside:
        shutil.copytree(prepared.parent / "model", beside, dirs_exist_ok=True)
    write_stamp(load(job), converted, Path(ready.data_folder), [])
    assert find_prepared(load(job)) is not None
    file = converted / "seal.json"
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage != "gone":
        file.write_text(damage)
    assert find_prepared(load(job)) is None
    assert not source.is_intact(converted)
    assert not converted.exists()


@pytest.mark.parametrize("seal", [5, {}, [], "x", {"block_bytes": 1}])
def test_a_stamp_with_anything_for_a_seal_is_none(
    seal: object, prepared: Path, tmp_path: Path
) -> None:
    """The model is looked at anew."""
    from sft_job.prepared import find_prepared

    job = make_job(tmp_path, prepared.parent / "model", prepared.parent / "d.json")
    data.encode_job(load(job))
    (stamp,) = (tmp_path / ".sft_job_cache/prepared").iterdir()
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"model_seal": seal}))
    assert find_prepared(load(job)) is None


class FailedCrew:
    """Workers of which one fails, after what is left in the run directory."""

    leaves = ""

    def __init__(self, run_dir: RunDir, attempt: int, count: int) -> None:
        self.attempt = Attempt(run_dir, attempt)

    def start(self, argv: object) -> None: ...

    def wait(self, stop: object) -> None:
        from sft_job.errors import WorkerError

        if self.leaves == "DONE":
            self.attempt.run_dir.done.touch()
        elif self.leaves == "interrupted":
            self.attempt.interrupt("interrupted by a test")
        elif self.leaves == "newer":
            self.attempt.cannot_load(2, "no", "x")
            Attempt.claim(self.attempt.run_dir)
        raise WorkerError("ended by signal SIGSEGV")


def test_what_fails_after_the_last_mark_has_lost_nothing(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Done is done, and what was saved for a stop can be resumed: the job script says the same.
    An older attempt does not begin another one beside a newer."""
    from sft_job.errors import SupersededError, WorkerError

    monkeypatch.setattr(train, "Workers", FailedCrew)
    for leaves, kind in (
        ("interrupted", Interrupted),
        ("newer", SupersededError),
        ("", WorkerError),
    ):
        FailedCrew.leaves = leaves
        with pytest.raises(kind):
            train._attempt(run, 1, [], StopRequest())
    FailedCrew.leaves = "DONE"
    assert train._attempt(run, 1, [], StopRequest())


def test_a_request_to_stop_is_obeyed_while_another_has_the_lock(run: RunDir) -> None:
    """As of a job that was put back off a lost node, whose lock lives on: it goes on later."""
    with run.exclusive_lock(".lock", "running this job"):
        with (
            pytest.raises(Interrupted, match="while it waited: another process is running this"),
            run.exclusive_lock(".lock", "x", patience_s=60, given_up=lambda: True),
        ):
            raise AssertionError
        (run.path / ".lock").write_text('{"host": "h", "pid": 1e999, "doing": "x"}')
        with (
            pytest.raises(RunDirError, match="another process is"),
            run.exclusive_lock(".lock", "running this job"),
        ):
            raise AssertionError


def test_the_reason_of_the_preparation_is_raised_here(tmp_path: Path) -> None:
    """Once, with its exit code; what the child says besides is passed on."""
    model = make_model(tmp_path / "model")
    (tmp_path / "d.json").write_text('[{"conversations": 3}]')
    job = make_job(tmp_path, model, tmp_path / "d.json")
    with pytest.raises(UserError, match="conversations"):
        start.prepare(load(job), job, [], StopRequest())


def test_a_request_to_stop_ends_the_preparation(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves nothing half-made in the cache."""
    stop = StopRequest()
    stop.request("signal SIGTERM")
    job = make_job(tmp_path, prepared.parent / "model", prepared.parent / "d.json")
    with pytest.raises(Interrupted, match="by signal SIGTERM while preparing the data"):
        start.prepare(load(job), job, [], stop)
    left = [path for path in (tmp_path / ".sft_job_cache").rglob(".*")]
    assert left == []


@pytest.mark.parametrize(
    ("file", "where"), [("tokens.bin", "tokens"), ("lengths.bin", "tokens"), ("stamp", "prepared")]
)
def test_a_damaged_cache_is_made_anew(
    file: str, where: str, prepared: Path, tmp_path: Path, capsys
) -> None:
    """Whatever of it is damaged, by whoever finds it."""
    job = make_job(tmp_path, prepared.parent / "model", prepared.parent / "d.json")
    first = data.encode_job(load(job))
    before = {p.name: p.read_bytes() for p in Path(first.data_folder).iterdir()}
    if file == "stamp":
        (target,) = (tmp_path / ".sft_job_cache/prepared").iterdir()
    else:
        target = Path(first.data_folder) / file
    content = target.read_bytes()
    target.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if file != "stamp" else b"{")
    from sft_job.prepared import find_prepared, forget

    found = find_prepared(load(job))
    if found is not None:  # only the ranks look at every byte
        assert found.fault() == (
            first.data_folder, f"{file} was changed after it was written (SHA-256 differs)"
        )  # fmt: skip
        forget(load(job))
    again = data.encode_job(load(job))
    assert {p.name: p.read_bytes() for p in Path(again.data_folder).iterdir()} == before
    assert json.loads((Path(again.data_folder) / "meta.json").read_text())["samples"] == 8


def test_an_interruption_of_data_encode_leaves_nothing_half_made(tmp_path: Path) -> None:
    """As of the launcher, by SIGTERM, in the midst of writing."""
    code = (
        "import os, pathlib, sys; from sft_job import cli; from sft_job.files import publish_dir\n"
        "def main(argv):\n"
        "    cli.stop_at_once()\n"
        f"    with publish_dir(pathlib.Path({str(tmp_path / 'c/f')!r})) as beside:\n"
        "        (beside / 'half').write_text('x'); os.kill(os.getpid(), 15)\n"
        "sys.exit(cli.run(main, []))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, list((tmp_path / "c").iterdir())) == (75, [])
    assert done.stderr.startswith("error: interrupted by signal SIGTERM\n")
