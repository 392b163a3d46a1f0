"""Seals: whatever is not as it was written is found, by several looking together too."""

import json
from pathlib import Path

import pytest

from sft_job import seal


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three files in blocks of 8 bytes, with their seal."""
    monkeypatch.setattr(seal, "BLOCK_BYTES", 8)
    place = tmp_path / "f"
    (place / "sub").mkdir(parents=True)
    (place / "long.bin").write_bytes(bytes(range(30)))
    (place / "sub/short.bin").write_bytes(b"abc")
    (place / "empty").touch()
    (place / seal.SEAL).write_text(json.dumps(seal.make(place)))
    return place


def test_what_was_sealed_is_good(folder: Path) -> None:
    """As a whole, to each of several, and when files were added."""
    assert seal.fault(folder) is None
    assert [seal.fault(folder, part=part, parts=3) for part in range(3)] == [None] * 3
    (folder / "new").touch()
    assert seal.fault(folder) is None


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("at", range(30))
def test_every_flipped_bit_is_found_by_exactly_one_of_several(folder: Path, at: int) -> None:
    """Each byte is in the share of one."""
    flip(folder / "long.bin", at)
    found = [seal.fault(folder, part=part, parts=4) for part in range(4)]
    said = "long.bin was changed after it was written (SHA-256 differs)"
    assert sorted(filter(None, found)) == [said]
    assert seal.fault(folder) == said


def test_what_is_missing_or_has_another_size_is_found_by_all(folder: Path) -> None:
    """Without reading anything."""
    (folder / "sub/short.bin").write_bytes(b"abcd")
    said = "sub/short.bin has 4 bytes, 3 were written"
    assert [seal.fault(folder, part=part, parts=9) for part in range(9)] == [said] * 9
    (folder / "sub/short.bin").unlink()
    assert seal.fault(folder, part=8, parts=9) == "sub/short.bin: missing"
    assert seal.fault(folder, names={"long.bin"}) is None


def test_a_folder_instead_of_a_file_is_found(folder: Path) -> None:
    """And said with the system's reason."""
    (folder / "long.bin").unlink()
    (folder / "long.bin").mkdir()
    assert "long.bin" in (seal.fault(folder) or "")


@pytest.mark.parametrize(
    "text",
    [
        "", "3", "[]", "null", "{}", "\udcff", '{"files": {}}', '{"block_bytes": 8, "files": {}}',
        '{"block_bytes": 8, "files": {"long.bin": {}}}',
        '{"block_bytes": 8, "files": {"long.bin": {"bytes": 30, "sha256": ["x"]}}}',
        '{"block_bytes": 8, "files": {"long.bin": {"bytes": "30", "sha256": []}}}',
        '{"block_bytes": 9, "files": {"empty": {"bytes": 0, "sha256": []}}}',
    ],
)  # fmt: skip
def test_a_damaged_seal_is_no_seal(folder: Path, text: str) -> None:
    """It may have been cut off, or be another's."""
    (folder / seal.SEAL).write_bytes(text.encode(errors="surrogateescape"))
    assert (seal.fault(folder) or "").startswith("seal.json ")


def test_links_are_sealed_by_what_they_point_to(folder: Path, tmp_path: Path) -> None:
    """A converted model may point to the weights of the user's own folder."""
    (tmp_path / "weights").write_bytes(b"0123456789")
    (folder / "link").symlink_to(tmp_path / "weights")
    (folder / seal.SEAL).write_text(json.dumps(seal.make(folder)))
    flip(tmp_path / "weights", 9)
    assert seal.fault(folder) == "link was changed after it was written (SHA-256 differs)"


def test_a_seal_that_has_lost_a_file_is_no_seal(folder: Path) -> None:
    """What it does not name would be taken for whole."""
    sealed = json.loads((folder / seal.SEAL).read_text())
    del sealed["files"]["long.bin"]
    (folder / seal.SEAL).write_text(json.dumps(sealed))
    assert seal.fault(folder) == "seal.json is damaged"


@pytest.mark.parametrize(
    "files",
    [
        {"long.bin": {"bytes": 10**40, "sha256": []}}, {"a\0b": {"bytes": 0, "sha256": []}},
        {"long.bin": {"bytes": True, "sha256": ["x"]}}, {"x" * 300: {"bytes": 0, "sha256": []}},
        {"long.bin": {"bytes": -1, "sha256": []}},
    ],
)  # fmt: skip
def test_whatever_a_seal_says_is_answered(folder: Path, files: dict[str, object]) -> None:
    """It is data of a file, also with a checksum that is right."""
    (folder / seal.SEAL).write_text(json.dumps(seal.sealed({"block_bytes": 8, "files": files})))
    assert seal.fault(folder) is not None


def test_a_seal_nested_beyond_reason_is_no_seal(folder: Path) -> None:
    """json gives up with an error of its own kind."""
    (folder / seal.SEAL).write_text("[" * 100_000)
    assert (seal.fault(folder) or "").startswith("seal.json cannot be read")
