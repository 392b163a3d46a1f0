"""Conversations: both forms, every fault of a record with its place, and what is cut."""

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
    cut,
    read,
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


# --- faults of a record --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (
            {"from": "bot", "value": "a"},
            "unknown role 'bot'; known: system, human, user, gpt, assistant",
        ),
        ({"from": "GPT", "value": "a"}, "unknown role 'GPT'; known: "),
        ({"from": None, "value": "a"}, "neither `from` nor `role`; it has `from`, `value`"),
        ({"from": 5, "value": "a"}, "unknown role 5; known: "),
        ({"from": ["gpt"], "value": "a"}, "unknown role ['gpt']; known: "),
        ({"value": "a"}, "neither `from` nor `role`"),
        ({"from": "gpt"}, "`value` must be text, not nothing"),
        ({"from": "gpt", "value": None}, "`value` must be text, not nothing"),
        ({"from": "gpt", "value": 5}, "`value` must be text, not number 5"),
        ({"from": "gpt", "value": False}, "`value` must be text, not false"),
        ({"from": "gpt", "value": {}}, "`value` must be text, not object {}"),
        ({"role": "assistant", "content": ["a"]}, "`content` must be text, not list ['a']"),
        ({"role": "assistant", "content": 0}, "`content` must be text, not number 0"),
        ({"role": "assistant"}, "`content` must be text, not nothing"),
        ({"from": "gpt", "value": "a\ud83d"}, "`value` has a lone surrogate (U+D83D, character 2)"),
        ("gpt: a", "a turn must be an object, not text 'gpt: a'"),
        (None, "a turn must be an object, not nothing"),
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
        ("text", "a conversation must be an object, not text 'text'"),
        (None, "a conversation must be an object, not nothing"),
        ([], "a conversation must be an object, not list []; write {"),
        ({"id": "c1"}, "neither `conversations` nor `messages` in the record"),
        (
            {"id": "c1", "conversations": "q"},
            "conversation 'c1': `conversations` must be a list, not text 'q'",
        ),
        (
            {"id": "c1", "messages": {"role": "user"}},
            "conversation 'c1': `messages` must be a list, not object {'role': 'user'}",
        ),
        (
            {"id": "c1", "conversations": None},
            "conversation 'c1': `conversations` must be a list, not nothing",
        ),
        (
            {"id": "c1", "conversations": []},
            "conversation 'c1': no assistant turn, there is nothing to learn",
        ),
        (
            {"id": "c1", "conversations": ANSWERED[:1]},
            "conversation 'c1': no assistant turn, there is nothing to learn",
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


def test_all_faults_of_all_files_are_reported_at_once(tmp_path):
    """A broken file does not hide the faults before it or in the next one."""
    first = tmp_path / "a.jsonl"
    first.write_text('{"id": 1}\n{"id": 2,}\n')
    second = write(tmp_path / "b.json", [record(), 5, record({"from": "gpt"})])
    third = write(tmp_path / "c.json", [])
    found = faults(first, second, third, tmp_path / "none.json")
    assert [fault.partition(": ")[0] for fault in found] == [
        "a.jsonl:1",
        "a.jsonl:2",
        "b.json[1]",
        "b.json[2]",
        "c.json",
        "none.json",
    ]
    assert found[-2] == "c.json: no conversations in the file"


def test_the_message_says_what_next(tmp_path):
    """And where more of the faults are, when there are more."""
    path = write(tmp_path / "d.json", [5])
    with pytest.raises(DataError, match=r"-> mend the data$"):
        read([path])
    write(path, [5] * 31)
    with pytest.raises(DataError, match=r"-> mend the data; `sft-job data validate job\.yaml` lis"):
        read([path])


def test_a_value_in_a_message_is_short(tmp_path):
    """However large or deep it is."""
    deep: list = []
    for _ in range(800):
        deep = [deep]
    values = [["x" * 10_000], list(range(10_000)), dict.fromkeys(map(str, range(10_000))), deep]
    turns = [{"from": "gpt", "value": value} for value in [*values, 10**4000]]
    turns.append({"from": "x" * 10_000, "value": ""})
    found = faults(write(tmp_path / "d.json", [record(*turns, name="n" * 10_000)]))
    assert len(found) == 6
    assert max(map(len, found)) < 300


# --- the cutting policy --------------------------------------------------------------------


def conversation(script: str) -> Conversation:
    """Turns from letters: s, u, a are system, user, assistant; a capital is an empty turn.

    x is an answer that is flagged as not to be trained on.
    """
    roles = {"s": "system", "u": "user", "a": "assistant", "x": "assistant"}
    turns = [
        Turn(roles[letter.lower()], "" if letter.isupper() else f"{letter}{number}", letter != "x")
        for number, letter in enumerate(script)
    ]
    return Conversation("c1", "d.json:1", tuple(turns))


def letters(cut: Trainable | None) -> str:
    """The turns that were kept, as `conversation` takes them."""
    if cut is None:
        return ""
    answers = ("ua" if exchange.trained else "ux" for exchange in cut.exchanges)
    return "s" * (cut.system is not None) + "".join(answers)


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
        # answers that are flagged as not to be trained on stay, wherever they are
        ("uxua", "uxua", {"untrained_answer": 1}),
        ("suauxux", "suauxux", {"untrained_answer": 2}),
        ("xuaux", "uaux", {"leading_assistant_turn": 1, "untrained_answer": 1}),
        ("uauuax", "ua", {"wrong_order": 4}),
        # and nothing else is left
        ("ux", "", {"untrained_answer": 1, "no_trained_answer": 1}),
        ("suxux", "", {"untrained_answer": 2, "no_trained_answer": 1, "system_turn": 1}),
        ("uxuua", "", {"untrained_answer": 1, "wrong_order": 3, "no_trained_answer": 1}),
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
    for exchanges in (
        (),
        (Exchange("", "a"),),
        (Exchange("u", "a"), Exchange("u", "")),
        (Exchange("u", "a", trained=False),),
    ):
        with pytest.raises(ValueError, match=r"d\.json:1: not a trainable conversation"):
            Trainable("c1", "d.json:1", None, exchanges)


scripts = st.text("suaxSUA", max_size=10)


@given(scripts)
def test_no_turn_is_lost_without_a_reason(script):
    """Turns kept and turns lost are the turns given."""
    cut, lost = trainable(conversation(script))
    untrained, dropped = lost["untrained_answer"], lost["no_trained_answer"]
    for reason in ("no_complete_exchange", "untrained_answer", "no_trained_answer"):
        del lost[reason]
    # Of a conversation whose answers are all flagged, the questions go as well.
    assert len(letters(cut)) + lost.total() + dropped * 2 * untrained == len(script)
    assert letters(cut).count("x") == (0 if dropped else untrained)


@given(scripts)
def test_what_is_kept_are_turns_of_the_conversation_in_their_order(script):
    """Exchanges alternate, no text is empty, nothing is made up or moved."""
    given_turns = conversation(script).turns
    cut, lost = trainable(conversation(script))
    assert (cut is None) == (lost["no_complete_exchange"] + lost["no_trained_answer"] == 1)
    if cut is not None:
        texts = [text for e in cut.exchanges for text in (e.user, e.assistant)]
        assert all(texts)
        assert [text[0] for text in texts] == [*letters(cut).removeprefix("s")]
        start = next(i for i, turn in enumerate(given_turns) if turn.text == texts[0])
        assert [turn.text for turn in given_turns[start:][: len(texts)]] == texts
        assert cut.system in (None, given_turns[0].text)


@given(st.text("ua", max_size=10).filter(lambda script: script.startswith("ua")))
def test_an_answered_first_question_is_never_lost(script):
    """A fault further down costs what follows it, not the conversation."""
    cut, _ = trainable(conversation(script))
    assert cut.exchanges[0] == Exchange("u0", "a1")


def test_copies_are_counted_and_kept():
    """With their flags: what is trained on differently is no copy."""
    kept, lost = cut([conversation("uaua"), conversation("uaux"), *[conversation("uaua")] * 2])
    assert [letters(one) for one in kept] == ["uaua", "uaux", "uaua", "uaua"]
    assert lost == {"duplicate": 2, "untrained_answer": 1}


def test_control_characters_are_counted_and_kept():
    """Legal in JSON as escapes, and text like any other; tab and line ends are none."""
    texts = ["a\x00b", "\x1b[1m", "\x7f", "\x92", "a\tb\r\n", "ä\u200b\ufeff"]
    turns = [Turn("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]
    (kept,), lost = cut([Conversation("c1", "d.json:1", tuple(turns))])
    assert [text for e in kept.exchanges for text in (e.user, e.assistant)] == texts
    assert lost == {"control_characters": 4}


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


def test_validate_lists_the_keys_that_mean_nothing(job_file, capsys):
    """After what is not trained on."""
    values = [record() | {"source": "s"}, record(*[turn | {"time": 1} for turn in ANSWERED])]
    write(job_file.parent / "conversations.json", values)
    data.validate(load(job_file))
    assert capsys.readouterr().out.splitlines() == [
        "2 conversations read, 2 to train on, 2 answers",
        "not trained on:",
        "         1  conversations equal to an earlier one (kept)",
        "keys that mean nothing here: time (2 turns), source (1 conversation)",
    ]


def test_validate_counts_the_answers_that_are_trained_on(job_file, capsys):
    """Not those that are only context."""
    turns = [ANSWERED[0], ANSWERED[1] | {"weight": 0}, *ANSWERED]
    values = [record(*turns), record() | {"train": False}]
    write(job_file.parent / "conversations.json", values)
    data.validate(load(job_file))
    assert capsys.readouterr().out.splitlines() == [
        "2 conversations read, 1 to train on, 1 answers",
        "not trained on:",
        "         1  conversations without an answer that is to be trained on, dropped",
        "         2  answers flagged as not to be trained on",
    ]


def test_validate_lists_more_faults_than_other_commands(job_file):
    """They refer to it for that."""
    write(job_file.parent / "conversations.json", list(range(2000)))
    with pytest.raises(DataError) as caught:
        data.validate(load(job_file))
    lines = str(caught.value).splitlines()
    assert lines[0] == "2,000 faults of the data:"
    assert lines[-2:] == ["  ... and 1,000 more", "  -> mend the data"]
