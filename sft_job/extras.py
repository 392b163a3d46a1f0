"""`train.extra`: Hugging Face TrainingArguments that a job may set, checked without transformers.

What the pinned release has is data, `training_arguments.json`; a test holds it to the class
(`python -m tests.test_extras` writes it anew). An argument is allowed where it does here what
its documentation says. Every other is refused by name, with what decides instead.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

from sft_job.schema import Engine, Train, Zero3, shown
from sft_job.yamltext import number

_RELEASE: dict[str, Any] = json.loads(
    resources.files("sft_job").joinpath("training_arguments.json").read_text(encoding="utf-8")
)
FIELDS = frozenset(_RELEASE["fields"])
OPTIMIZERS = frozenset(_RELEASE["optimizers"])
LOG_LEVELS: list[str] = _RELEASE["log_levels"]

ADAM = ("adamw_torch_fused", "adamw_torch")
# Optimizers that work element by element, and take nothing but torch: with sharded parameters
# every other sees pieces, and under ZeRO-3 flattened ones. (Adagrad, too, fails under ZeRO-3: it
# makes its state before DeepSpeed has its partitions.) What each reads from optim_args.
SUPPORTED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(ADAM, ()),
    "sgd": ("momentum", "dampening", "nesterov"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
}

# Parameters of the schedules, beside the numbers of steps.
SCHEDULES: dict[str, list[str]] = _RELEASE["schedules"]


def _reasons(why: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), why)


OWNED = {
    **_reasons(
        "decided by the job file's own keys; remove it",
        "output_dir do_train learning_rate weight_decay max_grad_norm num_train_epochs max_steps "
        "lr_scheduler_type warmup_steps logging_steps logging_strategy logging_first_step "
        "logging_nan_inf_filter logging_dir save_strategy save_steps save_total_limit "
        "save_only_model save_on_each_node seed data_seed bf16 fp16 fsdp fsdp_config deepspeed "
        "report_to disable_tqdm use_cpu activation_checkpointing activation_checkpointing_kwargs "
        "gradient_checkpointing gradient_checkpointing_kwargs full_determinism "
        "resume_from_checkpoint restore_callback_states_from_checkpoint enable_jit_checkpoint "
        "use_liger_kernel liger_kernel_config accelerator_config parallelism_config",
    ),
    **_reasons(
        "a step is made of data.batching and train.global_batch_size, and dealt by the plan; "
        "remove it",
        "per_device_train_batch_size gradient_accumulation_steps auto_find_batch_size "
        "average_tokens_across_devices group_by_length train_sampling_strategy "
        "length_column_name remove_unused_columns ignore_data_skip dataloader_drop_last "
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
        "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order "
        "label_names include_num_input_tokens_seen",
    ),
    **_reasons(
        "there is no evaluation during training; remove it",
        "do_eval do_predict eval_strategy eval_steps eval_delay eval_on_start "
        "per_device_eval_batch_size prediction_loss_only eval_do_concat_batches "
        "eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics "
        "bf16_full_eval fp16_full_eval load_best_model_at_end metric_for_best_model "
        "greater_is_better",
    ),
    **_reasons(
        "ranks and their process group are engine, run and slurm; remove it",
        "local_rank ddp_backend ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb "
        "ddp_broadcast_buffers ddp_static_graph",
    ),
    **_reasons(
        "nothing is sent to a hub; the model is exported to run.dir: remove it",
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push "
        "hub_revision",
    ),
    **_reasons(
        "of trackers, logging.report_to has tensorboard, wandb and mlflow; remove it",
        "project trackio_space_id trackio_bucket_id trackio_static_space_id",
    ),
    "neftune_noise_alpha": "noise on the embeddings makes every forward pass another one: the "
    "self-test before the first step could not compare packed samples with separate ones, and "
    "a resumed run would not be the same run; remove it",
    "label_smoothing_factor": "the loss is the mean over supervised tokens, without smoothing; "
    "remove it",
    **_reasons(
        "the attention functions and the loss here are not made to be compiled; remove it",
        "torch_compile torch_compile_backend torch_compile_mode",
    ),
    "use_cache": "training keeps no keys and values, and the export sets use_cache; remove it",
    "torch_empty_cache_steps": "a step here would not read it; remove it",
    "optim_target_modules": "every parameter is trained alike; remove it",
    "debug": "a loss or gradient that is not finite is found at every step anyway; remove it",
    "skip_memory_metrics": "every record has peak_memory_gib; remove it",
}


def faults(train: Train, engine: Engine) -> Iterator[tuple[str, str]]:
    """What is wrong with `train.extra`: key and reason."""
    asked = train.extra.get("optim", ADAM[0])
    optimizer = asked if asked in list(SUPPORTED) else None
    for name, value in train.extra.items():
        key = f"train.extra.{name}"
        if name in Train.model_fields and name not in OWNED:
            yield key, f"a key of the job file itself; set train.{name}"
        elif name in OWNED:
            yield key, OWNED[name]
        elif name not in ALLOWED:
            near = difflib.get_close_matches(name, ALLOWED, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; allowed are {', '.join(ALLOWED)}"
            yield key, f"not a Hugging Face TrainingArguments field{hint}"
        elif (why := ALLOWED[name](value)) is not None:
            yield key, why
        elif name.startswith("adam_") and optimizer not in (None, *ADAM):
            yield key, f"means nothing to optim: {optimizer}; remove it"
        elif name == "optim" and isinstance(engine, Zero3) and engine.offload == "cpu":
            if optimizer not in ADAM:
                yield key, "engine.offload: cpu steps with DeepSpeed's own AdamW; remove it"
        elif name == "optim_args" and optimizer is not None:
            yield from ((key, why) for why in _optimizer_faults(optimizer, value))
        elif name == "lr_scheduler_kwargs":
            yield from _schedule_faults(train.lr_scheduler_type, value or {})


def arguments(extra: dict[str, Any]) -> dict[str, Any]:
    """As TrainingArguments takes them: torch wants the betas to be of one type."""
    return {
        name: float(value) if name.startswith("adam_") else value for name, value in extra.items()
    }


# --- values --------------------------------------------------------------------------------

Check = Callable[[Any], str | None]


def _number(least: float, most: float, *, above: bool = False, below: bool = False) -> Check:
    """Args: above, below: the bounds themselves are excluded."""
    words = f"{'more than' if above else 'at least'} {least:g} and "
    words += f"{'less than' if below else 'at most'} {most:g}"

    def check(value: Any) -> str | None:
        good = (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and (value > least if above else value >= least)
            and (value < most if below else value <= most)
        )
        return None if good else f"must be a number of {words}, not {shown(value)}{_hint(value)}"

    return check


def _hint(value: Any) -> str:
    if not isinstance(value, str):
        return ""
    try:
        return f" in quotes; write {number(value)}"
    except ValueError as error:
        return f": {error}" if str(error) else ""


def _whole(least: int, most: int) -> Check:
    inner = _number(least, most)

    def check(value: Any) -> str | None:
        if isinstance(value, float) and not value.is_integer():
            return f"must be a whole number, not {shown(value)}"
        return inner(value)

    return check


def _or_null(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _switch(value: Any) -> str | None:
    return None if isinstance(value, bool) else f"must be true or false, not {shown(value)}"


def _text(value: Any) -> str | None:
    if isinstance(value, str) and value:
        return None
    return f"must be text, not {shown(value)}; put it in quotes"


def _one_of(names: list[str]) -> Check:
    def check(value: Any) -> str | None:
        if value in names:
            return None
        near = difflib.get_close_matches(str(value), names, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; it is one of {', '.join(names)}"
        return f"{shown(value)} is not one of its values{hint}"

    return check


def _optimizer(value: Any) -> str | None:
    if isinstance(value, str) and value in OPTIMIZERS - SUPPORTED.keys():
        return (
            f"{value} is not supported: parameters are sharded, so that an optimizer must work "
            f"element by element, with torch alone; take one of {', '.join(SUPPORTED)}"
        )
    return _one_of(list(SUPPORTED))(value)


def _mapping(value: Any) -> str | None:
    if isinstance(value, dict):
        return None
    return f"must be a mapping such as {{num_cycles: 0.5}}, not {shown(value)}"


ALLOWED: dict[str, Check] = {
    "adam_beta1": _number(0, 1, below=True),
    "adam_beta2": _number(0, 1, below=True),
    "adam_epsilon": _number(0, 1, above=True),
    "optim": _optimizer,
    "optim_args": _or_null(_text),
    "lr_scheduler_kwargs": _or_null(_mapping),
    "tf32": _or_null(_switch),
    "run_name": _or_null(_text),
    "log_level": _one_of(LOG_LEVELS),
    "log_level_replica": _one_of(LOG_LEVELS),
    "log_on_each_node": _switch,
}

_SCHEDULE_VALUES: dict[str, Check] = {
    "num_cycles": _number(0, 10_000),
    "timescale": _or_null(_whole(1, 10**9)),
}

_OPTIMIZER_VALUES: dict[str, Check] = {
    "momentum": _number(0, 1, below=True),
    "dampening": _number(0, 1),
    "alpha": _number(0, 1, below=True),
    "eps": _number(0, 1, above=True),
}


def _schedule_faults(kind: str, given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    known = SCHEDULES[kind]
    for name, value in given.items():
        key = f"train.extra.lr_scheduler_kwargs.{name}"
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            yield key, f"not a parameter of lr_scheduler_type: {kind}; {has}"
        elif (why := _SCHEDULE_VALUES[name](value)) is not None:
            yield key, why


def _optimizer_faults(optimizer: str, given: str | None) -> Iterator[str]:
    """`a=1,b=2`, as the Trainer takes it apart."""
    if given is None:
        return
    known = SUPPORTED[optimizer]
    if not known:
        yield f"optim: {optimizer} reads none; remove it"
        return
    values: dict[str, float | bool] = {}
    for part in given.replace(" ", "").split(","):
        name, equals, text = part.partition("=")
        if not equals:
            yield f"{part!r}: written {known[0]}=VALUE, with commas between several"
        elif name == "weight_decay":
            yield "weight_decay: set train.weight_decay"
        elif name not in known:
            yield f"{name!r} is no argument of optim: {optimizer}; it has {', '.join(known)}"
        elif name in ("nesterov", "centered"):
            if text.lower() not in ("true", "false"):
                yield f"{name}: must be true or false, not {text!r}"
            values[name] = text.lower() == "true"
        else:
            try:
                value = number(text)
            except ValueError:
                yield f"{name}: must be a number, not {text!r}"
                continue
            if (why := _OPTIMIZER_VALUES[name](value)) is not None:
                yield f"{name}: {why}"
            values[name] = value
    if values.get("nesterov") and (not values.get("momentum") or values.get("dampening")):
        yield "nesterov needs a momentum, and no dampening"
