"""A login node: the base package from a wheel, real Slurm, no torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.cluster import jobs
from tests.runs import ROOT, environment

HEAVY = ["torch", "transformers", "numpy", "tokenizers", "safetensors"]


def test_the_base_package_is_enough(tmp_path: Path, cluster: Path) -> None:
    """Checked, printed, submitted; the script that it writes is in the wheel."""
    job = jobs.make_cluster_job(tmp_path / "job", **{"train.max_steps": 2})
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    source = tmp_path / "source"  # a build leaves its folder there
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".*", "runs"))
    subprocess.run([python, "-m", "pip", "install", "--quiet", source], check=True)
    search = f"import importlib.util as u; print([n for n in {HEAVY} if u.find_spec(n)])"
    own = {name: value for name, value in environment().items() if name != "PYTHONPATH"}

    def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, env=own, cwd=tmp_path)

    assert run(python, "-c", search).stdout.strip() == "[]"
    program = python.with_name("sft-job")
    run(program, "--version")  # compiles
    began = time.perf_counter()
    result = run(program, "submit", job, "--dry-run")
    print(f"dry run: {time.perf_counter() - began:.2f} s")
    assert result.returncode == 0, result.stderr
    assert "128 samples, encoded" in result.stdout
    assert "#SBATCH --nodes=2" in result.stdout
    result = run(program, "submit", job)
    assert result.returncode == 0, result.stderr
    jobs.slurm("scancel", result.stdout.split("submitted: job ")[1].split()[0])
