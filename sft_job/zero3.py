"""Engine zero3: DeepSpeed ZeRO-3 under the Trainer's own integration.

`deepspeed.zero.Init` partitions every parameter as it is made; the weights are then filled
in one tensor at a time. Reductions and accumulation are fp32, said explicitly: DeepSpeed's
defaults follow the compute dtype.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sft_job.config import JobConfig, Zero3
from sft_job.errors import ModelError
from sft_job.model import WeightFiles, build, make_trainable, missing_names
from sft_job.plan import Plan
from sft_job.world import World


def prepare_environment(device: torch.device) -> None:
    """What DeepSpeed reads while it is imported; call before anything imports it."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed.ops

    # On a CPU DeepSpeed would compile a shared-memory collective at the first start: half a
    # minute, and a C++ compiler that not everyone has. gloo does the same.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def settings(config: JobConfig, plan: Plan) -> dict[str, Any]:
    """The DeepSpeed configuration of a plan."""
    engine = config.engine
    if not isinstance(engine, Zero3):
        raise TypeError("the job's engine is not zero3")
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_gather_16bit_weights_on_model_save": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    }
    for key in (
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_param_persistence_threshold",
    ):
        if (value := getattr(engine, key)) is not None:
            zero[key] = value
    return {
        "train_micro_batch_size_per_gpu": 1,
        # The trainer accumulates by itself and tells DeepSpeed which micro-batch is the last.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "bf16": {"enabled": plan.precision.value == "bf16"},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def load(folder: Path, plan: Plan, world: World, *, trust_remote_code: bool) -> PreTrainedModel:
    """The model, partitioned over all ranks and filled, ready for the Trainer.

    Must run while the TrainingArguments with `settings` are alive: transformers then makes
    every parameter under `deepspeed.zero.Init`.

    Raises:
        ModelError: a parameter is not in the files.
    """
    import deepspeed

    model = build(folder, plan, trust_remote_code=trust_remote_code, meta=False)
    files = WeightFiles(folder)
    if missing := missing_names(model, files):
        raise ModelError(f"the weight files have no {', '.join(missing[:5])}", where=str(folder))
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if world.is_main:
                parameter.data.copy_(files.read(name))
    make_trainable(model, activation_checkpointing=plan.activation_checkpointing)
    return model


def restore_masters(model: PreTrainedModel, folder: Path) -> None:
    """Put the exact weights into the fp32 masters.

    DeepSpeed makes the masters from the bf16 parameters; where the weight files hold more
    than bf16, that rounding would be the first step of the training.
    """
    from deepspeed.utils import safe_set_full_fp32_param

    files = WeightFiles(folder)
    for name, parameter in model.named_parameters():
        value = files.read(name)
        if value.dtype != torch.bfloat16:
            safe_set_full_fp32_param(parameter, value.to(parameter.device, torch.float32))


def save(engine: Any, folder: Path) -> None:
    """Write model and optimizer state, every rank its own shards."""
    engine.save_checkpoint(str(folder))


def forget_settings() -> None:
    """End transformers' ZeRO-3 mode: models loaded from here on are whole, on one rank alone."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def full_parameters(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter whole, fp32, one at a time; all ranks must go through it."""
    from deepspeed.utils import safe_get_full_fp32_param

    for name, parameter in model.named_parameters():
        yield name, safe_get_full_fp32_param(parameter).detach()
