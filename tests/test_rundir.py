"""The run directory: its names, who may use it, and writing that is never seen half done."""

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from sft_job import rundir
from sft_job.config import load
from sft_job.errors import RunDirError
from sft_job.files import publish_dir, read_json, write_atomically
from sft_job.rundir import CacheDir, RunDir
from sft_job.schema import JobConfig


def names(folder: Path) -> list[str]:
    """What is in a folder, hidden names included."""
    return sorted(path.name for path in folder.iterdir())


def mode(path: Path) -> str:
    """The permissions of a file or folder in octal."""
    return oct(stat.S_IMODE(path.stat().st_mode))


@pytest.fixture
def umask():
    """Set the umask for one test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


# --- names ---------------------------------------------------------------------------------


def test_the_names_in_a_run_directory():
    """They are an interface: scripts and users know them."""
    run = RunDir("/r")
    expected = {
        run.config_file: "config.yaml",
        run.job_file: "job.json",
        run.plan_file: "plan.json",
        run.metrics_file: "metrics.jsonl",
        run.logs(2): "logs/attempt-2",
        run.log(2, 1): "logs/attempt-2/rank-1.log",
        run.error(2, 1): "logs/attempt-2/rank-1.error",
        run.checkpoint(200): "checkpoints/step-00000200",
        run.model: "model",
        run.stop_file(3): "stop-3",
        run.interrupted(3): "attempts/3/interrupted",
        run.done: "DONE",
    }
    assert {path: path.relative_to("/r").as_posix() for path in expected} == expected


def test_every_drawn_name_of_the_run_directory_is_given_out():
    """What the docstring draws under RUN_DIR is what the class owns."""
    run = RunDir("/r")
    given_out = [str(value) for value in vars(run).values()]
    given_out += [str(name(1)) for name in (run.owner, run.interrupted, run.written_model)]
    given_out += [str(run.began(1)), str(run.unloadable_mark(1, 200)), str(run.log(1, 0))]
    given_out += [str(run.checkpoint(200)), str(run.stop_file(1))]
    drawn = rundir.__doc__.partition("RUN_DIR/")[2].partition("CACHE_DIR/")[0].splitlines()
    for line in drawn:
        if line.startswith("  "):
            for name in line[2:25].replace("|", " ").split():
                stem = name.replace("-N", "-1").replace("/N", "").rstrip("/")
                assert any(stem in path for path in given_out), name


def test_the_names_in_a_cache():
    """A fingerprint is cut to 32 digits, which still never meet."""
    cache = CacheDir("/c")
    assert cache.model("llama") == Path("/c/models/llama")
    assert cache.tokens("0123456789" * 6) == Path("/c/tokens/01234567890123456789012345678901")
    assert cache.prepared("f" * 64) == Path("/c/prepared") / ("f" * 32 + ".json")


def test_checkpoints_are_listed_newest_first(tmp_path):
    """By number, not by name; what is still being written is not one."""
    run = RunDir(tmp_path)
    assert run.checkpoint_steps() == []
    for name in ("step-00000002", "step-00000010", "step-123456789", "step-00000003.tmp", "x"):
        (run.checkpoints / name).mkdir(parents=True)
    assert run.checkpoint_steps() == [123456789, 10, 2]


def test_steps_beyond_eight_digits_keep_their_name(tmp_path):
    """Eight digits are a width, not a limit."""
    run = RunDir(tmp_path)
    run.checkpoint(123456789).mkdir(parents=True)
    assert run.checkpoint_steps() == [123456789]


def test_attempts_are_counted_from_their_logs(tmp_path):
    """By the greatest number, of logs without a folder too; foreign names do not matter."""
    run = RunDir(tmp_path)
    assert run.newest_attempt() == 0
    (tmp_path / "logs").mkdir()
    assert run.newest_attempt() == 0
    for name in ("attempt-2", "attempt-10", "attempt-x", "other"):
        (tmp_path / "logs" / name).mkdir()
    assert run.newest_attempt() == 10


# --- claim ---------------------------------------------------------------------------------


@pytest.fixture
def config(job_file: Path) -> JobConfig:
    return load(job_file)


def test_a_new_directory_is_made_and_holds_the_job(config, job_file):
    """The file as it was given, and the configuration as it was understood."""
    run = RunDir(config.run.dir)
    run.claim(config, job_file.read_text())
    assert run.config_file.read_text() == job_file.read_text()
    assert JobConfig.model_validate_json(run.job_file.read_text()) == config
    assert names(run.path) == ["config.yaml", "job.json"]


def test_an_empty_folder_may_be_claimed(config, tmp_path):
    """Made by a user or a batch script beforehand."""
    (tmp_path / "run").mkdir()
    RunDir(tmp_path / "run").claim(config, "text")
    assert (tmp_path / "run/job.json").is_file()


def test_the_same_job_claims_its_directory_again(config, job_file):
    """Resuming changes nothing in what was stored first."""
    run = RunDir(config.run.dir)
    run.claim(config, "first")
    stored = run.job_file.read_text()
    run.claim(load(job_file, ["train.micro_batch_tokens=4096", "logging.every_steps=5"]), "again")
    assert run.config_file.read_text() == "first"
    assert run.job_file.read_text() == stored


def test_another_job_is_refused_with_the_changed_keys_and_the_ways_out(config, job_file):
    """Each changed key with both values; what is equal or does not matter is not listed."""
    run = RunDir(config.run.dir)
    run.claim(config, "text")
    other = load(job_file, ["train.seed=1", "data.seq_len=512", "checkpoint.every_steps=7"])
    with pytest.raises(RunDirError) as caught:
        run.claim(other, "text")
    assert str(caught.value).splitlines() == [
        f"{run.path}: the directory belongs to a job with other settings:",
        "  data.seq_len: 2048 before, 512 now",
        "  train.seed: 0 before, 1 now",
        "  -> give the new job a run.dir of its own, or set these keys back to resume",
    ]


def test_where_data_and_model_are_is_no_part_of_a_job(config, job_file, tmp_path):
    """A project may be moved, and a branch be called by its commit: content decides."""
    run = RunDir(config.run.dir)
    run.claim(load(job_file, ["model.path=org/name", "model.revision=main"]), "text")
    moved = tmp_path / "moved.json"
    moved.write_text("[]")
    changes = ["model.path=org/other", "model.revision=c0ffee", f"data.train=[{moved}]"]
    run.claim(load(job_file, changes), "text")


def test_a_refused_job_leaves_the_directory_as_it_was(config, job_file):
    """Nothing of the first job is written over."""
    run = RunDir(config.run.dir)
    run.claim(config, "text")
    before = {name: (run.path / name).read_text() for name in names(run.path)}
    with pytest.raises(RunDirError, match="other settings"):
        run.claim(load(job_file, ["engine.type=zero3"]), "other")
    assert {name: (run.path / name).read_text() for name in names(run.path)} == before


def test_a_key_that_only_one_job_has_is_listed(config, job_file):
    """None stands for what a job does not have."""
    run = RunDir(config.run.dir)
    run.claim(config, "text")
    with pytest.raises(RunDirError, match=r"model\.rope\.factor: None before, 2\.0 now"):
        run.claim(load(job_file, ["model.rope={type: linear, factor: 2}"]), "text")


def test_a_foreign_folder_is_refused_and_left_alone(config, tmp_path):
    """It may be somebody's home."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("x")
    with pytest.raises(RunDirError, match=r"holds no job \(there is 'thesis.tex'\)\n  ->"):
        RunDir(tmp_path / "home").claim(config, "text")
    assert names(tmp_path / "home") == ["thesis.tex"]


@pytest.mark.parametrize("text", ['{"jobs": []}', "[1]", "no JSON"])
def test_a_foreign_job_json_is_refused_and_left_alone(text, config, tmp_path):
    """Another tool's job.json, or one of a version that had other keys, is no job of ours."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/job.json").write_text(text)
    with pytest.raises(RunDirError, match="job"):
        RunDir(tmp_path / "run").claim(config, "text")
    assert names(tmp_path / "run") == ["job.json"]


def test_a_file_is_no_run_directory(config, tmp_path):
    """run.dir names something that is there already."""
    (tmp_path / "run").write_text("x")
    with pytest.raises(RunDirError, match=r"run: run\.dir is a file"):
        RunDir(tmp_path / "run").claim(config, "text")


def test_a_directory_below_a_file_cannot_be_written(config, tmp_path):
    """What the system says, and what to do."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirError, match=r"cannot be written: Not a directory\n  -> choose a run"):
        RunDir(tmp_path / "file/run").claim(config, "text")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_cannot_be_written(config, tmp_path):
    """Found before anything is started."""
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(RunDirError, match="cannot be written: Permission denied"):
        RunDir(tmp_path / "locked/run").claim(config, "text")


# --- write_atomically ----------------------------------------------------------------------


def test_a_file_is_written_with_its_folders(tmp_path):
    """Text in UTF-8, nothing else beside it."""
    path = tmp_path / "a/b.json"
    write_atomically(path, "Grüße\n")
    assert path.read_bytes() == "Grüße\n".encode()
    assert names(path.parent) == ["b.json"]


def test_a_file_is_replaced_whole(tmp_path):
    """The old one is gone, also where it was longer."""
    path = tmp_path / "x"
    write_atomically(path, "a long text")
    write_atomically(path, "short")
    assert path.read_text() == "short"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("broken", ["fsync", "fchmod", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(broken, tmp_path, monkeypatch):
    """A full disk, at whatever moment it is noticed."""
    path = tmp_path / "x"
    path.write_text("old")

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rundir.os, broken, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_a_text_that_cannot_be_encoded_leaves_nothing(tmp_path):
    """Any failure is a failure, not only those of the disk."""
    with pytest.raises(UnicodeEncodeError, match="surrogates"):
        write_atomically(tmp_path / "x", "\ud800")
    assert names(tmp_path) == []


@pytest.mark.parametrize(("mask", "expected"), [(0o022, "0o644"), (0o027, "0o640"), (0, "0o666")])
def test_a_file_has_the_permissions_that_the_umask_gives(mask, expected, tmp_path, umask):
    """A group shares a run directory; a temporary file alone would be private."""
    umask(mask)
    write_atomically(tmp_path / "x", "")
    assert mode(tmp_path / "x") == expected
    assert os.umask(mask) == mask


# --- publish_dir ---------------------------------------------------------------------------


def test_a_folder_appears_complete(tmp_path):
    """While it is made there is nothing under its name."""
    target = tmp_path / "cache/tokens/f"
    with publish_dir(target) as beside:
        (beside / "sub").mkdir()
        (beside / "sub/a").write_text("a")
        assert not target.exists()
        assert beside.parent == target.parent
    assert (target / "sub/a").read_text() == "a"
    assert names(target.parent) == ["f"]


def test_a_folder_that_fails_does_not_appear(tmp_path):
    """Not in part, and nothing is left beside it."""

    def build():
        with publish_dir(tmp_path / "f") as beside:
            (beside / "a").write_text("a")
            raise ZeroDivisionError("half done")

    with pytest.raises(ZeroDivisionError, match="half done"):
        build()
    assert names(tmp_path) == []


def test_a_folder_that_is_interrupted_does_not_appear(tmp_path):
    """Ctrl-C is no Exception."""

    def build():
        with publish_dir(tmp_path / "f") as beside:
            (beside / "a").write_text("a")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build()
    assert names(tmp_path) == []


def test_the_first_to_finish_publishes(tmp_path):
    """The work of the second is dropped, and it is no fault."""
    with publish_dir(tmp_path / "f") as late:
        (late / "by").write_text("late")
        with publish_dir(tmp_path / "f") as early:
            (early / "by").write_text("early")
    assert (tmp_path / "f/by").read_text() == "early"
    assert names(tmp_path) == ["f"]


def test_a_file_in_the_way_is_a_fault(tmp_path):
    """It is neither replaced nor taken for the folder."""
    (tmp_path / "f").write_text("x")

    def build():
        with publish_dir(tmp_path / "f") as beside:
            (beside / "a").write_text("a")

    with pytest.raises(NotADirectoryError):
        build()
    assert names(tmp_path) == ["f"]
    assert (tmp_path / "f").read_text() == "x"


@pytest.mark.parametrize(("mask", "expected"), [(0o022, "0o755"), (0o027, "0o750")])
def test_a_folder_has_the_permissions_that_the_umask_gives(mask, expected, tmp_path, umask):
    """A cache is shared; a temporary folder alone would be private."""
    umask(mask)
    with publish_dir(tmp_path / "f") as beside:
        (beside / "a").write_text("a")
    assert mode(tmp_path / "f") == expected


def test_builders_at_the_same_time_leave_one_good_folder(tmp_path, umask):
    """Threads that finish together: one publishes, none fails, nothing is mixed or left over."""
    count = 4
    together = threading.Barrier(count)
    failures = []

    def build(number: int) -> None:
        try:
            with publish_dir(tmp_path / "f") as beside:
                for name in ("a", "b", "c"):
                    (beside / name).write_text(str(number))
                together.wait()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=build, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert names(tmp_path) == ["f"]
    assert names(tmp_path / "f") == ["a", "b", "c", "seal.json"]
    assert len({(tmp_path / "f" / name).read_text() for name in ("a", "b", "c")}) == 1


def test_json_is_read_as_utf8(tmp_path):
    """Whatever the locale of the machine is."""
    (tmp_path / "x").write_bytes(json.dumps({"a": "ü"}, ensure_ascii=False).encode())
    assert read_json(tmp_path / "x") == {"a": "ü"}
