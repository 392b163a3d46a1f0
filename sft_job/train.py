"""`sft-job train job.yaml`: fine-tune a model on conversations.

Without RANK or SLURM step variables this process is the launcher: it imports no torch,
prepares the data, starts one worker per GPU and passes signals on. With them it is a worker.
"""

from __future__ import annotations

import atexit
import dataclasses
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING

from sft_job import cli, flops, hardware, workers
from sft_job.attention import KERNELS, Choice
from sft_job.cli import StopRequest
from sft_job.config import load
from sft_job.errors import (
    DiskSpaceError,
    Interrupted,
    WorkerError,
)
from sft_job.facts import read_facts
from sft_job.plan import Plan, plan_of, processes, show
from sft_job.prepared import Prepared, find_prepared
from sft_job.rundir import RunDir, append_line, read_json, read_records, write_atomically
from sft_job.schema import JobConfig
from sft_job.workers import Phases, Place, Workers

if TYPE_CHECKING:
    from sft_job.dataset import Steps
    from sft_job.metrics import Meter, Reporter
    from sft_job.world import World

LOCK, RUNNING = ".lock", "running this job"
# A job that was requeued off a lost node: file servers keep its lock for a lease, 90 s with NFS.
LOST_LOCK_S = 180.0


def main(argv: Sequence[str]) -> int:
    parser = cli.job_parser("train", "Fine-tune a model on conversations, as the job file says.")
    args = parser.parse_intermixed_args(argv)
    place = workers.find_place(os.environ)
    if place is not None:
        return work(args.job, args.overrides, place)
    return launch(args.job, args.overrides, argv)


# --- the launcher ------------------------------------------------------------------------


def launch(job: Path, overrides: Sequence[str], argv: Sequence[str]) -> int:
    """Prepare, start the workers, wait for them; returns the exit code."""
    config = load(job, overrides)
    run_dir = RunDir(config.run.dir)
    run_dir.claim(config, job.read_text(encoding="utf-8"))
    with run_dir.alone(LOCK, RUNNING):
        if run_dir.done.exists():
            print(f"this job is done; its model is in {run_dir.model}")
            return 0
        attempt = run_dir.next_attempt()
        run_dir.logs(attempt).mkdir(parents=True)  # a stop file is for one attempt alone
        run_dir.stop_file(attempt).unlink(missing_ok=True)
        stop = StopRequest(run_dir.stop_file(attempt))
        stop.listen()
        machine = hardware.detect_for_training()  # before an hour of tokenising
        prepare(config, job, overrides, stop)
        stop.file = None  # the workers look for it themselves
        plan, _ = plan_of(config, machine=machine)  # refuses what every worker would
        refuse_small_disk(run_dir, plan)
        run_dir.interrupted.unlink(missing_ok=True)
        crew = Workers(run_dir, attempt, processes(config, machine))
        crew.start(argv)
        crew.wait(stop)
        if run_dir.interrupted.exists():
            raise Interrupted(
                read_json(run_dir.interrupted)["message"],
                where=str(run_dir.path),
                remedy="run the same command again to go on",
            )
        if not run_dir.done.exists():
            raise WorkerError(
                "all workers ended, but the job is not done",
                where=str(run_dir.path),
                remedy=f"look into {run_dir.logs(attempt)}",
            )
    return 0


def prepare(config: JobConfig, job: Path, overrides: Sequence[str], stop: StopRequest) -> None:
    """Make model and token cache ready, in a process of its own and outside any process group.

    Raises:
        SftJobError: whatever `sft-job data encode` refuses (it has said so itself).
        Interrupted: asked to stop meanwhile; nothing half-made is left.
    """
    if find_prepared(config) is not None:
        return
    command = [sys.executable, "-m", "sft_job.data", "encode", str(job), *overrides]
    child = subprocess.Popen(command, start_new_session=True)
    while child.poll() is None:
        if stop:
            child.terminate()
            child.wait()
        time.sleep(workers.POLL_S)
    if child.returncode and stop:  # by us, or by a signal to all processes
        what = f"interrupted by {stop.reason} while preparing the data"
        raise Interrupted(what, remedy="run the same command again")
    if child.returncode:
        raise SystemExit(child.returncode if child.returncode > 0 else 1)


def refuse_small_disk(run_dir: RunDir, plan: Plan) -> None:
    """Training for hours towards a checkpoint that cannot be written helps nobody.

    Raises:
        DiskSpaceError: there is no room for one checkpoint and the model.
    """
    if plan.checkpoint_bytes is None or plan.model_bytes is None:
        return
    needed, free = plan.checkpoint_bytes + plan.model_bytes, shutil.disk_usage(run_dir.path).free
    if free < needed:
        raise DiskSpaceError(
            f"no room: one checkpoint and the model need {needed / 2**30:.2f} GiB, "
            f"{free / 2**30:.2f} GiB are free",
            where=str(run_dir.path),
            remedy="free some space or choose another run.dir; nothing has been started",
        )


# --- a worker ----------------------------------------------------------------------------


def work(job: Path, overrides: Sequence[str], place: Place) -> int:
    """One training process; returns 0 when the job is done or was stopped in good order."""
    # What is imported is never garbage, and looking through it while it grows takes 0.6 s.
    gc.disable()
    # The number of tokens differs from batch to batch; blocks of fixed size would be cut to
    # pieces that fit no later one. Read by torch when it first uses a GPU.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    phases = Phases(workers.began())
    phases.end("launch")
    stop = StopRequest()
    stop.listen()
    launched = workers.LAUNCHED in os.environ
    if launched:
        workers.die_with_parent(int(os.environ[workers.LAUNCHED]))
    config = load(job, overrides)
    run_dir = RunDir(config.run.dir)
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    attempt = int(os.environ.get(workers.ATTEMPT) or restarts + 1)
    watched = workers.ATTEMPT in os.environ  # by a launcher or a job script
    stop.file = run_dir.stop_file(attempt)
    try:
        with ExitStack() as held:
            if not launched:
                if watched:
                    run_dir.ready(attempt, place.rank).touch()
                if place.rank == 0:
                    run_dir.claim(config, job.read_text(encoding="utf-8"))
                    patience = LOST_LOCK_S if watched else 0
                    held.enter_context(run_dir.alone(LOCK, RUNNING, patience_s=patience))
                if run_dir.done.exists():
                    return 0
                number = attempt if watched else None
                _prepare_without_launcher(config, job, overrides, place, run_dir, stop, number)
            train(config, run_dir, place, stop, attempt, phases, launched=launched)
    except Interrupted:
        pass  # the marker is written; whoever started us turns it into 75
    except BaseException as error:
        if not watched:
            raise
        code = 1
        try:
            code = workers.report_failure(run_dir, attempt, place.rank, error)
        finally:
            # The other ranks may be waiting for this one in a collective, and so would an orderly
            # exit; the launcher ends them.
            os._exit(code)
    if watched:
        # Everything is on disk. Taking the interpreter and torch apart takes a second or more;
        # the loggers' own exit functions are called.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(0)
    gc.unfreeze()  # else libraries complain at the exit that their objects were forgotten
    return 0


def _prepare_without_launcher(
    config: JobConfig,
    job: Path,
    overrides: Sequence[str],
    place: Place,
    run_dir: RunDir,
    stop: StopRequest,
    attempt: int | None,
) -> None:
    """Under torchrun or srun: rank 0 prepares, the others look for the result. `attempt`
    is the job script's, which has taken the marker of an earlier one away; else None."""
    if place.rank == 0:
        run_dir.interrupted.unlink(missing_ok=True)
        try:
            prepare(config, job, overrides, stop)
        except Interrupted as error:
            write_atomically(run_dir.interrupted, json.dumps({"message": error.what}) + "\n")
            raise
        except SystemExit as error:  # said already, in the log of this rank
            said = run_dir.log(attempt, 0).read_text(errors="replace") if attempt else ""
            raise WorkerError(
                "the data could not be prepared" + "\n".join(said.rpartition("error: ")[1:])
            ) from error
    while find_prepared(config) is None:
        # Under a job script rank 0 alone decides, so that nobody waits for one that has left.
        if run_dir.interrupted.exists() if attempt else stop:
            raise Interrupted(f"interrupted by {stop.reason} while the data is prepared")
        time.sleep(0.5)


def train(
    config: JobConfig,
    run_dir: RunDir,
    place: Place,
    stop: StopRequest,
    attempt: int,
    phases: Phases,
    *,
    launched: bool,
) -> None:
    """Parse -> world -> plan -> data -> model -> engine -> train -> export -> close.

    Raises:
        Interrupted: asked to stop; everything is saved and the marker is written.
    """
    if not config.run.online:
        os.environ["HF_HUB_OFFLINE"] = "1"
    from sft_job import world as worlds

    machine = hardware.detect_for_training()
    terminal: IO[str] = sys.stdout
    if launched and place.rank == 0:
        from sft_job.metrics import take_terminal

        terminal = take_terminal()
    world = worlds.join(place, machine)
    try:
        phases.end("torch and process group")
        plan, prepared = plan_of(config, world.size, machine)
        if prepared is None:
            raise WorkerError("the prepared data has vanished", where=str(config.cache_dir))
        refuse_different_plans(world, config, plan)
        reporter = _reporter(world, run_dir, terminal, attempt, launched=launched)
        if world.is_main:
            write_atomically(run_dir.plan_file, _as_json(plan))
        reporter.say(show(plan))
        _stop_if_asked(world, stop, run_dir, "before the model was loaded")
        try:
            _train_and_export(
                config, plan, prepared, world, run_dir, stop, reporter, attempt, phases
            )
        finally:
            reporter.stop()
    finally:
        if sys.exc_info()[0] is None or sys.exc_info()[0] is Interrupted:
            worlds.leave()  # after an error the others cannot take part in leaving


def _train_and_export(
    config: JobConfig,
    plan: Plan,
    prepared: Prepared,
    world: World,
    run_dir: RunDir,
    stop: StopRequest,
    reporter: Reporter,
    attempt: int,
    phases: Phases,
) -> None:
    if config.engine.type == "zero3":
        from sft_job import zero3 as engine_module

        engine_module.prepare_environment(world.device)
    import torch

    from sft_job import checkpoint, dataset, export, fsdp, trainer, zero3
    from sft_job.model import DTYPES
    from sft_job.tokenizer import load_tokenizer

    gc.freeze()
    gc.enable()
    phases.end("imports")
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    folder, trust = Path(prepared.model_folder), config.model.trust_remote_code
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run_dir.tensorboard))
    arguments = trainer.training_arguments(config, plan, run_dir, world)
    found, skipped = checkpoint.find(
        run_dir, world, engine=config.engine.type, data=prepared.stats.fingerprint
    )
    for line in skipped:
        reporter.say(line)

    steps = _steps(config, plan, prepared, world)
    engine = zero3 if config.engine.type == "zero3" else fsdp
    phases.end("data")
    model = engine.load(folder, plan, world, trust_remote_code=trust)
    phases.end("weights")
    sft = trainer.SftTrainer(
        model,
        arguments,
        config=config,
        plan=plan,
        steps=steps,
        world=world,
        run_dir=run_dir,
        stop=stop,
        reporter=reporter,
        meter=_meter(run_dir, plan, folder, found.step if found else 0, attempt, phases, world),
        started=_started(run_dir, phases, reporter, attempt),
        attempt=attempt,
        prepared_model=folder,
    )
    _stop_if_asked(world, stop, run_dir, "before the first step")
    if found is not None:
        sft.last_saved = found.step
        reporter.say(f"resuming after step {found.step} from {found.folder}")
    reporter.start(found.step if found else 0, plan.steps or 0)
    sft.train(resume_from_checkpoint=str(found.folder) if found else None)
    reporter.stop()
    _stop_if_asked(world, stop, run_dir, f"after step {sft.state.global_step}")
    reporter.say(f"writing the model to {run_dir.model}")
    zero3.forget_settings()
    tokenizer = load_tokenizer(folder, trust)
    export.write(
        run_dir.model,
        model,
        trainer.full_parameters(config)(model),
        tokenizer,
        dataset.encoder_of(config, tokenizer),
        world,
        source=folder,
        dtype=DTYPES[plan.precision.value],
        trust_remote_code=trust,
        pause=lambda: _stop_if_asked(world, stop, run_dir, "while the model was written"),
    )
    if world.is_main:
        record = {"step": sft.state.global_step, "attempt": attempt, "time": time.time()}
        write_atomically(run_dir.done, json.dumps(record) + "\n")
    world.barrier()
    reporter.say(f"done: sft-job chat {run_dir.path}")


def _steps(config: JobConfig, plan: Plan, prepared: Prepared, world: World) -> Steps:
    """This rank's share of the data."""
    from sft_job import dataset
    from sft_job.plan import schedule_of
    from sft_job.tokenizer import load_tokenizer

    folder, encoder = Path(prepared.data_folder), None
    lazy = config.data.preprocess == "lazy"
    if lazy:  # else there is nothing to tokenise before the export, and this takes a second
        trust = config.model.trust_remote_code
        encoder = dataset.encoder_of(config, load_tokenizer(Path(prepared.model_folder), trust))
    return dataset.Steps(
        dataset.TextCache(folder) if lazy else dataset.TokenCache(folder),
        schedule_of(config, prepared.stats),
        rank=world.rank,
        world_size=world.size,
        micro_batch_tokens=plan.micro_batch_tokens,
        attention_scale=plan.attention_scale,
        one_sample_each=not KERNELS[plan.attention.value].packs,
        encoder=encoder,
        group=world.group,
    )


def _started(
    run_dir: RunDir, phases: Phases, reporter: Reporter, attempt: int
) -> Callable[[str], None]:
    """Takes the time of the parts of the start that the trainer sees; tells after the last."""

    def started(phase: str) -> None:
        if phase in phases.seconds:
            return
        phases.end(phase)
        if phase == "first step":
            reporter.say(f"started in {phases}")
            reporter.append(run_dir.attempts_file, {"attempt": attempt, "start": phases.seconds})

    return started


def _meter(
    run_dir: RunDir,
    plan: Plan,
    folder: Path,
    done: int,
    attempt: int,
    phases: Phases,
    world: World,
) -> Meter:
    """Counts from the first attempt on; this one is entered."""
    from sft_job.metrics import Meter, useful_seconds

    facts, entry = read_facts(folder), {"attempt": attempt, "began": phases.began}
    if world.is_main:
        append_line(run_dir.attempts_file, json.dumps(entry))
    world.barrier()
    attempts = read_records(run_dir.attempts_file)
    return Meter(
        operations=lambda work: flops.needed(facts, work),
        peak_flops=plan.peak_flops,
        useful_before=useful_seconds(read_records(run_dir.metrics_file), done),
        began=min(entry["began"] for entry in attempts if "began" in entry),
    )


# What all ranks must have decided alike.
DECIDED = (
    "engine", "precision", "attention", "cross_entropy", "rope_factor", "micro_batch_tokens",
    "activation_checkpointing", "saved_products", "steps",
)  # fmt: skip


def refuse_different_plans(world: World, config: JobConfig, plan: Plan) -> None:
    """Ranks that do different things wait for each other for ever, or train something else.

    Raises:
        WorkerError: the first difference, with the machines: another package, GPU or job file.
    """
    mine = {"the job": config.model_dump_json()}
    for name in DECIDED:
        value = getattr(plan, name)
        mine[name] = value.value if isinstance(value, Choice) else value
    (host, first), *others = world.gather((socket.gethostname(), mine))
    for rank, (other_host, other) in enumerate(others, 1):
        for name, value in first.items():
            if other[name] != value:
                raise WorkerError(
                    f"the ranks resolve the job differently: {name} is {value!r} on rank 0 "
                    f"({host}) and {other[name]!r} on rank {rank} ({other_host})",
                    remedy="use machines of one kind with the same installation, "
                    "and leave the job file alone while it starts",
                )


def _stop_if_asked(world: World, stop: StopRequest, run_dir: RunDir, when: str) -> None:
    """Leave in good order if any rank was asked to stop."""
    if not world.any(bool(stop)):
        return
    reason = next(filter(None, world.gather(stop.reason)), "request")
    message = f"interrupted by {reason} {when}"
    if world.is_main:
        write_atomically(run_dir.interrupted, json.dumps({"message": message}) + "\n")
    world.barrier()
    raise Interrupted(message)


def _reporter(
    world: World, run_dir: RunDir, terminal: IO[str], attempt: int, *, launched: bool
) -> Reporter:
    from sft_job.metrics import Reporter, Silence

    if not world.is_main:
        return Silence()
    log = run_dir.log(attempt, 0) if launched else None
    return Reporter(terminal, log, run_dir.metrics_file)


def _as_json(plan: Plan) -> str:
    return json.dumps(dataclasses.asdict(plan), indent=2) + "\n"


if __name__ == "__main__":
    sys.exit(cli.run(main))
