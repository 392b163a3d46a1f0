"""The learning rate of every step, as a share of train.learning_rate. Pure.

Step i (from 0) of `steps`, of which the first `warmup` rise:

    warm-up                (i + 1) / (warmup + 1)
    linear                 falls in a line, to 0 behind the last step
    cosine                 falls along half a wave (num_cycles: 0.5), to 0 behind the last step
    constant_with_warmup   stays
    inverse_sqrt           1 / sqrt(1 + (i - warmup) / timescale), timescale: warmup, or 10,000
    constant               stays from the first step on: it has no warm-up

After the warm-up they are Hugging Face's of the same names. Hugging Face's rise is i / warmup:
the first step of a run would change nothing, and a run of one step would train nothing at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from sft_job.errors import ConfigError
from sft_job.schema import MOST_STEPS, JobConfig

# Below this a step of Adam, which changes every weight by at most about the rate, is lost in
# rounding: neighbouring fp32 numbers around 0.01, a usual weight, are 9e-10 apart.
LEAST = 1e-10
# Steps that `faults` looks at; between them no schedule does anything new.
_LOOKED_AT = 1000

Share = Callable[[int], float]


def warmup_steps(config: JobConfig, steps: int) -> int:
    """Never the last step: a run that is only a rise would end where it should begin."""
    if config.train.lr_scheduler_type == "constant":
        return 0
    return min(math.ceil(config.train.warmup_ratio * steps), steps - 1)


def schedule(config: JobConfig, steps: int) -> Share:
    """The share of train.learning_rate that a step (from 0) has."""
    options = config.train.extra.get("lr_scheduler_kwargs") or {}
    warmup = warmup_steps(config, steps)
    after = _AFTER[config.train.lr_scheduler_type](warmup, steps, options)
    return lambda step: (step + 1) / (warmup + 1) if step < warmup else after(step)


def _linear(warmup: int, steps: int, options: dict[str, Any]) -> Share:
    return lambda step: max(0.0, (steps - step) / max(1, steps - warmup))


def _cosine(warmup: int, steps: int, options: dict[str, Any]) -> Share:
    cycles = float(options.get("num_cycles", 0.5))

    def share(step: int) -> float:
        progress = (step - warmup) / max(1, steps - warmup)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * progress)))

    return share


def _constant(warmup: int, steps: int, options: dict[str, Any]) -> Share:
    return lambda step: 1.0


def _inverse_sqrt(warmup: int, steps: int, options: dict[str, Any]) -> Share:
    timescale = options.get("timescale") or warmup or 10_000
    return lambda step: 1.0 / math.sqrt((step + timescale - warmup) / timescale)


_AFTER = {
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
    "constant_with_warmup": _constant,
    "inverse_sqrt": _inverse_sqrt,
}


def checked_warmup(config: JobConfig, steps: int | None) -> int | None:
    """The steps of the warm-up; None while those of the whole run are not known.

    Raises:
        ConfigError: more steps than a run can have, or rates with which nothing is trained.
    """
    if found := list(faults(config, steps)):
        raise ConfigError(found)
    return warmup_steps(config, steps) if steps else None


def faults(config: JobConfig, steps: int | None) -> Iterator[str]:
    """More steps than a run can have, and rates with which nothing is trained."""
    steps = steps or config.train.max_steps or 1
    if steps > MOST_STEPS:
        yield (
            f"train.num_train_epochs: {config.train.num_train_epochs:,} epochs are {steps:,} "
            f"steps, more than {MOST_STEPS:,}; lower it, or raise train.global_batch_size"
        )
        return
    share, peak = schedule(config, steps), config.train.learning_rate
    looked_at = {*range(0, steps, max(1, steps // _LOOKED_AT)), warmup_steps(config, steps)}
    rates = [peak * share(step) for step in sorted({*looked_at, steps - 1})]
    if max(rates) < LEAST:
        yield (
            f"train.learning_rate: the greatest of all steps is {max(rates):g}, and weights in "
            f"fp32 do not change by less than about {LEAST:g}; raise it"
        )
    elif not all(math.isfinite(rate) and rate >= 0 for rate in rates) or rates[0] <= 0:
        yield (
            f"train.lr_scheduler_type: {config.train.lr_scheduler_type} gives learning rates "
            f"from {rates[0]:g} to {rates[-1]:g} over {steps:,} steps; the first must be more "
            "than 0, and all of them numbers"
        )
