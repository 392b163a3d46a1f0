"""Any data gives a list of conversations or a DataError, never another exception.

What is not in the result is counted or refused. SFT_JOB_FUZZ is the number of examples of all
tests here together.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft_job.conversations import ROLES, Conversation, Turn, cut, read
from sft_job.errors import DataError
from sft_job.formats import IgnoredKeys, ignored_line

EXAMPLES = int(os.environ.get("SFT_JOB_FUZZ", "200"))


def share(percent: int) -> settings:
    """So many of the examples; a failing one is shrunk within its test's time limit."""
    return settings(
        max_examples=max(10, EXAMPLES * percent // 100),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


Result = tuple[list[Conversation], dict[str, dict[str, int]]] | None


def checked(path: Path, data: bytes) -> Result:
    """What reading a file of these bytes gives; None for a DataError, whose text is checked."""
    path.write_bytes(data)
    ignored = IgnoredKeys()
    refused: DataError | None = None
    conversations: list[Conversation] = []
    try:
        conversations = read([path], ignored)
    except DataError as error:
        refused = error
    if refused is not None:
        assert refused.faults
        assert all(fault.startswith(str(path)) for fault in refused.faults)
        assert all(len(fault) < 1000 and fault.isprintable() for fault in refused.faults)
        return None
    kept, lost = cut(conversations)
    for conversation in conversations:
        assert conversation.id.isprintable()
        for turn in conversation.turns:
            turn.text.encode()
    dropped = lost["no_complete_exchange"] + lost["no_trained_answer"]
    assert len(kept) + dropped == len(conversations)
    line = ignored_line(ignored.counted())
    assert line is None or (line.isprintable() and len(line) < 1500)
    return conversations, ignored.counted()


# --- records -------------------------------------------------------------------------------

KEYS = st.sampled_from(
    ["id", "conversations", "messages", "from", "value", "role", "content", "system", "weight",
     "train", "loss", "mask", "tools", "images", "tool_calls", "reasoning_content", "chosen",
     "label", "type", "source", "text", "prompt", "completion", "data", "system_prompt"]
) | st.text(max_size=8)  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([0, 1, 0.5, "", " ", "null", "[]", "human", "gpt", "user", "assistant",
                       "system", "tool", "a\x00", "\ud800", 10**500, "User", "x" * 500])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
EXTRAS = st.dictionaries(KEYS, VALUES, max_size=2)

# Good records: keys that mean nothing with values that JSON has, flags on answers.
PLAIN = st.dictionaries(
    st.sampled_from(["source", "lang", "score", "k\n"]),
    st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from([None, [], {"a": 1}]),
    max_size=2,
)
FLAGS = st.sampled_from([{}, {"weight": 0}, {"weight": 1.0}, {"train": False}, {"loss": None}])


def good_turn(role: str, text: str, sharegpt: bool, flags: dict, plain: dict) -> dict[str, Any]:
    """A turn in one of the forms."""
    turn = {"from": role, "value": text} if sharegpt else {"role": role, "content": text}
    return turn | (flags if ROLES[role] == "assistant" else {}) | plain


TURNS = st.builds(
    good_turn,
    st.sampled_from([role for role in ROLES if role != "system"]),
    st.text(max_size=12),
    st.booleans(),
    FLAGS,
    PLAIN,
)
ANSWERED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
RECORDS = st.builds(
    lambda turns, beside, plain: {"messages": [*turns, *ANSWERED]} | beside | plain,
    st.lists(TURNS, max_size=4),
    st.sampled_from([{}, {"system": "s"}, {"system_prompt": " "}, {"id": 5}, {"train": False}]),
    PLAIN,
)


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """A good record with keys or values at random places of it."""
    record = json.loads(json.dumps(draw(RECORDS)))
    for _ in range(draw(st.integers(1, 3))):
        place = record
        if draw(st.booleans()):
            place = draw(st.sampled_from(record["messages"])) if record.get("messages") else record
        if not isinstance(place, dict):
            break
        if draw(st.booleans()) or not place:
            place.update(draw(EXTRAS))
        else:
            key = draw(st.sampled_from(sorted(place)))
            place[key] = draw(VALUES)
        if not isinstance(record.get("messages"), list):
            break
    return record


def written(records: list[Any], form: int) -> bytes:
    """A list in one line or in several, or JSON lines."""
    if form < 2:
        return json.dumps(records, indent=form or None).encode()
    return "".join(json.dumps(record) + "\n" for record in records).encode()


HONOURED = {"id", "conversations", "messages", "from", "value", "role", "content", "weight",
            "train", "loss", "mask", "system", "system_prompt"}  # fmt: skip


def says_something(value: Any) -> bool:
    """Whether a value is more than an unused column."""
    if isinstance(value, list):
        return any(map(says_something, value))
    if isinstance(value, dict):
        return any(map(says_something, value.values()))
    return not (value is None or (isinstance(value, str) and value.strip() in ("", "null", "[]")))


def places(record: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """A record and its turns, by level."""
    turns = record.get("messages") or record.get("conversations")
    return [("conversation", record), *(("turn", turn) for turn in turns)]


@share(20)
@given(st.lists(VALUES, max_size=3), st.integers(0, 2))
def test_any_json_is_read_or_refused(tmp_path_factory, values, form):
    """Whatever its records are."""
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    result = checked(path, written(values, form))
    assert result is None or len(result[0]) == len(values)


@share(30)
@given(st.lists(RECORDS, min_size=1, max_size=3), st.integers(0, 2))
def test_good_records_are_read_and_every_other_key_counted(tmp_path_factory, values, form):
    """Texts and flags as they are there, keys neither more nor less."""
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    conversations, ignored = checked(path, written(values, form))
    expected: dict[str, Counter[str]] = {"conversation": Counter(), "turn": Counter()}
    for record, conversation in zip(values, conversations, strict=True):
        for level, place in places(record):
            others = {key: value for key, value in place.items() if key not in HONOURED}
            blank = {k for k, v in others.items() if v in (None, []) or not str(v).strip()}
            expected[level].update(others.keys() - blank)
        turns = [Turn("system", "s")] if record.get("system") else []
        for turn in record["messages"]:
            role = ROLES[turn.get("from", turn.get("role"))]
            said = turn.get("weight", turn.get("train", record.get("train")))
            off = role == "assistant" and said in (0, False) and said is not None
            turns.append(Turn(role, turn.get("value", turn.get("content")), not off))
        assert list(conversation.turns) == turns
    assert ignored == expected


@share(30)
@given(st.lists(mutated(), min_size=1, max_size=2), st.integers(0, 2))
def test_no_key_of_a_mutated_record_is_ignored_in_silence(tmp_path_factory, values, form):
    """What is read has each of its keys honoured or counted."""
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    result = checked(path, written(values, form))
    if result is not None:
        assert len(result[0]) == len(values)
        for level, place in [one for record in values for one in places(record)]:
            for key in place.keys() - HONOURED - result[1][level].keys():
                # False as the value of a key that is refused otherwise: not used.
                assert not says_something(place[key]) or place[key] is False, (key, place[key])


@share(20)
@given(st.data())
def test_any_bytes_are_read_or_refused(tmp_path_factory, data):
    """Random ones, and good files with bytes taken out, put in or cut off."""
    path = tmp_path_factory.getbasetemp() / "fuzz.bin"
    if data.draw(st.booleans()):
        content = data.draw(st.binary(max_size=200))
        content = data.draw(st.sampled_from([b"", b"[", b"{", b'{"a": '])) + content
    else:
        content = written(data.draw(st.lists(RECORDS, max_size=2)), data.draw(st.integers(0, 2)))
        for _ in range(data.draw(st.integers(1, 3))):
            begin = data.draw(st.integers(0, len(content)))
            end = begin + data.draw(st.integers(0, 3))
            junk = data.draw(
                st.binary(max_size=3) | st.sampled_from([b",", b"]", b"}", b'"', b"\n"])
            )
            content = content[:begin] + junk + content[end:]
        content = content[: data.draw(st.integers(0, 2 * len(content)))]
    checked(path, content)


def test_nesting_of_any_depth_is_read_or_refused(tmp_path):
    """Near the limit of Python's stack too, wherever it comes."""
    limit = sys.getrecursionlimit()
    good = json.dumps({"messages": ANSWERED})[:-1]
    for depth in [*range(limit - 150, limit + 10, 20), 100 * limit]:
        for opened, closed in (("[", "]"), ('{"a":', "}")):
            nested = opened * depth + "1" + closed * depth
            for key in ("id", "conversations", "source", "tools", "system", "weight", "mask"):
                checked(tmp_path / "d.jsonl", f'{good}, "{key}": {nested}}}\n'.encode())
            for turn in (nested, f'{{"role": {nested}, "value": {nested}, "content": {nested}}}'):
                checked(tmp_path / "d.json", f'[{{"messages": [{turn}]}}]'.encode())
