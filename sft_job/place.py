"""This process's place among all, as whoever started it has said. No torch.

Variables outlive what they speak of: shells keep those of launchers, of old jobs, and of the task
that the shell itself is. None of them is believed without a sign that somebody has started this
very process with them:

    sign                                           what decides
    SFT_JOB_LAUNCHED      our launcher             RANK, WORLD_SIZE, ...
    SFT_JOB_ATTEMPT       our job script           Slurm's variables of the step, and nothing else
    TORCHELASTIC_RUN_ID   torchrun                 RANK, WORLD_SIZE, ...
    CROSS_SIZE            deepspeed                RANK, WORLD_SIZE, ...
    a Slurm step with several tasks                Slurm's, which RANK, ... may repeat
    OMPI_COMM_WORLD_SIZE, PMI_SIZE   mpirun        RANK, ... if the job sets them, and alike
    WORLD_SIZE above 1    started by hand          RANK, WORLD_SIZE, ...
    none                                           this is the launcher
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sft_job.errors import LaunchError, SlurmError
from sft_job.schema import JobConfig
from sft_job.workers import ATTEMPT, LAUNCHED, Place

# How many tasks the job script has started, to be compared with what each of them finds.
JOB_WORLD_SIZE = "SFT_JOB_WORLD_SIZE"

TORCHRUN = "TORCHELASTIC_RUN_ID"
DEEPSPEED = "CROSS_SIZE"
# (size, rank) of the launchers of MPI, which set no RANK.
MPI = (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK"))
GIVEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
STEP = (
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST", "SLURM_JOB_ID",
)  # fmt: skip

# What accelerate and the launchers of MPI set for processes of theirs. In a rank of ours accelerate
# would take its precision, its engine or its number of processes from what a shell has kept.
OF_OTHERS = re.compile(
    r"(ACCELERATE|FSDP|PARALLELISM_CONFIG|OMPI_COMM_WORLD|MV2_COMM_WORLD|PMIX?)_|MPI_LOCALN?RANK"
)
TORCHELASTIC = re.compile(r"TORCHELASTIC_")


def find_place(environ: Mapping[str, str]) -> Place | None:
    """This process's place as a launcher (ours, torchrun, srun) has given it, or None.

    Raises:
        LaunchError: the variables are there in part, contradict each other, or are left over.
        SlurmError: a container has kept Slurm's variables out.
    """
    if LAUNCHED in environ:
        return _given(environ)
    if ATTEMPT in environ:
        return _task_of_job_script(environ)
    given = [name for name in ("RANK", "WORLD_SIZE") if name in environ]
    if given and (TORCHRUN in environ or DEEPSPEED in environ):
        return _given(environ)
    tasks = _tasks(environ)
    mpi = _mpi(environ, tasks)
    if given:
        place = _given(environ)
        if mpi is not None:
            _refuse_difference(place, *mpi)
            return place
        return _confirmed(place, environ, tasks)
    if mpi is not None and mpi[1] > 1:
        raise LaunchError(
            f"{mpi[2]}: mpirun has started several processes, and each would take itself for the "
            "whole job",
            remedy="start with torchrun or srun, or once without mpirun: sft-job train starts the "
            "processes of this machine by itself",
        )
    if tasks > 1:
        if _typed_into_a_shell(environ):
            return None
        _refuse_an_old_step()
        return _of_step(environ)
    if "APPTAINER_CONTAINER" in environ and "SLURM_JOB_ID" not in environ and _under_slurm():
        raise SlurmError(
            "this is a task of a Slurm job, but Slurm's variables are not here: each task would "
            "take itself for the whole job",
            remedy="start the container without --cleanenv, --containall and APPTAINER_CLEANENV; "
            "or, if this is the only task, with --env SLURM_JOB_ID=$SLURM_JOB_ID",
        )
    return None


def refuse_another_size(place: Place, config: JobConfig, environ: Mapping[str, str]) -> None:
    """A job script and its job file are written together; ranks of another number are a mistake.

    Raises:
        LaunchError: with both numbers.
    """
    if ATTEMPT not in environ or LAUNCHED in environ or config.slurm is None:
        return
    nodes, tasks = config.slurm.nodes, config.slurm.tasks_per_node(config.run)
    if place.world_size != nodes * tasks:
        raise LaunchError(
            f"the job file asks for {nodes} node(s) with {tasks} task(s) each, {nodes * tasks} in "
            f"all, but this step has {place.world_size}",
            where=f"Slurm job {environ.get('SLURM_JOB_ID')}",
            remedy="submit the job again with sft-job submit",
        )


def disregard_others(environ: MutableMapping[str, str]) -> None:
    """Take from a rank's environment what speaks of other launchers, before torch and accelerate
    are imported, which read it."""
    ours = LAUNCHED in environ or ATTEMPT in environ
    for name in list(environ):
        # Under torchrun they are its own. Of a shell that has kept them, rank 0 would wait for
        # torchrun's store instead of opening one.
        if OF_OTHERS.match(name) or (ours and TORCHELASTIC.match(name)):
            del environ[name]


def _given(environ: Mapping[str, str]) -> Place:
    """From the variables that torch reads."""
    missing = [name for name in GIVEN if not environ.get(name)]
    if missing:
        there = [name for name in ("RANK", "WORLD_SIZE") if name in environ]
        verb = "are" if len(there) > 1 else "is"
        raise LaunchError(
            f"{' and '.join(there) or LAUNCHED} {verb} set, but not {', '.join(missing)}",
            remedy=f"start with torchrun or srun, or {_unset(environ)}",
        )
    local = next((n for n in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if n in environ), "WORLD_SIZE")
    place = Place(
        _number(environ, "RANK"),
        _number(environ, "LOCAL_RANK"),
        _number(environ, "WORLD_SIZE"),
        _number(environ, local),
        environ["MASTER_ADDR"],
        _number(environ, "MASTER_PORT"),
    )
    _refuse_contradiction(
        ("RANK", place.rank, "WORLD_SIZE", place.world_size),
        ("LOCAL_RANK", place.local_rank, local, place.local_world_size),
        ("MASTER_PORT", place.master_port, "the number of ports", 65536),
    )
    if place.local_world_size > place.world_size:
        raise LaunchError(
            f"{local} is {place.local_world_size}, but WORLD_SIZE is {place.world_size}",
            remedy=_unset(environ),
        )
    return place


def _confirmed(place: Place, environ: Mapping[str, str], tasks: int) -> Place | None:
    """A place of which no launcher is known, if nothing speaks against it.

    Args:
        tasks: of the Slurm step; 0 outside of steps.
    """
    if tasks:
        rank = _number(environ, "SLURM_PROCID")
        if tasks > 1:
            said = f"this is task {rank} of the {tasks} of a Slurm step"
            _refuse_difference(place, rank, tasks, said)
        elif (place.rank, place.world_size) == (rank, tasks):
            return None  # some images repeat Slurm's variables by these names
    if place.world_size == 1:
        raise LaunchError(
            "RANK and WORLD_SIZE=1 are set, but by no launcher: a shell has kept them, and this "
            "process would train alone, whatever GPUs are here",
            remedy=f"{_unset(environ)}; sft-job train starts the processes of this machine by "
            "itself",
        )
    return place


def _mpi(environ: Mapping[str, str], tasks: int) -> tuple[int, int, str] | None:
    """(rank, size, how they are called), where a launcher of MPI has started this process."""
    for size_name, rank_name in MPI:
        if size_name in environ and rank_name in environ:
            rank, size = _number(environ, rank_name), _number(environ, size_name)
            # Slurm speaks PMI too; under mpirun a step has one task for each node.
            if size_name != "PMI_SIZE" or size != tasks:
                return rank, size, f"{rank_name} is {rank} and {size_name} is {size}"
    return None


def _refuse_difference(place: Place, rank: int, size: int, said: str) -> None:
    if (place.rank, place.world_size) != (rank, size):
        raise LaunchError(
            f"RANK is {place.rank} and WORLD_SIZE is {place.world_size}, but {said}",
            remedy="unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT",
        )


def _unset(environ: Mapping[str, str]) -> str:
    all_names = (*GIVEN[:3], "LOCAL_WORLD_SIZE", *GIVEN[3:], ATTEMPT, LAUNCHED)
    names = [name for name in all_names if name in environ]
    return f"unset {' '.join(names)}"


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    """
    Raises:
        LaunchError: it is no number of a rank, a size or a port.
    """
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"[0-9]{1,9}", text, re.ASCII):
        raise LaunchError(f"{name} is {text!r}, which is no number", remedy=f"unset {name}")
    return int(text)


def _refuse_contradiction(*pairs: tuple[str, int, str, int]) -> None:
    for name, value, limit, size in pairs:
        if value >= size:
            raise LaunchError(
                f"{name} is {value}, but {limit} is {size}", remedy=f"unset {name} {limit}"
            )


# --- Slurm -------------------------------------------------------------------------------


def _tasks(environ: Mapping[str, str]) -> int:
    """Of the Slurm step that this process is in; 0 in none. SLURM sets most of its variables for
    batch scripts as well, but not these."""
    if "SLURM_PROCID" not in environ or "SLURM_STEP_NUM_TASKS" not in environ:
        return 0
    return _number(environ, "SLURM_STEP_NUM_TASKS")


def _task_of_job_script(environ: Mapping[str, str]) -> Place:
    if "SLURM_PROCID" not in environ:
        raise LaunchError(
            f"{ATTEMPT} is set, as in a job script, but this is no task of a Slurm step",
            remedy=f"unset {ATTEMPT}; in a container, let Slurm's variables in",
        )
    place = _of_step(environ)
    started = _number(environ, JOB_WORLD_SIZE, place.world_size)
    if started != place.world_size:
        raise LaunchError(
            f"the job script has started {started} task(s), but this step has {place.world_size}",
            where=f"Slurm job {environ['SLURM_JOB_ID']}",
            remedy="let nothing in slurm.setup or slurm.extra change the number of tasks",
        )
    return place


def _of_step(environ: Mapping[str, str]) -> Place:
    """From what Slurm says to each task."""
    missing = [name for name in STEP if not environ.get(name)]
    if missing:
        raise LaunchError(
            f"this is a task of a Slurm step, but {', '.join(missing)} is not here",
            remedy="let all of Slurm's variables into the container, or start with torchrun",
        )
    rank, local = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_LOCALID")
    size = _number(environ, "SLURM_STEP_NUM_TASKS")
    per_node = _per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
    node = _number(environ, "SLURM_NODEID")
    here = per_node[node] if node < len(per_node) else size
    _refuse_contradiction(
        ("SLURM_PROCID", rank, "SLURM_STEP_NUM_TASKS", size),
        ("SLURM_LOCALID", local, f"the number of tasks of node {node}", here),
    )
    port = 20000 + _number(environ, "SLURM_JOB_ID") % 12768
    return Place(
        rank,
        local,
        size,
        here,
        environ.get("MASTER_ADDR") or _first_host(environ["SLURM_STEP_NODELIST"]),
        _number(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else port,
    )


def _per_node(text: str) -> Sequence[int]:
    """The tasks of each node, which Slurm writes as 4(x2),3."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part, re.ASCII)
        if match is None:
            raise LaunchError(
                f"SLURM_STEP_TASKS_PER_NODE is {text!r}, which is not as Slurm writes it",
                remedy="unset SLURM_STEP_TASKS_PER_NODE",
            )
        counts += [int(match[1])] * min(int(match[2] or 1), 1_000_000)
    return counts


def _typed_into_a_shell(environ: Mapping[str, str]) -> bool:
    """Whether somebody at a terminal has started this process, in the shell of one task
    (`srun --pty bash`) or in one that has kept a task's variables: no other task does the same.

    The command of `srun --pty` itself leads the session of its terminal, or runs in the process
    group of what does; a shell for people gives each command a group of its own. What a shell was
    given by -c, the other tasks' shells were given too.
    """
    own, task = Process.of("self"), Process.of(environ.get("SLURM_TASK_PID", ""))
    if task is not None and (parent := Process.of(task.parent)) and parent.name != "slurmstepd":
        task = None  # a number that was given away again
    assert own is not None
    if own.terminal == NONE:
        # Without the terminal of its task by `setsid` or the like.
        return task is not None and task.terminal != NONE and task.session != own.session
    if task is None or task.session != own.session:
        return True
    return own.group != task.session and not task.was_given_a_command()


NONE = "0"


@dataclass(frozen=True)
class Process:
    """What /proc/PID/stat says, see proc(5)."""

    pid: str
    name: str
    parent: str
    group: str
    session: str
    terminal: str

    @classmethod
    def of(cls, pid: str) -> Process | None:
        if not pid.isalnum():
            return None
        try:
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:  # it has ended, or belongs to another namespace
            return None
        head, _, tail = text.rpartition(")")
        number, _, name = head.partition("(")
        return cls(number.strip(), name, *tail.split()[1:5])

    def was_given_a_command(self) -> bool:
        """A shell with -c."""
        try:
            words = Path(f"/proc/{self.pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return any(re.fullmatch(rb"-[a-zA-Z]*c", word) for word in words[1:])


def _refuse_an_old_step() -> None:
    """
    Raises:
        LaunchError: this process was started by no Slurm step.
    """
    if _under_slurm() is False:
        raise LaunchError(
            "SLURM_PROCID and SLURM_STEP_NUM_TASKS speak of a step with several tasks, but no "
            "Slurm step has started this process: the shell has kept them",
            remedy="unset SLURM_PROCID SLURM_STEP_NUM_TASKS, or start it in a new shell",
        )


# The namespace of process numbers that is not a container's (PROC_PID_INIT_INO of Linux).
MACHINES_OWN = "pid:[4026531836]"


def _under_slurm() -> bool | None:
    """A Slurm step is among the processes that have started this one, or its cgroup says so.
    None: not known, as in a container with process numbers of its own, which shows no others."""
    process = Process.of("self")
    while process is not None and process.name != "slurmstepd" and process.parent != "0":
        process = Process.of(process.parent)
    if process is not None and process.name == "slurmstepd":
        return True
    if "slurm" in Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="replace"):
        return True
    all_seen = process is not None and os.readlink("/proc/self/ns/pid") == MACHINES_OWN
    return False if all_seen else None


def _first_host(nodes: str) -> str:
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise LaunchError(
            f"the first host of {nodes!r} is not known: {' '.join(command)} failed ({error})",
            remedy="set MASTER_ADDR to the name of the job's first node",
        ) from error
    return answer.stdout.split()[0]
