"""The text of a job script: a pure function of a job. No torch.

Everything that comes from the user is quoted for the shell, or for sbatch's own reader of
`#SBATCH` lines. The script itself is `slurm/job.sh`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from sft_job.errors import ConfigError
from sft_job.prepared import hub_home
from sft_job.schema import Apptainer, JobConfig, Pyxis, Slurm

# sbatch options that the script depends on, and what to set instead.
OWNED = {
    "nodes": "slurm.nodes",
    "ntasks": "slurm.gpus_per_node",
    "ntasks-per-node": "slurm.gpus_per_node",
    "ntasks-per-gpu": "slurm.gpus_per_node",
    "tasks-per-node": "slurm.gpus_per_node",
    "gpus": "slurm.gpus_per_node",
    "gpus-per-node": "slurm.gpus_per_node",
    "gpus-per-task": "slurm.gpus_per_node",
    "gres": "slurm.gres",
    "time": "slurm.time_min",
    "partition": "slurm.partition",
    "account": "slurm.account",
    "qos": "slurm.qos",
    "constraint": "slurm.constraint",
    "reservation": "slurm.reservation",
    "comment": "slurm.comment",
    "exclusive": "slurm.exclusive",
    "cpus-per-task": "slurm.cpus_per_task",
    "requeue": "slurm.requeue",
    "no-requeue": "slurm.requeue",
    "signal": "slurm.grace_s",
    "job-name": "the name of run.dir",
    "dependency": "sft-job submit --after",
    "array": "several jobs, each with its run.dir",
    "chdir": "run.dir",
    "output": "run.dir",
    "error": "run.dir",
    "open-mode": "nothing: logs are appended to",
    "gpu-bind": "nothing: tasks choose by SLURM_LOCALID",
    "wrap": "nothing: the script is the job",
    "parsable": "nothing: it is used",
    "wait": "sft-job submit --wait",
    "clusters": "SLURM_CLUSTERS in the environment, for all commands",
    "quiet": "nothing: the job's number is read",
    "test-only": "sft-job submit --dry-run",
    "no-kill": "nothing: a lost node ends the attempt, and the job goes on",
    "export-file": "nothing: the script needs the environment",
    "export": "nothing: the script needs the environment",
}

MEMORY = {"mem", "mem-per-cpu", "mem-per-gpu"}

# Least seconds that are kept for saving; and bytes per second at which a shared file system
# surely takes a checkpoint.
GRACE_S = 120
MOST_GRACE_S = 65535  # sbatch --signal has 16 bits
WRITE_BYTES_PER_S = 10**9

CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def faults(slurm: Slurm) -> Iterator[str]:
    """What of the `slurm` section cannot be put into a job script."""
    for option in slurm.extra:
        name = option.lstrip("-").replace("_", "-")
        if name in OWNED:
            yield f"slurm.extra: {option} belongs to sft-job; set {OWNED[name]}"
        elif not re.fullmatch(r"[a-z][a-z0-9-]*", option):
            yield f"slurm.extra: {option!r} is not the long name of an sbatch option, such as mem"
    texts = {f"slurm.{key}": value for key, value in slurm.model_dump(exclude={"extra"}).items()}
    texts |= {f"slurm.extra.{key}": value for key, value in slurm.extra.items()}
    for key, value in texts.items():
        if isinstance(value, str) and CONTROL.search(value):
            yield f"{key}: {value!r} has a control character, which no #SBATCH line can carry"
    if slurm.gres is not None and slurm.gpus_per_node:
        number = re.fullmatch(r"gpu(:[^:,]+)?:(\d+)", slurm.gres)
        if number is None or int(number[2]) != slurm.gpus_per_node:
            yield (
                f"slurm.gres: {slurm.gres!r} is not gpu:{slurm.gpus_per_node} or "
                f"gpu:TYPE:{slurm.gpus_per_node}, as slurm.gpus_per_node has it"
            )


def quoted(value: str) -> str:
    """As sbatch reads a value in an `#SBATCH` line: in double quotes, backslash before both."""
    if re.fullmatch(r"[\w./:@%+=,-]+", value, re.ASCII):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def job_name(run_dir: Path) -> str:
    """Of the run directory's name what every Slurm tool prints as it is."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", run_dir.name).strip("_")
    return name[:60] or "sft_job"


def grace_s(config: JobConfig, checkpoint_bytes: int | None) -> int:
    """Seconds kept for saving before the end of the job."""
    if config.slurm is not None and config.slurm.grace_s is not None:
        return config.slurm.grace_s
    return min(MOST_GRACE_S, max(GRACE_S, 2 * (checkpoint_bytes or 0) // WRITE_BYTES_PER_S))


def options(slurm: Slurm, config: JobConfig, grace: int) -> dict[str, str | int | bool]:
    """sbatch options by long name; True for those without a value."""
    tasks = slurm.tasks_per_node(config.run)
    found: dict[str, str | int | bool | None] = {
        "job-name": job_name(Path(config.run.dir)),
        "nodes": slurm.nodes,
        "ntasks-per-node": tasks,
        "gpus-per-node": slurm.gpus_per_node or None if slurm.gres is None else None,
        "gres": slurm.gres,
        "cpus-per-task": slurm.cpus_per_task,
        "exclusive": slurm.exclusive,
        # --exclusive gives a node's processors, not its memory
        "mem": 0 if slurm.exclusive and not slurm.extra.keys() & MEMORY else None,
        "time": slurm.time_min,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "reservation": slurm.reservation,
        "comment": slurm.comment,
        "signal": f"B:USR1@{grace}",
        "requeue" if slurm.requeue else "no-requeue": True,
        "open-mode": "append",
        "output": "slurm-%j.log",
        **slurm.extra,
    }
    return {
        name: value for name, value in found.items() if value is not None and value is not False
    }


@dataclass(frozen=True)
class Bound:
    """What a container must see of the machine, beside what it brings.

    Args:
        writable: folders that are made before.
        readable: files and folders.
    """

    writable: Sequence[str]
    readable: Sequence[str]


def bound(config: JobConfig, environ: Mapping[str, str]) -> Bound:
    """Data, model, caches, run directory: each at the same place inside."""
    writable = [config.run.dir, str(config.cache_dir)]
    readable = [str(file) for file in config.data.files()]
    # A model may be a folder of links into a cache, and a data file too.
    if Path(config.model.path).is_absolute():
        readable.append(config.model.path)
        readable += [str(p.resolve()) for p in Path(config.model.path).iterdir() if p.is_symlink()]
    elif config.model.on_hub:
        (writable if config.run.online else readable).extend(hub(environ).values())
    readable += [str(Path(path).resolve()) for path in list(readable) if Path(path).is_symlink()]
    if config.container is not None:
        readable += config.container.bind
    return Bound(writable, list(dict.fromkeys(readable)))


def hub(environ: Mapping[str, str]) -> dict[str, str]:
    """What finds the hub cache of `bound` in a container, whose home is another."""
    cache = environ.get("HF_HUB_CACHE")
    return (
        {"HF_HUB_CACHE": str(Path(cache).expanduser())}
        if cache
        else {"HF_HOME": str(hub_home(environ))}
    )


def container_command(config: JobConfig, seen: Bound) -> tuple[list[str], list[str]]:
    """(words before the command, further options of srun) for the ranks."""
    container = config.container
    if container is None:
        return [], []
    if isinstance(container, Apptainer):
        words = ["apptainer", "exec", "--nv", "--no-home", "--pwd", config.run.dir]
        for path in (*seen.writable, *seen.readable):
            mode = "" if path in seen.writable else ",ro"
            # Apptainer reads this as one line of CSV: a field with a comma or quote is quoted.
            source, target = (_csv(f"{key}={path}") for key in ("source", "destination"))
            words += ["--mount", f"type=bind,{source},{target}{mode}"]
        return [*words, container.image], []
    mounts = []
    for path in (*seen.writable, *seen.readable):
        if re.search(r"[:,]", path):
            raise ConfigError(
                [f"container: Pyxis cannot mount a path with a colon or a comma: {path}"]
            )
        mounts.append(f"{path}:{path}" + ("" if path in seen.writable else ":ro"))
    return [], [
        f"--container-image={container.image}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={config.run.dir}",
        "--no-container-mount-home",
        "--no-container-entrypoint",
    ]


def _csv(field: str) -> str:
    return '"' + field.replace('"', '""') + '"' if re.search(r'[",\n]', field) else field


def script(config: JobConfig, python: str, grace: int, environ: Mapping[str, str]) -> str:
    """The job script.

    Args:
        python: the interpreter of a job without container.
        grace: seconds kept for saving before the end.

    Raises:
        ConfigError: something that no script can carry.
    """
    slurm = config.slurm
    if slurm is None:
        raise ConfigError(
            ["slurm: is missing; at least slurm: {nodes: 1, gpus_per_node: 4} is needed to submit"]
        )
    if found := list(faults(slurm)):
        raise ConfigError(found)
    words, srun = container_command(config, bound(config, environ))
    container = config.container
    needed = [] if isinstance(container, Pyxis) else [python]
    if isinstance(container, Apptainer):
        needed = [] if "://" in container.image else [container.image]
    lines = [
        f"#SBATCH --{name}" if value is True else f"#SBATCH --{name}={quoted(str(value))}"
        for name, value in options(slurm, config, grace).items()
    ]
    values = {
        "RUN_DIR": shlex.quote(config.run.dir),
        "PYTHON": shlex.quote(container.python if container else python),
        "CONTAINER": _array(words),
        "SRUN": _array(srun),
        "NEEDED": _array(needed),
        "NODES": str(slurm.nodes),
        "TASKS_PER_NODE": str(slurm.tasks_per_node(config.run)),
        "GPUS_PER_NODE": str(slurm.gpus_per_node),
        "CPUS_PER_TASK": str(slurm.cpus_per_task or ""),
        "GRACE_S": str(grace),
        "REQUEUE": str(int(slurm.requeue)),
    }
    job: list[str] = []
    for name, value in values.items():
        if re.search(r"[$`\\]", value):
            job.append("# shellcheck disable=SC1003,SC2016 # a name that only looks like syntax")
        job.append(f"{name}={value}")
    if container is not None and config.model.on_hub:
        job += [f"export {name}={shlex.quote(value)}" for name, value in hub(environ).items()]
    setup = ["", "# slurm.setup", *slurm.setup, ""] if slurm.setup else []
    text = resources.files("sft_job").joinpath("slurm_files/job.sh").read_text(encoding="utf-8")
    filled = {"@SBATCH@": lines, "@JOB@": job, "@SETUP@": setup}
    # At once: what is put in may have such a word in it.
    found_marks = "|".join(filled)
    return re.sub(f"^({found_marks})$", lambda m: "\n".join(filled[m[1]]), text, flags=re.MULTILINE)


def _array(words: Sequence[str]) -> str:
    """A bash array, one word a line."""
    if not words:
        return "()"
    # A comma means nothing to bash, but looks like a mistake.
    quoted = [
        f"'{word}'" if "," in word and "'" not in word else shlex.quote(word) for word in words
    ]
    return "(\n" + "".join(f"    {word}\n" for word in quoted) + ")"
