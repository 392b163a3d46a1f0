"""Reading data files: what they are, the place of every record, every fault with its place."""

import bz2
import gzip
import json
import lzma
import pickle
import sqlite3
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_job.errors import DataError
from sft_job.records import Faults, foreign, records

GOOD = '{"id": "a", "conversations": []}'


def found(path: Path, data: str | bytes) -> tuple[list[tuple[str, object]], list[str]]:
    """Records and faults of a file with this content, places without the folder."""
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    faults = Faults()
    folder = f"{path.parent}/"
    read = [(where.removeprefix(folder), value) for where, value in records(path, faults)]
    return read, [text.replace(folder, "") for text in faults.texts]


def places(path: Path, data: str | bytes) -> list[str]:
    """Places of the records of a good file."""
    read, faults = found(path, data)
    assert faults == []
    return [where for where, _ in read]


# --- what a file is ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.JSONL", "d.ndjson", "d.txt", "d"])
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (f"[{GOOD}, {GOOD}]", ["[0]", "[1]"]),
        (f"\n[\n {GOOD},\n {GOOD}\n]\n", [":3", ":4"]),
        (f"{GOOD}\n\n  \n{GOOD}", [":1", ":4"]),
        (f"{GOOD}\r\n{GOOD}\r\n", [":1", ":2"]),
        (f"{GOOD}\n", [":1"]),
        ('{\n "id": 1,\n "conversations": []\n}\n', [":1"]),
        (f"\ufeff{GOOD}\n\ufeff{GOOD}\n", [":1", ":2"]),
        (f"\ufeff[{GOOD}]", ["[0]"]),
    ],
    ids=["list", "pretty list", "lines", "CRLF", "one line", "one object", "marks", "mark"],
)
def test_a_file_is_what_its_content_is(name, data, expected, tmp_path):
    """The name decides nothing: a list in .jsonl and lines in .json or .txt are read."""
    assert places(tmp_path / name, data) == [f"{name}{place}" for place in expected]


def test_the_place_in_a_json_list_is_the_line_of_the_record(tmp_path):
    """Where the record's bracket opens."""
    text = '\n[\n  {"id": 1},\n\n  {"id": 2,\n   "x": [3]},\n  {"id": 3}\n]\n'
    assert places(tmp_path / "d.json", text) == ["d.json:3", "d.json:5", "d.json:7"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.lists(JSON), st.sampled_from([None, 0, 2]), st.booleans())
def test_a_json_list_is_read_as_json_reads_it(tmp_path_factory, values, indent, ascii_only):
    """Record by record, whatever is in the strings and however it is laid out."""
    path = tmp_path_factory.getbasetemp() / "any.json"
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    read, faults = found(path, text.encode())
    assert ([value for _, value in read], faults) == (json.loads(text), [])
    lines = [int(where.rpartition(":")[2]) for where, _ in read if where[-1] != "]"]
    assert lines == sorted(lines)


@given(st.lists(st.builds(dict, a=st.text()), min_size=1, max_size=3), st.booleans())
def test_json_lines_are_read_as_json_reads_them(tmp_path_factory, values, ascii_only):
    """Each in its line: only a line feed ends one, not what Unicode also calls a line end."""
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    lines = [json.dumps(value, ensure_ascii=ascii_only) for value in values]
    read, faults = found(path, "\n".join(lines).encode())
    assert (read, faults) == ([(f"any.jsonl:{n}", v) for n, v in enumerate(values, 1)], [])


def sqlite(folder: Path) -> bytes:
    """An SQLite database as bytes."""
    with sqlite3.connect(folder / "base") as base:
        base.execute("create table t (a)")
    base.close()
    return (folder / "base").read_bytes()


def zipped(folder: Path) -> bytes:
    """A zip archive as bytes."""
    with zipfile.ZipFile(folder / "zip", "w") as archive:
        archive.writestr("data.jsonl", GOOD)
    return (folder / "zip").read_bytes()


FOREIGN = [
    (gzip.compress(GOOD.encode()), "this is a gzip file, not JSON; unpack it first: gunzip"),
    (bz2.compress(GOOD.encode()), "this is a bzip2 file, not JSON; unpack it first: bunzip2"),
    (lzma.compress(GOOD.encode()), "this is an xz file, not JSON; unpack it first: unxz"),
    (b"\x28\xb5\x2f\xfd\x24", "this is a zstd file, not JSON; unpack it first: unzstd"),
    (zipped, "this is a zip archive (as .xlsx, .npz and .pt files are), not JSON; unpack it first"),
    (sqlite, "this is an SQLite database, not JSON; write it as JSON lines"),
    (b"PAR1\x15\x04", "this is a Parquet file, not JSON; write it as JSON lines"),
    (b"ARROW1\0\0", "this is an Arrow (Feather) file, not JSON; write it as JSON lines"),
    (b"\xff\xff\xff\xff\x10\x01", "this is an Arrow stream, not JSON; write it as JSON lines"),
    (b"ORC\x0a", "this is an ORC file, not JSON; write it as JSON lines"),
    (b"Obj\x01\x04", "this is an Avro file, not JSON; write it as JSON lines"),
    *((pickle.dumps([1], protocol=p), "this is a Python pickle, not JSON") for p in range(2, 6)),
    (b"x" * 257 + b"ustar\0", "this is a tar archive, not JSON; unpack it first"),
    (b"<!DOCTYPE html>", "this is a web page or XML, not JSON; fetch the file itself"),
    (b"version https://git-lfs.github.com/spec/v1\n", "this is a pointer of git-lfs, not JSON"),
    (b"id,conversations\n", "neither a JSON list nor JSON lines (one object a line): it begins"),
    (b"null", "neither a JSON list nor JSON lines (one object a line): it begins with 'null'"),
    (b"\0" * 40, "neither a JSON list nor JSON lines (one object a line): it begins with '\\x00"),
    (b"x" + b"\n" * 60_000, "neither a JSON list nor JSON lines (one object a line): it begins"),
    (b"", "the file is empty"),
    (b"\xef\xbb\xbf \r\n\t", "the file is empty"),
]


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
@pytest.mark.parametrize(("data", "expected"), FOREIGN, ids=range(len(FOREIGN)))
def test_a_file_of_another_kind_is_named_for_what_it_is(name, data, expected, tmp_path):
    """Under any name, with what to do about it, in one fault."""
    data = data(tmp_path) if callable(data) else data
    read, (fault,) = found(tmp_path / name, data)
    assert read == []
    assert fault.startswith(f"{name}: {expected}")


@pytest.mark.parametrize("unit", ["utf-16", "utf-32"])
@pytest.mark.parametrize("order", ["", "-le", "-be"])
@pytest.mark.parametrize("text", [f"[{GOOD}]", GOOD, f'\r\n[{{"id": "{chr(0x1F99C)}"}}]'])
def test_wide_encodings_are_told_with_and_without_their_mark(unit, order, text, tmp_path):
    """Both byte orders; the remedy is a command that works."""
    name = unit.upper() + order.upper().replace("-", "")
    _, (fault,) = found(tmp_path / "d.json", text.encode(unit + order))
    assert fault == f"d.json: this is {name}, not UTF-8 text; convert it: iconv -f {name} -t UTF-8"


def test_json_is_not_taken_for_another_kind():
    """No first bytes of a JSON text are those of something else."""
    for text in ("[", "{", '{"PAR1": 1}', " \n[", "[{", '["\0"]'):
        assert foreign(text.encode()) is None


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    """What the system says, with the path."""
    faults = Faults()
    assert list(records(tmp_path / "none.json", faults)) == []
    assert list(records(tmp_path, faults)) == []
    assert faults.texts == [
        f"{tmp_path}/none.json: cannot be read: No such file or directory",
        f"{tmp_path}: cannot be read: Is a directory",
    ]


# --- faults within a file ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[\n{},\n{]\n", "d:3: not valid JSON: "),
        ('[\n{"a": 1}\n{"b": 2}]', "d:3: not valid JSON: expected ',' or ']', but found '{'"),
        ("[\n{},\n", "d:3: not valid JSON: expected ',' or ']', but the file ends"),
        ("[\n1\n", "d:3: not valid JSON: expected ',' or ']', but the file ends"),
        ('[{"a": 1}, {"a": ', "(column 18): it ends inside a value: it was cut off, or a text"),
        ('[{"a": "b', "it ends inside a value: it was cut off, or a text has a line break in it"),
        ("[]\n[]", "d:2: not valid JSON: text after the closing ']'"),
        ('[{"a": "b\n"}]', "d:1: not valid JSON: Invalid control character"),
        ('[{"a": "\t"}]', "(column 9): U+0009 must be written as an escape"),
        ('[{"a": "\0"}]', "(column 9): a NUL byte: perhaps the file was not written to its end"),
        ("[{},\n]", "d:2: not valid JSON: a comma before ']'"),
        ('[{"a": [1, 2,]}]', "(column 14): a comma before ']'"),
        ('[{"a": 1,}]', "a comma before '}'"),
        ("[{'a': 1}]", "this is Python's notation; JSON has double quotes, true, false and null"),
        ('[{"a": None}]', "this is Python's notation; JSON has double quotes, true, false"),
        ("[// first\n{}]", "JSON has no comments"),
        ('{"a": 1}, \n{"a": 2}', "d:1: not valid JSON: more in the line (column 9): a comma too "),
        ('{"a": 1}\r{"a": 2}', "lines must end in a line feed, not in a carriage return alone"),
        ('{"a": 1}{"a": 2}\n', "d:1: not valid JSON: more in the line (column 9)"),
        ('{"a": 1}\n\0\0\0\n', "d:2: not valid JSON: Expecting value (column 1): a NUL byte"),
        ('{"a": 1}\n{"a": "b\n', "d:2: not valid JSON: Unterminated string"),
        ('{\n"a": 1\n}\n{\n"a": 2\n}\n', "d:4: text after the end of the object; in JSON lines"),
        ('{"data": [\n{"a": 1},\n]}', "d:3: not valid JSON: Expecting value (column 1): a comma"),
        ('{"a": NaN}', "d:1: NaN is not JSON; write null, or leave the key out"),
        ('[{"a": [-Infinity]}]', "d[0]: -Infinity is not JSON; write null, or leave the key out"),
        ('{"a": 1, "a": 2}', "d:1: the key 'a' more than once in one object"),
        ('[\n{"b": {"a": 1, "a": 1}}]', "d:2: the key 'a' more than once in one object"),
        ('{"a": ' + "1" * 5000 + "}", "d:1: an integer of 5,000 digits; write it as text"),
        ('[{"a": -' + "1" * 5000 + "}]", "d[0]: an integer of 5,000 digits; write it as text"),
        ('{"a":\n' + "1" * 5000 + "}", "d:1: an integer of 5,000 digits; write it as text"),
        ("[" * 100_000, "d[0]: nested too deeply; the list was not read any further"),
        ('{"a": ' + "[" * 100_000, "d:1: nested too deeply"),
    ],
)  # fmt: skip
def test_what_json_does_not_allow_is_named_with_its_place(text, expected, tmp_path):
    """One fault: file, line or index, column, and what it probably is."""
    _, (fault,) = found(tmp_path / "d", text)
    assert expected in fault
    assert fault.startswith("d")


def test_every_faulty_line_is_named_and_every_other_read(tmp_path):
    """UTF-8, syntax, NaN, a key twice, a long integer, nesting: nothing hides what follows."""
    lines = [
        b'{"id": 1}',
        b'{"id": "\xff"}',
        b'{"id": 3,}',
        b'{"id": NaN}',
        '{"id": "ü'.encode() + b'\xe9"}',
        b'{"id": 6, "id": 6}',
        b'{"id": ' + b"6" * 5000 + b"}",
        b'{"id": ' + b"[" * 100_000 + b"}",
        b'{"id": 9}',
    ]
    read, faults = found(tmp_path / "d.jsonl", b"\n".join(lines))
    assert [where for where, value in read if value in ({"id": 1}, {"id": 9})] == [
        "d.jsonl:1", "d.jsonl:9",
    ]  # fmt: skip
    assert [fault.partition(": ")[0] for fault in faults] == [f"d.jsonl:{n}" for n in range(2, 9)]
    assert "not UTF-8 text: byte 0xff in column 9 (invalid start byte)" in faults[0]
    assert "not UTF-8 text: byte 0xe9 in column 10 (" in faults[3]  # a character is a column


def test_a_faulty_first_line_does_not_hide_the_others(tmp_path):
    """It is not taken for the beginning of one object over many lines."""
    read, faults = found(tmp_path / "d.jsonl", '{"id": [\n{"id": 2}\n{"id": 3,}\n')
    assert read == [("d.jsonl:2", {"id": 2})]
    assert [fault.partition(": ")[0] for fault in faults] == ["d.jsonl:1", "d.jsonl:3"]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('{"id":\n{bad}\n{"id": 3}\n{"id": [}\n', [1, 2, 4]),  # two faulty ones at the beginning
        ('{"id": "a\n{bad}\n{"id": [\n', [1, 2, 3]),  # and no other
        ('{"messages": [\n{"role": "user"},\n{"role": "x"}\n{}]}', [4]),  # one object, spread out
        ('{"id": ' + "9" * 5000 + ',\n"x": 1}', [1]),
    ],
)
def test_faulty_lines_are_told_from_an_object_over_several_lines(text, lines, tmp_path):
    """Every fault is named with its line, and none that is not there."""
    _, faults = found(tmp_path / "d.jsonl", text)
    assert [int(fault.partition(": ")[0].partition(":")[2]) for fault in faults] == lines


def test_every_line_of_a_list_that_is_not_utf8_is_named(tmp_path):
    """Although a list is decoded as a whole; records without a fault are checked all the same."""
    data = b'[\n{"id": "\xff"},\n{"id": "\xe9"},\n{"id": 3}\n]'
    read, faults = found(tmp_path / "d.json", data)
    assert ("d.json:4", {"id": 3}) in read
    assert [fault.partition(": ")[0] for fault in faults] == ["d.json:2", "d.json:3"]


def test_a_place_in_a_large_file_is_counted_from_its_beginning(tmp_path):
    """Not from the beginning of what was read at a time."""
    data = (GOOD + "\n").encode() * 40_000 + b'{"id": "caf\xe9"}\n'
    _, (fault,) = found(tmp_path / "d.jsonl", data)
    assert fault.startswith("d.jsonl:40001: not UTF-8 text: byte 0xe9 in column 12")


def test_faults_are_all_counted_and_the_first_ones_kept(tmp_path):
    """A file full of faults needs no memory for them."""
    path = tmp_path / "d.jsonl"
    path.write_text("{,}\n" * 3000)
    faults = Faults()
    assert list(records(path, faults)) == []
    assert (faults.count, len(faults.texts)) == (3000, Faults.KEPT)
    error = faults.error(remedy="mend it", shown=2)
    assert isinstance(error, DataError)
    assert str(error).splitlines()[0] == "3,000 faults of the data:"
    assert str(error).splitlines()[-2:] == ["  ... and 2,998 more", "  -> mend it"]
