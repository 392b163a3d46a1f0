"""`sft-job submit`: a job file is checked, put into a SLURM queue, and followed.

    sft-job submit job.yaml [key=value ...] [--via sbatch | submitit] [--dry-run] [--wait]
    sft-job submit status RUN_DIR        where the job is
    sft-job submit logs RUN_DIR [-f]     its output
    sft-job submit cancel RUN_DIR        save a checkpoint, then end

Runs on a login node: no torch, no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sft_job import __version__, choices, cli, enqueue, follow, images, jobscript, preflight, slurm
from sft_job.config import load, stored
from sft_job.conversations import read_trainable
from sft_job.errors import (
    ConfigError,
    DataError,
    FaultList,
    RunDirError,
    SftJobError,
    SubmitError,
    WorkerError,
)
from sft_job.files import write_atomically
from sft_job.modelfiles import has_safetensors, weight_files
from sft_job.plan import Plan, gib, plan_for
from sft_job.prepared import (
    BUNDLED,
    find_prepared,
    hub_revision,
    hub_snapshot,
    model_facts,
)
from sft_job.rundir import RunDir
from sft_job.schema import Apptainer, JobConfig

# Kinds of file system that belong to one machine alone.
LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "ramfs", "overlay"}


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] in follow.COMMANDS:
        return follow.main(argv)
    parser = cli.job_parser("submit", "Check a job and put it into a SLURM queue.")
    parser.epilog = f"Then: sft-job submit {{{','.join(follow.COMMANDS)}}} RUN_DIR"
    parser.add_argument("--via", choices=["sbatch", "submitit"], default="sbatch")
    parser.add_argument(
        "--cluster", choices=["slurm", "local"], default="slurm",
        help="local: with --via submitit, run on this machine, to try",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="check and print, submit nothing")
    parser.add_argument("--wait", action="store_true", help="return when the job has ended")
    parser.add_argument("--after", metavar="JOBID", help="start when that job has ended")
    parser.add_argument("--fetch", action="store_true", help="fetch the model, encode the data")
    args = parser.parse_intermixed_args(argv)
    if args.cluster == "local" and args.via != "submitit":
        parser.error("--cluster local goes with --via submitit")
    return submit(args)


def submit(args: argparse.Namespace) -> int:
    """Check -> claim -> write the script -> queue."""
    config = load(args.job, args.overrides)
    try:
        run_dir = _submit(args, config)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RunDirError(
            f"cannot be used: {error.strerror or error}",
            where=str(error.filename or config.run.dir),
            remedy="see that this user may read and write there, and that there is room; "
            "or choose another run.dir",
        ) from error
    return follow.wait(run_dir) if args.wait and run_dir else 0


def _submit(args: argparse.Namespace, config: JobConfig) -> RunDir | None:
    """Returns the run directory of what was submitted."""
    notes: list[str] = []
    if config.slurm is not None:
        section, notes = slurm.with_site_defaults(config.slurm, os.environ)
        config = config.model_copy(update={"slurm": section})
    if args.fetch:
        fetch(config)
    if revision := hub_revision(config):
        pinned = config.model.model_copy(update={"revision": revision})
        config = config.model_copy(update={"model": pinned})
    run_dir = RunDir(config.run.dir)
    way = enqueue.Way(args.via, args.cluster, args.after)
    plan, lines = check(config, way)
    text = script_of(config, plan)
    for line in [*(f"{'slurm':<10} {note}" for note in notes), *lines]:
        print(line)
    if args.dry_run:
        print(f"\n--- {run_dir.script}\n{text}")
        return None
    run_dir.claim(config, args.job.read_text(encoding="utf-8"))
    with run_dir.exclusive_lock(".submit", "submitting this job"):
        enqueue.refuse_second(config, run_dir, way)  # another may have come first meanwhile
        # What runs is job.json: overrides applied, paths absolute, the model's commit fixed.
        write_atomically(run_dir.job_file, stored(config))
        write_atomically(run_dir.script, text)
        run_dir.cancelled.unlink(missing_ok=True)
        for path in jobscript.bound(config, os.environ).writable:
            Path(path).mkdir(parents=True, exist_ok=True)
        job = enqueue.enqueue(config, run_dir, way, _grace_of(config, plan))
    print(f"submitted: job {job}\n  sft-job submit status {shlex.quote(str(run_dir.path))}")
    return run_dir


def _grace_of(config: JobConfig, plan: Plan | None) -> int:
    return jobscript.grace_s(config, plan.checkpoint_bytes if plan else None)


def script_of(config: JobConfig, plan: Plan | None) -> str:
    return jobscript.script(config, sys.executable, _grace_of(config, plan), os.environ)


# --- checks ------------------------------------------------------------------------------


def check(config: JobConfig, way: enqueue.Way) -> tuple[Plan | None, list[str]]:
    """Everything that can be known before the job waits in a queue.

    Returns:
        The plan for the GPU that is named, and a line for everything that was looked at.

    Raises:
        SubmitError: all reasons not to submit, at once.
    """
    faults: list[str] = []
    lines: list[str] = []

    def look(what: str, checked: Callable[[], Iterator[str]]) -> None:
        try:
            lines.extend(f"{what:<10} {line}" for line in checked())
        except FaultList as error:
            faults.extend(error.faults)
        except SftJobError as error:
            faults.append(str(error))
        except OSError as error:  # of a file or folder that the job needs
            where = error.filename or config.run.dir
            faults.append(f"{what}: {where}: {error.strerror or error}: choose a place that this "
                          "user may use")  # fmt: skip

    plan: Plan | None = None

    def planned() -> Iterator[str]:
        nonlocal plan
        plan = yield from _plan(config)

    look("script", lambda: _script(config))
    look("run.dir", lambda: _run_dir(config, way))
    look("data", lambda: _data(config))
    look("model", lambda: _model(config))
    look("container", lambda: _container(config))
    look("report_to", lambda: iter(preflight.check(config)))
    look("plan", planned)
    look("disk", lambda: _disk(config, plan))
    if way.cluster == "slurm":
        look("cluster", lambda: _cluster(config))
    if faults:
        raise SubmitError(list(dict.fromkeys(faults)))
    return plan, lines


def _grace(config: JobConfig, grace: int) -> Iterator[str]:
    assert config.slurm is not None
    limit = 60 * config.slurm.time_min
    if grace >= limit:
        raise SubmitError(
            [f"slurm.time_min: of {limit} s, {grace} s are kept for saving, and nothing would be "
             f"trained; {2 * grace // 60 + 1} minutes or more are needed"]
        )  # fmt: skip
    if 2 * grace > limit:
        yield f"of {limit} s an attempt, {grace} s are kept for saving; set slurm.time_min higher"


def _existing(path: Path) -> Path:
    """The path, or what of it is there already."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _script(config: JobConfig) -> Iterator[str]:
    """Refuses what no script can carry, and a time limit in which nothing is trained."""
    lines = script_of(config, None).count("\n")
    yield f"{RunDir(config.run.dir).script}, {lines} lines"
    assert config.slurm is not None  # refused above
    if config.slurm.grace_s is not None:
        yield from _grace(config, config.slurm.grace_s)


def _run_dir(config: JobConfig, way: enqueue.Way) -> Iterator[str]:
    run_dir = RunDir(config.run.dir)
    for key, path in (("data.cache_dir", config.cache_dir), ("run.dir", run_dir.path)):
        folder = _existing(path)
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise RunDirError(
                "cannot be written to", where=str(folder), remedy=f"choose another {key}"
            )
    if run_dir.done.exists():
        raise RunDirError(
            "this job is done", where=str(run_dir.path), remedy="choose another run.dir"
        )
    enqueue.refuse_second(config, run_dir, way)
    run_dir.refuse_foreign(config)
    kind = _file_system(folder)
    local = ": is it on all nodes? they are asked before the job begins" if kind in LOCAL else ""
    yield f"{run_dir.path} ({kind}{local})"


def _file_system(folder: Path) -> str:
    """Type of the file system that holds a folder, as /proc/self/mountinfo has it."""
    folder = folder.resolve()
    best, kind = -1, "unknown"
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        left, _, right = line.partition(" - ")
        mount = left.split()[4].encode().decode("unicode_escape")
        if folder.is_relative_to(mount) and len(mount) >= best:
            best, kind = len(mount), right.split()[0]
    return kind


def _data(config: JobConfig) -> Iterator[str]:
    prepared = find_prepared(config)
    if prepared is not None:
        yield f"{prepared.stats.samples:,} samples, encoded: {prepared.data_folder}"
        return
    for file in config.data.files():
        if not os.access(file, os.R_OK):
            raise DataError([f"{file}: cannot be read by this user"])
    kept = read_trainable(config.data.files()).conversations
    yield (
        f"{len(kept):,} conversations, not encoded yet: the job does it when it starts, with all "
        "its GPUs waiting; `sft-job data encode` or --fetch does it before"
    )


def _model(config: JobConfig) -> Iterator[str]:
    path = config.model.path
    prepared = find_prepared(config)
    facts = model_facts(config, prepared)  # raises where a folder is not a whole model
    if facts is not None:
        yield from choices.check_model(config, facts, prepared.stats if prepared else None)
    if prepared is not None:
        yield f"{path}, ready"
        return
    if path.startswith("bundled:"):
        requirement, package, _ = BUNDLED[path]
        if config.container is None and importlib.util.find_spec(package):
            yield f"{path}, in {requirement}"
            return
        absent = f"{requirement}, which is not {'in the container' if config.container else 'here'}"
        remedy = "`sft-job data encode` where it is installed makes the model ready"
        raise SubmitError([f"model.path: {path} comes in the Python package {absent}; {remedy}"])
    if Path(path).is_absolute():
        has_safetensors(Path(path))
        yield f"{path}, {facts.parameters or 0:,} parameters" if facts else path
        return
    folder = hub_snapshot(config)
    files = weight_files(folder) if folder else []
    if files and all(file.is_file() for file in files):
        yield f"{path} at {hub_revision(config)}"
    elif config.run.online:
        yield f"{path}, fetched by the job (run.online)"
    else:
        state = (
            f"is incomplete in the hub cache ({folder})" if folder else "is not in the hub cache"
        )
        offline = "and compute nodes are offline; fetch it here with --fetch"
        raise SubmitError([f"model.path: {path} {state}, {offline}"])


def _container(config: JobConfig) -> Iterator[str]:
    container = config.container
    if container is None:
        yield f"none: {sys.executable}"
        return
    version = "version not checked: it is not a SIF file of this machine"
    if isinstance(container, Apptainer) and "://" not in container.image:
        image = Path(container.image)
        if not os.access(image, os.R_OK):
            raise SubmitError(
                [f"container.image: no such file, or not readable: {container.image}"]
            )
        if image.is_file():
            with open(image, "rb") as file:
                # A line for the shell, then this (Singularity image format).
                if b"SIF_MAGIC" not in file.read(64):
                    raise SubmitError([f"container.image: not a SIF file: {container.image}"])
        version = _image_version(image)
    for path in container.bind:
        if not os.path.exists(path):
            raise SubmitError([f"container.bind: not there: {path}"])
    yield f"{container.type}: {container.image}, {version}"


def _image_version(image: Path) -> str:
    """What is known of the sft_job in an Apptainer image.

    Raises:
        SubmitError: it is not the version that makes this job's files.
    """
    labels = images.labels(image)
    if isinstance(labels, str):
        return f"version not checked: {labels}"
    version = labels.get(images.VERSION_LABEL)
    if version is None:
        return f"version not checked: it has no label {images.VERSION_LABEL}"
    if version != __version__:
        raise SubmitError(
            [f"container.image: {image} brings sft_job {version}, this is {__version__}: "
             "install that version here, or take the image of this one"]
        )  # fmt: skip
    return f"sft_job {version}"


def _plan(config: JobConfig) -> Any:
    """Yields lines; returns the plan for the GPU that is named."""
    if config.slurm is None or config.slurm.gpu is None or not config.slurm.gpus_per_node:
        yield "not checked: slurm.gpu does not say on which GPU"
        return None
    count = config.slurm.nodes * config.slurm.gpus_per_node
    plan = plan_for(config, config.slurm.gpu, count, None)
    if plan.memory is None or plan.memory_room is None:
        yield "not checked: nothing is known of the model"
        return plan
    used = (
        f"{gib(plan.memory.total)} of {gib(plan.memory_room)} usable GiB on each of {plan.device}"
    )
    if plan.memory.total > plan.memory_room:
        remedy = f"; {plan.remedy}" if plan.remedy else ""
        raise SubmitError([f"plan: does not fit: {used}{remedy}"])
    yield used
    if config.slurm.grace_s is None:
        yield from _grace(config, jobscript.grace_s(config, plan.checkpoint_bytes))
    return plan


def _disk(config: JobConfig, plan: Plan | None) -> Iterator[str]:
    facts = model_facts(config, find_prepared(config))
    if facts is None or facts.parameters is None:
        yield "not checked: nothing is known of the model"
        return
    folder = _existing(Path(config.run.dir))
    free = shutil.disk_usage(folder).free
    # fp32 weights and Adam's two moments; the model in at most 4 bytes
    least = 16 * facts.parameters
    if free < least:
        raise SubmitError(
            [f"run.dir: one checkpoint and the model need {gib(least)} GiB, "
             f"{gib(free)} GiB are free: {folder}"]
        )  # fmt: skip
    whole = plan.disk_bytes if plan else None
    if whole is not None and free < whole:
        yield (
            f"{gib(free)} GiB free, the whole run grows to {gib(whole)} GiB: set checkpoint.keep"
        )
    else:
        yield f"{gib(free)} GiB free"


def _cluster(config: JobConfig) -> Iterator[str]:
    if config.slurm is None:
        return
    known = slurm.partitions()
    if faults := list(slurm.cluster_faults(config.slurm, known)):
        raise SubmitError(faults)
    wanted = config.slurm
    yield (
        f"{wanted.nodes} node(s) with {wanted.tasks_per_node(config.run)} task(s) each, partition "
        f"{wanted.partition or 'of the site'}, {wanted.time_min} min an attempt"
    )
    yield from slurm.account_notes(config.slurm)


def fetch(config: JobConfig) -> None:
    """Model and encoded data into the cache, on this machine, with what the job runs in.

    Raises:
        WorkerError: it did not work (the reason has been printed).
    """
    if find_prepared(config) is not None:
        return
    config = config.model_copy(update={"run": config.run.model_copy(update={"online": True})})
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        job.write_text(stored(config), encoding="utf-8")
        words: list[str] = []
        if isinstance(config.container, Apptainer):
            seen = jobscript.bound(config, os.environ)
            folders = [path for path in seen.writable if path != config.run.dir]  # nobody's yet
            for path in folders:
                Path(path).mkdir(parents=True, exist_ok=True)
            seen = jobscript.Bound(folders, [*seen.readable, str(job)])
            words, _ = jobscript.container_command(config, seen)
            words[words.index("--pwd") + 1] = "/"
            words.remove("--nv")
        elif config.container is not None:
            raise ConfigError(
                ["--fetch: Pyxis has no containers on a login node; run `sft-job data encode` "
                 "where the package is installed with [train], with run.online=true"]
            )  # fmt: skip
        python = config.container.python if config.container else sys.executable
        encode = [python, "-m", "sft_job.data", "encode", str(job)]
        environ = os.environ | jobscript.hub(os.environ)
        if subprocess.run([*words, *encode], env=environ, check=False).returncode:
            raise WorkerError("--fetch: model and data could not be made ready")


if __name__ == "__main__":
    sys.exit(cli.run(main))
