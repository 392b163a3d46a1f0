"""Images at work: as a user that they do not know, root read-only, without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from sft_job import __version__, checkpoint
from sft_job.files import read_json
from sft_job.rundir import RunDir
from tests.images.containers import Tool, run
from tests.runs import metrics, run_job, weights

TOOLS = ["docker", "podman", "apptainer"]
STEPS = 150

every_tool = pytest.mark.parametrize("tool", TOOLS, indirect=True)
docker = pytest.mark.parametrize("tool", ["docker"], indirect=True)


@docker
def test_entry_point(tool: Tool, job: Path) -> None:
    """Help without arguments, any program, and what is neither is named."""
    folder = job.parent
    for words in ((), ("--help",)):
        said = tool.run(*words, folder=folder).stdout
        assert "usage: sft-job COMMAND" in said
        assert "docker run --rm --gpus all" in said
    assert "hello 3" in tool.run("bash", "-c", "echo hello $((1 + 2))", folder=folder).stdout
    said = tool.run("--version", folder=folder).stdout
    assert __version__ in said
    assert '"flavor": "cpu"' in said
    assert "usage: sft-job train" in tool.run("train", "--help", folder=folder).stdout
    said = tool.run("tarin", "job.yaml", folder=folder, code=2).stderr
    assert said.startswith("error: tarin is neither a command of sft-job nor a program")


@docker
def test_nowhere_to_write_is_refused(tool: Tool, job: Path) -> None:
    said = tool.run("train", job, folder=job.parent, writable=False, code=2).stderr
    assert "no folder can be written to for temporary files: /tmp" in said
    assert "--tmpfs /tmp" in said


@every_tool
def test_defaults_give_way_to_what_is_set(tool: Tool, job: Path) -> None:
    """Caches are where this user may write; a value of the user's own stays."""
    option = ("--env", "TRITON_CACHE_DIR=/mine", "--env", "PYTHONPATH=/elsewhere")
    if tool.name == "apptainer":  # as a variable of the host's shell too
        option = ("--env", "TRITON_CACHE_DIR=/mine")
    said = tool.run("env", folder=job.parent, options=option).stdout
    found = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
    assert found["TRITON_CACHE_DIR"] == "/mine"
    assert found["TORCH_EXTENSIONS_DIR"].startswith("/tmp/")
    assert "HF_HOME" not in found
    assert found.get("PYTHONPATH", "") == ""
    assert found["SFT_JOB_FLAVOUR"] == "cpu"
    touch = (
        'touch "$HOME/x" && mkdir -p "$TORCH_EXTENSIONS_DIR" && '
        'python -c "import getpass; getpass.getuser()"'
    )
    tool.run("bash", "-c", touch, folder=job.parent)


@pytest.mark.parametrize("tool", ["apptainer"], indirect=True)
def test_host_variables_reach_apptainer(tool: Tool, job: Path) -> None:
    """Through `exec` as well, which runs no entry point; Python's own are kept out."""
    words = tool.command("env", folder=job.parent)
    words[words.index("run")] = "exec"
    at = words.index("OMP_NUM_THREADS=1")
    words[at:at] = ["TORCH_EXTENSIONS_DIR=/mine", "HF_HOME=/hub", "PYTHONPATH=/elsewhere",
                    "TMPDIR=/not/bound"]  # fmt: skip
    found = dict(line.split("=", 1) for line in run(*words).stdout.splitlines() if "=" in line)
    assert found["TORCH_EXTENSIONS_DIR"] == "/mine"
    assert found["HF_HOME"] == "/hub"
    assert found["TMPDIR"] == "/tmp"
    assert found["TRITON_CACHE_DIR"].startswith("/tmp/")
    assert found.get("PYTHONPATH", "") == ""


@pytest.mark.parametrize("tool", ["apptainer"], indirect=True)
def test_apptainer_has_labels_help_and_a_test(tool: Tool, job: Path) -> None:
    labels = run("apptainer", "inspect", "--labels", tool.image).stdout
    assert f"org.opencontainers.image.version: {__version__}" in labels
    assert f"sft_job.version: {__version__}" in labels  # what `sft-job submit` looks for
    assert "sft_job.flavor: cpu" in labels
    assert "--cleanenv" in run("apptainer", "run-help", tool.image).stdout
    words = tool.command(folder=job.parent)
    words[words.index("run")] = "test"
    assert "packages equal the lock" in run(*words, timeout=200).stdout


@every_tool
def test_plan_train_and_chat(tool: Tool, job: Path) -> None:
    folder = job.parent
    said = tool.run("plan", job, folder=folder).stdout
    assert "steps" in said
    run_dir = RunDir(folder / f"short-{tool.name}")
    tool.run("train", job, "train.max_steps=3", f"run.dir={run_dir.path}", folder=folder)
    assert run_dir.done.exists()
    assert run_dir.done.stat().st_uid not in (0, 10001)
    assert [record["step"] for record in metrics(run_dir)] == [1, 2, 3]
    prompt = ("--prompt", "sun", "--max-new-tokens", "4")
    assert "ASSISTANT:" in tool.run("chat", run_dir.path, *prompt, folder=folder).stdout


@pytest.mark.widest
@docker
def test_optimizer_on_the_host_compiles_in_the_image(tool: Tool, job: Path) -> None:
    """DeepSpeed's CPU Adam: a compiler, ninja and Python's headers are there."""
    run_dir = RunDir(job.parent / "offload")
    options = ("engine.type=zero3", "engine.offload=cpu", "train.max_steps=3")
    tool.run("train", job, *options, f"run.dir={run_dir.path}", folder=job.parent)
    assert run_dir.done.exists()


@pytest.fixture(scope="session")
def expected(job: Path) -> RunDir:
    """The undisturbed job, without any container."""
    cache = f"data.cache_dir={job.parent}/cache"  # what root has made there, others cannot add to
    return run_job(job, f"train.max_steps={STEPS}", f"run.dir={job.parent}/expected", cache)


def start(tool: Tool, job: Path, run_dir: RunDir) -> subprocess.Popen[str]:
    options = ("--name", f"sft-job-{tool.name}", "--stop-timeout", "600")
    command = tool.command(
        "train", job, f"train.max_steps={STEPS}", f"run.dir={run_dir.path}",
        folder=job.parent, options=() if tool.name == "apptainer" else options,
    )  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def stop(tool: Tool, process: subprocess.Popen[str]) -> None:
    """As a user would."""
    if tool.name == "apptainer":
        process.terminate()  # everything before Apptainer in the command has become Apptainer
    else:
        run(tool.name, "stop", f"sft-job-{tool.name}", timeout=300)


@every_tool
def test_stopped_and_continued(tool: Tool, job: Path, expected: RunDir) -> None:
    """`docker stop` leaves a checkpoint whose every file verifies; the same command goes on from
    it, and the weights are those of the undisturbed job, bit for bit."""
    run_dir = RunDir(job.parent / f"stopped-{tool.name}")
    process = start(tool, job, run_dir)
    while process.poll() is None and len(metrics(run_dir)) < 5:
        time.sleep(0.05)
    stop(tool, process)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 75, said
    (step,) = run_dir.checkpoint_steps()
    assert 5 <= step < STEPS
    assert checkpoint.fault(run_dir.checkpoint(step)) is None
    assert read_json(run_dir.checkpoint(step) / checkpoint.MANIFEST)["files"]
    process = start(tool, job, run_dir)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert f"resuming after step {step}" in said
    ours, theirs = weights(run_dir.model), weights(expected.model)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_no_program_is_left_behind(tools: Path) -> None:
    """All containers of the tests above have gone."""
    for tool in ("docker", "podman"):
        assert run(tool, "ps", "--all", "--quiet").stdout.split() == []


def test_state_is_short_and_closed(tools: Path) -> None:
    """A unix socket's path has at most 108 bytes; nobody else may write to what is run as root."""
    assert len(os.fsencode(tools / "exec/containerd/containerd.sock")) < 100
    assert tools.stat().st_mode & 0o022 == 0
    assert shutil.disk_usage(tools).free > 2**30
