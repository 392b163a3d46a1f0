"""The token cache, and a rank's share of every step.

A folder of the cache, written once and published whole (meta.json is its marker):

    meta.json           fingerprint, counts, what was lost
    tokens.bin          uint16 or uint32: ids of all samples, end to end
    supervised.bin      uint8: 1 where the id is trained on
    lengths.bin         uint32: tokens of each sample
    sources.jsonl       [conversation id, place] of each sample

With preprocess: lazy the folder holds texts instead: conversations.jsonl, offsets.bin.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import itertools
import json
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sft_job.batching import Schedule, deal, idle_share
from sft_job.conversations import Exchange, Trainable, read_trainable
from sft_job.encode import Encoder, Sample, TokenizerSpec, check_tokenizer, spec_of
from sft_job.errors import DataError
from sft_job.files import is_intact, publish_dir
from sft_job.hardware import cores
from sft_job.prepared import PREPARED_VERSION
from sft_job.rundir import CacheDir
from sft_job.schema import JobConfig
from sft_job.templates import TEMPLATES

# Conversations handed to an encoding process at a time; below PARALLEL_FROM the start of the
# processes would take longer than the encoding.
CHUNK = 512
PARALLEL_FROM = 4096

# Conversations on which the tokenizer is checked against itself before it is trusted.
CHECKED = 256


def encoder_of(config: JobConfig, tokenizer: Any) -> Encoder:
    data = config.data
    return Encoder(spec_of(tokenizer), data.template, data.seq_len, data.overlong)


def fingerprint(config: JobConfig, spec: TokenizerSpec) -> str:
    """Identity of the encoded data: everything that decides an id, a label or the order."""
    digest = hashlib.sha256()
    data = config.data
    parts = [PREPARED_VERSION, asdict(spec), asdict(TEMPLATES[data.template])]
    digest.update(json.dumps([*parts, data.seq_len, data.overlong]).encode())
    for path in config.data.files():
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def build(config: JobConfig, tokenizer: Any) -> Path:
    """Make the cache folder of a job ready; returns at once when it is there.

    Runs outside any process group. Two jobs may build the same folder at once.

    Raises:
        DataError: faults of the data, or nothing to train on.
    """
    encoder = encoder_of(config, tokenizer)
    identity = fingerprint(config, encoder.spec)
    lazy = config.data.preprocess == "lazy"
    folder = CacheDir(config.cache_dir).tokens(identity)
    if lazy:
        folder = folder.with_name(folder.name + "-text")
    if is_intact(folder):
        return folder
    found = read_trainable(config.data.files())
    conversations, lost = found.conversations, found.lost
    stride = max(1, len(conversations) // CHECKED)
    check_tokenizer(tokenizer, encoder, conversations[::stride])
    meta = {
        "fingerprint": identity,
        "conversations": found.count,
        "ignored_keys": found.ignored,
        "begin": tokenizer.bos_token if encoder.spec.begin else None,
        "end": tokenizer.eos_token,
    }
    highest = max(tokenizer.get_vocab().values())  # a vocabulary may have holes
    with publish_dir(folder) as beside:
        if lazy:
            _write_texts(beside, conversations)
            meta |= {"samples": len(conversations), "tokens": None, "supervised_tokens": None}
        else:
            meta |= _write_tokens(beside, encoder, conversations, lost, highest)
        meta["lost"] = dict(sorted(lost.items()))
        (beside / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return folder


def _write_tokens(
    folder: Path,
    encoder: Encoder,
    conversations: Sequence[Trainable],
    lost: Counter[str],
    highest: int,
) -> dict[str, Any]:
    dtype = np.dtype(np.uint16 if highest < 2**16 else np.uint32)
    lengths: list[int] = []
    supervised = 0
    with (
        open(folder / "tokens.bin", "wb") as tokens_file,
        open(folder / "supervised.bin", "wb") as supervised_file,
        open(folder / "sources.jsonl", "w", encoding="utf-8") as sources_file,
    ):
        for chunk, results, losses in _encode_all(encoder, conversations):
            lost += losses
            for conversation, samples in zip(chunk, results, strict=True):
                for sample in samples:
                    tokens_file.write(sample.input_ids.astype(dtype).tobytes())
                    supervised_file.write(sample.supervised.astype(np.uint8).tobytes())
                    sources_file.write(json.dumps([conversation.id, conversation.where]) + "\n")
                    lengths.append(len(sample.input_ids))
                    supervised += int(sample.supervised.sum())
    if not lengths:
        raise DataError(
            ["no sample is left to train on: every conversation was dropped as overlong"],
            remedy="raise data.seq_len",
        )
    np.array(lengths, dtype=np.uint32).tofile(folder / "lengths.bin")
    return {
        "samples": len(lengths),
        "tokens": sum(lengths),
        "supervised_tokens": supervised,
        "dtype": dtype.name,
    }


def _write_texts(folder: Path, conversations: Sequence[Trainable]) -> None:
    offsets = [0]
    with open(folder / "conversations.jsonl", "wb") as file:
        for conversation in conversations:
            line = json.dumps(asdict(conversation)).encode() + b"\n"
            file.write(line)
            offsets.append(offsets[-1] + len(line))
    np.array(offsets, dtype=np.uint64).tofile(folder / "offsets.bin")


_Result = tuple[list[list[Sample]], Counter[str]]
_worker: Encoder


def _start_worker(arguments: tuple[Any, ...]) -> None:
    global _worker
    _worker = Encoder(*arguments)


def _encode_chunk(chunk: Sequence[Trainable]) -> _Result:
    return _worker.encode(chunk)


def _encode_all(
    encoder: Encoder, conversations: Sequence[Trainable]
) -> Iterator[tuple[Sequence[Trainable], list[list[Sample]], Counter[str]]]:
    chunks = [conversations[i : i + CHUNK] for i in range(0, len(conversations), CHUNK)]
    if len(conversations) < PARALLEL_FROM or cores() == 1:
        for chunk in chunks:
            yield chunk, *encoder.encode(chunk)
        return
    arguments = (encoder.spec, encoder.template.name, encoder.seq_len, encoder.overlong)
    with concurrent.futures.ProcessPoolExecutor(
        cores(),
        # A forked child could inherit a lock that a thread of the tokenizer holds.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(arguments,),
    ) as pool:
        for chunk, (results, losses) in zip(chunks, pool.map(_encode_chunk, chunks), strict=True):
            yield chunk, results, losses


class TokenCache:
    """The samples of a cache folder, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = json.loads((folder / "meta.json").read_text())
        lengths = np.fromfile(folder / "lengths.bin", dtype=np.uint32).astype(np.int64)
        self._ends = np.cumsum(lengths)
        self._tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
        self._supervised = np.memmap(folder / "supervised.bin", dtype=np.uint8, mode="r")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = slice(int(self._ends[index - 1]) if index else 0, int(self._ends[index]))
        return Sample(self._tokens[part].astype(np.uint32), self._supervised[part].astype(np.bool_))

    def sources(self, indices: Sequence[int]) -> list[str]:
        """`conversation id (place)` of samples, for messages."""
        wanted = set(indices)
        with open(self.folder / "sources.jsonl", encoding="utf-8") as file:
            lines = [line for number, line in enumerate(file) if number in wanted]
        return [_source(*json.loads(line)) for line in lines]


def _source(name: str, where: str) -> str:
    return f"{name} ({where})"


class TextCache:
    """The conversations of a lazy cache folder, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self._offsets = np.fromfile(folder / "offsets.bin", dtype=np.uint64)
        self._text = np.memmap(folder / "conversations.jsonl", dtype=np.uint8, mode="r")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Trainable:
        begin, end = int(self._offsets[index]), int(self._offsets[index + 1])
        record = json.loads(self._text[begin:end].tobytes())
        record["exchanges"] = tuple(Exchange(**exchange) for exchange in record["exchanges"])
        return Trainable(**record)

    def sources(self, indices: Sequence[int]) -> list[str]:
        return [_source(c.id, c.where) for c in (self[i] for i in indices)]


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Flatten samples into one micro-batch; here two, of which a2, b1 and b2 are supervised.

        input_ids      a0 a1 a2 b0 b1 b2 b3      int64 [1, T]
        position_ids    0  1  2  0  1  2  3      int64 [1, T], restart in every sample
        supervised         1     3  4            int64 [n], places whose next token is trained on
        targets           a2    b1 b2            int64 [n], those next tokens
        cu_seqlens     [0, 3, 7]                 int32 [samples + 1]
        seq_lens       [3, 4]                    Python ints: no device has to be asked

    Without samples: one token that is not trained on, so that the forward pass still takes
    part in every collective.
    """
    ids = [sample.input_ids.astype(np.int64) for sample in samples] or [np.zeros(1, np.int64)]
    lengths = [len(one) for one in ids]
    row, ends = np.concatenate(ids), np.cumsum([0, *lengths])
    trained = np.zeros(len(row), np.bool_)
    for start, sample in zip(ends[:-1], samples, strict=False):
        trained[start : start + len(sample.input_ids)] = sample.supervised
    following = np.flatnonzero(trained)  # never the first of a sample, see Sample
    return {
        "input_ids": torch.from_numpy(row)[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "supervised": torch.from_numpy(following - 1),
        "targets": torch.from_numpy(row[following]),
        "cu_seqlens": torch.from_numpy(ends.astype(np.int32)),
        "seq_lens": lengths,
    }


@dataclass(frozen=True, slots=True, eq=False)
class StepBatch:
    """One rank's part of one optimizer step.

    Args:
        micro_batches: as from `collate`; the same number on every rank.
        tokens, supervised_tokens: of the whole step, over all ranks; squares: the sum of its
            squared sample lengths.
        idle_share: see `batching.idle_share`.
        samples: indices of the step's samples in the cache, over all ranks.
    """

    micro_batches: list[dict[str, Any]]
    tokens: int
    squares: int
    supervised_tokens: int
    idle_share: float
    samples: list[int]


class Steps(torch.utils.data.Dataset[StepBatch]):
    """Item i is this rank's part of step i."""

    def __init__(
        self,
        cache: TokenCache | TextCache,
        schedule: Schedule,
        *,
        rank: int,
        world_size: int,
        micro_batch_tokens: int,
        attention_scale: float,
        one_sample_each: bool = False,
        encoder: Encoder | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            one_sample_each: see `batching.deal`.
            encoder, group: needed with a TextCache; the group exchanges what each rank encoded.
        """
        self.cache, self.schedule, self.rank, self.world_size = cache, schedule, rank, world_size
        self.micro_batch_tokens, self.attention_scale = micro_batch_tokens, attention_scale
        self.one_sample_each = one_sample_each
        self.lost: Counter[str] = Counter()
        self._lazy = (
            _LazySteps(cache, schedule, encoder, group, rank, world_size)
            if isinstance(cache, TextCache) and encoder is not None
            else None
        )

    def __len__(self) -> int:
        return self.schedule.steps

    def __getitem__(self, index: int) -> StepBatch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        units = self.schedule.step(index)
        indices = [i for unit in units for i in unit]
        if self._lazy is not None:
            samples, lost = self._lazy.step(index)
            self.lost += lost
            units = [[i] for i in range(len(samples))]
            pool: Any = samples
        else:
            pool = {i: self.cache[i] for i in indices}
        lengths = [sum(len(pool[i].input_ids) for i in unit) for unit in units]
        dealt = deal(
            lengths,
            world_size=self.world_size,
            micro_batch_tokens=self.micro_batch_tokens,
            attention_scale=self.attention_scale,
            one_sample_each=self.one_sample_each,
        )
        mine = [[pool[i] for unit in ranks[self.rank] for i in units[unit]] for ranks in dealt]
        every = pool if self._lazy is not None else pool.values()
        return StepBatch(
            micro_batches=[collate(samples) for samples in mine or [[]]],
            tokens=sum(lengths),
            squares=sum(len(sample.input_ids) ** 2 for sample in every),
            supervised_tokens=sum(int(sample.supervised.sum()) for sample in every),
            idle_share=idle_share(dealt, lengths, self.attention_scale),
            samples=indices,
        )


class _LazySteps:
    """Encodes this rank's part of a step ahead, in a thread, and exchanges it with the others."""

    def __init__(
        self,
        cache: TextCache,
        schedule: Schedule,
        encoder: Encoder,
        group: dist.ProcessGroup | None,
        rank: int,
        world_size: int,
    ) -> None:
        self.cache, self.schedule, self.encoder, self.group = cache, schedule, encoder, group
        self.rank, self.world_size = rank, world_size
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._ahead: tuple[int, concurrent.futures.Future[_Result]] | None = None

    def _encode(self, step: int) -> _Result:
        mine = [unit[0] for unit in self.schedule.step(step)][self.rank :: self.world_size]
        return self.encoder.encode([self.cache[i] for i in mine]) if mine else ([], Counter())

    def step(self, index: int) -> tuple[list[Sample], Counter[str]]:
        """The samples of a step in the epoch's order, the same on every rank."""
        if self._ahead is not None and self._ahead[0] == index:
            mine = self._ahead[1].result()
        else:
            mine = self._encode(index)
        if index + 1 < self.schedule.steps:
            self._ahead = (index + 1, self._thread.submit(self._encode, index + 1))
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, mine, group=self.group)
        lost: Counter[str] = Counter()
        for _, losses in parts:
            lost += losses
        # Rank r has conversations r, r + world, ...: take turns to restore the order.
        turns = itertools.zip_longest(*(samples for samples, _ in parts), fillvalue=())
        return [sample for turn in turns for samples in turn for sample in samples], lost
