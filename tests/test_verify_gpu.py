"""`docker/verify-gpu.sh` is ready for a GPU machine: what of it runs without one."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import kernel_checks

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docker" / "verify-gpu.sh"
PROGRAM = ROOT / "docker" / "verify_gpu.py"


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": os.environ["PATH"]} | environment
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=environ)


def words(*arguments: str, **environment: str) -> list[str]:
    """The command that would be run."""
    said = script("--dry-run", *arguments, **environment)
    assert said.returncode == 0, said.stderr
    return shlex.split(said.stdout)


def test_docker_gets_the_gpus_and_nothing_else(tmp_path: Path) -> None:
    """Offline, read-only, as the caller; sft_job is the image's, the checkout's is left out."""
    command = words("--tool", "docker", "sft_job:1", "kernels", "ops", TMPDIR=str(tmp_path))
    assert command[:3] == ["docker", "run", "--rm"]
    for option in ("--read-only", "--gpus", "--shm-size=16g", f"{os.getuid()}:{os.getgid()}"):
        assert option in command
    assert command[command.index("--network") + 1] == "none"
    mounted = [command[i + 1] for i, word in enumerate(command) if word == "--volume"]
    inside = [f"{ROOT / part}:/verify/{part}:ro" for part in ("docker", "tests", "benchmarks")]
    assert mounted == [*inside, f"{tmp_path}:/scratch"]
    image = command.index("sft_job:1")
    assert command[image + 1 :] == [
        "python", "/verify/docker/verify_gpu.py", "--scratch", "/scratch", "kernels", "ops",
    ]  # fmt: skip


def test_podman_and_apptainer_have_their_own_words(tmp_path: Path) -> None:
    """A .sif is Apptainer's; how the image was built goes in."""
    podman = words("--tool", "podman", "sft_job:1", WITH_FLASH_ATTN="0")
    assert podman[podman.index("--device") + 1] == "nvidia.com/gpu=all"
    assert "WITH_FLASH_ATTN=0" in podman
    apptainer = words("--scratch", str(tmp_path), "sft_job.sif")
    assert apptainer[:3] == ["apptainer", "exec", "--nv"]
    assert f"{tmp_path}:/scratch" in apptainer
    assert "WITH_FLASH_ATTN=0" not in apptainer


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "which image? For example: docker/verify-gpu.sh sft_job:latest"),
        (
            ["--tool", "kubectl", "x"],
            "unknown tool kubectl; docker, podman and apptainer are known",
        ),
        (["--fast", "x"], "unknown option --fast; --help has them"),
        (["x", "--tool"], "--tool needs a value"),
        (
            ["--scratch", "/nowhere", "--tool", "docker", "x"],
            "/nowhere is no folder; give one with",
        ),
    ],
)
def test_mistakes_are_named(arguments: list[str], said: str) -> None:
    """Before a container is started."""
    answer = script(*arguments)
    assert answer.returncode == 2
    assert answer.stderr.startswith(f"docker/verify-gpu.sh: {said}")


def program(tmp_path: Path, *checks: str) -> subprocess.CompletedProcess[str]:
    """The part inside the image, without a GPU."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "sft-job").write_text(f'#!/bin/sh\nexec {sys.executable} -m sft_job "$@"\n')
    (commands / "sft-job").chmod(0o755)
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    path = {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, str(PROGRAM), "--scratch", str(tmp_path), *checks]
    environ = os.environ | hidden | path
    return subprocess.run(command, capture_output=True, text=True, env=environ)


def test_without_a_gpu_it_stops_at_once(tmp_path: Path) -> None:
    """All checks are asked for, the first one says why none can be made."""
    said = program(tmp_path)
    assert said.returncode == 1
    assert said.stderr.startswith("error: there is no GPU\n  -> run this on the machine whose GPUs")
    assert said.stdout.startswith("=== gpus\n")
    assert "| gpus | FAILED (2) |" in said.stdout
    assert "=== kernels" not in said.stdout


def test_it_trains_and_reads_the_metrics(tmp_path: Path) -> None:
    """The check of an engine is a real job; here on a CPU, where MFU is unknown."""
    said = program(tmp_path, "fsdp")
    assert said.returncode == 0, said.stderr
    assert "MFU [None, None, None]" in said.stdout
    assert "| fsdp | ok |" in said.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "bin"]  # its own folder is gone


def test_a_wrong_kernel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself: right on the kernel that runs anywhere, wrong on one that leaks."""
    from sft_job import varlen

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert kernel_checks.attention_error("sdpa", "fp32", 16, (4, 2)) <= 1
    right = varlen.FUNCTIONS["sdpa"]()

    def leaks(q, k, v, packed, scale, dropout):
        one = varlen.Packed([len(q)], packed.cu_seqlens[[0, -1]], len(q))
        return right(q, k, v, one, scale, dropout)

    monkeypatch.setitem(varlen.FUNCTIONS, "sdpa", lambda: leaks)
    assert kernel_checks.attention_error("sdpa", "fp32", 16, (4, 2)) > 100


def test_optimizers_are_compared() -> None:
    """AdamW is itself; weight decay of another kind, or no step at all, is seen in any dtype."""
    import torch

    spec = importlib.util.spec_from_file_location("verify_gpu", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    verify_gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(verify_gpu)
    assert verify_gpu.adam_difference(torch.optim.AdamW, "cpu", torch.float32) == 0
    assert verify_gpu.adam_difference(torch.optim.Adam, "cpu", torch.float32) > 100
    for kind in (torch.bfloat16, torch.float16):
        assert verify_gpu.adam_difference(torch.optim.SGD, "cpu", kind) > 1
