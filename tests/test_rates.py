"""The learning rate of every step."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest

from sft_job import rates
from sft_job.config import load
from sft_job.errors import ConfigError
from sft_job.schema import MOST_STEPS, Train

KINDS = get_args(Train.model_fields["lr_scheduler_type"].annotation)
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "cosine": [{}, {"num_cycles": 0.25}, {"num_cycles": 2}],
    "inverse_sqrt": [{}, {"timescale": 7}, {"timescale": None}],
}
CASES = [(kind, options) for kind in KINDS for options in OPTIONS.get(kind, [{}])]


def job(job_file, kind="cosine", *overrides, **options):
    extra = f"train.extra.lr_scheduler_kwargs={options}".replace("'", "").replace("None", "null")
    given = [extra] if options else []
    return load(job_file, [f"train.lr_scheduler_type={kind}", *given, *overrides])


def shares(config, steps: int) -> list[float]:
    return [rates.schedule(config, steps)(step) for step in range(steps)]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.8535533905932737, 0.5, 0.14644660940672627]),
        ("constant_with_warmup", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("inverse_sqrt", [1 / 3, 2 / 3, 1, (2 / 3) ** 0.5, (2 / 4) ** 0.5, (2 / 5) ** 0.5]),
        ("constant", [1, 1, 1, 1, 1, 1]),
    ],
)
def test_six_steps_of_which_two_rise(job_file, kind, expected):
    """By hand; constant has no warm-up, and the plan says none."""
    config = job(job_file, kind, "train.warmup_ratio=0.25")
    assert shares(config, 6) == pytest.approx(expected, rel=1e-12)
    assert rates.warmup_steps(config, 6) == (0 if kind == "constant" else 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("ratio", [0, 0.03, 0.5, 1])
def test_every_step_trains_and_the_last_is_no_warm_up(job_file, kind, steps, ratio):
    """Even where a run is one step, or nothing but a rise."""
    config = job(job_file, kind, f"train.warmup_ratio={ratio}")
    assert all(share > 0 for share in shares(config, steps))
    assert rates.warmup_steps(config, steps) < steps
    assert shares(config, steps)[rates.warmup_steps(config, steps)] == 1


@pytest.mark.parametrize(("kind", "options"), CASES)
@pytest.mark.parametrize(("steps", "ratio"), [(1, 0.03), (10, 0.0), (10, 0.25), (40, 0.1), (7, 1)])
def test_the_rates_are_hugging_faces_but_for_the_warm_up(job_file, kind, options, steps, ratio):
    """What `get_scheduler` of the pinned release gives after the rise, at every step."""
    import torch
    from transformers import get_scheduler

    config = job(job_file, kind, f"train.warmup_ratio={ratio}", **options)
    warmup = rates.warmup_steps(config, steps)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_scheduler(
        kind,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs=options or None,
    )
    ours = shares(config, steps)
    for step in range(steps):
        if step >= warmup:
            assert ours[step] == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        theirs.step()
    assert ours[:warmup] == [(step + 1) / (warmup + 1) for step in range(warmup)]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_the_trainer_steps_at_these_rates(job_file, kind, options):
    """Its own scheduler, whole and resumed from a state in the midst of the rise."""
    import torch

    from sft_job.trainer import SftTrainer

    config = job(job_file, kind, "train.warmup_ratio=0.4", **options)
    peak, steps = config.train.learning_rate, 10

    def scheduler() -> Any:
        trainer = SftTrainer.__new__(SftTrainer)  # no model is needed for it
        trainer.config, trainer.lr_scheduler = config, None
        trainer.optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
        trainer.create_scheduler(steps)
        return trainer.lr_scheduler

    made, used = scheduler(), []
    for step in range(steps):
        if step == 2:
            state, made = made.state_dict(), scheduler()
            made.load_state_dict(state)
        used.append(made.get_last_lr()[0])
        made.optimizer.step()
        made.step()
    assert used == [peak * share for share in shares(config, steps)]


@pytest.mark.parametrize(
    ("overrides", "steps", "said"),
    [
        (["train.learning_rate=1e-300"], 10, "train.learning_rate: the greatest of all steps is"),
        (["train.learning_rate=5e-324"], 10, "train.learning_rate: the greatest of all steps is"),
        (["train.learning_rate=1e-11"], None, "weights in fp32 do not change by less than about"),
        (["train.learning_rate=1e-300", "train.lr_scheduler_type=constant"], 1, "raise it"),
        ([], MOST_STEPS + 1, "train.num_train_epochs: 3 epochs are 10,000,001 steps, more than"),
    ],
)
def test_rates_with_which_nothing_is_trained_are_refused(job_file, overrides, steps, said):
    with pytest.raises(ConfigError) as caught:
        rates.checked_warmup(load(job_file, overrides), steps)
    assert said in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_run_is_looked_at_quickly(job_file, kind):
    """A few of its steps, the first, the last and the peak among them."""
    config = job(job_file, kind, "train.warmup_ratio=0.5")
    expected = 0 if kind == "constant" else MOST_STEPS // 2
    assert rates.checked_warmup(config, MOST_STEPS) == expected


def test_without_encoded_data_the_peak_is_looked_at(job_file):
    """The number of steps is not known yet; a rate that is nothing is nothing over any number."""
    assert rates.checked_warmup(load(job_file), None) is None
    assert math.isfinite(rates.schedule(load(job_file), 1)(0))
