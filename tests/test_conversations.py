"""Reading conversations: both forms, every fault with its place, and what is cut."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_job import data
from sft_job.config import load
from sft_job.conversations import (
    ROLES,
    Conversation,
    Exchange,
    Trainable,
    Turn,
    read,
    records,
    trainable,
)
from sft_job.errors import DataError

ANSWERED = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def record(*turns: dict, name: str = "c1") -> dict:
    """A ShareGPT record; without turns a complete one."""
    return {"id": name, "conversations": list(turns) or ANSWERED}


def write(path: Path, value: object, **options: object) -> Path:
    """A JSON file, or a JSONL file if it is called so."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(item) + "\n" for item in value))
    else:
        path.write_text(json.dumps(value, **options))
    return path


def faults(*paths: Path) -> list[str]:
    """The faults that reading reports, with the first file's folder taken away."""
    with pytest.raises(DataError) as caught:
        read(paths)
    return [fault.replace(f"{paths[0].parent}/", "") for fault in caught.value.faults]


# --- forms ---------------------------------------------------------------------------------


def test_the_sharegpt_form_is_read(tmp_path):
    """conversations: [{from, value}], roles system, human, gpt."""
    turns = [{"from": "system", "value": "s"}, *ANSWERED]
    (read_back,) = read([write(tmp_path / "d.json", [record(*turns)])])
    assert read_back.id == "c1"
    assert read_back.turns == (Turn("system", "s"), Turn("user", "q"), Turn("assistant", "a"))


def test_the_messages_form_is_read(tmp_path):
    """messages: [{role, content}], roles system, user, assistant."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (read_back,) = read([write(tmp_path / "d.jsonl", [{"id": "c1", "messages": turns}])])
    assert read_back.turns == (Turn("user", "q"), Turn("assistant", "a"))


def test_both_forms_give_the_same_conversation(tmp_path):
    """What is trained on does not depend on the form."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    both = [record(), {"id": "c1", "messages": messages}]
    first, second = read([write(tmp_path / "d.json", both)])
    assert first.turns == second.turns


@pytest.mark.parametrize("text", ["  q \n", "</s>", "Grüße 🦜", "a\u2028b\r\nc", "\u0000"])
def test_text_is_taken_as_it_is(text, tmp_path):
    """Nothing is stripped, normalised or interpreted."""
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": text}]
    for name in ("d.json", "d.jsonl"):
        (read_back,) = read([write(tmp_path / name, [record(*turns)])])
        assert [turn.text for turn in read_back.turns] == [text, text]


def test_a_byte_order_mark_is_no_content(tmp_path):
    """Files from Windows begin with one."""
    for name, text in (("d.json", json.dumps([record()])), ("d.jsonl", json.dumps(record()))):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert len(read([tmp_path / name])) == 1


def test_a_conversation_without_id_is_called_by_its_index(tmp_path):
    """Counted from 0 in its file; a number is a name too."""
    path = write(tmp_path / "d.json", [record(), {"conversations": ANSWERED}, record(name=17)])
    assert [conversation.id for conversation in read([path])] == ["c1", "1", "17"]


def test_files_are_read_in_the_given_order(tmp_path):
    """The order of conversations is the order of the files and of what is in them."""
    first = write(tmp_path / "b.json", [record(name="b1"), record(name="b2")])
    second = write(tmp_path / "a.jsonl", [record(name="a1")])
    assert [conversation.id for conversation in read([first, second])] == ["b1", "b2", "a1"]


# --- places --------------------------------------------------------------------------------


def test_the_place_in_a_json_list_is_the_line_of_the_record(tmp_path):
    """Where the record's bracket opens."""
    path = tmp_path / "d.json"
    path.write_text('\n[\n  {"id": 1},\n\n  {"id": 2,\n   "x": [3]},\n  {"id": 3}\n]\n')
    places = [where.removeprefix(str(path)) for where, _ in records(path)]
    assert places == [":3", ":5", ":7"]


def test_the_place_in_a_one_line_list_is_the_index(tmp_path):
    """Everything is in line 1, so the record's index is named."""
    path = write(tmp_path / "d.json", [1, 2, 3])
    assert [where for where, _ in records(path)] == [f"{path}[{index}]" for index in range(3)]


def test_the_place_in_jsonl_is_the_line(tmp_path):
    """Blank lines are no records and are counted."""
    path = tmp_path / "d.jsonl"
    path.write_text('{"id": 1}\n\n  \n{"id": 2}')
    assert list(records(path)) == [(f"{path}:1", {"id": 1}), (f"{path}:4", {"id": 2})]


@given(
    st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=8,
        )
    ),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
)
def test_a_json_list_is_read_as_json_reads_it(tmp_path_factory, values, indent, ascii_only):
    """Record by record, whatever is in the strings and however it is laid out."""
    path = tmp_path_factory.getbasetemp() / "any.json"
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    path.write_text(text, encoding="utf-8", newline="")
    found = list(records(path))
    assert [value for _, value in found] == json.loads(text)
    lines = [int(where.rpartition(":")[2]) for where, _ in found if where[-1] != "]"]
    assert lines == sorted(lines)


# --- faults of a record --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (
            {"from": "bot", "value": "a"},
            "unknown role 'bot'; known: system, human, user, gpt, assistant",
        ),
        ({"from": "GPT", "value": "a"}, "unknown role 'GPT'; known: "),
        ({"from": None, "value": "a"}, "unknown role None; known: "),
        ({"from": ["gpt"], "value": "a"}, "unknown role ['gpt']; known: "),
        ({"value": "a"}, "neither `from` nor `role`"),
        ({"from": "gpt"}, "`value` must be text, not nothing"),
        ({"from": "gpt", "value": None}, "`value` must be text, not nothing"),
        ({"from": "gpt", "value": 5}, "`value` must be text, not int '5'"),
        ({"role": "assistant", "content": ["a"]}, "`content` must be text, not list"),
        ({"role": "assistant", "value": "a"}, "`content` must be text, not nothing"),
        ({"from": "gpt", "value": "a\ud83d"}, "the text has a lone surrogate"),
        ("gpt: a", "a turn must be an object, not str 'gpt: a'"),
    ],
)
def test_a_wrong_turn_is_named_with_its_number(turn, expected, tmp_path):
    """File, line, conversation, turn (from 1), and what is wrong."""
    path = write(tmp_path / "d.jsonl", [record(), record(ANSWERED[0], turn)])
    (found,) = faults(path)
    assert found.startswith(f"d.jsonl:2: conversation 'c1', turn 2: {expected}")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("text", "a conversation must be an object, not str 'text'"),
        (None, "a conversation must be an object, not nothing"),
        ([], "a conversation must be an object, not list '[]'"),
        ({"id": "c1"}, "neither `conversations` nor `messages` in the record"),
        (
            {"id": "c1", "conversations": "q"},
            "conversation 'c1': `conversations` must be a list, not str 'q'",
        ),
        (
            {"id": "c1", "messages": {"role": "user"}},
            "conversation 'c1': `messages` must be a list, not dict",
        ),
        (
            {"id": "c1", "conversations": None},
            "conversation 'c1': `conversations` must be a list, not nothing",
        ),
        (
            {"id": "c1", "conversations": []},
            "conversation 'c1' has no assistant turn, there is nothing to learn",
        ),
        (
            {"id": "c1", "conversations": ANSWERED[:1]},
            "conversation 'c1' has no assistant turn, there is nothing to learn",
        ),
    ],
)
def test_a_wrong_record_is_named_with_its_place(value, expected, tmp_path):
    """File, line or index, and what is wrong."""
    (found,) = faults(write(tmp_path / "d.json", [record(), value]))
    assert found.startswith(f"d.json[1]: {expected}")
    (found,) = faults(write(tmp_path / "d.json", [record(), value], indent=1))
    assert found.startswith(f"d.json:15: {expected}")


def test_a_faulty_conversation_is_not_said_to_lack_an_answer_too(tmp_path):
    """One mistake is one fault."""
    turns = [ANSWERED[0], {"from": "bot", "value": "a"}]
    assert len(faults(write(tmp_path / "d.json", [record(*turns)]))) == 1


def test_every_wrong_turn_of_a_conversation_is_named(tmp_path):
    """Not only the first."""
    turns = [{"from": "x", "value": ""}, ANSWERED[1], {"from": "human"}]
    found = faults(write(tmp_path / "d.json", [record(*turns)]))
    assert [fault.split(":")[1] for fault in found] == [
        " conversation 'c1', turn 1",
        " conversation 'c1', turn 3",
    ]


def test_a_surrogate_pair_is_valid_unicode(tmp_path):
    """JSON writes characters above U+FFFF as two escapes, which are one character."""
    path = tmp_path / "d.json"
    path.write_text(json.dumps([record({"from": "gpt", "value": "🦜"})], ensure_ascii=True))
    assert "\\ud83e" in path.read_text()
    assert read([path])[0].turns[0].text == "🦜"


# --- faults of a file ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("d.json", "[\n{},\n{]\n", "d.json:3: not valid JSON: "),
        ("d.json", '[\n{"a": 1}\n{"b": 2}]', "d.json:3: not valid JSON: expected ',' or ']'"),
        ("d.json", "[\n{},\n", "d.json:3: not valid JSON: expected ',' or ']', but the file ends"),
        ("d.json", "[\n1\n", "d.json:3: not valid JSON: expected ',' or ']', but the file ends"),
        ("d.json", "[]\n[]", "d.json:1: not valid JSON: text after the closing ']'"),
        ("d.json", '[{"a": "b\n"}]', "d.json:1: not valid JSON: Invalid control character"),
        ("d.json", '{"a": 1}', "d.json:1: expected a JSON list of conversations (or a .jsonl"),
        ("d.json", "", "d.json: the file is empty"),
        ("d.json", " \n\t\n", "d.json: the file is empty"),
        ("d.json", "[]", "d.json: no conversations in the file"),
        ("d.json", "[\n]\n", "d.json: no conversations in the file"),
        ("d.jsonl", "", "d.jsonl: no conversations in the file"),
        ("d.jsonl", "\n\n", "d.jsonl: no conversations in the file"),
    ],
)
def test_a_file_that_is_no_list_of_conversations_is_named(name, text, expected, tmp_path):
    """File and line, and what was expected."""
    path = tmp_path / name
    path.write_text(text)
    found = faults(path)
    assert found[-1].startswith(expected)


def test_a_syntax_error_in_jsonl_has_its_line_and_column(tmp_path):
    """The line of the file, not of the record."""
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(record()) + '\n\n{"id": 3,}\n')
    (found,) = faults(path)
    assert found.startswith("d.jsonl:3: not valid JSON: ")
    assert found.endswith("(column 10)")


def test_a_file_that_is_not_there_is_named(tmp_path):
    """What the system says, with the path."""
    assert faults(tmp_path / "d.json") == ["d.json: cannot be read: No such file or directory"]


def test_a_file_that_is_no_text_is_named(tmp_path):
    """With the byte at which it stops being UTF-8."""
    (tmp_path / "d.json").write_bytes(b'["\xff"]')
    assert faults(tmp_path / "d.json") == ["d.json: not UTF-8 text (byte 2)"]


def test_all_faults_of_all_files_are_reported_at_once(tmp_path):
    """A broken file does not hide the faults before it or in the next one."""
    first = tmp_path / "a.jsonl"
    first.write_text('{"id": 1}\n{"id": 2,}\n')
    second = write(tmp_path / "b.json", [record(), 5, record({"from": "gpt"})])
    third = write(tmp_path / "c.json", [])
    found = faults(first, second, third)
    assert [fault.partition(": ")[0] for fault in found] == [
        "a.jsonl:1",
        "a.jsonl:2",
        "b.json[1]",
        "b.json[2]",
        "c.json",
    ]


def test_the_message_says_what_next(tmp_path):
    """How to see all of them."""
    with pytest.raises(DataError, match=r"-> mend the data; `sft-job data validate job\.yaml`"):
        read([write(tmp_path / "d.json", [5])])


# --- the cutting policy --------------------------------------------------------------------


def conversation(script: str) -> Conversation:
    """Turns from letters: s, u, a are system, user, assistant; a capital is an empty turn."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    turns = [
        Turn(roles[letter.lower()], "" if letter.isupper() else f"{letter}{number}")
        for number, letter in enumerate(script)
    ]
    return Conversation("c1", "d.json:1", tuple(turns))


def letters(cut: Trainable | None) -> str:
    """The turns that were kept, as `conversation` takes them."""
    if cut is None:
        return ""
    return "s" * (cut.system is not None) + "ua" * len(cut.exchanges)


@pytest.mark.parametrize(
    ("script", "kept", "lost"),
    [
        ("ua", "ua", {}),
        ("suaua", "suaua", {}),
        # a leading answer
        ("aua", "ua", {"leading_assistant_turn": 1}),
        ("saaua", "sua", {"leading_assistant_turn": 2}),
        ("Aua", "ua", {"leading_assistant_turn": 1}),
        # an empty turn
        ("Sua", "ua", {"empty_turn": 1}),
        ("uaUa", "ua", {"empty_turn": 2}),
        ("uauAua", "ua", {"empty_turn": 4}),
        ("uaU", "ua", {"empty_turn": 1}),
        # the roles stop alternating
        ("uauua", "ua", {"wrong_order": 3}),
        ("uaaua", "ua", {"wrong_order": 3}),
        ("uasua", "ua", {"wrong_order": 3}),
        ("uaus", "ua", {"wrong_order": 2}),
        ("uaa", "ua", {"wrong_order": 1}),
        ("uas", "ua", {"wrong_order": 1}),
        # a question at the end
        ("uau", "ua", {"trailing_user_turn": 1}),
        ("auau", "ua", {"leading_assistant_turn": 1, "trailing_user_turn": 1}),
        # nothing is left
        ("a", "", {"leading_assistant_turn": 1, "no_complete_exchange": 1}),
        (
            "au",
            "",
            {"leading_assistant_turn": 1, "trailing_user_turn": 1, "no_complete_exchange": 1},
        ),
        ("uA", "", {"empty_turn": 2, "no_complete_exchange": 1}),
        ("Ua", "", {"empty_turn": 2, "no_complete_exchange": 1}),
        ("uua", "", {"wrong_order": 3, "no_complete_exchange": 1}),
        ("", "", {"no_complete_exchange": 1}),
    ],
)
def test_a_conversation_is_cut_at_its_first_fault_of_form(script, kept, lost):
    """What stays, and the number of turns lost by reason."""
    cut, counted = trainable(conversation(script))
    assert letters(cut) == kept
    assert counted == Counter(lost)


def test_what_is_kept_is_kept_whole():
    """Texts, place and name pass unchanged; the kept turns are the first ones."""
    cut, _ = trainable(conversation("suauau"))
    assert cut == Trainable("c1", "d.json:1", "s0", (Exchange("u1", "a2"), Exchange("u3", "a4")))


def test_a_trainable_conversation_has_exchanges_without_empty_text():
    """The type itself refuses what would teach nothing."""
    for exchanges in ((), (Exchange("", "a"),), (Exchange("u", "a"), Exchange("u", ""))):
        with pytest.raises(ValueError, match=r"d\.json:1: not a trainable conversation"):
            Trainable("c1", "d.json:1", None, exchanges)


scripts = st.text("suaSUA", max_size=10)


@given(scripts)
def test_no_turn_is_lost_without_a_reason(script):
    """Turns kept and turns lost are the turns given."""
    cut, lost = trainable(conversation(script))
    del lost["no_complete_exchange"]
    assert len(letters(cut)) + lost.total() == len(script)


@given(scripts)
def test_what_is_kept_are_turns_of_the_conversation_in_their_order(script):
    """Exchanges alternate, no text is empty, nothing is made up or moved."""
    given_turns = conversation(script).turns
    cut, lost = trainable(conversation(script))
    assert (cut is None) == (lost["no_complete_exchange"] == 1)
    if cut is not None:
        texts = [text for e in cut.exchanges for text in (e.user, e.assistant)]
        assert all(texts)
        assert [text[0] for text in texts] == ["u", "a"] * len(cut.exchanges)
        start = next(i for i, turn in enumerate(given_turns) if turn.text == texts[0])
        assert [turn.text for turn in given_turns[start:][: len(texts)]] == texts
        assert cut.system in (None, given_turns[0].text)


@given(st.text("ua", max_size=10).filter(lambda script: script.startswith("ua")))
def test_an_answered_first_question_is_never_lost(script):
    """A fault further down costs what follows it, not the conversation."""
    cut, _ = trainable(conversation(script))
    assert cut.exchanges[0] == Exchange("u0", "a1")


def test_the_names_of_both_forms_mean_three_roles():
    """What a role may be called; a new name must be sorted in here."""
    assert ROLES == {
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
    }


# --- sft-job data validate -----------------------------------------------------------------


def test_validate_counts_what_is_trained_on_and_what_is_not(job_file, capsys):
    """Read, kept, answers, and every loss with its reason; duplicates are kept and counted."""
    turns = [*ANSWERED, {"from": "human", "value": "and?"}]
    values = [record(), record(*turns), record(*turns), record({"from": "gpt", "value": "a"})]
    write(job_file.parent / "conversations.json", values)
    data.validate(load(job_file))
    assert capsys.readouterr().out.splitlines() == [
        "4 conversations read, 3 to train on, 3 answers",
        "not trained on:",
        "         1  conversations equal to an earlier one (kept)",
        "         1  assistant turns before any question, dropped",
        "         1  conversations without a complete exchange, dropped",
        "         2  questions without an answer, dropped",
    ]


def test_validate_says_nothing_of_losses_where_there_are_none(job_file, capsys):
    """One line for good data."""
    data.validate(load(job_file))
    assert capsys.readouterr().out == "1 conversations read, 1 to train on, 1 answers\n"


def test_validate_reads_a_file_once_however_many_patterns_match_it(job_file, capsys):
    """As encoding does, which would otherwise train on other numbers than were shown."""
    job_file.write_text(
        job_file.read_text().replace("[conversations.json]", "[conversations.json, '*.json']")
    )
    data.validate(load(job_file))
    assert capsys.readouterr().out == "1 conversations read, 1 to train on, 1 answers\n"


def test_validate_refuses_data_without_anything_to_train_on(job_file, capsys):
    """And shows what was dropped and why: every other command refers to it for that."""
    write(job_file.parent / "conversations.json", [record({"from": "gpt", "value": "a"})])
    with pytest.raises(DataError, match="no conversation has a complete exchange") as caught:
        data.validate(load(job_file))
    said = capsys.readouterr().out + str(caught.value)
    assert "1  assistant turns before any question, dropped" in said
