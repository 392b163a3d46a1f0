"""What a folder holds: size and SHA-256 of its files, in blocks, so that many may look at once.

    {"block_bytes": 268435456, "files": {"tokens.bin": {"bytes": 4194304, "sha256": ["9f2c..."]}},
     "seal": "41d0..."}

A cache folder carries its seal from the moment it was built (`rundir.publish_dir`); the seal of
what belongs to the user, a base model that is trained from as it is, is in the stamp of the
prepared job. All ranks together look at every byte once, before the first step.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SEAL = "seal.json"
# A few blocks for each of 8 ranks in a weight file of 5 GB.
BLOCK_BYTES = 2**28
_READ_BYTES = 2**22

Seal = Mapping[str, Any]


def make(folder: Path, names: Iterable[str] | None = None) -> Seal:
    """The seal of files of a folder; links count as what they point to.

    Args:
        names: relative to the folder; None is every file in it.
    """
    if names is None:
        found = (
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
        )
        names = (name for name in found if name != SEAL)
    files = {name: (folder / name).stat().st_size for name in sorted(names)}
    blocks = [(name, index) for name, size in files.items() for index in _blocks(size)]
    digests = _digests(folder, blocks)
    contents: dict[str, Any] = {name: {"bytes": size, "sha256": []} for name, size in files.items()}
    for (name, _), digest in zip(blocks, digests, strict=True):
        contents[name]["sha256"].append(digest)
    return sealed({"block_bytes": BLOCK_BYTES, "files": contents})


def fault(
    folder: Path,
    seal: Seal | None = None,
    *,
    names: Collection[str] | None = None,
    part: int = 0,
    parts: int = 1,
) -> str | None:
    """Why a folder is not what was sealed, or None.

    Args:
        seal: None for the one in the folder itself.
        names: look at these files alone.
        part, parts: every part looks at all sizes and at its share of the content.
    """
    if seal is None:
        try:
            seal = read(folder)
        except OSError as error:
            return f"{SEAL} cannot be read ({_reason(error)})"
        except ValueError as error:
            return f"{SEAL} {error}"
    if not is_whole(seal):
        return f"{SEAL} is damaged"
    expected: list[tuple[tuple[str, int], str]] = []
    for name, wanted in seal["files"].items():
        if names is not None and name not in names:
            continue
        try:
            size = (folder / name).stat().st_size
        except (OSError, ValueError) as error:  # a name that no file can have
            return f"{name}: {_reason(error)}"
        if size != wanted["bytes"]:
            return f"{name} has {size:,} bytes, {wanted['bytes']:,} were written"
        expected += [((name, i), digest) for i, digest in enumerate(wanted["sha256"])]
    mine = expected[part::parts]
    try:
        found = _digests(folder, [block for block, _ in mine])
    except OSError as error:
        return f"{error.filename}: {_reason(error)}"
    for ((name, _), right), digest in zip(mine, found, strict=True):
        if digest != right:
            return f"{name} was changed after it was written (SHA-256 differs)"
    return None


def read(folder: Path) -> Seal:
    """The seal in a folder.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    text = (folder / SEAL).read_bytes()
    try:
        seal = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("cannot be read (not JSON)") from error
    if not is_whole(seal):
        raise ValueError("is damaged")
    found: Seal = seal
    return found


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with a checksum of itself, under "seal"."""
    rest = {key: value for key, value in record.items() if key != "seal"}
    text = json.dumps(rest, sort_keys=True)
    return rest | {"seal": hashlib.sha256(text.encode()).hexdigest()}


def is_sealed(record: Any) -> bool:
    """Whether it is a record, and as it was when it got its checksum."""
    try:
        return isinstance(record, dict) and record.get("seal") == sealed(record)["seal"]
    except RecursionError:
        return False


def is_whole(seal: Any) -> bool:
    """A damaged seal may hold anything, and one that has lost a file would say nothing of it."""
    if not is_sealed(seal) or seal.get("block_bytes") != BLOCK_BYTES:
        return False
    files = seal.get("files")
    return (
        isinstance(files, dict)
        and bool(files)
        and all(
            isinstance(one, dict)
            and type(one.get("bytes")) is int
            and 0 <= one["bytes"] < 2**63
            and isinstance(one.get("sha256"), list)
            and len(one["sha256"]) == len(_blocks(one["bytes"]))
            for one in files.values()
        )
    )


def _blocks(size: int) -> range:
    return range(-(-size // BLOCK_BYTES))


def _digests(folder: Path, blocks: list[tuple[str, int]]) -> Iterator[str]:
    """Hashing lets other threads go on."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return iter(list(pool.map(lambda block: _digest(folder / block[0], block[1]), blocks)))


def _digest(file: Path, index: int) -> str:
    digest, left = hashlib.sha256(), BLOCK_BYTES
    with open(file, "rb", buffering=0) as handle:
        handle.seek(index * BLOCK_BYTES)
        while left and (piece := handle.read(min(left, _READ_BYTES))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "missing"
    return error.strerror or str(error) if isinstance(error, OSError) else "not JSON"
