"""train.extra: which TrainingArguments a job may set, and with which values; no transformers.

`python -m tests.test_extras` writes `training_arguments.json` anew, for another release.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from packaging.requirements import Requirement

from sft_job import extras
from sft_job.config import load
from sft_job.errors import ConfigError
from sft_job.schema import Train
from tests.test_locks import PROJECT

FILE = Path(__file__).parents[1] / "sft_job" / "training_arguments.json"


def of_the_release() -> dict[str, Any]:
    """What the installed transformers has, as `training_arguments.json` holds it."""
    import transformers
    from transformers import TrainingArguments, optimization
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames, trainer_log_levels

    kinds = get_args(Train.model_fields["lr_scheduler_type"].annotation)
    counted = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    return {
        "transformers": transformers.__version__,
        "fields": sorted(f.name for f in dataclasses.fields(TrainingArguments) if f.init),
        "optimizers": sorted(member.value for member in OptimizerNames),
        "schedules": {
            kind: [
                name
                for name in inspect.signature(
                    optimization.TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(kind)]
                ).parameters
                if name not in counted
            ]
            for kind in kinds
        },
        "log_levels": sorted(trainer_log_levels),
    }


def faults(job_file: Path, extra: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(job_file, [f"train.extra={{{extra}}}", *overrides])
    return [fault.removeprefix("override train.extra.") for fault in caught.value.faults]


# --- the data ------------------------------------------------------------------------------


def test_the_data_is_that_of_the_installed_release() -> None:
    """Else write it anew, and sort new fields into `ALLOWED` or `OWNED`."""
    stored = json.loads(FILE.read_text())
    assert of_the_release() == stored
    requirements = map(Requirement, PROJECT["project"]["optional-dependencies"]["train"])
    (pinned,) = (one for one in requirements if one.name == "transformers")
    assert pinned.specifier.contains(stored["transformers"])


def test_every_field_is_allowed_or_refused_with_a_reason() -> None:
    """No field of the release is forgotten, none is both, and what is gone is known to be."""
    assert not extras.FIELDS - extras.ALLOWED.keys() - extras.OWNED.keys()
    assert not extras.ALLOWED.keys() & extras.OWNED.keys()
    assert extras.ALLOWED.keys() <= extras.FIELDS
    # Of older releases, which recipes still have.
    assert extras.OWNED.keys() - extras.FIELDS == {"logging_dir", "group_by_length"}
    assert set(extras.SUPPORTED) <= extras.OPTIMIZERS


def test_the_file_comes_with_an_installed_wheel() -> None:
    assert FILE.name in PROJECT["tool"]["setuptools"]["package-data"]["sft_job"]


# --- names ---------------------------------------------------------------------------------


def test_what_is_allowed_is_kept_as_it_is(job_file) -> None:
    extra = (
        "adam_beta1: 0.8, adam_beta2: 0.95, adam_epsilon: 1e-6, optim: adamw_torch, "
        "lr_scheduler_kwargs: {num_cycles: 1}, tf32: false, run_name: 16:00, log_level: info, "
        "log_level_replica: error, log_on_each_node: false, optim_args: null"
    )
    given = load(job_file, [f"train.extra={{{extra}}}"]).train.extra
    assert given == {
        "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "optim": "adamw_torch",
        "lr_scheduler_kwargs": {"num_cycles": 1}, "tf32": False, "run_name": "16:00",
        "log_level": "info", "log_level_replica": "error", "log_on_each_node": False,
        "optim_args": None,
    }  # fmt: skip
    assert given.keys() == extras.ALLOWED.keys()


@pytest.mark.parametrize("name", extras.OWNED)
def test_what_the_job_file_decides_is_refused_by_name(job_file, name) -> None:
    assert faults(job_file, f"{name}: 1") == [f"{name}: {extras.OWNED[name]}"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adam_bta1", "not a Hugging Face TrainingArguments field; did you mean adam_beta1?"),
        ("adam_eps", "not a Hugging Face TrainingArguments field; did you mean adam_epsilon?"),
        ("optimizer", "not a Hugging Face TrainingArguments field; did you mean optim?"),
        ("colour", "not a Hugging Face TrainingArguments field; allowed are adam_beta1, "),
        ("warmup_ratio", "a key of the job file itself; set train.warmup_ratio"),
        ("precision", "a key of the job file itself; set train.precision"),
    ],
)
def test_an_unknown_name_is_answered_with_the_near_one(job_file, name, said) -> None:
    (found,) = faults(job_file, f"{name}: 1")
    assert found.startswith(f"{name}: {said}")


def test_all_faults_have_their_lines(job_file) -> None:
    """With those of the other keys, in one message."""
    job_file.write_text(
        job_file.read_text()
        + "train:\n  seed: many\n  extra:\n    adam_beta1: abc\n    lr_scheduler_kwargs:\n"
        "      timescale: 5\n    optm: sgd\n"
    )
    with pytest.raises(ConfigError, match=r"job\.yaml:5: train\.seed"):
        load(job_file)
    with pytest.raises(ConfigError) as caught:
        load(job_file, ["train.seed=1"])
    places = [fault.rpartition("/")[2].split(": ")[:2] for fault in caught.value.faults]
    assert places == [
        ["job.yaml:7", "train.extra.adam_beta1"],
        ["job.yaml:9", "train.extra.lr_scheduler_kwargs.timescale"],
        ["job.yaml:10", "train.extra.optm"],
    ]


# --- values --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("adam_beta1: abc", "must be a number of at least 0 and less than 1, not 'abc'"),
        ("adam_beta1: 1", "less than 1, not 1"),
        ("adam_beta2: -0.1", "at least 0 and less than 1, not -0.1"),
        ("adam_beta2: .nan", "less than 1, not nan"),
        ("adam_beta2: true", "less than 1, not True"),
        ("adam_beta2: null", "less than 1, not None"),
        ("adam_beta2: [0.9]", "less than 1, not [0.9]"),
        ("adam_beta2: '0.95'", "not 0.95 in quotes; write 0.95"),
        ("adam_epsilon: 0", "more than 0 and at most 1, not 0"),
        ("adam_epsilon: 1e-999", "more than 0 and at most 1, not 0.0"),
        ("adam_beta1: 0,9", "unknown"),
        ("adam_beta1: 1:30", "not '1:30': YAML 1.1 reads 1:30 in base 60; write 90"),
        ("optim: nonsense", "optim: 'nonsense' is not one of its values; it is one of adamw"),
        ("optim: adamw_torh", "did you mean adamw_torch?"),
        ("optim: [sgd]", "['sgd'] is not one of its values"),
        ("optim: adafactor", "optim: adafactor is not supported: parameters are sharded"),
        ("optim: adagrad", "optim: adagrad is not supported"),
        ("optim: adamw_bnb_8bit", "optim: adamw_bnb_8bit is not supported"),
        ("optim: sgd, adam_beta1: 0.9", "adam_beta1: means nothing to optim: sgd; remove it"),
        ("optim: sgd, optim_args: 'momentum=x'", "optim_args: momentum: must be a number, not 'x'"),
        ("optim: sgd, optim_args: 'momentum=1.5'", "a number of at least 0 and less than 1"),
        ("optim: sgd, optim_args: 'momentm=0.9'", "'momentm' is no argument of optim: sgd; it has"),
        ("optim: sgd, optim_args: momentum", "'momentum': written momentum=VALUE"),
        ("optim: sgd, optim_args: 'nesterov=true'", "nesterov needs a momentum, and no dampening"),
        ("optim: sgd, optim_args: 'nesterov=maybe'", "nesterov: must be true or false, not"),
        ("optim: sgd, optim_args: 'weight_decay=0.1'", "weight_decay: set train.weight_decay"),
        ("optim: sgd, optim_args: {momentum: 0.9}", "optim_args: must be text, not {"),
        ("optim_args: 'momentum=0.9'", "optim: adamw_torch_fused reads none; remove it"),
        ("lr_scheduler_kwargs: {num_cycle: 2}", "lr_scheduler_kwargs.num_cycle: not a parameter of "
         "lr_scheduler_type: cosine; it has num_cycles"),
        ("lr_scheduler_kwargs: {num_cycles: x}", "num_cycles: must be a number of at least 0"),
        ("lr_scheduler_kwargs: {last_epoch: 3}", "lr_scheduler_kwargs.last_epoch: not a parameter"),
        ("lr_scheduler_kwargs: '{num_cycles: 2}'", "must be a mapping such as {num_cycles: 0.5}"),
        ("lr_scheduler_kwargs: 3", "must be a mapping such as {num_cycles: 0.5}, not 3"),
        ("tf32: yes", "tf32: must be true or false, not 'yes'"),
        ("tf32: 1", "tf32: must be true or false, not 1"),
        ("run_name: 5", "run_name: must be text, not 5; put it in quotes"),
        ("log_level: loud", "log_level: 'loud' is not one of its values"),
        ("log_level: warn", "did you mean warning?"),
        ("log_level: 10", "log_level: 10 is not one of its values"),
    ],
)  # fmt: skip
def test_values_are_checked_without_the_class(job_file, extra, said) -> None:
    """Types, choices and ranges: what ranks would find after minutes, or never."""
    if said == "unknown":  # YAML ends the value at the comma
        with pytest.raises(ConfigError, match=r"train\.extra\.9: not a Hugging Face"):
            load(job_file, [f"train.extra={{{extra}}}"])
        return
    assert any(said in found for found in faults(job_file, extra))


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("linear", "num_cycles: 1", "lr_scheduler_type: linear; it has none"),
        ("constant", "timescale: 5", "lr_scheduler_type: constant; it has none"),
        ("constant_with_warmup", "x: 5", "lr_scheduler_type: constant_with_warmup; it has none"),
        ("inverse_sqrt", "num_cycles: 1", "lr_scheduler_type: inverse_sqrt; it has timescale"),
        ("inverse_sqrt", "timescale: 0", "timescale: must be a number of at least 1"),
        ("inverse_sqrt", "timescale: 2.5", "timescale: must be a whole number, not 2.5"),
    ],
)
def test_parameters_belong_to_their_schedule(job_file, kind, options, said) -> None:
    """Hugging Face leaves some of them out without a word, and ends in a TypeError for others."""
    extra = f"lr_scheduler_kwargs: {{{options}}}"
    assert said in faults(job_file, extra, f"train.lr_scheduler_type={kind}")[0]


def test_an_offloaded_optimizer_is_deepspeeds(job_file) -> None:
    """optim would have been left out without a word."""
    offload = "engine={type: zero3, offload: cpu}"
    (found,) = faults(job_file, "optim: sgd", offload)
    assert found == "optim: engine.offload: cpu steps with DeepSpeed's own AdamW; remove it"
    assert load(job_file, ["train.extra={optim: adamw_torch, adam_beta2: 0.95}", offload])


def test_tf32_needs_a_gpu_that_has_it(job_file) -> None:
    """torch would end the ranks; the plan knows the hardware."""
    from sft_job import choices
    from sft_job.errors import HardwareError
    from tests.test_plan import A100, CPU, V100

    asked = load(job_file, ["train.extra.tf32=true"])
    for machine in (CPU, V100):
        with pytest.raises(HardwareError, match=rf"tf32 is true, but {machine.name} has no TF32"):
            choices.precision(asked, machine)
    assert choices.precision(asked, A100).value == "bf16"
    assert choices.precision(load(job_file, ["train.extra.tf32=false"]), CPU).value == "fp32"


# --- beside the class ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    [
        {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"},
        {"optim": "rmsprop", "optim_args": "alpha=0.9,eps=1e-8,centered=true"},
        {"optim": "adamw_torch", "adam_beta1": 0.0, "adam_beta2": 0, "adam_epsilon": 1},
        {"log_level": "passive", "log_level_replica": "detail", "log_on_each_node": False},
        {"lr_scheduler_kwargs": {"num_cycles": 0}, "run_name": "x", "tf32": None},
    ],
)
def test_the_class_takes_what_is_allowed(job_file, tmp_path, extra) -> None:
    """The real TrainingArguments, and the real optimizer that it chooses."""
    import torch
    from transformers import Trainer, TrainingArguments

    given = load(job_file, [f"train.extra={json.dumps(extra)}"]).train.extra
    named = extras.arguments(given)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **named)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    kind([torch.zeros(1, requires_grad=True)], **options)


if __name__ == "__main__":
    FILE.write_text(json.dumps(of_the_release(), indent=1) + "\n")
    sys.exit(0)
