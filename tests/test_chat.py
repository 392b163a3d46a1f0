"""`sft-job chat` before there is a model: what is said of arguments that cannot be meant."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sft_job import chat, cli


def refused(*words: str) -> int:
    return cli.run(chat.main, list(words))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory and a hub cache with nothing in them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/nonexistent", "/nonexistent: no such folder"),
        ("./runs/x", "./runs/x: no such folder"),
        ("~/nowhere", "~/nowhere: no such folder"),
        ("runs/a/b", "runs/a/b: no such folder"),
        ("", "'': no such folder"),
        ("runs/x", "runs/x: neither a folder nor in the local hub cache"),
        ("nosuch", "nosuch: neither a folder nor in the local hub cache"),
        ("bundled:gpt-5", "bundled:gpt-5: neither a folder nor in the local hub cache"),
        ("file.txt", "file.txt: not a folder"),
        ("dangling", "dangling: not a folder"),
        ("x" * 300, "cannot be looked into: File name too long"),
    ],
)
def test_what_is_no_model_is_said_to_be_none(name, said, elsewhere, capsys):
    """And not that standard input is no terminal, which is nothing to mend here."""
    Path("file.txt").touch()
    os.symlink("nowhere", "dangling")
    assert refused(name) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "standard input" not in error
    assert "-> give a run directory, a model folder, a hub id or bundled:NAME" in error


@pytest.mark.parametrize("stdin", [None, "pipe"])
def test_without_a_terminal_a_prompt_is_needed(stdin, monkeypatch, capsys):
    """Closed altogether, as by some schedulers, or a pipe."""
    Path("model").mkdir()
    monkeypatch.setattr(sys, "stdin", None if stdin is None else open(os.devnull))  # noqa: SIM115
    with pytest.raises(SystemExit) as ended:
        refused("model")
    assert ended.value.code == 2
    assert "standard input is not a terminal; give --prompt TEXT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-new-tokens", "0"), ("--max-new-tokens", "-1"), ("--max-new-tokens", "many"),
        ("--max-new-tokens", "9" * 30), ("--temperature", "nan"), ("--temperature", "-1"),
        ("--temperature", "inf"), ("--temperature", "warm"),
    ],
)  # fmt: skip
def test_numbers_that_no_model_takes(option, value, capsys):
    Path("model").mkdir()
    with pytest.raises(SystemExit) as ended:
        refused("model", "--prompt", "x", f"{option}={value}")
    assert ended.value.code == 2
    assert f"argument {option}: " in capsys.readouterr().err
