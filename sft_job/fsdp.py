"""Engine fsdp: PyTorch FSDP2 (`fully_shard`), one unit per decoder layer.

The model is sharded by us while it is still empty, and every rank reads only its own rows
of each tensor from the mapped weight files: no rank ever holds the whole model. The Trainer
is told that the model manages its own sharding, so accelerate does not wrap it again (its
FSDP plugin is silently ignored on a CPU and reduces gradients in bf16).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sft_job.errors import ModelError
from sft_job.model import DTYPES, build, decoder_layers, make_trainable
from sft_job.plan import Plan
from sft_job.weights import WeightFiles, fill_buffers, missing_names
from sft_job.world import World


def load(folder: Path, plan: Plan, world: World, *, trust_remote_code: bool) -> PreTrainedModel:
    """The model, sharded over all ranks, fp32 weights filled in, ready for the Trainer."""
    model = build(folder, plan, trust_remote_code=trust_remote_code, meta=True)
    make_trainable(model, plan)
    shard(model, plan, world)
    files = WeightFiles(folder, torch.finfo(DTYPES[plan.precision.value]).max)
    fill(model, files, world)
    # Read by Trainer: the model owns its placement and gradient reduction, do not wrap it.
    model._is_distributed_loading_by_transformers = True
    return model


def shard(model: PreTrainedModel, plan: Plan, world: World) -> None:
    """Apply FSDP2: parameters and reductions fp32, computation in the plan's precision."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    compute = None if plan.precision.value == "fp32" else DTYPES[plan.precision.value]
    # output_dtype stays unset: it would cast the hidden states after every layer as well.
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    layers = decoder_layers(model)
    for layer in layers:
        fully_shard(layer, **options)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not table.weight:
        # Units of their own: neither has to be there while the layers run. The head is needed
        # again as soon as the backward pass begins.
        fully_shard(table, **options)
        table.set_unshard_in_backward(False)  # a look-up's gradient does not need the table
        fully_shard(head, reshard_after_forward=False, **options)
    fully_shard(model, **options)
    sharded = [layer for layer in layers if isinstance(layer, FSDPModule)]
    for layer, following in itertools.pairwise(sharded):
        # Asked for before the layer computes, so that gathering does not wait for the host.
        # (The backward pass prefetches the layer before by itself.)
        layer.set_modules_to_forward_prefetch([following])


def fill(model: PreTrainedModel, files: WeightFiles, world: World) -> None:
    """Give every parameter its memory and this rank's rows of the weights.

    Raises:
        ModelError: a parameter is not in the files.
    """
    if missing := missing_names(model, files):
        raise ModelError(
            f"the weight files have no {', '.join(missing[:5])}", where=str(files.folder)
        )
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=world.device)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        for name, parameter in model.named_parameters():
            local = _local(parameter)
            rows = _rows(parameter.shape[0], world)
            local.copy_(files.read(name, rows).reshape(local.shape))
    fill_buffers(model, files)
    model.tie_weights()


def _local(parameter: nn.Parameter) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        raise TypeError("a parameter was not sharded")
    local: torch.Tensor = parameter.to_local()
    return local


def _rows(count: int, world: World) -> slice:
    """This rank's rows under Shard(0): torch.chunk's rule, ceil(count / ranks) rows each."""
    size = math.ceil(count / world.size)
    return slice(min(world.rank * size, count), min((world.rank + 1) * size, count))


def save(model: PreTrainedModel, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write model and optimizer state, every rank its own shards."""
    weights, state = get_state_dict(model, optimizer)
    state_dict_saver.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def restore(model: PreTrainedModel, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Read what `save` wrote, for any number of ranks."""
    weights, state = get_state_dict(model, optimizer)
    state_dict_loader.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


def full_parameters(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter whole, fp32, one at a time; all ranks must go through it."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass without a backward one leaves the last units whole
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            raise TypeError(f"{name} was not sharded")
        yield name, parameter.full_tensor().detach()
