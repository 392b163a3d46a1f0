"""Before the first step, on the device in use: packed against alone, our loss against the
model's own forward pass. A job whose numbers would be wrong does not start."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
# Tokens of the two samples, not a multiple of anything: on a GPU past the tile of 128 keys of the
# flash kernels; a CPU has none of these, and its time is better spent on training.
LENGTHS = {"cuda": (37, 150), "cpu": (9, 22)}

Call = Callable[..., dict[str, torch.Tensor]]


def run(
    call: Call,
    *,
    vocabulary: int,
    precision: str,
    kernel: str,
    packs: bool,
    place: Callable[[Any], Any],
    lengths: Sequence[int],
) -> None:
    """Compare; all ranks must call it.

    Args:
        call: the sharded model (`model.make_trainable`).
        kernel: name of the attention kernel, for messages.
        packs: the kernel keeps samples of one row apart.
        place: moves a batch to the device.
        lengths: of that device (`LENGTHS`).

    Raises:
        ModelError: training would optimise something else than it says.
    """
    random = np.random.default_rng(0)
    samples = [
        Sample(random.integers(0, vocabulary, n, dtype=np.uint32), np.arange(n) >= n // 2)
        for n in lengths
    ]
    batches = [place(collate([sample])) for sample in samples]
    with torch.no_grad():
        alone = [_logits(call, place, [sample]) for sample in samples]
        if packs:
            _refuse_leaks(call, place, samples, alone, kernel, ROUNDING[precision])
        followed = [
            logits[batch["supervised"]] for logits, batch in zip(alone, batches, strict=True)
        ]
        rows = [place(collate(samples))] if packs else batches

        def losses(targets: list[torch.Tensor]) -> tuple[float, float]:
            """Ours and theirs, of all samples together."""
            given = [torch.cat(targets)] if packs else targets
            ours = [call(**(r | {"targets": t}))["loss"] for r, t in zip(rows, given, strict=True)]
            theirs = [
                F.cross_entropy(f, t, reduction="sum")
                for f, t in zip(followed, targets, strict=True)
            ]
            return sum(map(float, ours)), sum(map(float, theirs))

        ours, theirs = losses([batch["targets"] for batch in batches])
        least = losses([logits.argmax(-1) for logits in followed])
        most = losses([logits.argmin(-1) for logits in followed])
    if not math.isfinite(ours) and not math.isfinite(theirs):
        return  # the two agree; the first training step refuses it and names what it saw
    _refuse_difference("loss is", ours, theirs, TOLERANCE[precision])
    # Without the logarithm of the sum, which is nearly all of the loss of a model that knows
    # little: here a factor of the logits is seen as it is, and so is a cap of the large ones.
    ours, theirs = most[0] - least[0], most[1] - least[1]
    _refuse_difference("logits span", ours, theirs, TOLERANCE[precision])


def _refuse_difference(what: str, ours: float, theirs: float, tolerance: float) -> None:
    if not abs(ours - theirs) <= tolerance * abs(theirs):
        raise ModelError(
            f"self-test: our {what} {ours:.4f}, the model's own forward pass gives {theirs:.4f}",
            remedy="this model computes its logits in a way that is not supported "
            "(it scales or caps them); it cannot be trained here",
        )


def _logits(call: Call, place: Callable[[Any], Any], samples: list[Sample]) -> torch.Tensor:
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
    packed = _logits(call, place, samples)
    joined = Sample(
        np.concatenate([sample.input_ids for sample in samples]),
        np.concatenate([sample.supervised for sample in samples]),
    )
    leaked = _logits(call, place, [joined])
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
