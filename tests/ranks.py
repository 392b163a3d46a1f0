"""Functions that tests run on the ranks of a gloo group (`tests.runs.on_ranks`)."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from sft_job import checkpoint, dataset, export, flops, fsdp, memory, trainer, zero3
from sft_job import model as models
from sft_job.attempt import Attempt
from sft_job.attention import KERNELS, Choice
from sft_job.cli import StopRequest
from sft_job.config import load
from sft_job.errors import ConfigError, Interrupted, WorkerError
from sft_job.facts import read_facts
from sft_job.files import append_line
from sft_job.metrics import Meter, Reporter, Silence, peak_memory_gib
from sft_job.plan import Plan, plan_of, schedule_of
from sft_job.rundir import RunDir
from sft_job.schema import JobConfig
from sft_job.weights import WeightFiles
from sft_job.worker import refuse_different_plans
from sft_job.world import World


class Setup:
    """A trainer on this rank, as `train` makes it."""

    def __init__(
        self, world: World, job: Path, *overrides: str, saved_products: int | None = None
    ) -> None:
        self.world = world
        self.config: JobConfig = load(job, overrides)
        self.run_dir = RunDir(self.config.run.dir)
        plan, prepared = plan_of(self.config, world.size)
        assert prepared is not None
        if saved_products is not None:
            plan = dataclasses.replace(plan, saved_products=saved_products)
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
            one_sample_each=not KERNELS[plan.attention.value].packs,
        )
        engine = zero3 if self.config.engine.type == "zero3" else fsdp
        trust = self.config.model.trust_remote_code
        self.model = engine.load(self.folder, plan, world, trust_remote_code=trust)
        self.trainer = trainer.SftTrainer(
            self.model,
            arguments,
            config=self.config,
            plan=plan,
            steps=self.steps,
            world=world,
            attempt=Attempt(self.run_dir, 1),
            stop=StopRequest(),
            reporter=Silence(),
            meter=Meter(lambda work: 0.0, None, 0.0, time.time()),
            started=lambda phase: None,
            prepared=prepared,
        )

    def record_to(self, file: Path) -> None:
        """Time the steps as a run does and write its records, but save nothing."""
        facts = read_facts(self.folder)
        self.trainer.meter = Meter(
            lambda work: flops.needed(facts, work), self.plan.peak_flops, 0.0, time.time()
        )
        if self.world.is_main:
            file.parent.mkdir(parents=True, exist_ok=True)
            self.trainer.reporter = Reporter(
                sys.stdout, None, lambda name, record: append_line(file, json.dumps(record))
            )
        self.trainer.remove_callback(trainer.Steering)
        self.trainer.add_callback(Measuring(self.trainer))

    def close(self) -> None:
        zero3.forget_settings()


class Measuring(trainer.Steering):
    """Everything before the first step, and then nothing but steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.peak_gib = peak_memory_gib(args.device)


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


def starts(world: World, job: Path, variants: list[list[str]]) -> list[tuple[float, list[Any]]]:
    """Train with each list of overrides in turn: how far the masters were from the files at the
    start, and the records."""
    results = []
    for number, overrides in enumerate(variants):
        setup = Setup(world, job, *overrides, f"run.dir={job.parent}/start-{number}")
        start, records = MasterCheck(setup), Records()
        setup.trainer.add_callback(start)
        setup.trainer.add_callback(records)
        setup.trainer.train()
        setup.close()
        results.append((start.difference, records.records))
    return results


def sharding(world: World, job: Path, *overrides: str) -> dict[str, Any]:
    """Train two steps; report what this rank holds and in which dtypes it computed."""
    setup = Setup(world, job, *overrides)
    start = MasterCheck(setup)
    setup.trainer.add_callback(start)
    seen: dict[str, set[str]] = {"hidden": set(), "weight": set()}

    def watch(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        seen["hidden"].add(str(output.dtype))
        seen["weight"].add(str(module.weight.dtype))

    for layer in setup.model.model.layers:
        layer.mlp.down_proj.register_forward_hook(watch)
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
    waits = {
        group._get_backend(world.device).options._timeout.total_seconds()
        for group in distributed_c10d._world.pg_map
    }
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
        "groups": len(distributed_c10d._world.pg_map),
        "waits": sorted(waits),
    }
    setup.close()
    return result


def _masters(setup: Setup) -> torch.Tensor:
    """Every fp32 master whole, in one row; all ranks must call it."""
    whole = trainer.full_parameters(setup.config)(setup.model)
    return torch.cat([value.float().flatten() for _, value in whole])


class StepLog(trainer.TrainerCallback):
    """What every step did to masters, learning rate and loss scale."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.steps: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.masters = _masters(self.setup)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before, self.masters = self.masters, _masters(self.setup)
        sft = self.setup.trainer
        self.steps.append(
            {
                "moved": float((self.masters - before).norm()),
                "scale": sft.loss_scale,
                "overflows": sft.overflows,
                "next_rate": sft.lr_scheduler.get_last_lr()[0],
            }
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self.steps[-1] |= {"grad_norm": logs.get("grad_norm"), "loss": logs["loss"]}


INJECTED = 7


def steps_taken(world: World, job: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train in fp16; what `StepLog` saw. Under FSDP2, one number of rank 1's part of the gradients
    is made infinite in step INJECTED (from 0)."""
    setup = Setup(world, job, *overrides)
    log = StepLog(setup)
    setup.trainer.add_callback(log)
    accelerator = setup.trainer.accelerator
    backward = accelerator.backward

    def injecting(value: torch.Tensor) -> None:
        backward(value)
        gradient = next(setup.model.parameters()).grad
        if isinstance(gradient, DTensor) and (world.rank, len(log.steps)) == (1, INJECTED):
            gradient.to_local().view(-1)[0] = float("inf")

    accelerator.backward = injecting
    setup.trainer.train()
    setup.close()
    return log.steps


class Gathers:
    """Counts how often each parameter is gathered whole, by name, while it is entered."""

    def __init__(self, setup: Setup) -> None:
        self.names = {id(p): name for name, p in setup.model.named_parameters()}
        self.counts: Counter[str] = Counter()
        self.released = 0
        self.patches = self._zero3() if setup.config.engine.type == "zero3" else self._fsdp()

    def _fsdp(self) -> list[Any]:
        from torch.distributed.fsdp._fully_shard import _fsdp_param_group

        gather = _fsdp_param_group.foreach_all_gather

        def counted(params: Any, *args: Any, **kwargs: Any) -> Any:
            self.counts.update(self.names[id(p.sharded_param)] for p in params)
            return gather(params, *args, **kwargs)

        return [mock.patch.object(_fsdp_param_group, "foreach_all_gather", counted)]

    def _zero3(self) -> list[Any]:
        from deepspeed.runtime.zero.partitioned_param_coordinator import (
            PartitionedParameterCoordinator as Coordinator,
        )
        from deepspeed.runtime.zero.partitioned_param_coordinator import ZeroParamStatus

        names = [
            f"_PartitionedParameterCoordinator__{n}" for n in ("all_gather_params", "release_param")
        ]
        gather, release = (getattr(Coordinator, name) for name in names)

        def counted_gather(coordinator: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            absent = [p for p in params if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
            self.counts.update(self.names[id(p)] for p in absent)
            return gather(coordinator, params, *args, **kwargs)

        def counted_release(*args: Any, **kwargs: Any) -> Any:
            self.released += 1
            return release(*args, **kwargs)

        replacements = (counted_gather, counted_release)
        return [
            mock.patch.object(Coordinator, name, replacement)
            for name, replacement in zip(names, replacements, strict=True)
        ]

    def __enter__(self) -> Gathers:
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *details: Any) -> None:
        for patch in self.patches:
            patch.stop()


def released(world: World, job: Path, *overrides: str) -> dict[str, Any]:
    """Count how often ZeRO-3 gathers, step by step."""
    setup = Setup(world, job, *overrides)
    with Gathers(setup) as gathers:
        setup.trainer.train()
    setup.close()
    return {
        "gathered": gathers.counts.total(),
        "released": gathers.released,
        "parameters": len(list(setup.model.parameters())),
        "steps": 2,
    }


class Count(TorchDispatchMode):
    """Counts the matrix products and attentions that are really computed."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in models.PRODUCTS:
            self.counts["product"] += 1
        elif func.name() in models.ATTENTION_OPERATORS:
            self.counts["attention"] += 1
        return func(*args, **(kwargs or {}))


@dataclasses.dataclass
class Trained:
    """What `trainings` saw.

    Args:
        records: (loss, gradient norm) of every step.
        gathers: of each parameter, for a micro-batch of the last step.
        products: matrix products of this rank in the last step.
        micro_batches: of the last step.
    """

    records: list[tuple[float, float]]
    gathers: dict[str, float]
    products: int
    micro_batches: int


def trainings(world: World, runs: list[tuple[Path, list[str], int | None]]) -> list[Trained]:
    """Train (job, overrides, products saved) one after the other, the loss in chunks of 64 rows."""
    memory.CHUNK_BYTES["cpu"] = 1
    results = []
    for job, overrides, saved in runs:
        setup = Setup(world, job, *overrides, saved_products=saved)
        setup.trainer.remove_callback(trainer.Steering)
        with Count() as computed, Gathers(setup) as gathers:
            records = Records(gathers.counts.clear, computed.counts.clear)
            setup.trainer.add_callback(records)
            setup.trainer.train()
        setup.close()
        batches = len(setup.steps[len(setup.steps) - 1].micro_batches)
        gathered = {name: count / batches for name, count in gathers.counts.items()}
        products = computed.counts["product"]
        results.append(Trained(records.records, gathered, products, batches))
    return results


class Records(trainer.TrainerCallback):
    """(loss, gradient norm) of every step."""

    def __init__(self, *at_step: Callable[[], None]) -> None:
        self.records: list[tuple[float, float]] = []
        self.at_step = at_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for call in self.at_step:
            call()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self.records.append((logs["loss"], logs["grad_norm"]))


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
    value = setup.trainer.training_step(setup.model, batch)
    gradients = {n: p.grad.full_tensor().numpy() for n, p in setup.model.named_parameters()}
    samples = [setup.steps.cache[i] for i in batch.samples]
    return {
        "packed_and_alone": difference,
        "loss": float(value),
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


def _small_write(world: World) -> Callable[[Path], None]:
    """Writes what every checkpoint has, of a few bytes, and a kilobyte of each rank."""

    def write(folder: Path) -> None:
        (folder / f"__{world.rank}_0.distcp").write_bytes(bytes([world.rank]) * 1000)
        if world.is_main:
            for name in checkpoint.required_files("fsdp", world.size):
                (folder / name).write_text(name)

    return write


def checkpoints(world: World, run: str) -> list[Any]:
    """Publish two checkpoints of one file per rank; look for the newest, whole and damaged."""
    run_dir = RunDir(run)
    attempt = Attempt(run_dir, 1)
    write = _small_write(world)
    for step in (1, 2):
        checkpoint.publish(attempt, step, write, world, engine="fsdp", data="d", needed_bytes=10)
    manifest = json.loads((run_dir.checkpoint(2) / checkpoint.MANIFEST).read_text())
    found, skipped = checkpoint.find(run_dir, world, engine="fsdp", data="d")
    assert found is not None
    assert skipped == []
    world.barrier()
    if world.is_main:
        (run_dir.checkpoint(2) / checkpoint.MANIFEST).unlink()
        shutil.copytree(run_dir.checkpoint(1), run_dir.checkpoint(7))
    world.barrier()
    older, skipped = checkpoint.find(run_dir, world, engine="fsdp", data="d")
    assert older is not None
    return [found.step, sorted(manifest["files"]), older.step, skipped]


def full_disk(world: World, run: str) -> str:
    """The disk is full on every rank, and the first has cleared away before the others look."""

    def write(folder: Path) -> None:
        if world.is_main:
            shutil.rmtree(folder)
        world.barrier()
        raise OSError(errno.ENOSPC, "No space left on device")

    try:
        attempt = Attempt(RunDir(run), 1)
        checkpoint.publish(attempt, 1, write, world, engine="fsdp", data="d", needed_bytes=10)
    except Exception as error:
        return type(error).__name__
    return "nothing"


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    line = next(line for line in text.splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def measured_memory(world: World, job: Path, *overrides: str) -> dict[str, int]:
    """Load and train two steps without saving; resident bytes at the peak of training above
    those before loading, and the largest micro-batch of any rank."""
    import deepspeed  # noqa: F401 (so that its code is counted before, too)

    before = _status("VmRSS")
    setup = Setup(world, job, *overrides)
    setup.trainer.remove_callback(trainer.Steering)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    setup.trainer.train()
    peak = _status("VmHWM") - before
    batches = [setup.steps[step].micro_batches for step in range(2)]
    mine = [
        max(batch["input_ids"].shape[1] for step in batches for batch in step),
        max(len(batch["targets"]) for step in batches for batch in step),
        max(len(step) for step in batches),
    ]
    setup.close()
    return {
        "bytes": peak, "tokens": mine[0], "supervised": mine[1], "micro_batches": mine[2],
    }  # fmt: skip


def agreement(world: World, job: Path) -> tuple[list[str | None], list[Any]]:
    """How ranks agree: `differences`, `decisions`."""
    return differences(world, job), decisions(world)


def differences(world: World, job: Path) -> list[str | None]:
    """What is said when rank 1 resolves the job alike, has another kernel, or another job."""
    config = load(job)
    plan = plan_of(config, world.size)[0]
    other = dataclasses.replace(plan, attention=Choice("torch_varlen", "installed here only"))
    edited = load(job, ["train.learning_rate=0.5"])
    said: list[str | None] = []
    for its_config, its_plan in ((config, plan), (config, other), (edited, plan)):
        try:
            if world.rank == 1:
                refuse_different_plans(world, its_config, its_plan)
            else:
                refuse_different_plans(world, config, plan)
        except WorkerError as error:
            said.append(str(error))
        else:
            said.append(None)
    return said


def decisions(world: World) -> list[Any]:
    """What every rank is told of what the main one does for all."""
    told: list[Any] = [world.on_main(lambda: world.rank + 7)]

    def refuse() -> None:
        raise ConfigError(["job.yaml:3: wrong"], remedy="mend it")

    def break_down() -> None:
        raise ZeroDivisionError("a bug")

    for work in (refuse, break_down):
        try:
            world.on_main(work)
        except Exception as error:
            mine = not getattr(error, "of_another_rank", False)
            told.append((type(error).__name__, str(error), mine))
    stop = StopRequest()
    if world.rank == 1:
        stop.request("signal SIGUSR1")

    def wait() -> str:
        while not stop.requested():
            time.sleep(0.01)
        return str(stop.reason)

    told.append(world.on_main(wait, stop))
    return told


def stopped_export(world: World, model: Path, target: Path, at: int) -> int:
    """Write a model in files of 20 kB, until asked to stop for the time `at`; how often asked."""
    network = AutoModelForCausalLM.from_pretrained(model)
    asked = 0

    def pause() -> None:
        nonlocal asked
        asked += 1
        if asked == at:
            raise Interrupted("as asked")

    with mock.patch.object(export, "SHARD_BYTES", 20_000), contextlib.suppress(Interrupted):
        export.write(
            Attempt(RunDir(target), 1), network, network.named_parameters(), None, None, world,
            source=model, dtype=torch.bfloat16, pause=pause,
        )  # fmt: skip
    return asked
