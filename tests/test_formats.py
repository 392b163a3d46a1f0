"""What the keys of other tools' data mean: honoured, refused by name, or counted and listed."""

import json
from pathlib import Path
from typing import Any

import pytest

from sft_job.conversations import Conversation, Turn, read
from sft_job.errors import DataError
from sft_job.formats import OTHERS, IgnoredKeys, ignored_line

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def parse(record: object, ignored: IgnoredKeys | None = None) -> Conversation | list[str]:
    """The conversation that a record is, or its faults without the place."""
    path = Path("record.jsonl")
    path.write_text(json.dumps(record) + "\n")
    try:
        (conversation,) = read([path], ignored)
    except DataError as error:
        return [fault.removeprefix("record.jsonl:1: ") for fault in error.faults]
    return conversation


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    """Records are written to a file of the test's own."""
    monkeypatch.chdir(tmp_path)


def of(*turns: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """A record of these turns (a question and its answer), with keys beside them."""
    return {"id": "c", "messages": list(turns) or [USER, ANSWER], **keys}


def trained(record: object) -> list[bool]:
    """Of each answer of a record whether it is trained on."""
    conversation = parse(record)
    assert isinstance(conversation, Conversation), conversation
    return [turn.trained for turn in conversation.turns if turn.role == "assistant"]


# --- the system text -----------------------------------------------------------------------

S = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    "key",
    ["system", "system_prompt", "system_message", "systemPrompt", "system_instruction", "sys"],
)
@pytest.mark.parametrize("turns", [[USER, ANSWER], [S, USER, ANSWER], [S | {"content": ""}, USER]])
def test_a_system_text_beside_the_turns_is_the_system_turn(key, turns):
    """Where there is none, or an empty one; an equal one stays the only one."""
    conversation = parse(of(*turns, ANSWER, **{key: "s"}))
    assert conversation.turns[0] == Turn("system", "s")
    assert [turn.role for turn in conversation.turns].count("system") == 1


def test_a_conversation_has_one_identity_wherever_its_system_text_stands():
    """A copy in the other form is a duplicate."""
    assert parse(of(S, USER, ANSWER)).turns == parse(of(system="s")).turns


@pytest.mark.parametrize("value", [None, "", "  \n", [], {}])
def test_no_system_text_is_none(value):
    """As exports fill in where a conversation has none."""
    assert parse(of(system=value)).turns == parse(of()).turns


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        (of(S, USER, ANSWER, system="t"), "`system` differs from the system turn"),
        (of(USER, ANSWER, S, system="t"), "`system` differs from the system turn"),
        (of(system="s", system_prompt="t"), "`system` and `system_prompt` differ"),
        (of(system=["s"]), "`system` must be text, not list ['s']"),
        (of(system=5), "`system` must be text, not number 5"),
        (of(system="s\ud800"), "`system` has a lone surrogate (U+D800, character 2)"),
        (of(USER | {"system": "s"}, ANSWER), "`system`: a system text belongs beside the turns"),
    ],
)
def test_a_system_text_that_is_not_clear_is_refused(record, fault):
    """Neither of two is chosen."""
    (found,) = parse(record)
    assert fault in found


# --- what is trained on --------------------------------------------------------------------

OFF = [
    {"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False},
    {"loss": 0}, {"loss_weight": 0.0}, {"train": False, "loss": False, "weight": 0},
    {"train": False, "weight": None}, {"trainable": False}, {"is_trained": False},
    {"supervised": 0}, {"compute_loss": False}, {"sample_weight": 0.0},
]  # fmt: skip
ON = [{"weight": 1}, {"weight": 1.0}, {"train": True}, {"loss": True}, {"training": 1},
      {"weight": None, "train": None}, {"weight": ""}, {"train": "null"}]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "expected"), [*((f, False) for f in OFF), *((f, True) for f in ON)]
)
def test_a_flag_says_whether_an_answer_is_trained_on(flags, expected):
    """In a turn for that answer; beside the turns for all that say nothing themselves."""
    assert trained(of(USER, ANSWER | flags, USER, ANSWER)) == [expected, True]
    assert trained(of(USER, ANSWER, USER, ANSWER, **flags)) == [expected, expected]


def test_a_turn_is_heard_before_its_conversation():
    """The flag beside the turns is a default."""
    turns = [USER, ANSWER, USER, ANSWER | {"train": True}, USER, ANSWER | {"weight": 0}]
    assert trained(of(*turns, train=False)) == [False, True, False]
    assert trained(of(*turns, weight=1)) == [True, True, False]


@pytest.mark.parametrize("flags", OFF)
@pytest.mark.parametrize("role", ["system", "user"])
def test_a_question_may_be_flagged_as_not_trained_on(flags, role):
    """It never is; nothing changes."""
    turns = [S, USER, ANSWER]
    flagged = [turn | flags if turn["role"] == role else turn for turn in turns]
    assert parse(of(*flagged)).turns == parse(of(*turns)).turns


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss", "loss_weight"])
@pytest.mark.parametrize("value", [0.5, 2, -1, "no", "0", "true", [0], {"a": 1}, 10**400])
def test_a_flag_of_another_value_is_refused(key, value):
    """By name, with what it must be, in a turn and beside the turns."""
    for record, place in (
        (of(USER, ANSWER | {key: value}), "conversation 'c', turn 2"),
        (of(**{key: value}), "conversation 'c'"),
    ):
        (fault,) = parse(record)
        assert fault.startswith(f"{place}: `{key}` says whether an answer is trained on: it must ")
        assert fault.endswith("; give the key another name if it means something else")


def test_flags_that_contradict_each_other_are_refused():
    """Neither is chosen."""
    faults = parse(of(USER, ANSWER | {"weight": 1, "train": False}))
    assert faults == ["conversation 'c', turn 2: `weight` and `train` contradict each other"]
    assert "contradict" in parse(of(loss=True, training=0))[0]


@pytest.mark.parametrize(("turn", "what"), [(USER, "question"), (S, "system text")])
def test_training_on_a_question_is_refused(turn, what):
    """Only answers are trained on."""
    turns = [S, USER, ANSWER]
    number = turns.index(turn) + 1
    turns[number - 1] = turn | {"weight": 1}
    assert parse(of(*turns)) == [
        f"conversation 'c', turn {number}: a flag asks to train on a {what}, "
        "but only answers are trained on"
    ]


def test_a_flagged_copy_is_another_conversation():
    """Flags are part of what a conversation is."""
    assert parse(of()).turns != parse(of(USER, ANSWER | {"weight": 0})).turns
    assert parse(of()).turns == parse(of(USER | {"weight": 0}, ANSWER | {"weight": 1})).turns


@pytest.mark.parametrize("value", ["User", "user", "human", None, ""])
def test_masking_the_questions_is_what_is_done(value):
    """NeMo's `mask` names the role whose turns are not trained on."""
    assert trained(of(mask=value)) == [True]


@pytest.mark.parametrize("value", ["Assistant", "None", ["User", "Assistant"], True, 0])
def test_another_mask_is_refused(value):
    """Beside the turns, and any in a turn: 1 may mean masked, or trained on."""
    (fault,) = parse(of(mask=value))
    assert fault.startswith("conversation 'c': `mask`: only `User` can be masked; what is trained")
    for key in ("mask", "loss_mask", "masked"):
        for flag in (1, 0, True, False):
            (fault,) = parse(of(USER, ANSWER | {key: flag}))
            assert fault.startswith(f"conversation 'c', turn 2: `{key}`: {PARTS}")


# --- what is refused -----------------------------------------------------------------------

PARTS = "what is trained on can be said of whole answers only"
REFUSED = {
    "tools are not supported": [
        "tools", "functions", "tool_calls", "toolCalls", "tool_call", "function_call",
        "tool_call_id", "tool_choice", "tool_responses", "tool_use", "tool_results",
        "available_tools",
    ],
    "a reasoning text of its own is not supported": [
        "reasoning", "reasoning_content", "reasoning_details", "thinking", "thinking_blocks",
        "thought", "thoughts", "reasoning_effort", "enable_thinking", "chain_of_thought",
    ],
    "images, video, audio and files are not supported": [
        "image", "images", "image_url", "image_path", "video", "videos", "audio", "audios",
        "audio_path", "attachments", "multi_modal_data", "media", "files", "documents",
    ],
    "preference data is not supported": [
        "chosen", "rejected", "rejected_response", "chosen_messages", "preferred_output",
        "non_preferred_output", "kto_tag",
    ],
    "a template in the data is not supported": ["chat_template", "chat_template_kwargs"],
    PARTS: [
        "train_detail", "training_detail", "loss_mask", "loss_scale", "masked",
        "assistant_masks", "completion_mask", "no_loss", "mask_loss", "ignore_loss",
        "exclude_from_training",
    ],
    "which roles are trained on is not chosen by the data": ["train_on_inputs", "roles_to_train"],
    "an answer that is to be continued is not supported": ["prefix", "continue_final_message"],
    "earlier turns beside the conversation are not supported": ["history"],
    "a refusal beside the text is not supported": ["refusal"],
}  # fmt: skip
REFUSED_KEYS = [(key, reason) for reason, keys in REFUSED.items() for key in keys]


@pytest.mark.parametrize(("key", "reason"), REFUSED_KEYS)
def test_what_would_change_the_meaning_is_refused_by_name(key, reason):
    """Beside the turns and in a turn, whatever is in it."""
    for value in ("x", ["x"], {"x": 1}, 1, True):
        (fault,) = parse(of(**{key: value}))
        assert fault.startswith(f"conversation 'c': `{key}`: {reason}")
        (fault,) = parse(of(USER, ANSWER | {key: value}))
        assert fault.startswith(f"conversation 'c', turn 2: `{key}`: {reason}")


@pytest.mark.parametrize("key", ["channel", "recipient", "skip", "ignore"])
def test_what_means_something_in_a_turn_alone(key):
    """Beside the turns the same word says where a conversation comes from."""
    (fault,) = parse(of(USER, ANSWER | {key: "x"}))
    assert fault.startswith(f"conversation 'c', turn 2: `{key}`: ")
    ignored = IgnoredKeys()
    assert isinstance(parse(of(USER, ANSWER | {key: False}, **{key: "x"}), ignored), Conversation)
    assert ignored.counted()["conversation"] == {key: 1}


@pytest.mark.parametrize("key", [key for key, _ in REFUSED_KEYS])
def test_a_column_that_is_not_used_is_not_refused(key):
    """Exports of several conversations give all of them the keys of any of them."""
    ignored = IgnoredKeys()
    empty = {"name": None, "arguments": ""}
    unused = [None, "", " ", [], {}, "null", "None", "[]", "{}", empty, [empty], [[]]]
    if key not in REFUSED[PARTS]:  # a mask of false says something
        unused.append(False)
    for value in unused:
        conversation = parse(of(USER, ANSWER | {key: value}, **{key: value}), ignored)
        assert isinstance(conversation, Conversation), (value, conversation)
    assert ignored_line(ignored.counted()) is None


def test_a_call_of_a_tool_without_text_is_one_mistake():
    """Its text is null because it is a call."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    assert parse(of(USER, call)) == [
        "conversation 'c', turn 2: `tool_calls`: tools are not supported"
    ]


@pytest.mark.parametrize("role", ["tool", "function", "function_call", "observation", "ipython"])
def test_the_roles_of_tools_are_refused_as_such(role):
    """OpenAI's and ShareGPT's."""
    faults = parse(of(USER, {"role": role, "content": "x"}, ANSWER))
    assert faults == [f"conversation 'c', turn 2: unknown role {role!r}; tools are not supported"]


@pytest.mark.parametrize("label", [True, False])
def test_a_judgement_of_the_answer_is_preference_data(label):
    """TRL's and ms-swift's KTO: of false the contrary is to be learnt. Others are metadata."""
    assert parse(of(label=label))[0].startswith("conversation 'c': `label`: preference data")
    assert trained(of(label="science")) == [True]
    assert trained(of(USER, ANSWER | {"label": True})) == [True]


def test_labels_that_become_text_are_refused():
    """NeMo's SteerLM types."""
    for name in ("TEXT_TO_VALUE", "VALUE_TO_TEXT"):
        assert f"`type`: {name} is not supported" in parse(of(type=name))[0]
    assert trained(of(type="chat")) == [True]


# --- which turns ---------------------------------------------------------------------------

SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize("empty", [None, [], ""])
def test_of_two_columns_the_filled_one_counts(empty):
    """Exports of both forms have null or an empty list in one of them."""
    expected = parse(of()).turns
    assert parse(of(conversations=empty)).turns == expected
    assert parse({"conversations": SHAREGPT, "messages": empty}).turns == expected


def test_two_conversations_in_one_record_are_refused():
    """Neither is chosen."""
    (fault,) = parse(of(conversations=SHAREGPT))
    assert fault == "both `conversations` and `messages` are filled; keep one of them"


@pytest.mark.parametrize(
    "turn",
    [
        {"from": "gpt", "content": "a"},
        {"role": "assistant", "value": "a"},
        {"role": "assistant", "content": "a", "from": None, "value": None},
        {"from": "gpt", "value": "a", "role": "assistant", "content": "a"},
        {"from": "gpt", "value": "", "role": "", "content": "a"},
        {"role": "gpt", "from": "assistant", "content": "a"},
    ],
)
def test_names_of_both_forms_in_one_turn_are_read_where_they_agree(turn):
    """`from` and `role`, `value` and `content` mean the same; null and nothing are not there."""
    assert parse(of(USER, turn)).turns == parse(of()).turns


@pytest.mark.parametrize(
    ("turn", "fault"),
    [
        ({"from": "gpt", "role": "user", "value": "a"}, "`from` and `role` differ"),
        (ANSWER | {"value": "b"}, "`value` and `content` differ"),
        (ANSWER | {"value": 5}, "`value` must be text, not number 5"),
        ({"from": None, "role": None, "value": "a"}, "neither `from` nor `role`; it has `from`,"),
        ({"speaker": "gpt", "text": "a"}, "neither `from` nor `role`; it has `speaker`, `text`"),
        (ANSWER | {"content": [{"type": "text", "text": "a"}]}, "parts are not supported, write "),
        (ANSWER | {"content": "\ud83d"}, "`content` has a lone surrogate (U+D83D, character 1)"),
    ],
)
def test_a_turn_that_is_not_clear_is_refused(turn, fault):
    """Neither reading is chosen."""
    assert any(
        found.startswith("conversation 'c', turn 2: ") and fault in found
        for found in parse(of(USER, turn))
    )


@pytest.mark.parametrize(
    ("record", "hint"),
    [
        ({"data": [of()]}, "they lie in the list `data`: the file must be that list alone"),
        ({"body": of()}, "they lie in `body`: write its content one level up"),
        ({"conversation": SHAREGPT}, "if `conversation` is the list of turns, call it `convers"),
        ({"Messages": [USER]}, "if `Messages` is the list of turns, call it `conversations`"),
        ({"instruction": "i", "input": "", "output": "o"}, "this is the Alpaca form; write {"),
        ({"prompt": [USER], "completion": [ANSWER]}, "this is a prompt with its completion"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "this is preference data, which is not"),
        ({"input": of(), "preferred_output": []}, "they lie in `input`"),
        ({"query": "q", "response": "r"}, "this is a query with its response"),
        ({"input_ids": [1]}, "this is tokenised data: give the conversations themselves"),
        ({"text": "t"}, "this is plain text, whose turns are not told apart"),
        (SHAREGPT[0], "this is a turn alone; write {"),
        ({"a\n": 1, "b": 2}, "it has 'a\\n', `b`"),
    ],
)
def test_another_form_is_named_for_what_it_is(record, hint):
    """With how to write it."""
    (fault,) = parse(record)
    assert fault.startswith("neither `conversations` nor `messages` in the record; ")
    assert hint in fault


def test_a_conversation_within_a_text_is_named():
    """A table's column that was written as JSON once more."""
    (fault,) = parse({"id": "c", "conversations": json.dumps(SHAREGPT)})
    assert fault.startswith("conversation 'c': `conversations` must be a list, not text '[{")
    assert fault.endswith("; it is JSON within a text, which has to be decoded first")
    assert "decoded" not in parse({"id": "c", "conversations": "q"})[0]


# --- the other keys ------------------------------------------------------------------------


def test_other_keys_are_counted_and_listed(tmp_path):
    """By conversation and by turn, the most frequent first; what is null is not there."""
    turns = [USER | {"time": 1}, ANSWER | {"time": 2, "model": "m"}]
    values = [of(*turns, source="s"), of(*turns, source="", topic=None, prompt="q", flagged=False)]
    path = tmp_path / "d.json"
    path.write_text(json.dumps(values))
    ignored = IgnoredKeys()
    read([path], ignored)
    assert ignored.counted() == {
        "conversation": {"source": 1, "prompt": 1, "flagged": 1},
        "turn": {"time": 4, "model": 2},
    }
    assert ignored_line(ignored.counted()) == (
        "keys that mean nothing here: time (4 turns), model (2 turns), source (1 conversation), "
        "prompt (1 conversation), flagged (1 conversation)"
    )


def test_an_id_that_is_no_name_is_counted():
    """A name is a text or a number."""
    for value in ({"$oid": "1"}, ["a"], True):
        ignored = IgnoredKeys()
        assert parse(of() | {"id": value}, ignored).id == "0"
        assert ignored.counted()["conversation"] == {"id": 1}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (7, "7"), (1.5, "1.5"), (None, "0"), ("a\nb", "a\\nb"), ("\ud800", "\\ud800"),
        ("x" * 300, "x"),
    ],
)  # fmt: skip
def test_an_id_can_stand_in_any_message(name, expected):
    """One line, valid Unicode, not long."""
    found = parse(of() | {"id": name}).id
    assert found.isprintable()
    assert found.startswith(expected)
    assert len(found) <= 200


def test_any_number_of_keys_is_listed_in_one_line(monkeypatch):
    """And neither memory nor the cache grows with it; no occurrence is lost."""
    monkeypatch.setattr(IgnoredKeys, "KEPT", 300)
    ignored = IgnoredKeys()
    for number in range(1000):
        ignored.add("conversation", [f"key-{number}", "often", "k" * 100_000])
    counts = ignored.counted()["conversation"]
    assert counts["k" * 57 + "..."] == counts["often"] == 1000
    assert len(counts) <= IgnoredKeys.LISTED + 1
    assert sum(counts.values()) == 3000
    assert counts[OTHERS] > 800
    line = ignored_line(ignored.counted(), listed=3)
    assert line.startswith("keys that mean nothing here: ")
    assert line.endswith("more")
    assert len(line) < 250


def test_keys_that_cannot_be_printed_are_escaped():
    """A terminal obeys control characters."""
    ignored = IgnoredKeys()
    ignored.add("turn", ["\x1b[2J", "a\nb", "ключ", "\ud800"])
    assert ignored_line(ignored.counted()) == (
        "keys that mean nothing here: '\\x1b[2J' (1 turn), 'a\\nb' (1 turn), ключ (1 turn), "
        "'\\ud800' (1 turn)"
    )
