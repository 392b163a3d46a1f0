"""Conversations: read from files, checked with their place, cut to what can be trained on.

    file -> Conversation (turns as written, checked)
         -> Trainable (system text and complete exchanges) + what was lost, by reason

Policy. A conversation is trained on up to its first fault of form: an answer whose history
is missing would teach nonsense, so nothing after the fault is kept.

    leading_assistant_turn    an answer before any question: dropped
    empty_turn                cut before the exchange with an empty turn
    wrong_order               cut where the roles stop alternating
    trailing_user_turn        a question without an answer: dropped
    no_complete_exchange      nothing is left: the conversation is dropped,
    system_turn               and its system turn with it
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sft_job.errors import DataError

Role = Literal["system", "user", "assistant"]

# ShareGPT exports and chat APIs name the same three roles differently.
ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


@dataclass(frozen=True, slots=True)
class Turn:
    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    id: str
    where: str
    """`file:line`, or `file[index]` when all records share a line."""
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Exchange:
    user: str
    assistant: str


@dataclass(frozen=True, slots=True)
class Trainable:
    """What is trained on of one conversation; at least one exchange, no empty text."""

    id: str
    where: str
    system: str | None
    exchanges: tuple[Exchange, ...]

    def __post_init__(self) -> None:
        if not self.exchanges or any(not e.user or not e.assistant for e in self.exchanges):
            raise ValueError(f"{self.where}: not a trainable conversation")


def records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, raw record) of a JSON list or a JSONL file.

    Raises:
        DataError: the file is not readable, not UTF-8 or not JSON; names the line.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            if path.suffix == ".jsonl":
                yield from _jsonl_records(path, file)
            else:
                yield from _json_records(path, file.read())
    except OSError as error:
        raise DataError([f"{path}: cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise DataError([f"{path}: not UTF-8 text (byte {error.start})"]) from error


def _jsonl_records(path: Path, lines: Iterator[str] | Any) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError([_syntax(path, number, error)]) from error
            except RecursionError as error:
                raise DataError([f"{path}:{number}: nested too deeply"]) from error


def _json_records(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    decoder = json.JSONDecoder()
    blank = " \t\r\n"
    position, line, counted = _skip(text, 0, blank), 1, 0
    one_line = "\n" not in text.strip()
    if not text[position:]:
        raise DataError([f"{path}: the file is empty"])
    if text[position] != "[":
        where = text.count("\n", 0, position) + 1
        raise DataError(
            [f"{path}:{where}: expected a JSON list of conversations (or a .jsonl file)"]
        )
    position, index = _skip(text, position + 1, blank), 0
    while position < len(text) and text[position] != "]":
        try:
            record, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError([_syntax(path, error.lineno, error)]) from error
        except RecursionError as error:
            raise DataError([f"{path}: record {index} is nested too deeply"]) from error
        line += text.count("\n", counted, position)
        counted = position
        yield f"{path}[{index}]" if one_line else f"{path}:{line}", record
        index += 1
        position = _skip(text, end, blank)
        if position < len(text) and text[position] == ",":
            position = _skip(text, position + 1, blank)
            if text[position : position + 1] == "]":
                where = text.count("\n", 0, position) + 1
                raise DataError([f"{path}:{where}: not valid JSON: a comma before ']'"])
        elif position >= len(text) or text[position] != "]":
            break
    line = text.count("\n", 0, position) + 1
    if position >= len(text) or text[position] != "]":
        found = f"found {text[position]!r}" if position < len(text) else "the file ends"
        raise DataError([f"{path}:{line}: not valid JSON: expected ',' or ']', but {found}"])
    if text[position + 1 :].strip():
        raise DataError([f"{path}:{line}: not valid JSON: text after the closing ']'"])


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position


def _syntax(path: Path, line: int, error: json.JSONDecodeError) -> str:
    return f"{path}:{line}: not valid JSON: {error.msg} (column {error.colno})"


def read(paths: Sequence[Path]) -> list[Conversation]:
    """Read and check all files.

    Raises:
        DataError: with every fault of every file at once; a file without conversations is one.
    """
    conversations: list[Conversation] = []
    faults: list[str] = []
    for path in paths:
        before = len(conversations)
        index = 0
        try:
            for index, (where, record) in enumerate(records(path), 1):
                checked = _check(record, where, str(index - 1))
                if isinstance(checked, Conversation):
                    conversations.append(checked)
                else:
                    faults += checked
        except DataError as error:
            faults += error.faults
            continue
        if index == 0 and len(conversations) == before:
            faults.append(f"{path}: no conversations in the file")
    if faults:
        raise DataError(faults, remedy=f"mend the data; {SEE} lists all faults")
    return conversations


def _check(record: Any, where: str, default_id: str) -> Conversation | list[str]:
    if not isinstance(record, dict):
        return [f"{where}: a conversation must be an object, not {_kind(record)}"]
    key = next((k for k in ("conversations", "messages") if k in record), None)
    if key is None:
        return [f"{where}: neither `conversations` nor `messages` in the record"]
    raw = record[key]
    name = record.get("id")
    name = str(name) if isinstance(name, str | int) else default_id
    if not isinstance(raw, list):
        return [f"{where}: conversation {name!r}: `{key}` must be a list, not {_kind(raw)}"]
    turns: list[Turn] = []
    faults: list[str] = []
    for number, turn in enumerate(raw, 1):
        checked = _check_turn(turn)
        if isinstance(checked, Turn):
            turns.append(checked)
        else:
            faults.append(f"{where}: conversation {name!r}, turn {number}: {checked}")
    if not faults and not any(turn.role == "assistant" for turn in turns):
        faults.append(
            f"{where}: conversation {name!r} has no assistant turn, there is nothing to learn"
        )
    return faults or Conversation(name, where, tuple(turns))


def _check_turn(turn: Any) -> Turn | str:
    if not isinstance(turn, dict):
        return f"a turn must be an object, not {_kind(turn)}"
    pair = next((p for p in (("from", "value"), ("role", "content")) if p[0] in turn), None)
    if pair is None:
        return "neither `from` nor `role`"
    role, text = turn[pair[0]], turn.get(pair[1])
    if not isinstance(role, str) or role not in ROLES:
        return f"unknown role {role!r}; known: {', '.join(ROLES)}"
    if not isinstance(text, str):
        return f"`{pair[1]}` must be text, not {_kind(text)}"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "the text has a lone surrogate, which is not valid Unicode"
    return Turn(ROLES[role], text)


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def trainable(conversation: Conversation) -> tuple[Trainable | None, Counter[str]]:
    """Cut a conversation to complete exchanges.

    Returns:
        What can be trained on, or None, and the number of turns lost by reason
        (`no_complete_exchange` counts conversations).
    """
    lost: Counter[str] = Counter()
    turns = list(conversation.turns)
    system = None
    if turns and turns[0].role == "system":
        system = turns.pop(0).text or None
        if system is None:
            lost["empty_turn"] += 1
    while turns and turns[0].role == "assistant":
        turns.pop(0)
        lost["leading_assistant_turn"] += 1
    exchanges: list[Exchange] = []
    while turns:
        if len(turns) == 1 and turns[0].role == "user":
            lost["trailing_user_turn" if turns[0].text else "empty_turn"] += 1
            break
        if [turn.role for turn in turns[:2]] != ["user", "assistant"]:
            lost["wrong_order"] += len(turns)
            break
        if not turns[0].text or not turns[1].text:
            lost["empty_turn"] += len(turns)
            break
        exchanges.append(Exchange(turns[0].text, turns[1].text))
        del turns[:2]
    if not exchanges:
        lost["no_complete_exchange"] += 1
        lost["system_turn"] += system is not None
        return None, +lost
    return Trainable(conversation.id, conversation.where, system, tuple(exchanges)), lost


def read_trainable(paths: Sequence[Path]) -> tuple[list[Trainable], Counter[str], int]:
    """All conversations cut to what is trained on, what was lost, and how many were read.

    Raises:
        DataError: faults of the files, or nothing to train on.
    """
    conversations = read(paths)
    kept, lost = cut(conversations)
    if not kept:
        raise DataError([NOTHING_LEFT], remedy=f"{SEE} shows what was dropped and why")
    return kept, lost, len(conversations)


NOTHING_LEFT = "no conversation has a complete exchange, there is nothing to train on"
SEE = "`sft-job data validate job.yaml`"


def cut(conversations: Sequence[Conversation]) -> tuple[list[Trainable], Counter[str]]:
    """What is trained on of all conversations, and what was lost, by reason.

    An exact copy of an earlier conversation is kept, since repeating one is a way to weight
    it, and counted (`duplicate`).
    """
    lost: Counter[str] = Counter()
    seen: set[tuple[Turn, ...]] = set()
    kept = []
    for conversation in conversations:
        lost["duplicate"] += conversation.turns in seen
        seen.add(conversation.turns)
        whole, losses = trainable(conversation)
        lost += losses
        if whole is not None:
            kept.append(whole)
    return kept, +lost
