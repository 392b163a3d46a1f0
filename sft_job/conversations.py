"""Conversations: read from files, checked with their place, cut to what can be trained on.

    record -> Conversation (turns as written, checked)
           -> Trainable (system text and complete exchanges) + what was lost, by reason

What the keys of a record mean is in `formats`.

Policy. A conversation is trained on up to its first fault of form: an answer whose history
is missing would teach nonsense, so nothing after the fault is kept.

    leading_assistant_turn    an answer before any question: dropped
    empty_turn                cut before the exchange with an empty turn
    wrong_order               cut where the roles stop alternating
    trailing_user_turn        a question without an answer: dropped
    untrained_answer          flagged as not to be trained on: stays as context
    no_complete_exchange      nothing is left: the conversation is dropped,
    no_trained_answer         nothing that is left is trained on: dropped,
    system_turn               and its system turn with it
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sft_job.errors import DataError
from sft_job.formats import IgnoredKeys, flagged, form_of, sort_keys
from sft_job.records import Faults, brief, kind, quoted, records

Role = Literal["system", "user", "assistant"]

# ShareGPT exports and chat APIs name the same three roles differently.
ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
TOOL_ROLES = ("tool", "tool_call", "tool_response", "function", "function_call", "observation",
              "ipython")  # fmt: skip

TURNS = ("conversations", "messages")
RECORD_KEYS = frozenset({*TURNS, "id"})
ROLE_KEYS, TEXT_KEYS = ("from", "role"), ("value", "content")
TURN_KEYS = frozenset({*ROLE_KEYS, *TEXT_KEYS})


@dataclass(frozen=True, slots=True)
class Turn:
    role: Role
    text: str
    trained: bool = True
    """False only for an answer that the data wants as context."""


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
    trained: bool = True
    """Whether the answer is trained on; else it is only context of what follows."""


@dataclass(frozen=True, slots=True)
class Trainable:
    """What is trained on of one conversation; at least one answer of it, no empty text."""

    id: str
    where: str
    system: str | None
    exchanges: tuple[Exchange, ...]

    def __post_init__(self) -> None:
        complete = all(e.user and e.assistant for e in self.exchanges)
        if not complete or not any(e.trained for e in self.exchanges):
            raise ValueError(f"{self.where}: not a trainable conversation")


# --- from records to conversations -----------------------------------------------------------

SEE = "`sft-job data validate job.yaml`"


def read(
    paths: Sequence[Path], ignored: IgnoredKeys | None = None, *, shown: int = 30
) -> list[Conversation]:
    """Read and check all files.

    Args:
        ignored: counts the keys that mean nothing here.
        shown: faults that the error's message has; the rest is counted.

    Raises:
        DataError: with the faults of all files at once; a file without conversations is one.
    """
    conversations: list[Conversation] = []
    faults = Faults()
    ignored = IgnoredKeys() if ignored is None else ignored
    for path in paths:
        before = len(conversations), faults.count
        for index, (where, record) in enumerate(records(path, faults)):
            conversation = _Check(where, faults, ignored).conversation(record, str(index))
            if conversation is not None:
                conversations.append(conversation)
        if (len(conversations), faults.count) == before:
            faults.add(f"{path}: no conversations in the file")
    if faults.count:
        more = f"; {SEE} lists more of them" if shown < faults.count and shown < Faults.KEPT else ""
        raise faults.error(remedy=f"mend the data{more}", shown=shown)
    return conversations


class _Check:
    """The check of one record."""

    def __init__(self, where: str, faults: Faults, ignored: IgnoredKeys) -> None:
        self._where, self._faults, self._ignored = where, faults, ignored

    def _fault(self, what: str) -> None:
        self._faults.add(f"{self._where}: {what}")

    def conversation(self, record: Any, default_id: str) -> Conversation | None:
        """The conversation of a record; None when it has faults."""
        place, before = self._where, self._faults.count
        key = self._turns_key(record)
        if key is None:
            return None
        name = record.get("id")
        if isinstance(name, bool) or not isinstance(name, str | int | float):
            if name is not None:
                self._ignored.add("conversation", ["id"])
            name = default_id
        name = _printable(str(name))
        self._where = f"{place}: conversation {brief(name)}"
        raw = record[key]
        if not isinstance(raw, list):
            decode = isinstance(raw, str) and raw.lstrip()[:1] in ("[", "{")
            hint = "; it is JSON within a text, which has to be decoded first" if decode else ""
            self._fault(f"`{key}` must be a list, not {kind(raw)}{hint}")
            return None
        keys = sort_keys(record, RECORD_KEYS, "conversation")
        self._ignored.add("conversation", keys.ignored)
        default, faults = flagged(keys.flags)
        for fault in [*keys.faults, *faults]:
            self._fault(fault)
        turns = list(self._turns(raw, default is not False))
        turns = self._with_system(keys.system, turns)
        if self._faults.count > before:
            return None
        if not any(turn.role == "assistant" for turn in turns):
            self._fault("no assistant turn, there is nothing to learn")
            return None
        return Conversation(name, place, tuple(turns))

    def _turns_key(self, record: Any) -> str | None:
        if not isinstance(record, dict):
            hint = '; write {"conversations": [...]}' if isinstance(record, list) else ""
            self._fault(f"a conversation must be an object, not {kind(record)}{hint}")
            return None
        there = [key for key in TURNS if key in record]
        filled = [key for key in there if record[key] not in (None, [], "")]
        if not there:
            self._fault(f"neither `conversations` nor `messages` in the record{form_of(record)}")
            return None
        if len(filled) == 2:
            self._fault("both `conversations` and `messages` are filled; keep one of them")
            return None
        # An export with both columns has null or an empty list in one of them.
        return (filled or [key for key in there if record[key] is not None] or there)[0]

    def _turns(self, raw: Sequence[Any], default: bool) -> Iterator[Turn]:
        """The turns without faults."""
        conversation = self._where
        for number, turn in enumerate(raw, 1):
            self._where = f"{conversation}, turn {number}"
            if not isinstance(turn, dict):
                self._fault(f"a turn must be an object, not {kind(turn)}")
            elif (checked := self._turn(turn, default)) is not None:
                yield checked
        self._where = conversation

    def _turn(self, turn: dict[str, Any], default: bool) -> Turn | None:
        """A turn; None when it has faults.

        Args:
            default: whether an answer without a flag of its own is trained on.
        """
        before = self._faults.count
        wanted, called = None, False
        if not turn.keys() <= TURN_KEYS:
            keys = sort_keys(turn, TURN_KEYS, "turn")
            self._ignored.add("turn", keys.ignored)
            wanted, faults = flagged(keys.flags)
            for fault in [*keys.faults, *faults]:
                self._fault(fault)
            called = bool(keys.faults)
        role = self._role(turn)
        # A call of a tool has no text: that is not a second mistake.
        text = None if called else self._text(turn)
        if wanted and role in ("system", "user"):
            what = "question" if role == "user" else "system text"
            self._fault(f"a flag asks to train on a {what}, but only answers are trained on")
        if role is None or text is None or self._faults.count > before:
            return None
        return Turn(role, text, role != "assistant" or (default if wanted is None else wanted))

    def _role(self, turn: Mapping[str, Any]) -> Role | None:
        given = [turn[key] for key in ROLE_KEYS if turn.get(key) not in (None, "")]
        if not given:
            has = ", ".join(quoted(key) for key in list(turn)[:5])
            self._fault(f"neither `from` nor `role`{'; it has ' if has else ''}{has}")
            return None
        for name in given:
            if not isinstance(name, str) or name not in ROLES:
                tool = name in TOOL_ROLES
                why = "tools are not supported" if tool else f"known: {', '.join(ROLES)}"
                self._fault(f"unknown role {brief(name)}; {why}")
                return None
        if ROLES[given[0]] != ROLES[given[-1]]:
            self._fault("`from` and `role` differ; keep one of them")
        return ROLES[given[0]]

    def _text(self, turn: Mapping[str, Any]) -> str | None:
        """The text of `value` or `content`; either may stand beside `from` and beside `role`."""
        given = [key for key in TEXT_KEYS if turn.get(key) is not None]
        if len(given) == 2:
            given = [key for key in given if turn[key] != ""] or given
        usual = "value" if "from" in turn else "content"
        texts = [self._checked(key, turn.get(key)) for key in given or [usual]]
        if None not in texts and texts[0] != texts[-1]:
            self._fault("`value` and `content` differ; keep one of them")
        return texts[0]

    def _checked(self, key: str, text: Any) -> str | None:
        if not isinstance(text, str):
            hint = "; parts are not supported, write the text itself" * isinstance(text, list)
            self._fault(f"{quoted(key)} must be text, not {kind(text)}{hint}")
            return None
        try:
            text.encode()
        except UnicodeEncodeError as error:
            self._fault(
                f"{quoted(key)} has a lone surrogate (U+{ord(text[error.start]):04X}, character "
                f"{error.start + 1}), which is not valid Unicode: half of a character was cut off"
            )
            return None
        return text

    def _with_system(self, found: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
        """The turns with the system text that stands beside them."""
        texts = [self._checked(key, value) for key, value in found.items()]
        if not texts or None in texts:
            return turns
        if len(set(texts)) > 1:
            self._fault(f"{' and '.join(map(quoted, found))} differ; keep one of them")
            return turns
        system = Turn("system", str(texts[0]))
        if any(t.role == "system" and t.text.strip() and t.text != system.text for t in turns):
            name = quoted(next(iter(found)))
            self._fault(f"{name} differs from the system turn; keep one of them")
        rest = turns[1:] if turns and turns[0].role == "system" else turns
        return [system, *rest]


def _printable(name: str) -> str:
    """An id that can stand in any message."""
    name = name if len(name) <= 200 else name[:197] + "..."
    return name if name.isprintable() else brief(name)[1:-1]


# --- from conversations to what is trained on ------------------------------------------------


def trainable(conversation: Conversation) -> tuple[Trainable | None, Counter[str]]:
    """Cut a conversation to complete exchanges.

    Returns:
        What can be trained on, or None, and the number of turns lost by reason
        (`no_complete_exchange` and `no_trained_answer` count conversations).
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
        exchanges.append(Exchange(turns[0].text, turns[1].text, turns[1].trained))
        del turns[:2]
    lost["untrained_answer"] += sum(not exchange.trained for exchange in exchanges)
    if any(exchange.trained for exchange in exchanges):
        return Trainable(conversation.id, conversation.where, system, tuple(exchanges)), +lost
    lost["no_trained_answer" if exchanges else "no_complete_exchange"] += 1
    lost["system_turn"] += system is not None
    return None, +lost


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What the files of a job come to.

    Args:
        count: conversations that were read.
        lost: what is not trained on, by reason.
        ignored: as from `IgnoredKeys.counted`.
    """

    conversations: list[Trainable]
    count: int
    lost: Counter[str]
    ignored: Mapping[str, Mapping[str, int]]


def read_trainable(paths: Sequence[Path]) -> TrainingData:
    """All conversations, cut to what is trained on.

    Raises:
        DataError: faults of the files, or nothing to train on.
    """
    ignored = IgnoredKeys()
    conversations = read(paths, ignored)
    kept, lost = cut(conversations)
    if not kept:
        raise DataError([NOTHING_LEFT], remedy=f"{SEE} shows what was dropped and why")
    return TrainingData(kept, len(conversations), lost, ignored.counted())


NOTHING_LEFT = "no conversation has a complete exchange whose answer is to be trained on"

# C0 without tab and line ends, DEL, C1: legal in JSON as escapes, rarely meant.
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def cut(conversations: Sequence[Conversation]) -> tuple[list[Trainable], Counter[str]]:
    """What is trained on of all conversations, and what was lost, by reason.

    An exact copy of an earlier conversation is kept, since repeating one is a way to weight
    it, and counted (`duplicate`); so are turns with control characters (`control_characters`).
    """
    lost: Counter[str] = Counter()
    seen: set[tuple[Turn, ...]] = set()
    kept = []
    for conversation in conversations:
        lost["duplicate"] += conversation.turns in seen
        seen.add(conversation.turns)
        lost["control_characters"] += sum(
            CONTROL.search(turn.text) is not None for turn in conversation.turns
        )
        whole, losses = trainable(conversation)
        lost += losses
        if whole is not None:
            kept.append(whole)
    return kept, +lost
