"""The files of a model as they are on disk: JSON, and the headers of its weights, checked.

Read on a login node too: no torch, no safetensors.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sft_job.errors import ModelError, SftJobError

LFS = b"version https://git-lfs"
# Bytes of a number, by safetensors' names. Only FLOATS can be trained.
WIDTHS = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8,
    "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
LONGEST_HEADER = 100_000_000  # bytes; safetensors reads no longer one


def unreadable(file: Path, reason: Exception) -> ModelError:
    """A file of the model that cannot be read, with the cause that can be seen from outside."""
    if isinstance(reason, PermissionError):
        return ModelError(
            f"this user may not read it: {reason.strerror}",
            where=str(file),
            remedy="its owner lets you with chmod +r (and +x on the folders above)",
        )
    if os.path.isdir(file):
        return ModelError("is a folder, and a file is needed", where=str(file))
    if not os.path.exists(file):
        state = "is a link to nothing" if os.path.islink(file) else "is not there"
        return ModelError(state, where=str(file), remedy="fetch the model again, all of it")
    if _starts_as_pointer(file):
        return ModelError(
            "is a pointer of git-lfs, not the file itself",
            where=str(file),
            remedy="run `git lfs pull` in the model folder",
        )
    said = "it is nested too deeply" if isinstance(reason, RecursionError) else reason
    return ModelError(f"cannot be read: {said}", where=str(file), remedy="fetch it again")


def _starts_as_pointer(file: Path) -> bool:
    try:
        with open(file, "rb") as handle:
            return handle.read(len(LFS)) == LFS
    except OSError:
        return False


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file of the model.

    Raises:
        ModelError: not there, not readable, not JSON, or no object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(file, error) from error
    if not isinstance(value, dict):
        raise ModelError(
            f"a JSON {type(value).__name__} is in it, expected an object",
            where=str(file),
            remedy="fetch it again",
        )
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: those of its index, else all of the folder.

    Some models come with a second copy of their weights in one consolidated file.

    Raises:
        ModelError: the index is broken, or names files elsewhere.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        return [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(
            "weight_map is no table of tensors and files", where=str(index), remedy="fetch it again"
        )
    for tensor, name in names.items():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise ModelError(
                f"weight_map has {tensor} in {name!r}, which is no file of this folder",
                where=str(index),
                remedy="fetch it again",
            )
    return sorted(folder / name for name in set(names.values()))


def has_safetensors(folder: Path) -> bool:
    """Whether there are weights that need no conversion of their format.

    Raises:
        ModelError: there are no weights of any format.
    """
    if any(folder.glob("*.safetensors")):
        return True
    if any(folder.glob("pytorch_model*.bin")):
        return False
    raise ModelError(
        "no weights in the model folder (*.safetensors or pytorch_model*.bin)",
        where=str(folder),
        remedy="fetch the model again, weights included",
    )


def headers(folder: Path) -> Iterator[tuple[Path, dict[str, tuple[str, list[int]]]]]:
    """Each weight file with the dtype and shape of its tensors.

    Raises:
        ModelError: not there, cut off, not of this format, or not plain numbers.
    """
    for file in weight_files(folder):
        try:
            yield file, _header(file)
        except (OSError, ValueError, RecursionError, struct.error) as error:
            raise unreadable(file, error) from error


def _header(file: Path) -> dict[str, tuple[str, list[int]]]:
    """8 bytes of length, then JSON, then the numbers without gaps (safetensors' format)."""
    whole = file.stat().st_size
    with open(file, "rb") as handle:
        (size,) = struct.unpack("<Q", handle.read(8))
        if size > min(whole - 8, LONGEST_HEADER):
            raise ValueError("no safetensors file: it does not begin with the length of a header")
        entries = json.loads(handle.read(size))
    if not isinstance(entries, dict):
        raise ValueError("no safetensors file: its header is no JSON object")
    entries.pop("__metadata__", None)
    tensors, end = {}, 0
    for name, entry in entries.items():
        dtype, shape = _dtype_and_shape(name, entry)
        if any(n == 0 for n in shape):
            raise ValueError(
                f"{name} holds nothing (shape {shape}): it was saved by one rank of several, "
                "without gathering it"
            )
        end += math.prod(shape) * WIDTHS.get(dtype, 1)
        tensors[name] = (dtype, shape)
    if all(dtype in WIDTHS for dtype, _ in tensors.values()) and 8 + size + end != whole:
        state = "cut off" if whole < 8 + size + end else "longer than its header says"
        raise ValueError(f"{state}: {whole:,} bytes, {8 + size + end:,} expected")
    return tensors


def _dtype_and_shape(name: str, entry: Any) -> tuple[str, list[int]]:
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    shape = entry.get("shape") if isinstance(entry, dict) else None
    whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    if not isinstance(dtype, str) or not isinstance(shape, list) or not whole:
        raise ValueError(f"no safetensors file: the entry of {name} is {str(entry)[:80]}")
    return dtype, shape


def refuse_quantised(file: Path, name: str, dtype: str) -> None:
    """8-bit values have the shape of the weights and mean something else without scales.

    Raises:
        ModelError: a weight is not of plain floating-point numbers.
    """
    kinds = ("weight", "weight_packed", "qzeros", "absmax")
    if name.endswith(kinds) and dtype not in FLOATS:
        raise ModelError(
            f"{name} is {dtype}: quantised weights cannot be fully fine-tuned",
            where=str(file),
            remedy="use the model's unquantised weights",
        )


# --- the tokenizer -----------------------------------------------------------------------


def check_tokenizer_files(folder: Path, vocabulary: int) -> None:
    """What can be seen of a tokenizer without the libraries that read it.

    Raises:
        ModelError: there is none, a special token is empty, or a token has no row in the
            embedding table.
    """
    settings = read_object_or_none(folder / "tokenizer_config.json") or {}
    special = special_tokens(settings, folder / "tokenizer_config.json")
    for name in ("special_tokens_map.json", "added_tokens.json", "generation_config.json"):
        content = read_object_or_none(folder / name)
        if name == "special_tokens_map.json" and content:
            special = special_tokens(content, folder / name) | special
    file = folder / "tokenizer.json"
    content = read_object_or_none(file)
    if content is None:
        _check_sentencepiece(folder)
        return
    if "eos_token" in settings and "eos_token" not in special:
        raise ModelError(
            "eos_token is null: an answer could never end",
            where=str(folder / "tokenizer_config.json"),
            remedy="name the token there that ends a text",
        )
    ids = _ids(content, file) | _added(settings, folder / "tokenizer_config.json")
    _refuse_without_rows(ids, special, vocabulary, folder)


def read_object_or_none(file: Path) -> dict[str, Any] | None:
    """As `read_object`; None where there is no such file."""
    return read_object(file) if os.path.lexists(file) else None


def special_tokens(settings: Mapping[str, Any], file: Path) -> dict[str, str]:
    """The special tokens that a file names, by key.

    Raises:
        ModelError: one is neither null nor a text, or is empty.
    """
    found = {}
    for key, value in settings.items():
        if not key.endswith("_token") or key.startswith("add_") or isinstance(value, bool):
            continue
        text = value.get("content") if isinstance(value, Mapping) else value
        if value is None:
            continue
        if not isinstance(text, str) or not text:
            raise ModelError(
                f"{key} is {json.dumps(value)[:60]}, expected a token or null",
                where=str(file),
                remedy=f"name the token, or set {key} to null",
            )
        found[key] = text
    return found


def _check_sentencepiece(folder: Path) -> None:
    """Without tokenizer.json there must be a tokenizer.model that can be converted."""
    file = folder / "tokenizer.model"
    if not os.path.lexists(file):
        raise ModelError(
            "the model folder has no tokenizer (tokenizer.json or tokenizer.model)",
            where=str(folder),
            remedy="copy the tokenizer files of the model into the folder",
        )
    try:
        with open(file, "rb") as handle:
            start = handle.read(64)
    except OSError as error:
        raise unreadable(file, error) from error
    if start.startswith(LFS):
        raise unreadable(file, ValueError("a pointer"))
    if start[:1] != b"\n":  # field 1 of its protocol buffer: the first piece
        raise ModelError(
            "is no sentencepiece model" + (" but a tiktoken vocabulary" if b" " in start else ""),
            where=str(file),
            remedy="add the tokenizer.json that was published for this model to the folder",
        )


def _ids(content: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Every token of a tokenizer.json with its id."""
    model, added = content.get("model"), content.get("added_tokens") or []
    pieces = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(pieces, list | Mapping) or not pieces:
        raise ModelError("has no model.vocab", where=str(file), remedy="fetch it again")
    if not isinstance(added, list) or not all(isinstance(token, Mapping) for token in added):
        raise ModelError(
            "added_tokens is no list of objects", where=str(file), remedy="fetch it again"
        )
    if isinstance(pieces, list):  # of [piece, score]
        pieces = {
            str(piece[0] if isinstance(piece, list) and piece else piece): number
            for number, piece in enumerate(pieces)
        }
    return dict(pieces) | {str(token.get("content")): token.get("id") for token in added}


def _added(settings: Mapping[str, Any], file: Path) -> dict[str, Any]:
    table = settings.get("added_tokens_decoder") or {}
    if not isinstance(table, Mapping) or not all(isinstance(t, Mapping) for t in table.values()):
        raise ModelError(
            "added_tokens_decoder is no table of objects", where=str(file), remedy="fetch it again"
        )
    return {
        str(token.get("content")): int(number) if str(number).isdigit() else number
        for number, token in table.items()
    }


def _refuse_without_rows(
    ids: Mapping[str, Any], special: Mapping[str, str], vocabulary: int, folder: Path
) -> None:
    beyond = {name: n for name, n in ids.items() if type(n) is not int or not 0 <= n < vocabulary}
    remedy = "take tokenizer and weights of one model; embeddings are never resized here"
    if beyond:
        name, number = next(iter(beyond.items()))
        key = next((key for key, token in special.items() if token == name), "such as")
        raise ModelError(
            f"{len(beyond):,} token(s) have no row in the embedding table, {key} {name!r} with id "
            f"{number}: vocab_size is {vocabulary:,}",
            where=str(folder / "tokenizer.json"),
            remedy=remedy,
        )
    unknown = dict.fromkeys(token for token in special.values() if token not in ids)
    following = max(ids.values()) + 1
    for number, token in enumerate(unknown, following):
        if number >= vocabulary:
            key = next(key for key, value in special.items() if value == token)
            raise ModelError(
                f"{key} {token!r} is no token of tokenizer.json; it would get the id {number}, and "
                f"vocab_size is {vocabulary:,}",
                where=str(folder / "tokenizer_config.json"),
                remedy=remedy,
            )


# --- libraries ---------------------------------------------------------------------------


@contextmanager
def read_by_library(what: str, where: Path, remedy: str | None = None) -> Iterator[None]:
    """Whatever a library raises while it reads a model's files is a fault of these files.

    Anything at all comes out of there: KeyError and AttributeError for what a key lacks,
    AssertionError, RecursionError and IndexError for what a value leads to, and tokenizers and
    safetensors raise kinds of their own, one of them Exception itself. So all are caught; the
    block holds calls of the library alone.

    Args:
        what: as in "WHAT: reason".

    Raises:
        ModelError: what was raised, as one sentence.
    """
    try:
        yield
    except SftJobError:
        raise
    except BaseException as error:
        # What the Rust of tokenizers and safetensors breaks off with is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = " ".join(lines)[:300]
        telling = isinstance(error, OSError | ValueError | RuntimeError | TypeError) and said
        kind = "" if telling and not isinstance(error, RecursionError) else type(error).__name__
        reason = ": ".join(filter(None, (kind, said)))
        raise ModelError(f"{what}: {reason}", where=str(where), remedy=remedy) from error
