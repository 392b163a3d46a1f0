"""One training process, from its first line to its last; `train.py` calls it on every rank."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from sft_job import flops, hardware, identity, launcher, result, start, workers
from sft_job.attempt import STARTS, Attempt, metric_records, refresh, start_records
from sft_job.attention import KERNELS, Choice
from sft_job.cli import StopRequest
from sft_job.config import load
from sft_job.errors import CheckpointError, Interrupted, SftJobError, WorkerError
from sft_job.facts import read_facts
from sft_job.files import make_folder, translated, write_atomically
from sft_job.place import disregard_others, refuse_another_size
from sft_job.plan import Plan, plan_of, show
from sft_job.prepared import Prepared, forget
from sft_job.rundir import RunDir
from sft_job.schema import JobConfig
from sft_job.workers import Phases, Place

# A job that was requeued off a lost node: file servers keep its lock for a lease, 90 s with NFS.
LOST_LOCK_S = 180.0


def work(job: Path, overrides: Sequence[str], place: Place) -> int:
    """One training process; returns 0 when the job is done, or was stopped in good order and
    who started this process knows."""
    disregard_others(os.environ)
    # What is imported is never garbage, and looking through it while it grows takes 0.6 s.
    gc.disable()
    workers.say_warnings_once()
    phases = Phases(workers.began())
    phases.end("launch")
    stop = StopRequest()
    stop.listen()
    launched = workers.LAUNCHED in os.environ
    if launched:
        launcher.die_with_parent(int(os.environ[workers.LAUNCHED]))
        os.set_inheritable(int(os.environ[launcher.REPORT_TO]), False)
    config = load(job, overrides)
    refuse_another_size(place, config, os.environ)
    run_dir = RunDir(config.run.dir)
    # A launcher or a job script has claimed an attempt, and watches it.
    number = int(os.environ[workers.ATTEMPT]) if workers.ATTEMPT in os.environ else None
    try:
        try:
            if number is not None:
                stop.file = run_dir.stop_file(number)
                run_dir.ready(number, place.rank).touch()
            rank = Rank(config, job, overrides, place, stop, phases, number, launched=launched)
            rank.run()
        except Interrupted as error:
            if number is None:
                return _stopped_without_launcher(error, place)
            if place.rank == 0 and run_dir.interruption(number) is None:
                Attempt(run_dir, number).interrupt(error.what)
    except BaseException as error:
        if number is None:
            raise
        code = 1
        try:
            code = launcher.report_failure(run_dir, number, place.rank, _explained(error))
        finally:
            # The other ranks may be waiting for this one in a collective, and so would an orderly
            # exit; the launcher ends them.
            os._exit(code)
    if number is not None:
        # Everything is on disk. Taking the interpreter and torch apart takes a second or more;
        # the loggers' own exit functions are called.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(0)
    gc.unfreeze()  # else libraries complain at the exit that their objects were forgotten
    return 0


def _explained(error: BaseException) -> BaseException:
    """What the system refused, in the user's terms, however deep it is."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(error, SftJobError):
        if isinstance(seen, OSError) and (known := translated(seen)) is not None:
            known.__cause__ = error
            return known
        seen = seen.__cause__ or seen.__context__
    return error


def _stopped_without_launcher(error: Interrupted, place: Place) -> int:
    """torchrun takes any other code than 0 for a failure, and would start the ranks again."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return error.exit_code
    if place.rank == 0:
        print(
            f"{error.what}; run the same command again to go on (torchrun cannot end with "
            f"{error.exit_code}: the mark is attempts/N/interrupted in the run directory)"
        )
    return 0


class Rank:
    """One rank of a job: what it has, in the order in which it gets it."""

    def __init__(
        self,
        config: JobConfig,
        job: Path,
        overrides: Sequence[str],
        place: Place,
        stop: StopRequest,
        phases: Phases,
        number: int | None,
        *,
        launched: bool,
    ) -> None:
        """
        Args:
            number: of the attempt, where a launcher or a job script has claimed one.
            launched: by our own launcher, which has made everything ready.
        """
        self.config, self.job, self.overrides = config, job, overrides
        self.place, self.stop, self.phases = place, stop, phases
        self.number, self.launched = number, launched
        self.run_dir = RunDir(config.run.dir)
        self.terminal: IO[str] = sys.stdout

    def run(self) -> None:
        """Group -> claim -> prepared data -> plan -> train -> export -> close.

        Raises:
            Interrupted: asked to stop; everything is saved and the mark is left.
        """
        os.environ.update(workers.own_environment(self.config, os.environ))
        from sft_job import world as worlds

        self.machine = hardware.detect_for_training()
        if self.launched and self.place.rank == 0:
            from sft_job.metrics import take_terminal

            self.terminal = take_terminal()
        scripted = self.number is not None and not self.launched
        self.world = worlds.join(
            self.place,
            self.machine,
            self.config.run,
            stop=self.stop,
            name=f"{self.run_dir.path}/{self.number}",
            published=self.run_dir.rendezvous(self.number or 0) if scripted else None,
        )
        self.phases.end("torch and process group")
        with ExitStack() as held:
            try:
                if self._begin(held):
                    self._train()
            finally:
                if sys.exc_info()[0] is None or sys.exc_info()[0] is Interrupted:
                    worlds.leave()  # after an error the others cannot take part in leaving

    def _begin(self, held: ExitStack) -> bool:
        """Everything that one process decides for all; returns whether there is anything to do."""

        def on_main() -> int | None:
            if self.launched:
                return self.number
            there_is_work = start.enter(
                held,
                self.config,
                self.job,
                self.overrides,
                self.machine,
                self.stop,
                world_size=self.world.size,
                patience_s=LOST_LOCK_S if self.number is not None else 0,
            )
            if not there_is_work:
                return None
            return self.number or Attempt.claim(self.run_dir).number

        number = self.world.on_main(on_main, self.stop)
        if number is None:
            return False
        self.attempt = Attempt(self.run_dir, number)
        self.stop.file = self.run_dir.stop_file(number)
        if self.world.is_main:
            make_folder(self.run_dir.logs(number))
        self.world.barrier()
        return True

    def _train(self) -> None:
        self.reporter = _reporter(self)
        try:
            if self.world.is_main:
                self.attempt.refuse_if_superseded()
                result.clear_left_over(self.attempt)
            prepared = self._intact()
            plan, _ = plan_of(self.config, self.world.size, self.machine)
            refuse_different_plans(self.world, self.config, plan)
            if self.world.is_main:
                write_atomically(self.run_dir.plan_file, _as_json(plan))
            self.reporter.say(show(plan))
            self.stop_if_asked("before the model was loaded")
            _train_and_export(self, plan, prepared)
        finally:
            self.reporter.stop()

    def _intact(self) -> Prepared:
        """Model and data as they were made ready: all ranks together look at every byte.

        Raises:
            SftJobError: they are damaged, and cannot be made anew.
        """
        prepared = start.wait_until_seen(self.config, self.config.run.start_timeout_s)
        damage = self._damage(prepared)
        if damage is None:
            return prepared
        self.reporter.say(f"note: {damage}; made anew")

        def again() -> None:
            forget(self.config)
            start.prepare(self.config, self.job, self.overrides, self.stop)
            ready = start.wait_until_seen(self.config, self.config.run.start_timeout_s)
            identity.refuse_changed_content(self.run_dir, self.config, ready)

        self.world.on_main(again, self.stop)
        prepared = start.wait_until_seen(self.config, self.config.run.start_timeout_s)
        damage = self._damage(prepared)
        if damage is not None:
            raise WorkerError(
                f"{damage}, though it was made anew just now", remedy="have the disk checked"
            )
        return prepared

    def _damage(self, prepared: Prepared) -> str | None:
        found = self.world.gather(prepared.fault(self.world.rank, self.world.size))
        faults = [fault for fault in found if fault is not None]
        return f"{faults[0][0]} is damaged ({faults[0][1]})" if faults else None

    def stop_if_asked(self, when: str) -> None:
        """Leave in good order if any rank was asked to stop."""
        if not self.world.any(self.stop.requested()):
            return
        reason = next(filter(None, self.world.gather(self.stop.reason)), "request")
        message = f"interrupted by {reason} {when}"
        if self.world.is_main:
            self.attempt.interrupt(message)
        self.world.barrier()
        raise Interrupted(message)


def _train_and_export(rank: Rank, plan: Plan, prepared: Prepared) -> None:
    config, world, attempt = rank.config, rank.world, rank.attempt
    if config.engine.type == "zero3":
        from sft_job import zero3 as engine_module

        engine_module.prepare_environment(world.device)
    import torch

    from sft_job import checkpoint, dataset, export, fsdp, trainer, zero3
    from sft_job.model import DTYPES
    from sft_job.tokenizer import load_tokenizer

    gc.freeze()
    gc.enable()
    rank.phases.end("imports")
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True)
    folder, trust = Path(prepared.model_folder), config.model.trust_remote_code
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(rank.run_dir.tensorboard))
    arguments = trainer.training_arguments(config, plan, rank.run_dir, world)
    found, skipped = checkpoint.find(
        rank.run_dir,
        world,
        engine=config.engine.type,
        data=prepared.stats.fingerprint,
        weights=identity.weights(prepared),
    )
    for line in skipped:
        rank.reporter.say(line)
    done = found.step if found else 0

    steps = _steps(rank, plan, prepared)
    engine = zero3 if config.engine.type == "zero3" else fsdp
    rank.phases.end("data")
    model = engine.load(folder, plan, world, trust_remote_code=trust)
    rank.phases.end("weights")
    sft = trainer.SftTrainer(
        model,
        arguments,
        config=config,
        plan=plan,
        steps=steps,
        world=world,
        attempt=attempt,
        stop=rank.stop,
        reporter=rank.reporter,
        meter=_meter(rank, plan, folder, done),
        started=_started(rank),
        prepared=prepared,
    )
    rank.stop_if_asked("before the first step")
    if found is not None:
        sft.last_saved = found.step
        rank.reporter.say(f"resuming after step {found.step} from {found.folder}")
    rank.reporter.start(done, plan.steps or 0)
    _run_trainer(sft, attempt, found)
    rank.reporter.stop()
    rank.stop_if_asked(f"after step {sft.state.global_step}")
    rank.reporter.say(f"writing the model to {rank.run_dir.model}")
    zero3.forget_settings()
    tokenizer = load_tokenizer(folder, trust)
    written = export.write(
        attempt,
        model,
        trainer.full_parameters(config)(model),
        tokenizer,
        dataset.encoder_of(config, tokenizer),
        world,
        source=folder,
        dtype=DTYPES[plan.precision.value],
        trust_remote_code=trust,
        needed_bytes=plan.model_bytes,
        pause=lambda: rank.stop_if_asked("while the model was written"),
    )
    world.on_main(lambda: result.mark_done(attempt, sft.state.global_step, written))
    rank.reporter.say(f"done: sft-job chat {rank.run_dir.path}")


def _run_trainer(sft: Any, attempt: Attempt, found: Any) -> None:
    """Train; a checkpoint that verifies and cannot be loaded is left out by the next attempt.

    Raises:
        CheckpointError: it could not be loaded; the mark is left.
    """
    import torch

    from sft_job import checkpoint

    sft.loading = found is not None
    try:
        sft.train(resume_from_checkpoint=str(found.folder) if found else None)
    except (SftJobError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a damaged pickle raises anything, torch its own BaseException
        if not sft.loading or not checkpoint.is_blamed_by(error):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        with contextlib.suppress(OSError):
            attempt.cannot_load(found.step, reason, checkpoint.identity(found.folder))
        raise CheckpointError(
            f"the checkpoint of step {found.step} cannot be loaded: {reason}",
            where=str(found.folder),
            remedy="the next attempt goes on from the one before",
        ) from error


def _steps(rank: Rank, plan: Plan, prepared: Prepared) -> Any:
    """This rank's share of the data (`dataset.Steps`)."""
    from sft_job import dataset
    from sft_job.plan import schedule_of
    from sft_job.tokenizer import load_tokenizer

    config, folder, encoder = rank.config, Path(prepared.data_folder), None
    lazy = config.data.preprocess == "lazy"
    if lazy:  # else there is nothing to tokenise before the export, and this takes a second
        trust = config.model.trust_remote_code
        encoder = dataset.encoder_of(config, load_tokenizer(Path(prepared.model_folder), trust))
    return dataset.Steps(
        dataset.TextCache(folder) if lazy else dataset.TokenCache(folder),
        schedule_of(config, prepared.stats),
        rank=rank.world.rank,
        world_size=rank.world.size,
        micro_batch_tokens=plan.micro_batch_tokens,
        attention_scale=plan.attention_scale,
        one_sample_each=not KERNELS[plan.attention.value].packs,
        encoder=encoder,
        group=rank.world.group,
    )


def _started(rank: Rank) -> Callable[[str], None]:
    """Takes the time of the parts of the start that the trainer sees; tells after the last."""
    phases = rank.phases

    def started(phase: str) -> None:
        if phase in phases.seconds:
            return
        phases.end(phase)
        if phase == "first step":
            rank.reporter.say(f"started in {phases}")
            rank.reporter.append(STARTS, {"start": phases.seconds})

    return started


def _meter(rank: Rank, plan: Plan, folder: Path, done: int) -> Any:
    """Counts from the first attempt on; this one is entered (`metrics.Meter`).

    Args:
        done: steps in the checkpoint that is resumed.
    """
    from sft_job.metrics import Meter, useful_seconds

    run_dir, began = rank.run_dir, rank.phases.began
    if rank.world.is_main:
        rank.reporter.append(STARTS, {"began": began, "resumed": done})
        with contextlib.suppress(OSError):  # for people; the disk may be full
            refresh(run_dir)
    rank.world.barrier()
    facts = read_facts(folder)
    starts = [
        entry["began"]
        for entry in start_records(run_dir)
        if isinstance(entry.get("began"), int | float) and 0 < entry["began"] <= began
    ]
    return Meter(
        operations=lambda work: flops.needed(facts, work),
        peak_flops=plan.peak_flops,
        useful_before=useful_seconds(metric_records(run_dir), done),
        began=min(starts, default=began),
    )


# What all ranks must have decided alike.
DECIDED = (
    "engine", "precision", "attention", "cross_entropy", "rope_factor", "micro_batch_tokens",
    "activation_checkpointing", "saved_products", "steps",
)  # fmt: skip


def refuse_different_plans(world: Any, config: JobConfig, plan: Plan) -> None:
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


def _reporter(rank: Rank) -> Any:
    """`metrics.Reporter` on the main rank."""
    from sft_job.metrics import Reporter, Silence

    if not rank.world.is_main:
        return Silence()
    log = rank.run_dir.log(rank.attempt.number, 0) if rank.launched else None
    return Reporter(rank.terminal, log, rank.attempt.append)


def _as_json(plan: Plan) -> str:
    return json.dumps(dataclasses.asdict(plan), indent=2) + "\n"
