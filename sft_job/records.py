"""Records of a data file, each with its place, and what is wrong with the file.

What a file is, is decided by its content, never by its name: a JSON list (it begins with a
bracket) or JSON lines (one object a line; or a single object over several lines). All that
json would pass over is a fault: NaN, a key twice in one object.

A line of JSON lines is a unit of its own, so that every faulty one is named. In a list
nothing is known behind a syntax error; bytes that are not UTF-8 are named in either.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sft_job.errors import DataError

# Looked at to tell what a file is.
HEAD = 64 * 2**10

# A longer integer is not converted: the time that takes grows with the square. Python's limit.
MAX_DIGITS = 4300

BLANK = " \t\r\n"
BOM = "\ufeff"


class Faults:
    """Faults in the order in which they are found: all counted, the first ones kept as text."""

    KEPT = 1000

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.count = 0

    def add(self, fault: str) -> None:
        self.count += 1
        if self.count <= self.KEPT:
            self.texts.append(fault)

    def error(self, *, remedy: str, shown: int) -> DataError:
        return DataError(self.texts, remedy=remedy, shown=shown, count=self.count)


def records(path: Path, faults: Faults) -> Iterator[tuple[str, Any]]:
    """Yield (place, raw record) of a file; what is wrong with its form is added to `faults`.

    A place is `file:line`, or `file[index]` in a list that is written in one line.
    """
    reader = _Reader(path, faults)
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
            file.seek(0)
            begins = head.removeprefix(BOM.encode()).lstrip(BLANK.encode())
            found = foreign(head)
            if found is not None:
                faults.add(f"{path}: {found}")
            elif not begins and len(head) < HEAD:
                faults.add(f"{path}: the file is empty")
            elif begins.startswith(b"["):
                yield from reader.listed(file.read())
            elif _is_open(begins) and _is_one_object(data := file.read()):
                yield from reader.one_object(data)
            elif re.search(rb"^[ \t]*\{", begins, re.MULTILINE):
                file.seek(0)
                yield from reader.lines(file)
            else:
                start = begins[:30].decode(errors="replace")
                faults.add(
                    f"{path}: neither a JSON list nor JSON lines (one object a line): "
                    f"it begins with {start!r}"
                )
    except OSError as error:
        faults.add(f"{path}: cannot be read: {error.strerror}")


# --- what is no JSON text at all -------------------------------------------------------------

TO_JSON = "write it as JSON lines, as pandas or datasets do with to_json(..., lines=True)"
UNPACK = "unpack it first"

# First bytes of a file -> what it is, what to do. Sources: the formats' own specifications.
MAGIC = (
    (b"\x1f\x8b", "a gzip file", f"{UNPACK}: gunzip"),
    (b"BZh", "a bzip2 file", f"{UNPACK}: bunzip2"),
    (b"\xfd7zXZ\0", "an xz file", f"{UNPACK}: unxz"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", f"{UNPACK}: unzstd"),
    (b"\x04\x22\x4d\x18", "an lz4 file", f"{UNPACK}: unlz4"),
    (b"\xff\x06\0\0sNaPpY", "a snappy file", UNPACK),
    (b"PK\x03\x04", "a zip archive (as .xlsx, .npz and .pt files are)", UNPACK),
    (b"PK\x05\x06", "an empty zip archive", "fetch the file again"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!", "a rar archive", UNPACK),
    (b"PAR1", "a Parquet file", TO_JSON),
    (b"PARE", "an encrypted Parquet file", TO_JSON),
    (b"ARROW1", "an Arrow (Feather) file", TO_JSON),
    (b"FEA1", "a Feather file", TO_JSON),
    (b"\xff\xff\xff\xff", "an Arrow stream", TO_JSON),
    (b"ORC", "an ORC file", TO_JSON),
    (b"Obj\x01", "an Avro file", TO_JSON),
    (b"SQLite format 3\0", "an SQLite database", TO_JSON),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", TO_JSON),
    (b"\x93NUMPY", "a NumPy array", TO_JSON),
    (b"%PDF", "a PDF document", "give the conversations themselves"),
    (b"version https://git-lfs", "a pointer of git-lfs", "fetch the file itself: git lfs pull"),
)

# Encodings of Unicode in units of more than one byte; the longer marks stand first.
MARKS = (
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
# JSON begins with an ASCII character: the zeros beside it tell the unit and the byte order.
UNMARKED = (
    (re.compile(rb"[^\0]\0\0\0"), "UTF-32LE"),
    (re.compile(rb"\0\0\0[^\0]"), "UTF-32BE"),
    (re.compile(rb"[^\0]\0[^\0]\0"), "UTF-16LE"),
    (re.compile(rb"\0[^\0]\0[^\0]"), "UTF-16BE"),
)


def foreign(head: bytes) -> str | None:
    """What a file is that is no UTF-8 text, told by its first bytes, with the remedy; or None."""
    encoding = next((name for mark, name in MARKS if head.startswith(mark)), None) or next(
        (
            name
            for pattern, name in UNMARKED
            if pattern.match(head) and head[:4].decode(name, "replace").isascii()
        ),
        None,
    )
    if encoding is not None:
        return f"this is {encoding}, not UTF-8 text; convert it: iconv -f {encoding} -t UTF-8"
    for magic, name, remedy in MAGIC:
        if head.startswith(magic):
            return f"this is {name}, not JSON; {remedy}"
    if re.match(rb"\x80[\x02-\x05]", head):
        return f"this is a Python pickle, not JSON; {TO_JSON}"
    if head[257:262] == b"ustar":
        return f"this is a tar archive, not JSON; {UNPACK}"
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        return "this is a web page or XML, not JSON; fetch the file itself"
    return None


# --- UTF-8 and JSON --------------------------------------------------------------------------


def _is_open(begins: bytes) -> bool:
    """Whether an object begins in the first line and does not end there."""
    line, newline, _ = begins.partition(b"\n")
    if not newline or not line.startswith(b"{"):
        return False
    try:
        _probe(line)
    except json.JSONDecodeError as error:
        return _ends_inside(error)
    except RecursionError:
        return False
    return False


def _probe(text: bytes) -> Any:
    """A JSON value, whatever its numbers."""
    return json.loads(text.decode(errors="replace"), parse_int=len)


def _is_one_object(data: bytes) -> bool:
    """Whether a file with an open first line is one object over several lines.

    Else its first line is faulty and the others are to be read: one object each.
    """
    text = data.decode("utf-8-sig", "replace").lstrip(BLANK)
    try:
        json.JSONDecoder(parse_int=len).raw_decode(text)
        return True
    except (ValueError, RecursionError):
        pass
    lines = text.encode().split(b"\n")
    if any(_is_record(line) for line in lines[1:]):
        return False
    # What is spread over lines is broken behind a mark of its structure.
    spread = lines[0].rstrip().endswith((b"{", b"[", b",", b":"))
    return spread or not any(line.startswith(b"{") for line in lines[1:])


def _is_record(line: bytes) -> bool:
    """Whether a line is an object by itself, and not a turn of a list of turns."""
    if not line.startswith(b"{") or not line.rstrip().endswith(b"}"):
        return False
    try:
        return not {"from", "role"} & _probe(line).keys()
    except (ValueError, RecursionError):
        return False


class _Reader:
    """Reads one file. What json would accept in silence is a fault too."""

    def __init__(self, path: Path, faults: Faults) -> None:
        self.path, self.faults = path, faults
        self._where = ""
        self._json = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_int=self._integer
        )

    def lines(self, file: BinaryIO) -> Iterator[tuple[str, Any]]:
        """One object a line."""
        for number, raw in enumerate(file, 1):
            # A mark within a file is left over from joining files.
            text = self._text(raw, number).removeprefix(BOM).rstrip(BLANK)
            start = _skip(text, 0)
            if start == len(text):
                continue
            where = f"{self.path}:{number}"
            value, end, sound = self._decode(text, start, where, number)
            if end is not None and _skip(text, end) < len(text):
                surplus = json.JSONDecodeError("more in the line", text, _skip(text, end))
                self.faults.add(f"{where}: {_syntax(surplus)}")
            elif sound:
                yield where, value

    def one_object(self, data: bytes) -> Iterator[tuple[str, Any]]:
        """A single object over several lines."""
        text = self._text(data, 1).removeprefix(BOM)
        start = _skip(text, 0)
        where = f"{self.path}:{_line(text, start)}"
        value, end, sound = self._decode(text, start, where, 1)
        if sound:
            yield where, value
        if end is not None and _skip(text, end) < len(text):
            self.faults.add(
                f"{self.path}:{_line(text, _skip(text, end))}: text after the end of the object; "
                "in JSON lines each object stands in one line"
            )

    def listed(self, data: bytes) -> Iterator[tuple[str, Any]]:
        """A list of records."""
        text = self._text(data, 1).removeprefix(BOM)
        del data
        one_line = "\n" not in text.strip(BLANK)
        line, counted, index = 1, 0, 0
        unread = "; the list was not read any further"
        position = _skip(text, _skip(text, 0) + 1)
        while position < len(text) and text[position] != "]":
            line += text.count("\n", counted, position)
            counted = position
            where = f"{self.path}[{index}]" if one_line else f"{self.path}:{line}"
            value, end, sound = self._decode(text, position, where, 1, unread)
            if end is None:
                return
            if sound:
                yield where, value
            index += 1
            position = _skip(text, end)
            if position == len(text) or text[position] != ",":
                break
            position = _skip(text, position + 1)
            if text[position : position + 1] == "]":
                self._list_fault(text, position, "a comma before ']'")
        if position >= len(text):
            self._list_fault(text, position, "expected ',' or ']', but the file ends")
        elif text[position] != "]":
            found = brief(text[position])
            self._list_fault(text, position, f"expected ',' or ']', but found {found}")
        elif _skip(text, position + 1) < len(text):
            self._list_fault(text, _skip(text, position + 1), "text after the closing ']'")

    def _list_fault(self, text: str, position: int, what: str) -> None:
        self.faults.add(f"{self.path}:{_line(text, position)}: not valid JSON: {what}")

    def _text(self, raw: bytes, line: int) -> str:
        """The text of bytes that begin in `line`.

        Every line that is not UTF-8 is a fault; its bytes are replaced, for what else is wrong.
        """
        try:
            return raw.decode()
        except UnicodeDecodeError:
            pass
        for number, part in enumerate(raw.split(b"\n"), line):
            try:
                part.decode()
            except UnicodeDecodeError as error:
                column = len(part[: error.start].decode().removeprefix(BOM)) + 1
                self.faults.add(
                    f"{self.path}:{number}: not UTF-8 text: byte 0x{part[error.start]:02x} in "
                    f"column {column} ({error.reason}); if the file is of another encoding: "
                    "iconv -f ENCODING -t UTF-8"
                )
        return raw.decode(errors="replace")

    def _decode(
        self, text: str, position: int, where: str, line: int, unread: str = ""
    ) -> tuple[Any, int | None, bool]:
        """The value at a position of a text that begins in `line`.

        Args:
            unread: said after a syntax error.

        Returns:
            The value; where it ends, None after a syntax error; whether it is free of faults.
        """
        self._where, before = where, self.faults.count
        try:
            value, end = self._json.raw_decode(text, position)
        except json.JSONDecodeError as error:
            self.faults.add(f"{self.path}:{line + error.lineno - 1}: {_syntax(error)}{unread}")
        except RecursionError:
            self.faults.add(f"{where}: nested too deeply{unread}")
        else:
            return value, end, self.faults.count == before
        return None, None, False

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
            names = ", ".join(map(brief, twice[:3]))
            self.faults.add(f"{self._where}: the key {names} more than once in one object")
        return made

    def _constant(self, name: str) -> None:
        self.faults.add(f"{self._where}: {name} is not JSON; write null, or leave the key out")

    def _integer(self, digits: str) -> int:
        if len(digits) <= MAX_DIGITS:
            return int(digits)
        what = f"an integer of {len(digits.lstrip('-')):,} digits; write it as text"
        self.faults.add(f"{self._where}: {what}")
        return 0


def _skip(text: str, position: int) -> int:
    """The next position that is not blank."""
    while position < len(text) and text[position] in BLANK:
        position += 1
    return position


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxlong = 60
_BRIEF.maxlist = _BRIEF.maxdict = 3
_BRIEF.maxlevel = 2

_KINDS = {str: "text", int: "number", float: "number", list: "list", dict: "object"}


def brief(value: Any) -> str:
    """A JSON value for a message: one line, no control characters, not long."""
    return _BRIEF.repr(value)


def kind(value: Any) -> str:
    """What a JSON value is, for a message."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{_KINDS[type(value)]} {brief(value)}"


def quoted(key: str) -> str:
    """A key for a message."""
    return f"`{key}`" if key.isprintable() and len(key) <= 60 else brief(key)


def _ends_inside(error: json.JSONDecodeError) -> bool:
    """Whether the text ends within a value."""
    cut = _skip(error.doc, error.pos) == len(error.doc)
    return cut or error.msg.startswith("Unterminated string")


def _syntax(error: json.JSONDecodeError) -> str:
    hint = _hint(error)
    return f"not valid JSON: {error.msg} (column {error.colno}){hint and ': '}{hint}"


def _hint(error: json.JSONDecodeError) -> str:
    """What a syntax error probably comes from."""
    if _ends_inside(error):
        return "it ends inside a value: it was cut off, or a text has a line break in it"
    before = error.doc[max(0, error.pos - 20) : error.pos]
    start = _skip(error.doc, error.pos)
    rest = error.doc[start : start + 200]
    if before.rstrip(BLANK).endswith(",") and rest[0] in "]}":
        return f"a comma before {rest[0]!r}"
    if found := re.match(r",\s*([\]}]?)", rest):
        return f"a comma before {found[1]!r}" if found[1] else "a comma too many"
    if re.match(r"\{?\s*'|(True|False|None|nan|inf)\b", rest):
        return "this is Python's notation; JSON has double quotes, true, false and null"
    if re.match(r"//|/\*|#", rest):
        return "JSON has no comments"
    if before.endswith("\r"):
        return "lines must end in a line feed, not in a carriage return alone"
    if rest[0] == "\0":
        return "a NUL byte: perhaps the file was not written to its end"
    if rest[0] < " " or error.msg.startswith("Invalid control character"):
        return f"U+{ord(error.doc[error.pos]):04X} must be written as an escape"
    return ""
