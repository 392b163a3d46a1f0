"""Peak memory of one rank by torch's own tracker, on fake tensors and a fake process group.

    echo '{"world_size": 8, ...}' | python -m tests.tracker      prints bytes, one line for each

Each line in a process of its own, since the fake group and the tracker's hooks are for a whole
process; forked, so that torch is imported once. The model is built, sharded and run by the code
that trains. What the optimizer's step holds for a moment is left out: the fused step holds
nothing, and the tracker counts an unfused one several times over.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig

from sft_job import fsdp, model
from sft_job.attention import Choice


def peak(
    shape: dict[str, Any],
    *,
    world_size: int,
    lengths: list[int],
    supervised: int,
    precision: str,
    recompute: str,
    saved_products: int | None,
    micro_batches: int,
) -> int:
    """Bytes at the peak of forward and backward passes, optimizer state present."""
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    plan: Any = SimpleNamespace(
        rope_factor=None,
        longest=None,
        attention=Choice("torch_varlen", ""),
        cross_entropy=Choice("torch", ""),
        activation_checkpointing=Choice(recompute, ""),
        saved_products=saved_products,
        precision=Choice(precision, ""),
    )
    device = torch.device("cpu")
    world: Any = SimpleNamespace(device=device, size=world_size, rank=0)
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**shape).save_pretrained(folder)
        network = model.build(Path(folder), plan, trust_remote_code=False, meta=True)
    model.make_trainable(network, plan)
    fsdp.shard(network, plan, world)
    total = sum(lengths)
    with FakeTensorMode(allow_non_fake_inputs=True):
        network.to_empty(device=device)
        network.tie_weights()
        optimizer = torch.optim.AdamW(network.parameters(), foreach=False)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        with FSDPMemTracker(network, optimizer) as tracker:
            for _ in range(micro_batches):
                network(
                    input_ids=torch.zeros(1, total, dtype=torch.int64),
                    position_ids=torch.zeros(1, total, dtype=torch.int64),
                    supervised=torch.zeros(supervised, dtype=torch.int64),
                    targets=torch.zeros(supervised, dtype=torch.int64),
                    cu_seqlens=torch.zeros(len(lengths) + 1, dtype=torch.int32),
                    seq_lens=lengths,
                )["loss"].backward()
                tracker.reset_mod_stats()
            snapshot = tracker.get_tracker_snapshot("peak")[device]
    return int(snapshot["Total"])


if __name__ == "__main__":
    for line in sys.stdin:
        if child := os.fork():
            if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
                sys.exit(code)
        else:
            print(peak(**json.loads(line)), flush=True)
            break
