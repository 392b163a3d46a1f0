"""The tokenizer of a model: read, or converted from a bare `tokenizer.model` and checked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from sft_job.conversations import Trainable
from sft_job.errors import ModelError
from sft_job.files import read_json
from sft_job.modelfiles import read_by_library, read_object_or_none

# Beside a tokenizer that was converted from sentencepiece: check it on every new data set.
CONVERTED = "converted_from_sentencepiece.json"


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a prepared folder, its pad token settled.

    Nothing is ever padded here; the pad token is for those who use the model later: the
    unknown token where there is one (as in the published recipe), else what it has, else none.

    Raises:
        ModelError: its files cannot be read.
    """
    remedy = "look at tokenizer.json and tokenizer_config.json, or fetch them again"
    with read_by_library("the tokenizer cannot be read", folder, remedy):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer("Hi there")  # of what only a text shows: a post-processor, a length
    if tokenizer.unk_token is not None:
        tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def convert_sentencepiece(source: Path, target: Path) -> None:
    """Make tokenizer.json from tokenizer.model, with merges in sentencepiece's own order.

    transformers 5.23 orders the merges by pairs of ids; sentencepiece merges by the score of
    the piece that results. The dummy prefix is a plain prepended piece in sentencepiece, also
    where the text begins with a space (Metaspace leaves it out there).

    Raises:
        ModelError: tokenizer.model is none of sentencepiece's, or not a BPE model.
    """
    import sentencepiece
    import tokenizers

    config = read_object_or_none(source / "tokenizer_config.json") or {}
    remedy = "add the tokenizer.json that was published for this model to its folder"
    with read_by_library("cannot be read by sentencepiece", source / "tokenizer.model", remedy):
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
        tokenizer = LlamaTokenizer.from_pretrained(
            source,
            legacy=config.get("legacy", True),
            add_bos_token=config.get("add_bos_token", True),
        )
        tokenizer.save_pretrained(target)
    file = target / "tokenizer.json"
    backend = json.loads(file.read_text(encoding="utf-8"))
    if backend["model"]["type"] != "BPE":
        raise ModelError("tokenizer.model is not a BPE model", where=str(source))
    vocabulary = backend["model"]["vocab"]

    def order(merge: list[str]) -> tuple[float, int, int]:
        left, right = merge
        score = pieces.get_score(vocabulary[left + right])
        # Pieces of one score, such as runs of spaces, are put together from the left.
        return -score, -len(left), -len(right)

    backend["model"]["merges"].sort(key=order)
    if config.get("legacy", True):
        backend["pre_tokenizer"] = None
        backend["normalizer"] = {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        }
    # Saved as a plain fast tokenizer: LlamaTokenizer would rebuild its own normalizer and
    # pre-tokenizer over those of the file.
    plain = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(backend)),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        add_bos_token=config.get("add_bos_token", True),
    )
    plain.save_pretrained(target)
    shutil.copyfile(source / "tokenizer.model", target / "tokenizer.model")
    (target / CONVERTED).write_text(json.dumps({"legacy": config.get("legacy", True)}))
    _compare_with_sentencepiece(
        target, ["Hello world", " two  spaces", "a\n\n    return 1", "été 谢谢 🌅", "1. 2"]
    )


def check_converted(folder: Path, conversations: Iterable[Trainable]) -> None:
    """Compare a tokenizer that was converted here with sentencepiece, on the user's data."""
    if (folder / CONVERTED).is_file():
        _compare_with_sentencepiece(
            folder, (t for c in conversations for e in c.exchanges for t in (e.user, e.assistant))
        )


def _compare_with_sentencepiece(folder: Path, texts: Iterable[str]) -> None:
    import sentencepiece
    import tokenizers

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.encode_special_tokens = True
    legacy = read_json(folder / CONVERTED)["legacy"]
    for text in texts:
        if not legacy and text.startswith(" "):
            continue  # there the two are meant to differ
        if backend.encode(text, add_special_tokens=False).ids != pieces.encode(text):
            raise ModelError(
                f"tokenizer.model could not be converted: sentencepiece reads {text[:60]!r} "
                "differently from the converted tokenizer",
                where=str(folder),
                remedy="add a tokenizer.json that was made for this model to its folder",
            )
