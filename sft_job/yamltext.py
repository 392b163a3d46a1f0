"""The text of a job file or an override: its values as they are written, each with its line.

YAML 1.1 turns what looks like text, or like another number, into numbers, dates and switches:
`1:30` is 90 (base 60), `010` is 8, `no` is false. Here a scalar without quotes stays text until
the key that it belongs to says what it takes (`schema`), or, under keys that take anything,
until `resolved` reads what can only be meant in one way.

The text is taken event by event with a stack of our own: nesting, aliases and sizes are
bounded, so that no text makes reading slow or deep.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from sft_job.errors import ConfigError

# Of one job file. Each is many times what a job needs; without them a small text can stand for
# billions of values (aliases of aliases).
MOST_BYTES = 2**18
MOST_VALUES = 10_000
MOST_KEYS = 300
DEEPEST = 16

_DECIMAL = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_WHOLE = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_NULL = ("", "null", "Null", "NULL")
# Null to YAML, and the home folder to whoever writes it where a path belongs: `config` refuses it
# there, and every other key takes it for null.
TILDE = "~"
_SWITCHES = {"true": True, "True": True, "TRUE": True, "false": False, "False": False,
             "FALSE": False}  # fmt: skip
_SURROGATE = re.compile("[\ud800-\udfff]")
_TEXT_TAGS = (None, "!", "tag:yaml.org,2002:str")
_NODE_TAGS = {
    yaml.MappingStartEvent: (None, "!", "tag:yaml.org,2002:map"),
    yaml.SequenceStartEvent: (None, "!", "tag:yaml.org,2002:seq"),
}
# Digits that a number may have; Python refuses to read integers of more than 4,300.
_MOST_DIGITS = 60


class Plain(str):
    """A scalar that was written without quotes."""

    __slots__ = ()


def number(text: str) -> int | float:
    """A number that is written as one, and in one way only.

    Raises:
        ValueError: it is not, and how it is written if it was meant as one; empty where it
            does not look like a number.
    """
    text = text.strip()
    if len(text) > _MOST_DIGITS:
        raise ValueError("")
    if _WHOLE.fullmatch(text):
        return int(text)
    if _DECIMAL.fullmatch(text):
        return float(text)
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", "", 1))
    raise ValueError(_how_to_write(text))


def _how_to_write(text: str) -> str:
    """What a number of another notation is, and how it is written here."""
    digits = text.lstrip("+-")
    sign = "-" if text.startswith("-") else ""
    if re.fullmatch(r"[0-9]+(:[0-9]{1,2})+", digits):
        value = 0
        for part in digits.split(":"):
            value = value * 60 + int(part)
        return f"YAML 1.1 reads {text} in base 60; write {sign}{value} if that is meant"
    if re.fullmatch(r"0[0-7]+", digits):
        ten, eight = int(digits), int(digits, 8)
        return f"YAML 1.1 reads {text} in base 8; write {sign}{ten} or {sign}{eight}"
    if re.fullmatch(r"0[0-9]+(\.[0-9]*)?", digits):
        return f"write {sign}{digits.lstrip('0') or '0'}, without leading zeros"
    for prefix, base in (("0x", 16), ("0o", 8), ("0b", 2)):
        if digits.lower().startswith(prefix):
            try:
                return f"write {sign}{int(digits[2:].replace('_', ''), base)}, in base 10"
            except ValueError:
                return ""
    bare = re.sub("[_, ']", "", digits)
    if bare != digits and re.match("[0-9.]", digits) and _DECIMAL.fullmatch(bare):
        return f"write {sign}{bare}, without marks between digits"
    return ""


def resolved(value: Any) -> Any:
    """Values of a key that takes anything: what was written without quotes and can only be a
    number or a switch becomes one; everything else stays text as it was written."""
    if isinstance(value, dict):
        return {key: resolved(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [resolved(inner) for inner in value]
    if not isinstance(value, Plain):
        return value
    if value == TILDE:
        return None
    if value in _SWITCHES:
        return _SWITCHES[value]
    try:
        return number(value)
    except ValueError:
        return str(value)


def as_text(value: Any) -> Any:
    """Scalars as they were written, for keys that say themselves what they take."""
    if isinstance(value, dict):
        return {key: as_text(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [as_text(inner) for inner in value]
    if not isinstance(value, Plain):
        return value
    return None if value == TILDE else str(value)


@dataclass
class _Open:
    """A mapping or sequence that is being read."""

    value: dict[str, Any] | list[Any]
    path: str
    line: int
    anchor: str | None
    key: str | None = None
    merged: list[dict[str, Any]] = field(default_factory=list)
    height: int = 1
    size: int = 1


@dataclass(frozen=True)
class _Anchored:
    value: Any
    height: int
    size: int


class Source:
    """A parsed text.

    Attributes:
        value: its values; mappings, lists, `Plain`, str and None.
        lines: line of each key by its dotted path, and of each item (`data.train.0`).
        faults: keys that are given twice.
        end: position behind the last value.
    """

    def __init__(self, name: str, text: str) -> None:
        """
        Raises:
            ConfigError: not YAML, or more than a job file can hold.
        """
        self.name = name
        self.value: Any = None
        self.lines: dict[str, int] = {}
        self.faults: list[str] = []
        self.end = 0
        self._open: list[_Open] = []
        self._anchors: dict[str, _Anchored | None] = {}  # None: still open
        self._count = 0
        self._documents = 0
        if (character := _SURROGATE.search(text)) is not None:
            self._line = text.count("\n", 0, character.start()) + 1
            raise self._fault("not valid YAML: not a character: bytes that are not UTF-8")
        self._line = 1
        try:
            for event in yaml.parse(text, Loader=yaml.SafeLoader):
                self._line = event.start_mark.line + 1 if event.start_mark else self._line
                self._take(event)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            if mark is not None:
                self._line = mark.line + 1
            said = getattr(error, "problem", None) or str(error).splitlines()[0]
            raise self._fault(f"not valid YAML: {said}") from error
        except (ValueError, OverflowError) as error:
            # The parser lets through what Python says of "\UFFFFFFFF" and of %YAML 99...9.1.
            raise self._fault(f"not valid YAML: {error}") from error

    def place(self, path: str) -> str:
        """File and line of a key, or of the nearest section around it that is there."""
        parts = path.split(".")
        while parts and ".".join(parts) not in self.lines:
            parts.pop()
        return f"{self.name}:{self.lines['.'.join(parts)]}" if parts else self.name

    def _fault(self, what: str) -> ConfigError:
        return ConfigError([f"{self.name}:{self._line}: {what}"])

    def _take(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                raise self._fault("not valid YAML: found another document")
        elif isinstance(event, yaml.ScalarEvent):
            self._scalar(event)
        elif isinstance(event, yaml.AliasEvent):
            self._alias(event.anchor)
        elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            self._begin(event)
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            self._finish(event)

    def _expects_key(self) -> bool:
        return (
            bool(self._open)
            and isinstance(self._open[-1].value, dict)
            and (self._open[-1].key is None)
        )

    def _path(self) -> str:
        """Of the value that comes next."""
        if not self._open:
            return ""
        parent = self._open[-1]
        last = parent.key if isinstance(parent.value, dict) else str(len(parent.value))
        return f"{parent.path}.{last}" if parent.path else str(last)

    def _scalar(self, event: Any) -> None:
        if event.tag not in _TEXT_TAGS:
            raise self._tag(event.tag)
        if _SURROGATE.search(event.value):
            raise self._fault("not valid YAML: half of a character")
        if self._expects_key():
            self._key(event.value)
            return
        value: str | None = event.value
        if event.style is None and event.implicit[0]:
            value = None if event.value in _NULL else Plain(event.value)
        self.end = event.end_mark.index
        self._put(value, event.anchor, 0, 1)

    def _key(self, key: str) -> None:
        parent = self._open[-1]
        if not key:
            raise self._fault("not valid YAML: an empty key")
        parent.key = key
        path, line = self._path(), self._line
        if key == "<<":
            return
        if key in parent.value:
            first = self.lines[path]
            self.faults.append(f"{self.name}:{line}: {path}: given twice (first in line {first})")
        elif len(parent.value) == MOST_KEYS:
            raise self._fault(f"more than {MOST_KEYS} keys in one section")
        self.lines[path] = line

    def _alias(self, name: str | None) -> None:
        if self._expects_key():
            raise self._fault("not valid YAML: a key must be written out")
        if name is None or name not in self._anchors:
            raise self._fault(f"not valid YAML: found undefined alias {name!r}")
        found = self._anchors[name]
        if found is None:
            raise self._fault(f"not valid YAML: *{name} stands inside of what it stands for")
        self._count_values(found.size)
        self._check_depth(found.height)
        self._put(_copy(found.value), None, found.height, found.size)

    def _begin(self, event: Any) -> None:
        if self._expects_key():
            raise self._fault("not valid YAML: a key must be a word, not a list or a mapping")
        if event.tag not in _NODE_TAGS[type(event)]:
            raise self._tag(event.tag)
        self._check_depth(1)
        value: dict[str, Any] | list[Any] = {} if isinstance(event, yaml.MappingStartEvent) else []
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        self._open.append(_Open(value, self._path(), self._line, event.anchor))

    def _finish(self, event: Any) -> None:
        done = self._open.pop()
        for base in done.merged:  # the first of several wins, and what is written out wins
            assert isinstance(done.value, dict)
            done.value = _copy(base) | done.value
        self.end = event.end_mark.index
        self._put(done.value, done.anchor, done.height, done.size)

    def _put(self, value: Any, anchor: str | None, height: int, size: int) -> None:
        """Give a whole value to what it belongs to."""
        if anchor is not None:
            self._anchors[anchor] = _Anchored(value, height, size)
        if height == 0:
            self._count_values(1)
        if not self._open:
            self.value = value
            return
        parent = self._open[-1]
        parent.height = max(parent.height, height + 1)
        parent.size += size
        if isinstance(parent.value, list):
            self.lines[self._path()] = self._line
            parent.value.append(value)
            return
        key, parent.key = parent.key, None
        assert key is not None
        if key == "<<":
            bases = value if isinstance(value, list) else [value]
            if not all(isinstance(base, dict) for base in bases):
                raise self._fault("not valid YAML: << takes mappings")
            parent.merged += bases
            return
        parent.value[key] = value

    def _count_values(self, more: int) -> None:
        self._count += more
        if self._count > MOST_VALUES:
            raise self._fault(f"more than {MOST_VALUES:,} values, written out or by aliases")

    def _check_depth(self, more: int) -> None:
        if len(self._open) + more > DEEPEST:
            raise self._fault(f"nested more than {DEEPEST} deep")

    def _tag(self, tag: str) -> ConfigError:
        short = tag.replace("tag:yaml.org,2002:", "!!")
        return self._fault(f"not valid YAML: the tag {short} is not read; write the value alone")


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value
