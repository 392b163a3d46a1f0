"""Before the first step, on the device in use: packed against alone, our attention and loss against
the model's own. A job whose numbers would be wrong does not start."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sft_job.dataset import collate
from sft_job.encode import Sample
from sft_job.errors import ModelError

# Relative difference of the two losses: rounding of fp32, and of bf16 and fp16 activations.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
# As a share of what seeing the neighbour changes: what rounding may change between rows of
# different shapes, in the mean; and what one row may change from one time to the next.
ROUNDED, RANDOM = 0.25, 1 / 16
# What another attention of the same meaning may change, as a share of what one token has beside
# another: rounding, 24 layers deep a quarter of these.
ATTENTION = {"fp32": 1e-2, "bf16": 0.25, "fp16": 0.1}
# Rounding of a logit, relative; differences below it say nothing.
ROUNDING = {"fp32": 1e-5, "bf16": 2**-7, "fp16": 2**-10}
# Tokens of two samples that are compared and of one behind them, not multiples of anything: on a
# GPU past the tile of 128 keys of the flash kernels; a CPU has none of these, and its time is
# better spent on training.
LENGTHS = {"cuda": (37, 150, 21), "cpu": (9, 22, 5)}
OWN = "use model.attention=own: one sample per forward pass"


def lengths(device: str, window: int | None) -> tuple[int, int, int]:
    """Tokens of the samples on a device (cuda, cpu): the first two together within the window."""
    first, second, behind = LENGTHS[device]
    if window is None or first + second <= window:
        return first, second, behind
    return max(window // 4, 2), max(window - window // 4, 3), behind


Call = Callable[..., dict[str, torch.Tensor]]


@dataclass
class Tested:
    """The model under test.

    Args:
        call: the sharded model (`model.make_trainable`), without dropout and noise.
        place: moves a batch to the device.
        kernel: name of the attention kernel, for messages.
        rounding: of a logit, relative.
    """

    call: Call
    place: Callable[[Any], Any]
    kernel: str
    rounding: float

    def logits(self, *samples: Sample) -> torch.Tensor:
        """fp32 `[tokens, vocabulary]` of a row, from the model's own forward pass."""
        batch = self.place(collate(samples))
        del batch["supervised"], batch["targets"]
        return self.call(own_forward=True, **batch)["logits"][0].float()

    def fault(self, what: str, remedy: str) -> ModelError:
        return ModelError(f"self-test, attention kernel {self.kernel}: {what}", remedy=remedy)


def run(
    model: torch.nn.Module,
    *,
    vocabulary: int,
    precision: str,
    kernel: str,
    packs: bool,
    place: Callable[[Any], Any],
    lengths: Sequence[int],
    own_attention: Callable[[], AbstractContextManager[None]],
) -> None:
    """Compare; all ranks must call it.

    Args:
        model: sharded, in training mode (`model.make_trainable`).
        kernel: name of the attention kernel, for messages.
        packs: the kernel keeps samples of one row apart.
        place: moves a batch to the device.
        lengths: as from `lengths`.
        own_attention: in it the model computes with its own attention.

    Raises:
        ModelError: training would optimise something else than it says.
    """
    random = np.random.default_rng(0)

    def sample(length: int) -> Sample:
        ids = random.integers(0, vocabulary, length, dtype=np.uint32)
        return Sample(ids, np.arange(length) >= length // 2)

    samples, others = ([sample(length) for length in lengths] for _ in range(2))
    tested = Tested(model, place, kernel, ROUNDING[precision])
    model.eval()  # dropout and noise would be taken for what is looked for
    try:
        with torch.no_grad():
            alone = [tested.logits(one) for one in samples[:2]]
            _refuse_sight(tested, samples, others, alone, packs=packs)
            if packs:
                with own_attention():
                    theirs = tested.logits(samples[1])
                _refuse_other_attention(tested, alone[1], theirs, ATTENTION[precision])
            _refuse_other_loss(tested, samples[:2], alone, TOLERANCE[precision], packs=packs)
    finally:
        model.train()


def _refuse_sight(
    tested: Tested,
    samples: Sequence[Sample],
    others: Sequence[Sample],
    alone: Sequence[torch.Tensor],
    *,
    packs: bool,
) -> None:
    """Refuse a token that sees another sample, or a later token.

    Two rows of one shape that differ in some tokens, and the logits at the others:

        row        a0 a1 a2  b0 b1 b2 b3  c0 c1      packed: nothing of b may change
        other row  x0 x1 x2  b0 b1 b2 b3  y0 y1

    Rows of one shape are computed alike, bit for bit, whatever is in them: what differs has been
    seen. The largest difference counts, at the very first tokens too: what a short convolution
    lets through is lost in a mean.
    """
    first, second, _ = samples
    joined = tested.logits(_join(first, second))
    ahead = joined - tested.logits(_join(first, others[1]))
    middle = slice(len(first.input_ids), len(first.input_ids) + len(second.input_ids))
    seen = (joined[middle] - alone[1]).abs()
    yardstick, mean = float(seen.max()), float(seen.mean())
    least = tested.rounding * float(alone[1].abs().mean())
    later = float(ahead[: middle.start].abs().max())
    row = tested.logits(*samples) if packs else joined
    once_more = tested.logits(*samples) if packs else tested.logits(_join(first, second))
    again = float((row - once_more).abs().max())
    leak = different = 0.0
    if packs:
        neighbours = tested.logits(others[0], second, others[2])
        leak = float((row[middle] - neighbours[middle]).abs().max())
        different = float((row[: middle.stop] - torch.cat(list(alone))).abs().mean())
    if not math.isfinite(yardstick + later + leak + different + again):
        return  # the first training step refuses it and names what it saw
    # Kernels whose order of additions changes from call to call are no fault of the model's.
    allowed = max(least, 4 * again)
    sees = f"logits differ by up to {{:.3g}}, seeing a neighbour changes {yardstick:.3g}"
    if again > max(RANDOM * yardstick, least):
        raise tested.fault(
            "the same row computed twice gives other logits: the model drops or adds something at "
            f"random even outside of training ({again:.3g})",
            "set its dropout and noise to 0 in config.json",
        )
    if leak > allowed:
        raise tested.fault(
            "samples of a row see each other, through layers that are not attention or by "
            f"attention that is not told where samples begin: {sees.format(leak)}",
            OWN,
        )
    if later > allowed:
        raise tested.fault(
            f"tokens see later ones: {sees.format(later)}",
            "use a model that is a decoder, or another model.attention if this one is, and report "
            "it"
            if packs
            else "use a model that is a decoder",
        )
    if different > max(ROUNDED * mean, least):
        raise tested.fault(
            "a sample is computed otherwise in a row than alone, although it sees no other "
            f"(positions that go on?): logits differ by {different:.3g} on average",
            OWN,
        )


def _join(first: Sample, second: Sample) -> Sample:
    return Sample(
        np.concatenate([first.input_ids, second.input_ids]),
        np.concatenate([first.supervised, second.supervised]),
    )


def _refuse_other_attention(
    tested: Tested, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float
) -> None:
    """The kernel against the attention that the model came with, on one sample. The yardstick is
    how much logits differ from token to token."""
    difference = float((ours - theirs).abs().mean())
    yardstick = float((theirs - theirs.mean(0)).abs().mean())
    if math.isfinite(difference + yardstick) and difference > tolerance * yardstick:
        raise tested.fault(
            "it computes something else than the model's own attention: logits differ by "
            f"{difference:.3g} on average, and from token to token by {yardstick:.3g}",
            f"{OWN}, and report this",
        )


def _refuse_other_loss(
    tested: Tested,
    samples: Sequence[Sample],
    alone: Sequence[torch.Tensor],
    tolerance: float,
    *,
    packs: bool,
) -> None:
    """Our loss, which never makes all logits, against that of the model's own logits."""
    batches = [tested.place(collate([sample])) for sample in samples]
    rows = [tested.place(collate(samples))] if packs else batches
    followed = [logits[batch["supervised"]] for logits, batch in zip(alone, batches, strict=True)]

    def losses(targets: list[torch.Tensor]) -> tuple[float, float]:
        """Ours and theirs, of all samples together."""
        given = [torch.cat(targets)] if packs else targets
        ours = [
            tested.call(**(row | {"targets": each}))["loss"]
            for row, each in zip(rows, given, strict=True)
        ]
        theirs = [
            F.cross_entropy(logits, each, reduction="sum")
            for logits, each in zip(followed, targets, strict=True)
        ]
        return sum(map(float, ours)), sum(map(float, theirs))

    ours, theirs = losses([batch["targets"] for batch in batches])
    least = losses([logits.argmax(-1) for logits in followed])
    most = losses([logits.argmin(-1) for logits in followed])
    if not math.isfinite(ours) and not math.isfinite(theirs):
        return  # the two agree; the first training step refuses it and names what it saw
    _refuse_difference("loss is", ours, theirs, tolerance)
    # Without the logarithm of the sum, which is nearly all of the loss of a model that knows
    # little: here a factor of the logits is seen as it is, and so is a cap of the large ones.
    _refuse_difference("logits span", most[0] - least[0], most[1] - least[1], tolerance)


def _refuse_difference(what: str, ours: float, theirs: float, tolerance: float) -> None:
    if not abs(ours - theirs) <= tolerance * abs(theirs):
        raise ModelError(
            f"self-test: our {what} {ours:.4f}, the model's own forward pass gives {theirs:.4f}",
            remedy="this model computes its logits in a way that is not supported "
            "(it scales or caps them); it cannot be trained here",
        )
