"""What a folder holds: size and SHA-256 of its files, in blocks, so that many may look at once.

    {"block_bytes": 268435456, "files": {"tokens.bin": {"bytes": 4194304, "sha256": ["9f2c..."]}}}

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
    sealed: dict[str, Any] = {name: {"bytes": size, "sha256": []} for name, size in files.items()}
    for (name, _), digest in zip(blocks, digests, strict=True):
        sealed[name]["sha256"].append(digest)
    return {"block_bytes": BLOCK_BYTES, "files": sealed}


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
            seal = json.loads((folder / SEAL).read_bytes())
        except (OSError, ValueError) as error:
            return f"{SEAL} cannot be read ({_reason(error)})"
    if not _well_formed(seal):
        return f"{SEAL} is damaged"
    expected: list[tuple[tuple[str, int], str]] = []
    for name, sealed in seal["files"].items():
        if names is not None and name not in names:
            continue
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            return f"{name}: {_reason(error)}"
        if size != sealed["bytes"]:
            return f"{name} has {size:,} bytes, {sealed['bytes']:,} were written"
        expected += [((name, i), digest) for i, digest in enumerate(sealed["sha256"])]
    mine = expected[part::parts]
    try:
        found = _digests(folder, [block for block, _ in mine])
    except OSError as error:
        return f"{error.filename}: {_reason(error)}"
    for ((name, _), wanted), digest in zip(mine, found, strict=True):
        if digest != wanted:
            return f"{name} was changed after it was written (SHA-256 differs)"
    return None


def _well_formed(seal: Any) -> bool:
    """A damaged seal may hold anything."""
    if not isinstance(seal, dict) or seal.get("block_bytes") != BLOCK_BYTES:
        return False
    files = seal.get("files")
    return (
        isinstance(files, dict)
        and bool(files)
        and all(
            isinstance(one, dict)
            and isinstance(one.get("bytes"), int)
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
