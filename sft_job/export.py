"""The final model: safetensors in the compute dtype, tokenizer and chat template, verified.

    RUN_DIR/model/
      model-00001-of-0000N.safetensors, model.safetensors.index.json
      config.json, generation_config.json, tokenizer.json, ...        see settings.py

Parameters come one at a time from all ranks (`full_parameters`); the main rank writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from sft_job import checkpoint, result, settings
from sft_job.attempt import Attempt
from sft_job.encode import Encoder
from sft_job.errors import ExportError
from sft_job.files import discard, settle
from sft_job.rundir import RunDir
from sft_job.weights import persistent_buffers
from sft_job.world import World

SHARD_BYTES = 5 * 2**30


def write(
    attempt: Attempt,
    model: PreTrainedModel,
    parameters: Iterable[tuple[str, torch.Tensor]],
    tokenizer: Any,
    encoder: Encoder,
    world: World,
    *,
    source: Path,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    needed_bytes: int | None = None,
    pause: Callable[[], None] = lambda: None,
) -> Any:
    """Write and verify the model; visible under its name only when it is good.

    Args:
        parameters: every parameter whole, in the same order on all ranks.
        source: the folder that the job's model came from; its generation settings are kept.
        needed_bytes: what the model takes, for messages.
        pause: called by all ranks together between files; may raise, to stop.

    Returns:
        The seal of the model, which an attempt that ended too early may have written before.

    Raises:
        ExportError: what was written does not load as what was trained.
        DiskSpaceError: the disk is full.
        SupersededError: a later attempt runs this job.
    """
    run_dir = attempt.run_dir
    before = world.on_main(lambda: result.written_before(run_dir))
    if before is not None:
        return before
    beside = run_dir.model.with_name(f".{run_dir.model.name}.attempt-{attempt.number}.tmp")
    writer = _ShardWriter(beside) if world.is_main else None
    digests: dict[str, str] = {}

    def gather() -> None:
        since = 0
        if writer is not None:
            discard(beside)
            beside.mkdir(parents=True)
        for name, value in parameters:
            since += value.numel() * dtype.itemsize  # counted alike by all ranks
            if since > SHARD_BYTES:
                pause()
                since = 0
            if writer is not None:
                # A copy: DeepSpeed hands out a buffer that it fills again for the next parameter.
                tensor = value.to("cpu", dtype, copy=True).contiguous()
                digests[name] = _digest(tensor)
                writer.add(name, tensor)

    def finish() -> Any:
        assert writer is not None
        with _room(run_dir, needed_bytes):
            for name, buffer in persistent_buffers(model):
                kind = dtype if buffer.is_floating_point() else buffer.dtype
                writer.add(name, buffer.to("cpu", kind, copy=True).contiguous())
            writer.close()
            settings.write(
                beside,
                source,
                model.config,
                tokenizer,
                encoder,
                dtype,
                # FSDP2 has made a class of its own from the model's.
                architecture=type(model).__name__.removeprefix("FSDP"),
                trust_remote_code=trust_remote_code,
            )
            _verify(beside, digests, tokenizer, encoder, trust_remote_code)
            settle(beside)
            return result.publish_model(attempt, beside)

    try:
        with _room(run_dir, needed_bytes):
            gather()
        pause()
        return world.on_main(finish)
    except BaseException:
        if writer is not None:  # its room is needed for whatever comes next
            discard(beside)
        raise


@contextlib.contextmanager
def _room(run_dir: RunDir, needed: int | None) -> Iterator[None]:
    """Say so where the disk is full: libraries wrap what the system says into errors of theirs."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise checkpoint.not_written(run_dir, "model", error, needed) from error


class _ShardWriter:
    """Collects tensors into safetensors files of at most SHARD_BYTES."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shard: dict[str, torch.Tensor] = {}
        self._bytes = self._total = 0
        self._files: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self._shard and self._bytes + tensor.nbytes > SHARD_BYTES:
            self._flush()
        self._shard[name] = tensor
        self._bytes += tensor.nbytes
        self._total += tensor.nbytes

    def _part(self, index: int) -> Path:
        return self.folder / f"part-{index}"

    def _flush(self) -> None:
        save_file(self._shard, self._part(len(self._files)), metadata={"format": "pt"})
        self._files.append(list(self._shard))
        self._shard, self._bytes = {}, 0

    def close(self) -> None:
        self._flush()
        count = len(self._files)
        if count == 1:
            self._part(0).rename(self.folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._files):
            file = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self._part(index).rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        index_file = self.folder / "model.safetensors.index.json"
        metadata = {"total_size": self._total}
        index_file.write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy().data).hexdigest()


def _verify(
    folder: Path,
    digests: dict[str, str],
    tokenizer: Any,
    encoder: Encoder,
    trust_remote_code: bool,
) -> None:
    """Load the folder as a user would and compare every parameter with the trained one."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True, trust_remote_code=trust_remote_code
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ExportError(f"the written model does not load completely: {info}", where=str(folder))
    loaded = {name: _digest(p.detach().contiguous()) for name, p in model.named_parameters()}
    differing = sorted(n for n in digests.keys() | loaded.keys() if digests.get(n) != loaded.get(n))
    if differing:
        raise ExportError(
            f"{len(differing)} parameters of the written model differ from the trained ones, "
            f"such as {differing[0]}",
            where=str(folder),
            remedy="the last checkpoint is good; run the job again to write the model again",
        )
