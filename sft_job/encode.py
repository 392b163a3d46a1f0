"""Conversations to token ids and labels, in one tokenisation.

Each segment of a conversation (`templates.Segment`) is tokenised once, with character
offsets; the end-of-sequence id is put after it. Ids and labels are made together from the
offsets, so that they cannot drift apart:

    text      USER: Hi ASSISTANT: Hello!          boundary after "ASSISTANT:"
    tokens    ▁US ER : ▁Hi ▁A SS IST ANT : ▁Hello ! </s>
    labels     -   -  -  -  -  -  -   -  -    x   x   x

Text never becomes a control token: special tokens are not looked for in it. The result is
compared with what the tokenizer makes of the whole rendered text (`check_tokenizer`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tokenizers

from sft_job.conversations import Exchange, Trainable
from sft_job.errors import DataError, ModelError
from sft_job.templates import TEMPLATES, Segment, Template

IGNORE_INDEX = -100
"""torch.nn.CrossEntropyLoss(ignore_index=-100): the label of a token that is not trained on."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One sequence to train on.

    Args:
        input_ids: uint32 `[n]`.
        supervised: bool `[n]`, true where the token is trained on. Never true at position 0,
            which nothing predicts, and true somewhere.
    """

    input_ids: np.ndarray
    supervised: np.ndarray

    def __post_init__(self) -> None:
        same = self.input_ids.shape == self.supervised.shape == (len(self.input_ids),)
        if not same or not self.supervised.any() or self.supervised[0]:
            raise ValueError("not a sample: shapes differ, or nothing in it can be trained on")

    @property
    def labels(self) -> np.ndarray:
        """int64 `[n]`: the token's own id where supervised, else IGNORE_INDEX."""
        return np.where(self.supervised, self.input_ids.astype(np.int64), IGNORE_INDEX)


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """A fast tokenizer as plain values, to be rebuilt in any process.

    Args:
        first: `tokenizers` JSON for text at the beginning.
        following: the same for text after an end-of-sequence id; differs where the tokenizer
            puts a space before the very first word only.
        begin: ids before the first segment (the begin-of-sequence id, or none).
        end: the end-of-sequence id.
    """

    first: str
    following: str
    begin: tuple[int, ...]
    end: int


def spec_of(tokenizer: Any) -> TokenizerSpec:
    """The spec of a transformers fast tokenizer.

    Raises:
        ModelError: not a fast tokenizer, or without an end-of-sequence token.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    where = str(getattr(tokenizer, "name_or_path", "tokenizer"))
    if backend is None:
        raise ModelError(
            f"{type(tokenizer).__name__} is not a fast tokenizer: it gives no character offsets",
            where=where,
            remedy="use a model folder with a tokenizer.json",
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no end-of-sequence token, so an answer could never end",
            where=where,
            remedy="set eos_token in tokenizer_config.json",
        )
    first = json.loads(backend.to_str())
    # Only ids of our own choosing go around the text; truncation and padding are ours as well.
    first.update(post_processor=None, truncation=None, padding=None)
    following = json.loads(json.dumps(first))
    _never_prepend(following.get("pre_tokenizer"))
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return TokenizerSpec(
        first=json.dumps(first),
        following=json.dumps(following),
        begin=(tokenizer.bos_token_id,) if begins else (),
        end=tokenizer.eos_token_id,
    )


def _never_prepend(pre_tokenizer: Any) -> None:
    """Metaspace with prepend_scheme "first" adds its space at offset 0 of the whole text only."""
    if isinstance(pre_tokenizer, dict):
        if pre_tokenizer.get("prepend_scheme") == "first":
            pre_tokenizer["prepend_scheme"] = "never"
        for inner in pre_tokenizer.get("pretokenizers", ()):
            _never_prepend(inner)


def _backend(text: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(text)
    backend.encode_special_tokens = True  # "</s>" typed by a user is five characters
    return backend


@dataclass(frozen=True, slots=True, eq=False)
class _Encoded:
    """One tokenised segment: ids with the end-of-sequence id, and where its answer begins.

    Args:
        first: the answer's first token.
        straddling: 1 where a token before it has a part of the answer.
        trained: whether the answer is supervised.
    """

    input_ids: np.ndarray
    first: int
    straddling: int
    trained: bool

    @property
    def supervised(self) -> np.ndarray:
        return (np.arange(len(self.input_ids)) >= self.first) & self.trained


class Encoder:
    """Encodes conversations under one template and one policy for overlong ones."""

    def __init__(
        self,
        spec: TokenizerSpec,
        template: str,
        seq_len: int,
        overlong: Literal["truncate", "split", "drop", "error"],
    ) -> None:
        self.spec, self.seq_len, self.overlong = spec, seq_len, overlong
        self.template: Template = TEMPLATES[template]
        self._first = _backend(spec.first)
        same = spec.first == spec.following
        self._following = self._first if same else _backend(spec.following)

    def encode(self, conversations: Sequence[Trainable]) -> tuple[list[list[Sample]], Counter[str]]:
        """Encode conversations, all segments in two calls of the tokenizer.

        Returns:
            The samples of each conversation (none when it was dropped), and what was lost:
            tokens and conversations by reason.

        Raises:
            DataError: with overlong: error, every overlong conversation.
        """
        rendered = [self.template.render(c.system, c.exchanges) for c in conversations]
        firsts = iter(self._tokenize(self._first, [r[0] for r in rendered]))
        others = iter(self._tokenize(self._following, [s for r in rendered for s in r[1:]]))
        lost: Counter[str] = Counter()
        faults: list[str] = []
        result = []
        for conversation, segments in zip(conversations, rendered, strict=True):
            encoded = [next(firsts), *(next(others) for _ in segments[1:])]
            lost["straddling_token"] += sum(e.straddling for e in encoded if e.trained)
            length = self._length(encoded)
            if length <= self.seq_len:
                result.append([self._sample(encoded)])
                continue
            lost["overlong"] += 1
            if self.overlong == "error":
                faults.append(
                    f"{conversation.where}: conversation {conversation.id!r} has {length:,} "
                    f"tokens, data.seq_len is {self.seq_len:,}"
                )
                result.append([])
            elif self.overlong == "drop":
                lost["overlong_dropped"] += 1
                lost["overlong_tokens"] += length
                lost["overlong_supervised_tokens"] += sum(int(e.supervised.sum()) for e in encoded)
                result.append([])
            elif self.overlong == "split":
                result.append(self._split(conversation, encoded, lost))
            else:
                result.append(self._truncated(encoded, lost))
        if faults:
            raise DataError(
                faults,
                remedy="raise data.seq_len, or choose data.overlong: truncate | split | drop",
            )
        return result, lost

    def prompt(self, system: str | None, exchanges: Sequence[Exchange], question: str) -> list[int]:
        """Ids of a conversation up to where the next answer begins, as in training."""
        segments = self.template.render(system, [*exchanges, Exchange(question, "")])
        last = segments[-1]
        segments[-1] = Segment(last.text[: last.boundary], last.boundary)
        ids: list[int] = list(self.spec.begin)
        for index, segment in enumerate(segments):
            backend = self._following if index else self._first
            ids += backend.encode(segment.text, add_special_tokens=False).ids
            ids += [self.spec.end] if segment is not segments[-1] else []
        return ids

    def _tokenize(self, backend: tokenizers.Tokenizer, segments: list[Segment]) -> list[_Encoded]:
        encodings = backend.encode_batch([s.text for s in segments], add_special_tokens=False)
        return [
            self._encoded(segment, encoding)
            for segment, encoding in zip(segments, encodings, strict=True)
        ]

    def _encoded(self, segment: Segment, encoding: tokenizers.Encoding) -> _Encoded:
        ids = encoding.ids
        first, straddling = len(ids), 0
        for position in range(segment.boundary, len(segment.text)):
            token = encoding.char_to_token(position)
            if token is not None:
                first = token
                break
        if first < len(ids) and encoding.offsets[first][0] < segment.boundary:
            first, straddling = first + 1, 1
        if not 0 < first <= len(ids) or encoding.offsets[first - 1 - straddling][1] > (
            segment.boundary
        ):
            # Offsets that do not rise with the text would put labels on the question.
            raise ModelError(
                f"the tokenizer's offsets do not follow the text: {segment.text!r}",
                remedy="this tokenizer cannot be used; report it with this text",
            )
        input_ids = np.array([*ids, self.spec.end], dtype=np.uint32)
        return _Encoded(input_ids, first, straddling, segment.trained)

    def _sample(self, encoded: Sequence[_Encoded]) -> Sample:
        begin = np.array(self.spec.begin, dtype=np.uint32)
        sample = Sample(
            np.concatenate([begin, *(e.input_ids for e in encoded)]),
            np.concatenate([np.zeros(len(begin), bool), *(e.supervised for e in encoded)]),
        )
        self._check_invariant(sample, encoded)
        return sample

    def _check_invariant(self, sample: Sample, encoded: Sequence[_Encoded]) -> None:
        """Supervised runs are exactly the trained answers, each through its stop token."""
        edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.supervised, [0]])))
        ends = np.cumsum([len(e.input_ids) for e in encoded]) + len(self.spec.begin)
        expected = [
            (end - len(e.input_ids) + e.first, end)
            for e, end in zip(encoded, ends, strict=True)
            if e.trained
        ]
        stops = sample.input_ids[edges[1::2] - 1]
        if (
            edges.tolist() != [edge for run in expected for edge in run]
            or (stops != self.spec.end).any()
        ):
            raise AssertionError("labels are not exactly the trained answers and their stop tokens")

    def _truncated(self, encoded: Sequence[_Encoded], lost: Counter[str]) -> list[Sample]:
        """The first seq_len tokens; nothing when no token of a trained answer is among them."""
        if any(e.trained for e in encoded):
            whole = self._sample(encoded)
            kept = whole.supervised[: self.seq_len]
            lost["overlong_supervised_tokens"] += int(whole.supervised.sum() - kept.sum())
            if kept.any():
                lost["overlong_tokens"] += len(whole.input_ids) - len(kept)
                return [Sample(whole.input_ids[: self.seq_len], kept)]
        lost["overlong_nothing_left"] += 1
        lost["overlong_tokens"] += self._length(encoded)
        return []

    def _length(self, encoded: Sequence[_Encoded]) -> int:
        return len(self.spec.begin) + sum(len(e.input_ids) for e in encoded)

    def _split(
        self, conversation: Trainable, encoded: Sequence[_Encoded], lost: Counter[str]
    ) -> list[Sample]:
        """Parts of whole exchanges, each with the system text, each as long as it may be.

        A part without an answer to train on is dropped.
        """
        exchanges = conversation.exchanges
        samples: list[Sample] = []
        start = 0
        while start < len(exchanges):
            head = self.template.render(conversation.system, exchanges[start : start + 1])
            part = [encoded[0]] if start == 0 else self._tokenize(self._first, head)
            length = self._length(part)
            end = start + 1
            while end < len(exchanges) and length + len(encoded[end].input_ids) <= self.seq_len:
                length += len(encoded[end].input_ids)
                part.append(encoded[end])
                end += 1
            if length <= self.seq_len and any(e.trained for e in part):
                samples.append(self._sample(part))
            else:
                samples += self._truncated(part, lost)
            start = end
        return samples


def check_tokenizer(tokenizer: Any, encoder: Encoder, conversations: Sequence[Trainable]) -> None:
    """Compare segment-wise ids with the tokenizer's own reading of the whole text.

    Conversations whose text contains a control token are passed over: there the difference
    is intended.

    Raises:
        ModelError: an id differs, so that inference would see other ids than training.
    """
    control = [str(token) for token in tokenizer.all_special_tokens]
    end = tokenizer.convert_ids_to_tokens(encoder.spec.end)
    for conversation in conversations:
        segments = encoder.template.render(conversation.system, conversation.exchanges)
        if any(token in segment.text for segment in segments for token in control):
            continue
        text = "".join(segment.text + end for segment in segments)
        theirs = [*encoder.spec.begin, *tokenizer(text, add_special_tokens=False).input_ids]
        ours = list(encoder.spec.begin)
        for index, segment in enumerate(segments):
            backend = encoder._following if index else encoder._first
            ours += [*backend.encode(segment.text, add_special_tokens=False).ids, encoder.spec.end]
        if ours != theirs:
            at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
            raise ModelError(
                f"{conversation.where}: the tokenizer reads a whole conversation differently from "
                f"its parts (token {at}: {tokenizer.convert_ids_to_tokens(theirs[at : at + 3])} "
                f"against {tokenizer.convert_ids_to_tokens(ours[at : at + 3])})",
                where=str(tokenizer.name_or_path),
                remedy="this tokenizer strips or adds text around control tokens and cannot be "
                "used with this template",
            )
