"""What the keys of other tools' data mean here. Nothing is ignored in silence.

    honoured    system text; whether an answer is trained on
    refused     what would change the meaning and is not supported, by name, where it is filled
    nothing     every other key: counted and listed

The forms are those of OpenAI, ShareGPT (as in LLaMA-Factory and ms-swift), axolotl, TRL, NeMo,
Mistral and Anthropic. Keys are compared without case, `_` and `-`: `toolCalls` is `tool_calls`.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sft_job.records import kind, quoted

Level = Literal["conversation", "turn"]

# The names stand here in the spelling of `_spelling`.
SYSTEM = ("system", "systemprompt", "systemmessage", "systeminstruction", "systeminstructions",
          "systemtext", "systemcontent", "sysprompt", "sys")  # fmt: skip

# OpenAI, Mistral: weight. axolotl: train, training. ms-swift: loss. LLaMA-Factory: loss_weight.
# Others: what can mean nothing else.
FLAGS = ("weight", "train", "training", "loss", "lossweight", "trainable", "istrainable",
         "trained", "istrained", "supervised", "issupervised", "computeloss", "sampleweight",
         "exampleweight")  # fmt: skip

_PREFERENCE = "preference data is not supported: nothing says that the answers are to be learnt"
_PARTS = (
    "what is trained on can be said of whole answers only: `weight: 0` or `train: false` in a turn"
)
REFUSED = (
    (
        r"(available)?tools?|functions"
        r"|(tool|function)s?(call|choice|use|result|response|output|definition|schema)s?(ids?)?",
        "tools are not supported",
    ),
    (
        r"(reasoning|thinking|thoughts?)"
        r"(content|text|block|detail|step|trace|process|effort|budget|signature)?s?"
        r"|enablethinking|chainofthoughts?|cot",
        "a reasoning text of its own is not supported: write it into the answer or take it out",
    ),
    (
        r"(image|img|picture|video|audio)s?(path|url|file|data|bytes|base64)?s?"
        r"|multimodal(data|inputs?)|attachments?|media|files|documents",
        "images, video, audio and files are not supported",
    ),
    (
        r"(chosen|rejected|(non)?preferred)"
        r"(response|output|message|answer|completion|conversation|image)?s?|ktotag",
        _PREFERENCE,
    ),
    (
        r"chattemplate(kwargs|args)?",
        "a template in the data is not supported: data.template is used for all conversations",
    ),
    (
        r"(train|training|loss|weight)(detail|mask|span|offset|scale|weight)s?|weights"
        r"|(label|assistant|completion|token)s?masks?|masked"
        r"|(no|mask|ignore|skip|exclude|without)(from)?(train|training|loss)",
        _PARTS,
    ),
    (
        r"trainon(input|prompt|eo[st])s?|rolestotrain",
        "which roles are trained on is not chosen by the data: it is the answers",
    ),
    (
        r"prefix|continuefinalmessage",
        "an answer that is to be continued is not supported",
    ),
    (r"history", "earlier turns beside the conversation are not supported: write them as turns"),
    (r"refusal", "a refusal beside the text is not supported: write it as the answer's text"),
)
# Beside a conversation these are about where it comes from.
REFUSED_IN_A_TURN = (
    (r"channel|recipient", "channels and recipients of an answer (harmony) are not supported"),
    (r"skip|skipped|ignored?", "write `train: false` for an answer that is not to be trained on"),
)
_PATTERNS: dict[Level, tuple[tuple[re.Pattern[str], str], ...]] = {
    "conversation": tuple((re.compile(pattern), reason) for pattern, reason in REFUSED),
    "turn": tuple((re.compile(p), reason) for p, reason in (*REFUSED, *REFUSED_IN_A_TURN)),
}

# NeMo: attributes of a turn are written into its text.
_NEMO_TYPES = ("TEXT_TO_VALUE", "VALUE_TO_TEXT")


def _spelling(key: str) -> str:
    return re.sub(r"[_\-\s]", "", key.casefold())


@functools.lru_cache(4096)
def _sort(key: str, level: Level) -> tuple[str, str]:
    """(`system`, `flag`, `value`, `refused` or `nothing`; the reason of a refusal)."""
    name = _spelling(key)
    if name in FLAGS:
        return "flag", ""
    if name in SYSTEM and level == "conversation":
        return "system", ""
    if name in ("mask", "label", "type") and level == "conversation":
        return "value", ""  # the value tells
    if name in SYSTEM:
        return "refused", "a system text belongs beside the turns, or in a turn of its own"
    if name == "mask":
        return "refused", _PARTS
    for pattern, reason in _PATTERNS[level]:
        if pattern.fullmatch(name):
            return "refused", reason
    return "nothing", ""


class Keys:
    """The keys of one conversation or one turn beside those of its text, sorted by meaning."""

    def __init__(self) -> None:
        self.system: dict[str, Any] = {}
        self.flags: dict[str, Any] = {}
        self.ignored: list[str] = []
        self.faults: list[str] = []


def sort_keys(record: Mapping[str, Any], own: frozenset[str], level: Level) -> Keys:
    """Sort the keys of a record. What holds nothing (null, blank, an empty list) is not there.

    Args:
        own: the keys that have been read already.
    """
    keys = Keys()
    refused: dict[str, list[str]] = {}
    for key, value in record.items():
        if key in own or _is_empty(value):
            continue
        meaning, reason = _sort(key, level) if len(key) <= 60 else ("nothing", "")
        if meaning == "value":
            meaning, reason = _judge(_spelling(key), value)
        elif meaning == "refused" and _is_unused(value, reason):
            continue
        if meaning == "system":
            keys.system[key] = value
        elif meaning == "flag":
            keys.flags[key] = value
        elif meaning == "nothing":
            keys.ignored.append(key)
        elif meaning == "refused":
            refused.setdefault(reason, []).append(quoted(key))
    keys.faults = [f"{', '.join(names)}: {reason}" for reason, names in refused.items()]
    return keys


def _judge(name: str, value: Any) -> tuple[str, str]:
    """Keys of a conversation that are refused for some of their values only."""
    if name == "mask":
        # NeMo: the role whose turns are not trained on, as is always so here.
        good = isinstance(value, str) and value.casefold() in ("user", "human")
        return ("honoured", "") if good else ("refused", f"only `User` can be masked; {_PARTS}")
    if name == "label" and isinstance(value, bool):  # TRL, ms-swift: KTO
        return "refused", _PREFERENCE
    if name == "type" and value in _NEMO_TYPES:
        return "refused", f"{value} is not supported: labels do not become text"
    return "nothing", ""


def _is_empty(value: Any) -> bool:
    return value is None or value in ([], {}) or (isinstance(value, str) and not value.strip())


def _is_unused(value: Any, reason: str = _PARTS) -> bool:
    """Whether a key is there for its column's sake: exports fill in "[]", {"name": null}.

    False says that something is not there or not wanted; of a part's mask it says something.
    """
    if value is False:
        return reason != _PARTS
    inside = [value]
    while inside:
        one = inside.pop()
        if isinstance(one, dict):
            inside += one.values()
        elif isinstance(one, list):
            inside += one
        elif isinstance(one, str):
            if one.strip().casefold() not in ("", "null", "none", "nan", "[]", "{}"):
                return False
        elif one is not None:
            return False
    return True


def flagged(flags: Mapping[str, Any]) -> tuple[bool | None, list[str]]:
    """Whether answers are trained on, as flags say it; None where they do not. And their faults."""
    said: dict[str, bool] = {}
    faults = []
    for key, value in flags.items():
        if isinstance(value, int | float) and value in (0, 1):  # also true, false, and 0.0
            said[key] = bool(value)
        elif not _is_unused(value):
            faults.append(
                f"{quoted(key)} says whether an answer is trained on: it must be true, false, 1 or "
                f"0, not {kind(value)}; give the key another name if it means something else"
            )
    if len(set(said.values())) == 2:
        faults.append(" and ".join(map(quoted, said)) + " contradict each other")
    return next(iter(said.values()), None), faults


# --- records without a conversation ----------------------------------------------------------

# Keys that are there together -> the form that they belong to.
FORMS = (
    (("chosen", "rejected"), "preference data, which is not supported"),
    (("preferred_output",), "preference data, which is not supported"),
    (("instruction", "output"), "the Alpaca form"),
    (("prompt", "completion"), "a prompt with its completion"),
    (("prompt", "response"), "a prompt with its response"),
    (("query", "response"), "a query with its response"),
    (("question", "answer"), "a question with its answer"),
    (("input", "output"), "an input with its output"),
    (("input_ids",), "tokenised data: give the conversations themselves"),
    (("text",), "plain text, whose turns are not told apart"),
)
WRITE = 'write {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}'


def form_of(record: Mapping[str, Any]) -> str:
    """What to do about a record that has no conversation under a known key; ends a sentence."""
    for key, value in record.items():
        if _has_turns(value):
            return f"; they lie in {quoted(key)}: write its content one level up"
        if isinstance(value, list) and value and _has_turns(value[0]):
            return (
                f"; they lie in the list {quoted(key)}: the file must be that list alone, "
                "or have one of its objects in each line"
            )
    for names, what in FORMS:
        if all(name in record for name in names):
            return f"; this is {what}; {WRITE}"
    if {"from", "role"} & record.keys() and {"value", "content"} & record.keys():
        return f"; this is a turn alone; {WRITE}"
    for key, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return f"; if {quoted(key)} is the list of turns, call it `conversations`; {WRITE}"
    has = ", ".join(quoted(key) for key in list(record)[:8])
    return f"; it has {has}" if has else ""


def _has_turns(value: Any) -> bool:
    return isinstance(value, dict) and ("conversations" in value or "messages" in value)


# --- counting the rest -----------------------------------------------------------------------


class IgnoredKeys:
    """How many conversations and turns have each key that means nothing here."""

    # Keys that are told apart; a file may have any number, such as ids that are keys.
    KEPT = 10_000
    LISTED = 100

    def __init__(self) -> None:
        self._counts: dict[Level, Counter[str]] = {"conversation": Counter(), "turn": Counter()}

    def add(self, level: Level, keys: Sequence[str]) -> None:
        counts = self._counts[level]
        for key in keys:
            key = key if len(key) <= 60 else key[:57] + "..."
            counts[key if key in counts or len(counts) < self.KEPT else OTHERS] += 1

    def counted(self) -> dict[str, dict[str, int]]:
        """`{"conversation": {key: count}, "turn": {key: count}}`, the most frequent keys first."""
        found: dict[str, dict[str, int]] = {}
        for level, counts in self._counts.items():
            first = dict(counts.most_common(self.LISTED))
            rest = counts.total() - sum(first.values())
            found[level] = first | ({OTHERS: rest + first.get(OTHERS, 0)} if rest else {})
        return found


OTHERS = "other keys"


def ignored_line(found: Mapping[str, Mapping[str, int]], listed: int = 10) -> str | None:
    """One line about the keys that `IgnoredKeys` has counted; None where there are none."""
    all_keys = [
        (count, key, level) for level, counts in found.items() for key, count in counts.items()
    ]
    all_keys.sort(key=lambda one: -one[0])
    parts = [
        f"{key if key.isprintable() else repr(key)} ({count:,} {level}{'s' * (count != 1)})"
        for count, key, level in all_keys[:listed]
    ]
    if len(all_keys) > listed:
        parts.append(f"and {len(all_keys) - listed:,} more")
    return f"keys that mean nothing here: {', '.join(parts)}" if parts else None
