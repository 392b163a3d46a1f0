"""Every error kind: how it is printed and how the program ends."""

import errno
import os
import pickle
import re
from collections.abc import Iterator

import pytest

from sft_job import cli, errors
from sft_job.errors import ConfigError, DataError, FaultList, Interrupted, SftJobError


def kinds(base: type[SftJobError] = SftJobError) -> Iterator[type[SftJobError]]:
    """The base and all of its descendants that errors.py declares."""
    yield base
    for child in base.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from kinds(child)


def make(kind: type[SftJobError]) -> SftJobError:
    """An error of a kind as its call sites make it."""
    if issubclass(kind, FaultList):
        return kind(["job.yaml:3: it is wrong"], remedy="mend it")
    return kind("it is wrong", where="job.yaml:3", remedy="mend it")


def drawn() -> list[tuple[str, str | None, int | None]]:
    """(class, parent, exit code) of every line of the tree in the module's docstring."""
    lines, above = [], []
    for line in errors.__doc__.splitlines():
        match = re.match(r" {4}([│├└─ ]*)([A-Z]\w+)(?: +(\d+))? {2,}", line)
        if match:
            depth = len(match[1]) // 4
            del above[depth:]
            lines.append((match[2], above[-1] if above else None, int(match[3] or 0) or None))
            above.append(match[2])
    return lines


ALL = list(kinds())


def test_the_drawn_tree_lists_exactly_the_kinds():
    """The docstring of errors.py is the catalogue of what a user can meet."""
    assert sorted(name for name, _, _ in drawn()) == sorted(kind.__name__ for kind in ALL)


def test_the_drawn_tree_has_the_real_parents():
    """A kind hangs in the drawing under the class that it is derived from."""
    real = {kind.__name__: kind.__base__.__name__ for kind in ALL if kind is not SftJobError}
    assert {name: parent for name, parent, _ in drawn() if parent or name in real} == real


@pytest.mark.parametrize(("name", "parent", "code"), drawn())
def test_exit_codes_are_the_drawn_ones(name, parent, code):
    """A line without a number has the number of its parent."""
    codes = {name: code for name, _, code in drawn()}
    assert getattr(errors, name).exit_code == (code or codes[parent])


def test_exit_codes_mean_ours_yours_and_again():
    """1 is our fault, 2 the user's, 75 is EX_TEMPFAIL: run the same command again."""
    assert {kind.exit_code for kind in ALL} == {1, 2, 75}
    assert [kind.__name__ for kind in ALL if kind.exit_code == 75] == ["Interrupted"]
    assert Interrupted.exit_code == errors.EXIT_INTERRUPTED


@pytest.mark.parametrize("kind", ALL)
def test_every_kind_says_where_what_and_what_next(kind):
    """The printed message has the place first and the remedy on a line of its own."""
    assert str(make(kind)) == "job.yaml:3: it is wrong\n  -> mend it"


@pytest.mark.parametrize("kind", ALL)
def test_place_and_remedy_may_be_left_out(kind):
    """Without place and remedy the message is the sentence alone."""
    error = kind(["it is wrong"]) if issubclass(kind, FaultList) else kind("it is wrong")
    assert str(error) == "it is wrong"


@pytest.mark.parametrize("kind", ALL)
def test_every_kind_ends_the_program_with_its_message_and_code(kind, capsys):
    """No traceback for what we raise ourselves: `error: message`, then the exit code."""

    def main(argv):
        raise make(kind)

    assert cli.run(main, ["job.yaml"]) == kind.exit_code
    assert capsys.readouterr().err == "error: job.yaml:3: it is wrong\n  -> mend it\n"


@pytest.mark.parametrize("kind", ALL)
def test_debug_shows_the_traceback(kind, capsys):
    """With --debug the place in our code is shown; the exit code stays."""

    def main(argv):
        raise make(kind)

    assert cli.run(main, ["job.yaml", "--debug"]) == kind.exit_code
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (most recent call last):")
    assert "it is wrong" in printed


def test_every_kind_crosses_a_process_boundary():
    """Encoding runs in a pool of processes, which sends an error back by pickling it."""

    def crosses(error: SftJobError) -> bool:
        try:
            copy = pickle.loads(pickle.dumps(error))
        except TypeError:
            return False
        return (type(copy), str(copy)) == (type(error), str(error))

    assert [kind.__name__ for kind in ALL if not crosses(make(kind))] == []


def test_a_bug_is_one_sentence_with_its_place(capsys):
    """What to do with it too; with --debug it keeps its traceback."""

    def main(argv):
        return cli.unexpected(None)  # a bug in a file of ours

    assert cli.run(main, []) == 1
    printed = capsys.readouterr().err
    assert re.match(r"error: unexpected AttributeError: .* \(cli\.py:\d+\)\n  -> a fault", printed)
    assert "Traceback" not in printed
    with pytest.raises(AttributeError):
        cli.run(main, ["--debug"])


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (errno.EACCES, 2, "/shared/x: Permission denied\n  -> have it opened to this user"),
        (errno.EROFS, 2, "/shared/x: Read-only file system\n  -> have it opened"),
        (errno.ENAMETOOLONG, 2, "/shared/x: File name too long\n  -> name another place"),
        (errno.ENOSPC, 1, "/shared/x: nothing can be written: No space left on device (space or"),
        (errno.ESTALE, 1, "/shared/x: Stale file handle\n  -> the disk or the file server has"),
    ],
)
def test_what_the_system_refuses_is_said_with_its_place(number, code, said, capsys):
    """Wherever it happens, in every command."""

    def main(argv):
        raise OSError(number, os.strerror(number), "/shared/x")

    assert cli.run(main, []) == code
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_an_interruption_from_the_keyboard_is_no_error(capsys):
    """128 + SIGINT, as shells have it, and nothing else."""

    def main(argv):
        raise KeyboardInterrupt

    assert cli.run(main, []) == 130
    assert capsys.readouterr() == ("", "")


def test_success_is_exit_code_0():
    """An entry point that returns nothing has done its work."""
    assert cli.run(lambda argv: None, []) == 0
    assert cli.run(lambda argv: 0, []) == 0


@pytest.mark.parametrize("kind", [ConfigError, DataError])
def test_several_faults_are_shown_together(kind):
    """One line per fault under a count."""
    error = kind(["a:1: x", "a:2: y"], remedy="mend them")
    assert error.faults == ["a:1: x", "a:2: y"]
    assert str(error) == f"2 {kind.noun}:\n  a:1: x\n  a:2: y\n  -> mend them"


def test_many_faults_are_counted_not_printed():
    """A file full of faults does not scroll the first ones away."""
    error = DataError([f"fault {number}" for number in range(34)], shown=3)
    lines = str(error).splitlines()
    assert lines == [
        "34 faults of the data:",
        "  fault 0",
        "  fault 1",
        "  fault 2",
        "  ... and 31 more",
    ]
    assert len(error.faults) == 34


def test_faults_that_were_not_kept_are_counted():
    """A caller may keep the first of very many."""
    error = DataError(["a", "b"], shown=1, count=12345)
    assert str(error).splitlines() == ["12,345 faults of the data:", "  a", "  ... and 12,344 more"]


def test_exactly_as_many_faults_as_are_shown_need_no_rest():
    """Nothing is counted when everything is shown."""
    assert "more" not in str(DataError(["a", "b"], shown=2))


def test_a_fault_list_without_faults_is_a_bug():
    """An empty list would print an empty error."""
    with pytest.raises(ValueError, match="at least one fault"):
        DataError([])


def test_an_unknown_command_lists_the_known_ones(capsys):
    """Exit code 2 and the list of commands."""
    assert cli.main(["trian"]) == 2
    printed = capsys.readouterr().err
    assert "unknown command 'trian'" in printed
    assert all(command in printed for command in cli.COMMANDS)
