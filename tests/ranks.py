"""Functions that tests run on the ranks of a gloo group (`tests.runs.on_ranks`)."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from sft_job import checkpoint, dataset, fsdp, trainer, zero3
from sft_job.cli import StopRequest
from sft_job.config import JobConfig, load
from sft_job.metrics import Silence
from sft_job.model import WeightFiles
from sft_job.plan import Plan, plan_of, schedule_of
from sft_job.rundir import RunDir
from sft_job.world import World


class Setup:
    """A trainer on this rank, as `train` makes it."""

    def __init__(self, world: World, job: Path, *overrides: str) -> None:
        self.world = world
        self.config: JobConfig = load(job, overrides)
        self.run_dir = RunDir(self.config.run.dir)
        plan, prepared = plan_of(self.config, world.size)
        assert prepared is not None
        self.plan: Plan = plan
        self.folder = Path(prepared.model_folder)
        arguments = trainer.training_arguments(self.config, plan, self.run_dir, world)
        self.steps = dataset.Steps(
            dataset.TokenCache(Path(prepared.data_folder)),
            schedule_of(self.config, prepared.stats),
            rank=world.rank,
            world_size=world.size,
            micro_batch_tokens=plan.micro_batch_tokens,
            attention_scale=plan.attention_scale,
        )
        engine = zero3 if self.config.engine.type == "zero3" else fsdp
        self.model = engine.load(self.folder, plan, world, trust_remote_code=False)
        self.trainer = trainer.SftTrainer(
            self.model,
            arguments,
            config=self.config,
            plan=plan,
            steps=self.steps,
            world=world,
            run_dir=self.run_dir,
            stop=StopRequest(),
            reporter=Silence(),
            attempt=1,
            prepared_model=self.folder,
        )

    def close(self) -> None:
        zero3.forget_settings()


def _adam_elements(optimizer: Any) -> int:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    count = 0
    for state in optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            value = state[name]
            count += (value.to_local() if isinstance(value, DTensor) else value).numel()
    return count


class MasterCheck(trainer.TrainerCallback):
    """Largest difference between the fp32 masters and the weight files before the first step."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.difference = setup, -1.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        files = WeightFiles(self.setup.folder)
        whole = trainer.full_parameters(self.setup.config)(self.setup.model)
        self.difference = max(float((p - files.read(name)).abs().max()) for name, p in whole)


def sharding(world: World, job: Path, *overrides: str) -> dict[str, Any]:
    """Train two steps; report what this rank holds and in which dtypes it computed."""
    setup = Setup(world, job, *overrides)
    start = MasterCheck(setup)
    setup.trainer.add_callback(start)
    seen: dict[str, set[str]] = {"hidden": set(), "weight": set()}

    def watch(module: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        seen["hidden"].add(str(hidden.dtype))
        seen["weight"].add(str(module.self_attn.q_proj.weight.dtype))

    for layer in setup.model.model.layers:
        layer.register_forward_hook(watch)
    setup.trainer.train()
    whole = local = 0
    kinds = set()
    for parameter in setup.model.parameters():
        if isinstance(parameter, DTensor):
            kinds.add("DTensor")
            whole += parameter.numel()
            local += parameter.to_local().numel()
        elif hasattr(parameter, "ds_tensor"):
            kinds.add(f"ds:{parameter.ds_status.name}")
            whole += parameter.ds_numel
            local += parameter.ds_tensor.numel()
        else:
            kinds.add("plain")
            whole += parameter.numel()
            local += parameter.numel()
    masters = {str(p.to_local().dtype) for p in setup.model.parameters() if isinstance(p, DTensor)}
    result = {
        "kinds": sorted(kinds),
        "whole": whole,
        "local": local,
        "adam": _adam_elements(setup.trainer.optimizer),
        "hidden": sorted(seen["hidden"]),
        "weight": sorted(seen["weight"]),
        "masters": sorted(masters),
        "start": start.difference,
    }
    setup.close()
    return result


def released(world: World, job: Path, *overrides: str) -> dict[str, Any]:
    """Count how often ZeRO-3 gathers, step by step."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import (
        PartitionedParameterCoordinator,
    )

    setup = Setup(world, job, *overrides)
    counts = {"gathered": 0, "released": 0}
    gather = PartitionedParameterCoordinator._PartitionedParameterCoordinator__all_gather_params
    release = PartitionedParameterCoordinator._PartitionedParameterCoordinator__release_param

    def counted_gather(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        counts["gathered"] += len(params)
        return gather(self, params, *args, **kwargs)

    def counted_release(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts["released"] += 1
        return release(self, *args, **kwargs)

    name = "_PartitionedParameterCoordinator"
    setattr(PartitionedParameterCoordinator, f"{name}__all_gather_params", counted_gather)
    setattr(PartitionedParameterCoordinator, f"{name}__release_param", counted_release)
    setup.trainer.train()
    setup.close()
    return counts | {"parameters": len(list(setup.model.parameters())), "steps": 2}


def peak_rss_mib(world: World, job: Path, *overrides: str) -> float:
    """Load and train two steps without saving; the most this process has held."""
    setup = Setup(world, job, *overrides)
    setup.trainer.remove_callback(trainer.Steering)
    setup.trainer.train()
    setup.close()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def single(world: World, job: Path, *overrides: str) -> dict[str, Any]:
    """One process: packed against alone; then loss and gradients of the job's first step."""
    setup = Setup(world, job, *overrides)
    difference = _packed_and_alone(setup)
    batch = setup.steps[0]
    assert len(batch.micro_batches) > 1
    loss = setup.trainer.training_step(setup.model, batch)
    gradients = {n: p.grad.full_tensor().numpy() for n, p in setup.model.named_parameters()}
    samples = [setup.steps.cache[i] for i in batch.samples]
    return {
        "packed_and_alone": difference,
        "loss": float(loss),
        "gradients": gradients,
        "samples": [(s.input_ids.tolist(), s.labels.tolist()) for s in samples],
    }


def _packed_and_alone(setup: Setup) -> float:
    """Largest difference between logits of samples packed into one row and alone."""
    samples = [setup.steps.cache[i] for i in range(5)]

    def logits(chosen: list[Any]) -> torch.Tensor:
        batch = dataset.collate(chosen)
        del batch["supervised"], batch["targets"]
        with torch.no_grad():
            result: torch.Tensor = setup.model(own_forward=True, **batch)["logits"][0]
        return result

    packed = logits(samples)
    alone = torch.cat([logits([sample]) for sample in samples])
    assert packed.abs().max() > 0.1
    return float((packed - alone).abs().max())


def checkpoints(world: World, run: str) -> list[Any]:
    """Publish two checkpoints of one file per rank; look for the newest, whole and damaged."""
    run_dir = RunDir(run)

    def write(folder: Path) -> None:
        (folder / f"part-{world.rank}.bin").write_bytes(bytes([world.rank]) * 1000)

    for step in (1, 2):
        checkpoint.publish(run_dir, step, write, world, engine="fsdp", data="d", needed_bytes=10)
    manifest = json.loads((run_dir.checkpoint(2) / checkpoint.MANIFEST).read_text())
    found, skipped = checkpoint.find(run_dir, world, engine="fsdp", data="d")
    assert found is not None
    assert skipped == []
    world.barrier()
    if world.is_main:
        (run_dir.checkpoint(2) / checkpoint.MANIFEST).unlink()
        shutil.copytree(run_dir.checkpoint(1), run_dir.checkpoint(7))
        (run_dir.checkpoint(7) / "part-1.bin").write_bytes(b"short")
    world.barrier()
    older, skipped = checkpoint.find(run_dir, world, engine="fsdp", data="d")
    assert older is not None
    return [found.step, sorted(manifest["files"]), older.step, skipped]
