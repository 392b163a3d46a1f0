"""Chat templates as data: the text of a conversation, and which of it is trained on.

A conversation becomes segments. Each segment is one exchange, and each ends in the
tokenizer's end-of-sequence id, which is inserted as an id and never written as text:

    A chat between ... USER: Hi ASSISTANT: Hello!|eos|USER: Who? ASSISTANT: Quill.|eos|
    ................................======= ======....................======= =====
                                    supervised: the answer with its leading space, and eos

The same template as Jinja goes into the exported tokenizer (`jinja`), so that what is typed
after training has exactly the ids that were trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sft_job.conversations import Exchange


@dataclass(frozen=True, slots=True)
class Segment:
    """One exchange as text; `text[boundary:]` and the end-of-sequence id are its answer."""

    text: str
    boundary: int
    trained: bool = True
    """Whether the answer is supervised."""


@dataclass(frozen=True, slots=True)
class Template:
    """A template of the form `system user: question assistant: answer<eos>`."""

    name: str
    system: str
    """Used when a conversation has no system turn."""
    user: str
    """Before a question."""
    assistant: str
    """Between question and answer; the supervised part begins after it."""
    answer: str
    """Before the answer's own text, and supervised with it."""

    def render(self, system: str | None, exchanges: Sequence[Exchange]) -> list[Segment]:
        segments = []
        for index, exchange in enumerate(exchanges):
            head = f"{system or self.system} " if index == 0 else ""
            prompt = f"{head}{self.user}{exchange.user}{self.assistant}"
            text = f"{prompt}{self.answer}{exchange.assistant}"
            segments.append(Segment(text, len(prompt), exchange.trained))
        return segments

    def jinja(self, start: str) -> str:
        """The template for `tokenizer.apply_chat_template`.

        Args:
            start: what the tokenizer needs written before the system text, such as the
                begin-of-sequence token.
        """
        return (
            "{%- if messages and messages[0]['role'] == 'system' -%}"
            "{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}"
            "{%- else -%}"
            f"{{%- set system = '' -%}}{{%- set turns = messages -%}}"
            "{%- endif -%}"
            f"{{{{- {_quote(start)} + (system or {_quote(self.system)}) + ' ' -}}}}"
            "{%- for turn in turns -%}"
            "{%- if turn['role'] == 'user' -%}"
            f"{{{{- {_quote(self.user)} + turn['content'] -}}}}"
            "{%- elif turn['role'] == 'assistant' -%}"
            f"{{{{- {_quote(self.assistant + self.answer)} + turn['content'] + eos_token -}}}}"
            "{%- else -%}"
            "{{- raise_exception('unknown role ' + turn['role']) -}}"
            "{%- endif -%}"
            "{%- endfor -%}"
            f"{{%- if add_generation_prompt -%}}{{{{- {_quote(self.assistant)} -}}}}{{%- endif -%}}"
        )


def _quote(text: str) -> str:
    """A Jinja string literal."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


# lm-sys/FastChat, conversation.py "vicuna_v1.1" (style ADD_COLON_TWO).
VICUNA = Template(
    name="vicuna",
    system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
    user="USER: ",
    assistant=" ASSISTANT:",
    answer=" ",
)

TEMPLATES = {template.name: template for template in (VICUNA,)}
