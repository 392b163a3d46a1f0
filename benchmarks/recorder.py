"""Writes down what a peer's Trainer does: time, loss and real tokens of every step.

Runs in a peer's own environment. The trainer class, its loop and its data path are the peer's;
this only looks at the batches that reach `Trainer.training_step` and at the clock at the end of
every step, and ends the process when training is over: saving is not measured.

One line of JSON per optimizer step:

    seconds       end of the step before to end of this one: data, forward, backward, optimizer
    loss          as the peer logs it
    computed      positions that went through the model
    tokens        of those, tokens of conversations
    supervised    tokens that are trained on
    samples       digests of the samples' ids and labels
    peak_rss_gib  so far
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers import trainer as trainer_module

IGNORE_INDEX = -100


class Recorder(TrainerCallback):
    """Collects a step's figures and appends them to a file when its loss is known."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.extra: dict[str, Any] = {}
        self._now = self._empty()
        self._done: dict[str, Any] = {}
        self._since = 0.0

    @staticmethod
    def _empty() -> dict[str, Any]:
        return {"seconds": 0.0, "computed": 0, "tokens": 0, "supervised": 0, "samples": []}

    def batch(self, inputs: dict[str, Any]) -> None:
        self._now["computed"] += inputs["input_ids"].numel()
        for ids, labels in samples_of(inputs):
            self._now["tokens"] += len(ids)
            self._now["supervised"] += int((labels[1:] != IGNORE_INDEX).sum())
            self._now["samples"].append(sample_digest(ids.tolist(), labels.tolist()))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self._now["seconds"] = now - self._since
        self._since = now
        self._done, self._now = self._now, self._empty()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        figures = {"loss": float(logs["loss"]), "peak_rss_gib": round(peak, 3)}
        record = self._done | figures | {"threads": torch.get_num_threads()} | self.extra
        with open(self.file, "a") as file:
            file.write(json.dumps(record) + "\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        os._exit(0)


def samples_of(inputs: dict[str, Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels of each sample of a batch, without padding; flattened rows are cut where
    their positions start again."""
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    for row in range(inputs["input_ids"].shape[0]):
        ids, labels = inputs["input_ids"][row], inputs["labels"][row]
        if mask is not None:
            kept = mask[row].bool()
            yield ids[kept], labels[kept]
            continue
        starts = [0] if positions is None else (positions[row] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            yield ids[start:end], labels[start:end]


def sample_digest(ids: list[int], labels: list[int]) -> str:
    """Names a sample by its ids and by which of them are trained on."""
    supervised = [int(label != IGNORE_INDEX) for label in labels]
    return hashlib.sha256(json.dumps([ids, supervised]).encode()).hexdigest()[:16]


def install(file: Path) -> Recorder:
    """Record every Trainer of this process into `file`."""
    recorder = Recorder(file)
    trainer_module.DEFAULT_CALLBACKS.append(recorder)
    original = Trainer.training_step

    def training_step(self: Any, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        recorder.batch(inputs)
        return original(self, model, inputs, *rest, **named)

    Trainer.training_step = training_step
    return recorder
