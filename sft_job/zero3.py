"""Engine zero3: DeepSpeed ZeRO-3 under the Trainer's own integration.

The parameters are partitioned by us while the model is still empty, and every rank reads only its
own part of each tensor: no rank ever holds the whole model. Reductions and accumulation are fp32,
said explicitly: DeepSpeed's defaults follow the compute dtype.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sft_job import compiled
from sft_job.errors import CheckpointError, HardwareError, ModelError
from sft_job.loss import LossScale
from sft_job.model import DTYPES, build, make_trainable
from sft_job.plan import Plan
from sft_job.schema import JobConfig, Zero3
from sft_job.weights import WeightFiles, fill_buffers, missing_names
from sft_job.world import World


def prepare_environment(device: torch.device) -> None:
    """What DeepSpeed reads while it is imported; call before anything imports it."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    os.environ.pop("ACCELERATE_USE_CPU", None)  # with it accelerate leaves DeepSpeed out
    if device.type == "cpu":
        import deepspeed.ops

        # DeepSpeed would compile a shared-memory collective at the first start: half a minute,
        # and a C++ compiler that not everyone has. gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        from deepspeed.accelerator import get_accelerator

        # DeepSpeed asks for native fp16 instructions; torch computes fp16 on every CPU, slowly.
        get_accelerator().is_fp16_supported = lambda: True


def settings(config: JobConfig, plan: Plan) -> dict[str, Any]:
    """The DeepSpeed configuration of a plan."""
    engine = config.engine
    if not isinstance(engine, Zero3):
        raise TypeError("the job's engine is not zero3")
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_gather_16bit_weights_on_model_save": False,
        "contiguous_gradients": True,
        "overlap_comm": True,
        # DeepSpeed's own linear layer does not hold on to gathered weights; a recomputed layer has
        # none to hold, and ends its recomputation before its last product only with torch's.
        "memory_efficient_linear": plan.activation_checkpointing.value == "none",
        **buffers(plan),
    }
    for key in (
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_param_persistence_threshold",
    ):
        if (value := getattr(engine, key)) is not None:
            zero[key] = value
    if engine.offload == "cpu":
        pinned = plan.device_type == "cuda"
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    return {
        "train_micro_batch_size_per_gpu": 1,
        # The trainer accumulates by itself and tells DeepSpeed which micro-batch is the last.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "bf16": {"enabled": plan.precision.value == "bf16"},
        "fp16": {
            "enabled": plan.precision.value == "fp16",
            "loss_scale": 0,  # dynamic
            "initial_scale_power": int(math.log2(LossScale.initial)),
            "loss_scale_window": LossScale.window,
            "hysteresis": 1,
            # At its minimum, a whole number, DeepSpeed ends with a bare Exception; the trainer
            # refuses an overflow at our least scale before.
            "min_loss_scale": int(LossScale.least) // 2,
        },
        # Else accelerate makes DeepSpeed's CPU Adam anew, and forgets that it is AdamW.
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def buffers(plan: Plan) -> dict[str, int]:
    """Sizes in elements, from the shape of the model: one decoder layer is gathered while the
    one before computes, and the gradients of one are reduced while the next computes. Norms and
    biases stay whole on every rank: gathering them costs a message each."""
    layer, hidden, ends = plan.layer_parameters, plan.hidden, plan.end_parameters
    return {
        "reduce_bucket_size": layer,
        "stage3_prefetch_bucket_size": layer,
        "stage3_max_live_parameters": 2 * layer + ends,
        "stage3_max_reuse_distance": layer,
        "stage3_param_persistence_threshold": hidden + 1,
        # The optimizer makes an fp32 copy of the gradients of so many elements at a time.
        "sub_group_size": max(2 * layer // plan.world_size, 1),
    }


def cpu_adam() -> type[torch.optim.Optimizer]:
    """DeepSpeed's CPU Adam; the first use on a machine compiles it.

    Raises:
        HardwareError: it cannot be compiled.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.op_builder import CPUAdamBuilder

    class Builder(CPUAdamBuilder):
        """Knows whether the installed DeepSpeed brings it; compiles in our way if not."""

        def jit_load(self, verbose: bool = True) -> ModuleType:
            module = _compiled_cpu_adam()
            self._loaded_ops[self.name] = module  # where the optimizer's own builder looks
            return module

    Builder().load()
    adam: type[torch.optim.Optimizer] = DeepSpeedCPUAdam
    return adam


def _compiled_cpu_adam() -> ModuleType:
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    versions = (torch.__version__, importlib.metadata.version("deepspeed"))
    file = root / "sft_job" / compiled.name_of("cpu_adam", versions)
    compiled.once(
        file,
        compiled.CPU_ADAM,
        what="DeepSpeed's CPU Adam",
        asked="engine.offload is cpu",
        remedy="install a C++ compiler (g++) and Python's headers, or use engine.offload=none",
    )
    spec = importlib.util.spec_from_file_location("cpu_adam", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} has no loader")
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise HardwareError(
            f"the compiled CPU Adam cannot be loaded: {error}",
            where=str(file),
            remedy="remove this file: it is compiled anew",
        ) from error
    return module


def load(folder: Path, plan: Plan, world: World, *, trust_remote_code: bool) -> PreTrainedModel:
    """The model, partitioned over all ranks and filled, ready for the Trainer.

    Must run while the TrainingArguments with `settings` are alive.

    Raises:
        ModelError: a parameter is not in the files.
    """
    model = build(folder, plan, trust_remote_code=trust_remote_code, meta=True)
    files = WeightFiles(folder, torch.finfo(DTYPES[plan.precision.value]).max)
    if missing := missing_names(model, files):
        raise ModelError(f"the weight files have no {', '.join(missing[:5])}", where=str(folder))
    partition(model, plan, world)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.ds_tensor.copy_(_own_part(files, name, parameter, world))
    fill_buffers(model, files)
    make_trainable(model, plan)
    return model


def partition(model: PreTrainedModel, plan: Plan, world: World) -> None:
    """Give every parameter memory for this rank's part, in the compute dtype.

    `deepspeed.zero.Init` does it while the model is built, and broadcasts each parameter before:
    as many copies of it in a machine's memory as there are ranks, and nothing in them yet.
    """
    import deepspeed
    from transformers.integrations.deepspeed import deepspeed_config

    # With a module, if only an empty one, it replaces torch's linear layer as `settings` say.
    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=deepspeed_config())
    made: dict[nn.Parameter, Any] = {}  # tied parameters stay one
    for module in model.modules():
        for name, whole in list(module.named_parameters(recurse=False)):
            if whole not in made:
                # On the host, memory that is never written to takes none; partitioning reads it.
                dtype = DTYPES[plan.precision.value]
                empty = torch.empty(whole.shape, dtype=dtype, device=world.device)
                made[whole] = nn.Parameter(empty)
                init._convert_to_deepspeed_param(made[whole])
                made[whole].partition()
            setattr(module, name, made[whole])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(world.device))


def _own_part(files: WeightFiles, name: str, parameter: Any, world: World) -> torch.Tensor:
    """This rank's part of a flattened tensor as DeepSpeed cuts it: equal parts, the last one
    filled up with zeros."""
    size = parameter.ds_tensor.ds_numel
    begin = min(world.rank * size, parameter.ds_numel)
    end = min(begin + size, parameter.ds_numel)
    if begin == end:
        return torch.zeros(size)
    row = math.prod(parameter.ds_shape[1:])
    first = begin // row
    rows = files.read(name, slice(first, math.ceil(end / row))).flatten()
    part = rows[begin - first * row : end - first * row]
    return part if len(part) == size else torch.nn.functional.pad(part, (0, size - len(part)))


def restore_masters(model: PreTrainedModel, folder: Path, plan: Plan, world: World) -> None:
    """Put the exact weights into the fp32 masters.

    DeepSpeed makes the masters from the parameters in the compute dtype; where the weight files
    hold more than that, the rounding would be the first step of the training.
    """
    from deepspeed.utils import safe_set_local_fp32_param

    files = WeightFiles(folder)
    for name, parameter in model.named_parameters():
        part = _own_part(files, name, parameter, world)
        if part.dtype != DTYPES[plan.precision.value]:
            safe_set_local_fp32_param(parameter, part.to(parameter.device, torch.float32))


def save(engine: Any, folder: Path) -> None:
    """Write model and optimizer state, every rank its own shards."""
    engine.save_checkpoint(str(folder))


def check_loaded(engine: Any, plan: Plan, *, offload: bool) -> None:
    """Mend what DeepSpeed takes over from a checkpoint as it was written.

    Raises:
        CheckpointError: its loss scale is that of another precision.
    """
    if engine.optimizer.loss_scaler.dynamic != (plan.precision.value == "fp16"):
        raise CheckpointError(
            "the checkpoint was written in another precision than "
            f"{plan.precision.value} ({plan.precision.reason}), and its loss scale with it",
            remedy="resume on the hardware that the job began on, or begin in a new run.dir",
        )
    if offload:  # the CPU Adam counts its steps in numbers, torch's in tensors
        for state in engine.optimizer.optimizer.state.values():
            state["step"] = int(state["step"])


def forget_settings() -> None:
    """End the ZeRO-3 mode of transformers, in which models are made partitioned over all ranks,
    and of torch, whose linear layer DeepSpeed has replaced."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    torch.nn.functional.linear = torch._C._nn.linear


def full_parameters(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter whole, fp32, one at a time; all ranks must go through it."""
    from deepspeed.utils import safe_get_full_fp32_param

    for name, parameter in model.named_parameters():
        yield name, safe_get_full_fp32_param(parameter).detach()
