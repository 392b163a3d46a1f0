"""Which samples make a step, and how a step is dealt to ranks and micro-batches. Pure.

The order of an epoch depends on (fingerprint of the data, seed, epoch) alone, never on the
number of ranks. A step is `global_batch_size` units of that order; a unit is one sample
(batching: conversations) or one packed row of samples (batching: rows). Since the loss is
normalised over the whole step, its samples may be dealt in any way. Engines meet at every
micro-batch, so a step costs the sum over its micro-batches of the heaviest rank:

                 micro-batch 0      micro-batch 1
        rank 0   [s7 s2 s9]         [s1 s4]             one flattened row each,
        rank 1   [s3 s8]            [s6 s0 s5]          at most micro_batch_tokens long
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Bins = list[list[int]]


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> Bins:
    """Pack items into as few bins as best-fit decreasing finds.

    Args:
        lengths: size of each item, at most `capacity`.

    Returns:
        Item indices by bin.
    """
    bins: Bins = []
    spaces: list[tuple[int, int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[item]
        if length > capacity:
            raise ValueError(f"item of {length} does not fit into {capacity}")
        position = bisect_left(spaces, (length, -1))
        if position < len(spaces):
            space, target = spaces.pop(position)
            bins[target].append(item)
        else:
            space, target = capacity, len(bins)
            bins.append([item])
        insort(spaces, (space - length, target))
    return bins


def cost(length: int, attention_scale: float) -> float:
    """Cost of a sample in tokens of linear work.

    Args:
        attention_scale: body parameters / (layers x hidden size); causal attention of n tokens
            costs n^2 / attention_scale (2 x layers x hidden x n FLOPs a token against
            2 x parameters).
    """
    return length * (1 + length / attention_scale)


def deal(
    lengths: Sequence[int],
    *,
    world_size: int,
    micro_batch_tokens: int,
    attention_scale: float,
    one_sample_each: bool = False,
) -> list[list[list[int]]]:
    """Deal the samples of one step.

    Args:
        lengths: tokens of each sample of the step.
        one_sample_each: no two samples share a row (a model whose attention cannot keep them
            apart).

    Returns:
        `[micro-batch][rank] -> positions in lengths`; the same number of micro-batches for
        every rank, the least that best-fit decreasing finds. A list may be empty.
    """
    costs = [cost(length, attention_scale) for length in lengths]
    if one_sample_each:
        packed = [[index] for index in range(len(lengths))]
    else:
        packed = best_fit_decreasing(lengths, micro_batch_tokens)
    count = math.ceil(len(packed) / world_size) * world_size
    bins = None if one_sample_each else _longest_first(lengths, costs, count, micro_batch_tokens)
    if bins is None:  # levelling would need more room than there is: the tight packing has it
        bins = packed + [[] for _ in range(count - len(packed))]
    # Bins of like cost meet in one micro-batch, so that its heaviest rank waits least.
    bins.sort(key=lambda b: -sum(costs[i] for i in b))
    return [bins[start : start + world_size] for start in range(0, count, world_size)]


def _longest_first(
    lengths: Sequence[int], costs: Sequence[float], count: int, capacity: int
) -> Bins | None:
    """Longest-processing-time levelling under a capacity; None where a sample finds no room."""
    bins: Bins = [[] for _ in range(count)]
    heap = [(0.0, index, 0) for index in range(count)]
    for item in sorted(range(len(lengths)), key=lambda i: (-costs[i], i)):
        full = []
        while heap and heap[0][2] + lengths[item] > capacity:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        load, index, tokens = heapq.heappop(heap)
        bins[index].append(item)
        heapq.heappush(heap, (load + costs[item], index, tokens + lengths[item]))
        for entry in full:
            heapq.heappush(heap, entry)
    return bins


def idle_share(
    dealt: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int], attention_scale: float
) -> float:
    """Share of the ranks' time spent waiting for the heaviest rank of each micro-batch."""
    loads = [
        [sum(cost(lengths[i], attention_scale) for i in samples) for samples in ranks]
        for ranks in dealt
    ]
    waited = sum(max(ranks) * len(ranks) for ranks in loads)
    return max(0.0, 1 - sum(map(sum, loads)) / waited) if waited else 0.0


@dataclass(frozen=True)
class Schedule:
    """Which samples are in which step, for the whole run.

    Args:
        sample_count: number of samples.
        lengths: tokens of each sample; None while nothing is tokenised (preprocess: lazy).
        fingerprint: identity of the data.
    """

    sample_count: int
    fingerprint: str
    seed: int
    batching: Literal["conversations", "rows"]
    global_batch_size: int
    num_train_epochs: int
    max_steps: int | None
    seq_len: int
    lengths: Sequence[int] | None = None
    _rows: Bins = field(init=False, repr=False, compare=False)
    _orders: dict[int, Bins] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.batching == "rows":
            if self.lengths is None:
                raise ValueError("rows are packed from lengths")
            rows = best_fit_decreasing(self.lengths, self.seq_len)
        else:
            rows = [[index] for index in range(self.sample_count)]
        object.__setattr__(self, "_rows", rows)

    @property
    def units(self) -> int:
        """Conversations or rows in an epoch."""
        return len(self._rows)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.units / self.global_batch_size)

    @property
    def steps(self) -> int:
        return self.max_steps or self.steps_per_epoch * self.num_train_epochs

    def step(self, index: int) -> list[list[int]]:
        """Units of step `index` (0-based), each a list of samples."""
        epoch, position = divmod(index, self.steps_per_epoch)
        if epoch not in self._orders:
            order = list(self._rows)
            random.Random(f"{self.fingerprint}/{self.seed}/{epoch}").shuffle(order)
            self._orders.clear()
            self._orders[epoch] = order
        start = position * self.global_batch_size
        return self._orders[epoch][start : start + self.global_batch_size]

    def epoch(self, steps_done: int) -> float:
        return steps_done / self.steps_per_epoch
