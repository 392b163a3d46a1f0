"""DONE is believed only where the model is there as it was written."""

import json
from pathlib import Path

import pytest

from sft_job import result
from sft_job.attempt import Attempt
from sft_job.errors import SupersededError
from sft_job.rundir import RunDir


def written(run: RunDir, attempt: Attempt, content: bytes = b"weights") -> Path:
    """A finished model, not yet under its name."""
    beside = run.path / f".model.attempt-{attempt.number}.tmp"
    beside.mkdir(parents=True)
    (beside / "model.safetensors").write_bytes(content)
    (beside / "config.json").write_text("{}")
    return beside


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that is done."""
    run = RunDir(tmp_path / "run")
    attempt = Attempt.claim(run)
    result.mark_done(attempt, 7, result.publish_model(attempt, written(run, attempt)))
    return run


def test_a_whole_model_is_good(run: RunDir) -> None:
    """And DONE says by whom and when."""
    assert result.model_fault(run) is None
    record = json.loads(run.done.read_text())
    assert (record["step"], record["attempt"]) == (7, 1)


@pytest.mark.parametrize("damage", ["gone", "half", "flipped", "a file", "DONE"])
def test_a_model_that_is_not_as_it_was_written_is_told(run: RunDir, damage: str) -> None:
    """Whatever has happened to it, or to its mark."""
    file = run.model / "model.safetensors"
    if damage == "gone":
        run.model.rename(run.path / "elsewhere")
    elif damage == "half":
        file.write_bytes(b"weig")
    elif damage == "flipped":
        file.write_bytes(b"weighTs")
    elif damage == "a file":
        run.model.rename(run.path / "elsewhere")
        run.model.write_text("x")
    else:
        run.done.write_bytes(b"\xff")
    assert result.model_fault(run)


def test_a_mark_without_a_seal_is_believed_where_the_files_are(run: RunDir) -> None:
    """Earlier versions wrote none, nor that of an attempt."""
    run.written_model(1).unlink()
    run.done.write_text('{"step": 7, "attempt": 1}')
    assert result.model_fault(run) is None
    (run.model / "model.safetensors").unlink()
    assert result.model_fault(run) == "model.safetensors is missing"


def test_a_model_is_never_replaced(run: RunDir) -> None:
    """One that another attempt published and that is whole stays; the mark speaks of it."""
    late = Attempt.claim(run)
    kept = result.publish_model(late, written(run, late, b"other"))
    assert (run.model / "model.safetensors").read_bytes() == b"weights"
    assert kept == json.loads(run.done.read_text())["model"]
    result.mark_done(late, 7, kept)
    assert json.loads(run.done.read_text())["attempt"] == 1


def test_what_nobody_wrote_is_put_aside(run: RunDir) -> None:
    """A damaged model, or a folder of the user's: deleting is not ours to decide."""
    (run.model / "model.safetensors").write_bytes(b"damaged")
    assert result.written_before(run) is None
    late = Attempt.claim(run)
    result.publish_model(late, written(run, late, b"again"))
    assert (run.model / "model.safetensors").read_bytes() == b"again"
    assert (run.path / "replaced-1-model/model.safetensors").read_bytes() == b"damaged"


def test_an_older_attempt_publishes_nothing(run: RunDir) -> None:
    """It is told that another one runs the job."""
    older = Attempt(run, 1)
    Attempt.claim(run)
    with pytest.raises(SupersededError):
        result.publish_model(older, written(run, older))


def test_a_model_whose_mark_was_never_made_is_found(run: RunDir) -> None:
    """The process was killed between the two: nothing has to be written again."""
    run.done.unlink()
    assert result.written_before(run) is not None


def test_a_finished_attempt_leaves_no_second_copy(run: RunDir) -> None:
    """What it wrote is not needed where a whole model is published already."""
    late = Attempt.claim(run)
    beside = written(run, late)
    result.publish_model(late, beside)
    assert not beside.exists()


def test_what_earlier_attempts_left_of_a_model_is_cleared_away(run: RunDir) -> None:
    """At the start of the next one, which needs the room."""
    own, left = (written(run, attempt) for attempt in (Attempt(run, 3), Attempt(run, 2)))
    (run.path / ".model.tmp").mkdir()
    result.clear_left_over(Attempt(run, 3))
    assert own.exists()
    assert not left.exists()
    assert not (run.path / ".model.tmp").exists()
