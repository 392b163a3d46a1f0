"""Before the first step, on the device in use: packed against alone, our loss against the
model's own forward pass. A job whose numbers would be wrong does not start."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sft_job.dataset import collate
from sft_job.encode import Sample
from sft_job.errors import ModelError

# Relative difference of the two losses: rounding of fp32, and of bf16 and fp16 activations.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
# Logits of packed samples may differ from those of each alone by this share of what seeing the
# neighbour changes: rounding is far below, a leak is 1.
LEAK = 0.25
# Rounding of a logit, relative; differences below it say nothing.
ROUNDING = {"fp32": 1e-5, "bf16": 2**-7, "fp16": 2**-10}
# Past the tile of 128 keys of the flash kernels, and not a multiple of anything.
LENGTHS = (37, 150)

Call = Callable[..., dict[str, torch.Tensor]]


def run(
    call: Call,
    *,
    vocabulary: int,
    precision: str,
    kernel: str,
    packs: bool,
    place: Callable[[Any], Any],
) -> None:
    """Compare; all ranks must call it.

    Args:
        call: the sharded model (`model.make_trainable`).
        kernel: name of the attention kernel, for messages.
        packs: the kernel keeps samples of one row apart.
        place: moves a batch to the device.

    Raises:
        ModelError: training would optimise something else than it says.
    """
    random = np.random.default_rng(0)
    samples = [
        Sample(random.integers(0, vocabulary, n, dtype=np.uint32), np.arange(n) >= n // 2)
        for n in LENGTHS
    ]
    with torch.no_grad():
        alone = [_logits(call, place, [sample], packs) for sample in samples]
        if packs:
            _refuse_leaks(call, place, samples, alone, kernel, ROUNDING[precision])
        rows = [samples] if packs else [[sample] for sample in samples]
        ours = sum(float(call(**place(collate(row)))["loss"]) for row in rows)
    theirs = 0.0
    for sample, logits in zip(samples, alone, strict=True):
        batch = place(collate([sample]))
        followed = logits[batch["supervised"]]
        theirs += float(F.cross_entropy(followed, batch["targets"], reduction="sum"))
    if not math.isfinite(ours) and not math.isfinite(theirs):
        return  # the two agree; the first training step refuses it and names what it saw
    if not abs(ours - theirs) <= TOLERANCE[precision] * abs(theirs):
        raise ModelError(
            f"self-test: our loss is {ours:.4f}, the model's own forward pass gives {theirs:.4f}",
            remedy="this model computes its logits in a way that is not supported "
            "(it scales or caps them); it cannot be trained here",
        )


def _logits(
    call: Call, place: Callable[[Any], Any], samples: list[Sample], packs: bool
) -> torch.Tensor:
    """fp32 `[tokens, vocabulary]` of a row, from the model's own forward pass."""
    batch = place(collate(samples))
    del batch["supervised"], batch["targets"]
    return call(own_forward=True, **batch)["logits"][0].float()


def _refuse_leaks(
    call: Call,
    place: Callable[[Any], Any],
    samples: list[Sample],
    alone: list[torch.Tensor],
    kernel: str,
    rounding: float,
) -> None:
    """The yardstick is what happens when the second sample does see the first."""
    packed = _logits(call, place, samples, packs=True)
    joined = Sample(
        np.concatenate([sample.input_ids for sample in samples]),
        np.concatenate([sample.supervised for sample in samples]),
    )
    leaked = _logits(call, place, [joined], packs=True)
    expected = torch.cat(alone)
    first = len(samples[0].input_ids)
    difference = float((packed - expected).abs().mean())
    yardstick = float((leaked - expected)[first:].abs().mean())
    # A sample alone must not depend on what comes later either: the first one's logits are the
    # same whether or not something follows it in the same sample.
    ahead = float((leaked - expected)[:first].abs().mean())
    if not math.isfinite(difference + yardstick + ahead):
        return  # the first training step refuses it and names what it saw
    allowed = max(LEAK * yardstick, rounding * float(expected.abs().mean()))
    if max(difference, ahead) > allowed:
        what = "samples of a row see each other" if difference > ahead else "tokens see later ones"
        raise ModelError(
            f"self-test: under attention kernel {kernel} {what}: logits differ by "
            f"{max(difference, ahead):.3g} on average, seeing a neighbour changes {yardstick:.3g}",
            remedy="use another model.attention (sdpa runs everywhere), and report this",
        )
