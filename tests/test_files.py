"""Files and folders: seen whole or not at all, published once, never replaced."""

import errno
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sft_job import files, seal
from sft_job.files import append_line, create, discard, is_intact, publish, publish_dir


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def at_once(count: int, action) -> list:
    """What threads return that begin together."""
    together, results = threading.Barrier(count), []

    def run(number: int) -> None:
        together.wait()
        results.append(action(number))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_made_by_exactly_one(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight at once; also on a file system without hard links. The content is whole."""
    if not links:

        def refuse(source: Path, target: Path) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(files.os, "link", refuse)
    text = "x" * 10_000
    made = at_once(8, lambda number: create(tmp_path / "DONE", f"{number}{text}"))
    assert sorted(made) == [False] * 7 + [True]
    assert (tmp_path / "DONE").read_text()[1:] == text
    assert names(tmp_path) == ["DONE"]


def test_a_folder_is_published_by_exactly_one(tmp_path: Path) -> None:
    """The others keep theirs."""
    for number in range(6):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}/by").write_text(str(number))
    made = at_once(6, lambda number: publish(tmp_path / str(number), tmp_path / "f"))
    assert sorted(made) == [False] * 5 + [True]
    assert len(names(tmp_path)) == 6


def test_a_folder_that_is_discarded_has_lost_its_name_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever still works on it can publish nothing of it, while its files go one by one."""
    (tmp_path / "f").mkdir()
    (tmp_path / "f/a").touch()
    seen = []

    def look(folder: Path, ignore_errors: bool) -> None:
        seen.append((tmp_path / "f").exists())
        with pytest.raises(FileNotFoundError):
            publish(tmp_path / "f", tmp_path / "published")

    monkeypatch.setattr(files.shutil, "rmtree", look)
    discard(tmp_path / "f")
    discard(tmp_path / "never")
    assert seen == [False]


def test_a_cache_folder_is_sealed_and_open_to_others(tmp_path: Path) -> None:
    """Libraries write some files for their owner alone; the umask decides."""
    before = os.umask(0o027)
    try:
        with publish_dir(tmp_path / "f") as beside:
            (beside / "sub").mkdir(mode=0o700)
            for name in ("private", "sub/private"):
                (beside / name).write_text("x")
                (beside / name).chmod(0o600)
    finally:
        os.umask(before)
    modes = {p.name: oct(stat.S_IMODE(p.stat().st_mode)) for p in (tmp_path / "f").rglob("*")}
    assert modes == {"sub": "0o750", "private": "0o640", "seal.json": "0o640"}
    assert is_intact(tmp_path / "f")


def test_a_damaged_cache_folder_is_deleted_and_said(tmp_path: Path, capsys) -> None:
    """Whoever finds it makes it anew."""
    with publish_dir(tmp_path / "f") as beside:
        (beside / "a").write_text("abc")
    (tmp_path / "f/a").write_text("abd")
    assert not is_intact(tmp_path / "f")
    assert not is_intact(tmp_path / "f")
    assert f"note: {tmp_path / 'f'} is damaged (a was changed" in capsys.readouterr().err
    assert names(tmp_path) == []


def test_what_a_killed_builder_has_left_is_cleared_away(tmp_path: Path) -> None:
    """By the next one; what a living one works on is left alone."""
    code = (
        "import os, sys, pathlib; from sft_job.files import publish_dir\n"
        f"with publish_dir(pathlib.Path({str(tmp_path / 'f')!r})) as beside:\n"
        "    (beside / 'half').write_text('x'); os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    (left,) = names(tmp_path)
    assert left.startswith(".f.")
    with publish_dir(tmp_path / "f") as first:
        assert names(tmp_path) == [first.name]
        with publish_dir(tmp_path / "f") as second:
            assert names(tmp_path) == sorted([first.name, second.name])
            (second / "a").touch()
    assert names(tmp_path) == ["f"]


def test_a_line_that_finds_no_room_is_an_error(tmp_path: Path) -> None:
    """The kernel may take a part of it; the next line does not continue that."""
    with pytest.raises(OSError, match="No space left"):
        append_line(Path("/dev/full"), json.dumps({"step": 1}))


@pytest.mark.parametrize("number", [errno.ECONNRESET, errno.EINVAL, errno.EPIPE])
def test_what_explains_nothing_is_not_translated(number: int) -> None:
    """A bug of ours is not sold as the user's."""
    assert files.translated(OSError(number, os.strerror(number), "/x")) is None


def test_a_builder_that_is_killed_while_it_flushes_is_cleared_away_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has its lock to the end: until then others can tell whether it is alive."""
    seen = []
    settle = files.settle

    def look(folder: Path) -> None:
        files._clear_dead(tmp_path / "f")
        seen.append((folder.is_dir(), (folder / files._BUILDER).is_file()))
        settle(folder)

    monkeypatch.setattr(files, "settle", look)
    with files.publish_dir(tmp_path / "f") as beside:
        (beside / "a").write_text("a")
    assert seen == [(True, True)]
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == ["a", "seal.json"]
    assert seal.fault(tmp_path / "f") is None


def test_a_folder_that_never_had_its_builders_lock_is_cleared_away_later(tmp_path: Path) -> None:
    """Its builder was killed between two lines; one that is just being made is left alone."""
    old, new = tmp_path / ".f[1].a", tmp_path / ".f[1].b"
    for folder in (old, new):
        folder.mkdir()
        (folder / f"{files._BUILDER}.new").touch()
    os.utime(old, (0, 0))
    files._clear_dead(tmp_path / "f[1]")
    assert not old.exists()
    assert new.exists()


def test_a_file_in_the_place_of_a_cache_folder_is_put_aside(tmp_path: Path, capsys) -> None:
    """And said: the folder can be made."""
    (tmp_path / "f").write_text("x")
    assert not files.is_intact(tmp_path / "f")
    assert (tmp_path / "replaced-1-f").read_text() == "x"
    assert "f is no folder: now replaced-1-f" in capsys.readouterr().err


def test_what_a_killed_writer_has_left_is_cleared_away(tmp_path: Path) -> None:
    """Not what another writes at this moment, nor hidden files of other names."""
    path = tmp_path / "plan.json"
    left, foreign = tmp_path / ".plan.json.a1b2c3d4", tmp_path / ".settings.of_users"
    for file in (left, foreign):
        file.write_text("{")
    with files._beside(path, "{}") as written:
        files.clear_unwritten(path)
        assert written.is_file()
    assert not written.exists()
    assert not left.exists()
    assert foreign.is_file()


def test_a_writer_whose_file_is_cleared_before_it_is_locked_makes_another(
    tmp_path: Path, monkeypatch
) -> None:
    """Between the two it may be taken for one that a killed writer has left."""
    flock, cleared = files.fcntl.flock, []

    def late(handle: int, how: int) -> None:
        if not cleared:
            cleared.extend(tmp_path.glob(".x.*"))
            cleared[0].unlink()
        flock(handle, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    files.write_atomically(tmp_path / "x", "text")
    assert (tmp_path / "x").read_text() == "text"
    assert cleared
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
