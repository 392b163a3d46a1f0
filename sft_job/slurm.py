"""Slurm from outside: what it says about jobs and partitions; a job under submitit. No torch."""

from __future__ import annotations

import os
import pwd
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_job.errors import EXIT_INTERRUPTED, Interrupted, SlurmError, SubmitError, WorkerError
from sft_job.rundir import RunDir
from sft_job.schema import Slurm

TIMEOUT_S = 30.0
SBATCH_TIMEOUT_S = 300.0  # a loaded controller takes its time, and a second job must not be made

# sbatch takes options from variables before those of a script. What sites and users set for every
# job fills in what the job file leaves open; nothing else may overrule it.
DEFAULTS = {
    f"SBATCH_{key.upper()}": key
    for key in ("account", "constraint", "partition", "qos", "reservation")
}
# What a shell knows of other jobs and processes: allocations, whose options srun would take; places
# that launchers gave; accelerate's settings. The job script leaves out the same.
ABOUT_OTHERS = re.compile(
    r"SBATCH_|SRUN_|SLURMD_|SLURM_(?!(?:CONF|CONF_SERVER|JWT|CLUSTERS)$)"
    r"|(?:(?:LOCAL_|GROUP_|ROLE_)?(?:RANK|WORLD_SIZE)|LOCAL_SIZE|NODE_RANK|ROLE_NAME|CROSS_RANK"
    r"|CROSS_SIZE|MASTER_ADDR|MASTER_PORT|SFT_JOB_(?:ATTEMPT|LAUNCHED|BEGAN|WORLD_SIZE))$"
    r"|TORCHELASTIC_|PMIX?_|OMPI_COMM_WORLD_|MV2_COMM_WORLD_|MPI_LOCALN?RANK"
    r"|ACCELERATE_|FSDP_|PARALLELISM_CONFIG_"
)
# What tells Slurm's commands which jobs to leave out, how to print, and to ask before they act.
FILTERS = re.compile(r"(?:SQUEUE|SINFO|SACCT|SACCTMGR|SCONTROL|SCANCEL|SPRIO)_")

# --- under submitit ---------------------------------------------------------------------

REQUEUE = 76
"""Exit code of the job script under submitit: interrupted, to be put back into the queue."""


@dataclass
class Attempt:
    """What submitit calls: the job script, which does here what it does under sbatch.

    submitit puts the job back into the queue when `checkpoint` returns. It calls that on its own
    signal; an attempt that has stopped for another reason sends itself this signal.
    """

    run_dir: str

    def __post_init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"run_dir": self.run_dir}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def command(self) -> list[str]:
        return ["bash", str(RunDir(self.run_dir).script), "submitit"]

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def forward(self, number: int, frame: object) -> None:
        """What sbatch's shell would get: signals to the batch process alone."""
        if self._child is not None:
            os.kill(self._child.pid, number)  # it is never reaped: the number stays its own

    def exit_code(self, *, wait: bool) -> int | None:
        """Of the child; None while it runs. For a signal's handler too: Popen.poll's lock may be
        held by the very frame that the signal has interrupted."""
        assert self._child is not None
        how = os.WEXITED | os.WNOWAIT | (0 if wait else os.WNOHANG)
        found = os.waitid(os.P_PID, self._child.pid, how)
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def __call__(self) -> str:
        """Returns the run directory when the job is done.

        Raises:
            WorkerError: it failed; the first line says where and why.
            Interrupted: it was stopped and shall not be put back.
        """
        run_dir = RunDir(self.run_dir)
        self._child = subprocess.Popen(self.command(), env=self.environment())
        import submitit

        own = submitit.JobEnvironment._usr_sig()
        for number in {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT} - {own}:
            signal.signal(number, self.forward)
        while (code := self.exit_code(wait=False)) is None:
            time.sleep(0.2)
        if code in (REQUEUE, self.interrupted_code()) and not run_dir.cancelled.exists():
            os.kill(os.getpid(), own)
            time.sleep(600)  # the handler ends this process
        if code in (EXIT_INTERRUPTED, REQUEUE):
            raise Interrupted(
                "saved and stopped; the last line above says what next", where=self.run_dir
            )
        if code:
            cause = run_dir.cause(run_dir.newest_attempt())
            said = cause.read_text() if cause.exists() else f"exit code {code}"
            raise WorkerError(said.removeprefix("error: ").strip(), where=self.run_dir)
        return self.run_dir

    def interrupted_code(self) -> int:
        return REQUEUE

    def checkpoint(self) -> Any:
        """Called in the signal's handler: wait until everything is saved, then ask to go on."""
        from submitit.helpers import DelayedSubmission

        if self._child is None:  # nothing has begun
            return DelayedSubmission(self)
        if self.exit_code(wait=False) is None:
            os.kill(self._child.pid, signal.SIGUSR1)
        code, run_dir = self.exit_code(wait=True), RunDir(self.run_dir)
        if run_dir.done.exists():
            sys.exit(0)  # nothing to go on with
        if run_dir.cancelled.exists():
            return None
        if code not in (0, REQUEUE, self.interrupted_code()):
            return None  # failed, or not to be put back: submitit says so
        return DelayedSubmission(self)


@dataclass
class LocalAttempt(Attempt):
    """On this machine, without Slurm: the launcher instead of the job script.

    Args:
        devices: CUDA_VISIBLE_DEVICES of the submission, which submitit would set otherwise.
    """

    devices: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"run_dir": self.run_dir, "devices": self.devices}

    def environment(self) -> dict[str, str]:
        found = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
        return found if self.devices is None else found | {"CUDA_VISIBLE_DEVICES": self.devices}

    def command(self) -> list[str]:
        return [sys.executable, "-m", "sft_job.train", str(RunDir(self.run_dir).job_file)]

    def interrupted_code(self) -> int:
        return EXIT_INTERRUPTED


# --- asking Slurm -----------------------------------------------------------------------


def with_site_defaults(slurm: Slurm, environ: Mapping[str, str]) -> tuple[Slurm, list[str]]:
    """The `slurm` section with what the environment fills in, and a line for each variable."""
    found = {
        key: environ[name]
        for name, key in DEFAULTS.items()
        if environ.get(name) and getattr(slurm, key) is None
    }
    lines = [f"{key} {value}, from SBATCH_{key.upper()}" for key, value in found.items()]
    ignored = sorted(n for n in environ if n.startswith("SBATCH_") and n not in DEFAULTS)
    lines += [f"{name} is left out: the job file decides" for name in ignored]
    return slurm.model_copy(update=found), lines


def clean(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment that a job is submitted from, and that Slurm is asked in: nothing in it
    speaks of another job, or decides what an answer leaves out."""
    return {
        name: value
        for name, value in environ.items()
        if not ABOUT_OTHERS.match(name) and not FILTERS.match(name)
    }


def user() -> str:
    """The name of this process's user, whatever a shell says; the number where nobody has given
    it a name, as in containers and on nodes without the site's directory."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def ask(*command: str, timeout_s: float = TIMEOUT_S, cluster: str | None = None) -> str:
    """What a Slurm command prints.

    Args:
        cluster: where several are joined; None is where SLURM_CLUSTERS says, HERE this one.

    Raises:
        SlurmError: it is not here, fails, or does not answer.
    """
    environ = clean(os.environ)
    if cluster is not None:
        environ.pop("SLURM_CLUSTERS", None)
    if cluster:
        command = (command[0], f"--clusters={cluster}", *command[1:])
    try:
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
            env=environ,
            check=True,
        )
    except FileNotFoundError as error:
        raise SlurmError(
            f"{command[0]} is not on this machine",
            remedy="submit from a login node of the cluster, "
            "or run the job here with `sft-job train`",
        ) from error
    except OSError as error:
        raise SlurmError(f"{command[0]} cannot be started: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"{command[0]} does not answer within {timeout_s:.0f} s",
            remedy="the controller may be down: look with `squeue --me` before you try again",
        ) from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip() or f"exit code {error.returncode}"
        raise SlurmError(f"{command[0]} refuses: {said}") from error
    return answer.stdout


HERE = ""


def sbatch(run_dir: RunDir, after: str | None) -> tuple[str, str]:
    """Put the run directory's script into the queue; returns job id and cluster (or HERE).

    Raises:
        SlurmError: it is not taken, or nobody can say whether it is.
    """
    options = [f"--dependency=afterany:{after}"] if after else []
    command = ["sbatch", "--parsable", f"--chdir={run_dir.path}", *options, str(run_dir.script)]
    said = ask(*command, timeout_s=SBATCH_TIMEOUT_S)
    # Of several clusters id;cluster; sites put notices of their own before it.
    found = re.findall(r"^(\d+)(?:;(\S+))?\s*$", said, re.MULTILINE)
    if not found:
        raise SlurmError(
            f"sbatch does not say which job it has made: {said.strip()[:200]!r}",
            where=str(run_dir.path),
            remedy="look with `squeue --me`; submit again if it is not there",
        )
    job, of = found[-1]
    return job, of


def local_state(pid: str, submitted: float) -> str | None:
    """Of a job that runs on this machine, without Slurm: RUNNING, or None.

    Args:
        submitted: when, in seconds since the epoch. A younger process has its number by chance.
    """
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()  # from the third on: proc(5)
    except (FileNotFoundError, ProcessLookupError):
        return None
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    younger = time.time() - age > submitted + 60
    return None if fields[0] in "ZX" or younger else "RUNNING"


# What Slurm calls a job that is there, or may come back.
ALIVE = {
    "PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED",
    "SPECIAL_EXIT", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING", "RESV_DEL_HOLD",
    "EXPEDITING", "POWER_UP_NODE", "UPDATE_DB",
}  # fmt: skip
# The end, or the moment before Slurm puts the job back into the queue.
UNSURE = {"NODE_FAIL", "PREEMPTED"}
ENDED = {
    "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "BOOT_FAIL", "LAUNCH_FAILED", "DEADLINE",
    "OUT_OF_MEMORY", "REVOKED", "RECONFIG_FAIL",
}  # fmt: skip


def state(job: str, cluster: str = HERE) -> str | None:
    """PENDING, RUNNING, ...; None when Slurm says that it does not know the job any more.

    Raises:
        SlurmError: it says neither. A job that is not seen may well run.
    """
    refusal = None
    said: list[str] = []
    for command in (
        ("squeue", "--all", "--noheader", "--states=all", f"--jobs={job}", "--format=%T"),
        ("scontrol", "--oneliner", "show", "job", job),
    ):
        try:
            text = ask(*command, cluster=cluster)
        except SlurmError as error:
            if INVALID in error.what and not any(said):
                return None
            if not error.what.startswith("squeue refuses"):  # nor would the other one answer
                raise refusal or error from error
            refusal, text = error, ""
        if (word := _state_in(text)) is not None:
            return word
        said.append(text.strip())
    raise refusal or SlurmError(
        f"it is not known whether job {job} lives: squeue says {said[0][:80]!r}, and scontrol "
        f"{said[1][:80]!r}",
        remedy=f"look with `scontrol show job {job}`",
    )


def jobs_in(folder: Path) -> list[tuple[str, str]]:
    """(job, state) of this user's jobs that work in a folder, whoever has written them down.

    Raises:
        SlurmError: nobody says.
    """
    text = ask(
        "squeue", "--all", "--noheader", f"--user={user()}", "--format=%i|%T|%Z", cluster=HERE
    )
    lines = [line.split("|", 2) for line in text.splitlines() if line.count("|") >= 2]
    places = {str(folder), str(folder.resolve())}
    return [(job.strip(), state) for job, state, place in lines if place.strip() in places]


INVALID = "Invalid job id"


def _state_in(text: str) -> str | None:
    """The state that a line of squeue or scontrol has; there may be headers of clusters, and a line
    for each part of a job."""
    words = re.findall(r"(?:^|JobState=)([A-Z_]+)\+?\s", text + "\n", re.MULTILINE)
    for kind in (ALIVE, UNSURE, ENDED):
        for word in words:
            if word in kind:
                return str(word)
    return None


def ending(job: str, cluster: str = HERE) -> str | None:
    """TIMEOUT, CANCELLED, ...: of a job that squeue has forgotten; None without accounting."""
    try:
        found = ask("sacct", "--noheader", "--allocations", "--parsable2", "--format=State",
                    f"--jobs={job}", cluster=cluster)  # fmt: skip
    except SlurmError:
        return None
    return found.split()[0] if found.split() else None


@dataclass(frozen=True)
class Partition:
    """A line of sinfo: a partition and one kind of its nodes."""

    name: str
    default: bool
    up: bool
    limit_min: int | None
    nodes: int
    gres: str
    features: str


def partitions() -> list[Partition]:
    text = ask("sinfo", "--all", "--noheader", "--format=%P|%a|%l|%D|%G|%f")
    found = []
    for line in text.splitlines():
        name, up, limit, nodes, gres, features = line.split("|", 5)
        found.append(
            Partition(
                name.removesuffix("*"), name.endswith("*"), up == "up", minutes(limit), int(nodes),
                gres, features,
            )
        )  # fmt: skip
    return found


def minutes(limit: str) -> int | None:
    """A limit as Slurm prints it ([days-]hours:minutes:seconds), in minutes; None without one."""
    if limit in ("infinite", "UNLIMITED", "n/a"):
        return None
    days, _, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    hours, mins, seconds = [0] * (3 - len(parts)) + parts
    return int(days or 0) * 1440 + hours * 60 + mins + (seconds > 0)


def cluster_faults(slurm: Slurm, known: Sequence[Partition]) -> Iterator[str]:
    """What of the request this cluster cannot give."""
    names = sorted({p.name for p in known})
    if slurm.partition is not None:
        asked = slurm.partition.split(",")
        for name in asked:
            if name not in names:
                yield f"slurm.partition: no {name!r} on this cluster; it has {', '.join(names)}"
    else:
        asked = [p.name for p in known if p.default]
        if not asked:
            yield f"slurm.partition: this cluster has no default; it has {', '.join(names)}"
    rows = [p for p in known if p.name in asked]
    if not rows:
        return
    if not any(p.up for p in rows):
        yield f"slurm.partition: {', '.join(asked)} is down"
    limits = [p.limit_min for p in rows]
    if None not in limits and slurm.time_min > max(filter(None, limits), default=0):
        yield (
            f"slurm.time_min: {slurm.time_min} is more than {', '.join(asked)} allows "
            f"({max(filter(None, limits), default=0)})"
        )
    per_node = [_gpus(p.gres) for p in rows]
    fitting = rows
    if slurm.gpus_per_node:
        kind = (re.fullmatch(r"gpu:([^:,]+):\d+", slurm.gres or "") or [None, None])[1]
        fitting = [
            p for p in rows
            if any(n >= slurm.gpus_per_node and kind in (None, k) for k, n in _gpus(p.gres))
        ]  # fmt: skip
        if not fitting:
            has = sorted({f"{n} {k or 'GPU'}" for row in per_node for k, n in row}) or ["no GPU"]
            yield (
                f"slurm.gpus_per_node: no node of {', '.join(asked)} has {slurm.gpus_per_node} "
                f"{kind or 'GPU(s)'}; they have {', '.join(has)}"
            )
            return
    if sum(p.nodes for p in fitting) < slurm.nodes:
        yield (
            f"slurm.nodes: {slurm.nodes} asked for, {', '.join(asked)} has "
            f"{sum(p.nodes for p in fitting)} such nodes"
        )


def account_notes(wanted: Slurm) -> Iterator[str]:
    """Whether this user may use account and QOS, where the site keeps accounts.

    Raises:
        SubmitError: they may not, and the site enforces it.
    """
    if wanted.account is None and wanted.qos is None:
        return
    name = user()
    query = ("list", "assoc", f"user={name}", "format=account,qos")
    try:
        text = ask("sacctmgr", "--noheader", "--parsable2", *query)
    except SlurmError as error:
        yield f"account and QOS not checked: {error.what}"
        return
    rows = [line.lower().split("|") for line in text.splitlines() if line]
    if not rows:
        yield f"account and QOS not checked: Slurm keeps none of {name}"
        return
    account, wanted_qos = (name and name.lower() for name in (wanted.account, wanted.qos))
    accounts = sorted({row[0] for row in rows})
    if account is not None and account not in accounts:
        raise SubmitError(
            [f"slurm.account: {name} has no account {wanted.account!r}; {', '.join(accounts)}"]
        )
    allowed = {q for row in rows for q in row[1].split(",") if account in (None, row[0])}
    if wanted_qos is not None and wanted_qos not in allowed:
        said = f"slurm.qos: {name} may not use {wanted.qos!r}; {', '.join(sorted(allowed))}"
        settings = ask("scontrol", "show", "config")
        if re.search(r"^AccountingStorageEnforce\s*=.*\b(qos|all)\b", settings, re.MULTILINE):
            raise SubmitError([said])
        yield f"{said} (not enforced here)"


def _gpus(gres: str) -> list[tuple[str | None, int]]:
    """(type, number) of GPUs in a gres text such as gpu:a100:4(S:0-1),nvme:1."""
    found = re.findall(r"gpu:(?:([^:,(]+):)?(\d+)", gres)
    return [(kind or None, int(number)) for kind, number in found]
