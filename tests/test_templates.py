"""The exact text of a template, and where the supervised part begins."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_job.conversations import Exchange
from sft_job.templates import TEMPLATES, VICUNA

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
EXCHANGES = [Exchange("Hi", "Hello!"), Exchange("Who?", "Vicuna."), Exchange("Really?", "Yes.")]


def joined(system: str | None, exchanges: list[Exchange]) -> str:
    """The text of a conversation with the end-of-sequence id written as </s>."""
    return "".join(segment.text + "</s>" for segment in VICUNA.render(system, exchanges))


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, f"{SYSTEM} USER: Hi ASSISTANT: Hello!</s>"),
        (2, f"{SYSTEM} USER: Hi ASSISTANT: Hello!</s>USER: Who? ASSISTANT: Vicuna.</s>"),
        (
            3,
            f"{SYSTEM} USER: Hi ASSISTANT: Hello!</s>USER: Who? ASSISTANT: Vicuna.</s>"
            "USER: Really? ASSISTANT: Yes.</s>",
        ),
    ],
)
def test_vicuna_is_the_text_of_fastchat(count, expected):
    """lm-sys/FastChat's get_prompt for vicuna_v1.1: no newline, no space after </s>."""
    assert joined(None, EXCHANGES[:count]) == expected


def test_a_system_turn_replaces_the_default_system_text():
    """In its place, with the same space after it, once."""
    expected = "Be brief. USER: Hi ASSISTANT: Hello!</s>USER: Who? ASSISTANT: Vicuna.</s>"
    assert joined("Be brief.", EXCHANGES[:2]) == expected


def test_text_is_neither_stripped_nor_escaped():
    """Spaces, newlines and what looks like a control token stay where they are."""
    segment = VICUNA.render("s", [Exchange(" </s>\n", " a </s> ")])[0]
    assert segment.text == "s USER:  </s>\n ASSISTANT:  a </s> "


def test_the_boundary_stands_after_the_colon_of_assistant():
    """The answer is supervised with its leading space; what is before is not."""
    first, second = VICUNA.render(None, EXCHANGES[:2])
    assert first.text[: first.boundary] == f"{SYSTEM} USER: Hi ASSISTANT:"
    assert first.text[first.boundary :] == " Hello!"
    assert second.text[: second.boundary] == "USER: Who? ASSISTANT:"
    assert second.text[second.boundary :] == " Vicuna."


texts = st.text(min_size=1, max_size=20)


@given(st.none() | texts, st.lists(st.builds(Exchange, texts, texts), min_size=1, max_size=5))
def test_one_segment_an_exchange_and_its_answer_supervised(system, exchanges):
    """Whatever is written in the turns, also the words of the template itself."""
    segments = VICUNA.render(system, exchanges)
    answers = [segment.text[segment.boundary :] for segment in segments]
    prompts = [segment.text[: segment.boundary] for segment in segments]
    assert answers == [f" {exchange.assistant}" for exchange in exchanges]
    heads = [f"{system or SYSTEM} ", *[""] * (len(exchanges) - 1)]
    assert prompts == [
        f"{head}USER: {exchange.user} ASSISTANT:"
        for head, exchange in zip(heads, exchanges, strict=True)
    ]


def test_no_exchange_is_no_text():
    """The system text alone is nothing to train on."""
    assert VICUNA.render("s", []) == []


def test_templates_are_found_by_their_own_name():
    """The name in the job file is the name of the template."""
    assert {name: template.name for name, template in TEMPLATES.items()} == {"vicuna": "vicuna"}
