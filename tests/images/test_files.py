"""The files that images are made from, without building any; and what cannot be built here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from sft_job import __version__
from tests.images.containers import BASE, ROOT, STAND_IN, run

DOCKERFILES = ["Dockerfile", "docker/Dockerfile.v100"]
SCRIPTS = sorted(
    str(file.relative_to(ROOT))
    for folder in ("docker", "docker/steps", "slurm", "tests/cluster", "tests/images")
    for file in (ROOT / folder).glob("*.sh")
)


@pytest.mark.parametrize("file", DOCKERFILES)
def test_hadolint(tools: Path, file: str) -> None:
    run("hadolint", "--failure-threshold", "style", ROOT / file)


@pytest.mark.parametrize("file", SCRIPTS)
def test_shellcheck(tools: Path, file: str) -> None:
    run("env", "-C", ROOT, "shellcheck", "--external-sources", file)


@pytest.mark.parametrize("file", DOCKERFILES)
def test_docker_build_check(tools: Path, file: str) -> None:
    """Docker's own rules: undefined arguments, secrets, wrong stages."""
    run("docker", "build", "--check", *STAND_IN, "--file", ROOT / file, ROOT)


def instructions(file: str) -> list[str]:
    """Without comments, blank lines and what only one of the images has."""
    text = (ROOT / file).read_text().replace("\\\n", " ")
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def test_both_images_are_built_alike() -> None:
    """Dockerfile.v100 is Dockerfile without flash-attn, for other architectures."""

    def common(line: str) -> str:
        line = re.sub(r" --mount=\S*from=wheel-(flash-attn|fa3)\S*", "", line)
        line = re.sub(r" (WITH_FLASH_ATTN|WITH_FA3)=\S+", "", line)
        return re.sub(r"^ARG (FLAVOR|TORCH_CUDA_ARCH_LIST)=.*", r"ARG \1=", line)

    ours, theirs = instructions("Dockerfile"), instructions("docker/Dockerfile.v100")
    start = ours.index("FROM builder AS wheel-flash-attn-1")
    end = ours.index("FROM environment AS wheel-sft-job")
    rest = [line for line in (*ours[:start], *ours[end:]) if not line.startswith("ARG WITH_")]
    assert [common(line) for line in rest] == [common(line) for line in theirs]


@pytest.mark.parametrize("file", DOCKERFILES)
def test_builds_on_old_tools_and_offline(file: str) -> None:
    """No frontend from a registry, no here-documents, no secret as an argument, no ENV that
    Apptainer would put above the user's own."""
    text = (ROOT / file).read_text()
    assert not re.search(r"^#\s*syntax\s*=", text, re.MULTILINE)
    assert "<<" not in text
    assert not re.search(r"^(ARG|ENV).*(TOKEN|PASSWORD|SECRET|KEY)", text, re.MULTILINE)
    (environment,) = [line for line in instructions(file) if line.startswith("ENV ")]
    users = ("HF_HOME", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME", "NCCL_",
             "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "PYTORCH_VERSION")  # fmt: skip
    assert [name for name in users if name in environment] == []
    assert f"ARG VERSION={__version__}\n" in text


def test_no_host_of_an_index_in_what_is_shipped() -> None:
    """Mirrors come from outside, as a secret."""
    files = subprocess.run(
        ["git", "ls-files", "Dockerfile", "docker", ".dockerignore"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert files
    for file in files:
        text = (ROOT / file).read_text()
        assert not re.search(r"index-url|extra-index|trusted-host|https?://(?!schema)", text), file


@pytest.mark.parametrize("part", ["only", "without"])
def test_a_lock_is_divided_without_loss(part: str) -> None:
    lock = (ROOT / "docker/locks/ampere.txt").read_text()
    names = ("deepspeed", "flash-attn")
    script = ROOT / "docker/steps/lock-part.sh"
    found = subprocess.run(
        [script, part, *names], input=lock, capture_output=True, text=True, check=True
    ).stdout
    pins = set(re.findall(r"^([\w.-]+)==", lock, re.MULTILINE))
    mine = set(re.findall(r"^([\w.-]+)==", found, re.MULTILINE))
    assert mine == (set(names) if part == "only" else pins - set(names))
    hashes = [line for line in found.splitlines() if "--hash" in line]
    whole = [line for line in lock.splitlines() if "--hash" in line]
    assert set(hashes) <= set(whole)
    assert all(re.search(rf"^{name}==\S+ \\\n +--hash=", found, re.MULTILINE) for name in mine)


# --- what the CUDA stages do with their source archives, as far as that goes without CUDA -----


@pytest.fixture(scope="session")
def sources(tools: Path) -> dict[str, Path]:
    """The source archives of flash-attn and DeepSpeed, fetched by the lock's hashes, unpacked."""
    folder = tools / "sources"
    folder.mkdir(exist_ok=True)
    part = [ROOT / "docker/steps/lock-part.sh", "only", "deepspeed", "flash-attn"]
    with open(ROOT / "docker/locks/ampere.txt") as lock, open(folder / "lock.txt", "w") as output:
        subprocess.run(part, stdin=lock, stdout=output, check=True)
    # The words of docker/steps/sources.sh.
    run(
        "env", "FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE", "DS_ACCELERATOR=cpu",
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation",
        "--require-hashes", "--no-binary", ":all:", "--requirement", folder / "lock.txt",
        "--dest", folder, timeout=300,
    )  # fmt: skip
    found = {}
    for name in ("deepspeed", "flash_attn"):
        (archive,) = folder.glob(f"{name}-*.tar.gz")
        target = folder / name
        if not target.exists():
            with tarfile.open(archive) as file:
                file.extractall(target, filter="data")
        (found[name],) = target.iterdir()
    return found


def test_flash_attn_is_built_as_the_dockerfile_says(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    """FORCE_BUILD keeps its setup from looking for a wheel on the web; the others are read."""
    setup = (sources["flash_attn"] / "setup.py").read_text()
    for name in (
        "FLASH_ATTENTION_FORCE_BUILD",
        "FLASH_ATTN_CUDA_ARCHS",
        "MAX_JOBS",
        "NVCC_THREADS",
    ):
        assert f'"{name}"' in setup, name
    for value, code, said in (("TRUE", 0, ""), ("FALSE", 1, "get_wheel_url")):
        result = run(
            # Nobody else's wheel could come: there is no network, in either case.
            "unshare", "--net", "env", "-C", sources["flash_attn"], "PYTHONDONTWRITEBYTECODE=1",
            "FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE", f"FLASH_ATTENTION_FORCE_BUILD={value}",
            sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", tmp_path / value,
            code=code,
        )  # fmt: skip
        assert said in result.stderr
        assert len(list((tmp_path / value).glob("flash_attn-*.whl"))) == (code == 0)
    architectures = re.search(r"FLASH_ATTN_CUDA_ARCHS=\"(.*)\"", (ROOT / "Dockerfile").read_text())
    assert architectures is not None
    program = (
        "import os; text = open('setup.py').read(); start = text.index('def cuda_archs'); "
        "exec(text[start:text.index('\\n\\n', start)]); print(cuda_archs())"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=sources["flash_attn"], check=True,
        capture_output=True, text=True, env={"FLASH_ATTN_CUDA_ARCHS": architectures[1]},
    ).stdout  # fmt: skip
    assert found.strip() == str(["80", "90", "100"])


@pytest.mark.parametrize(
    ("accelerator", "source"),
    [("cuda", "multi_tensor_adam.cu"), ("cpu", "csrc/cpu/adam")],
)
def test_deepspeed_builds_its_cuda_ops_when_told(
    sources: dict[str, Path], accelerator: str, source: str
) -> None:
    """Its own setup, asked without a GPU: DS_ACCELERATOR decides what fused_adam is made of."""
    program = """
import setuptools, sys, types
from op_builder.all_ops import ALL_OPS
ours = ("DS_BUILD_FUSED_ADAM", "DS_BUILD_UTILS")
print(sorted(name for name, op in ALL_OPS.items() if op.BUILD_VAR in ours))
print(ALL_OPS["fused_adam"].sources())
"""
    found = run(
        "env", "-C", sources["deepspeed"], f"DS_ACCELERATOR={accelerator}", "PYTHONPATH=.",
        sys.executable, "-c", program,
    ).stdout  # fmt: skip
    assert source in found
    assert "fused_adam" in found
    assert ("utils" in found) == (accelerator == "cuda")


@pytest.mark.parametrize(
    ("file", "bf16"), [("Dockerfile", True), ("docker/Dockerfile.v100", False)]
)
def test_deepspeed_reads_the_architectures(sources: dict[str, Path], file: str, bf16: bool) -> None:
    """The list of each Dockerfile gives code for just these GPUs, and bf16 where they have it."""
    match = re.search(r'^ARG TORCH_CUDA_ARCH_LIST="(.*)"', (ROOT / file).read_text(), re.MULTILINE)
    assert match is not None
    program = (
        "from op_builder.fused_adam import FusedAdamBuilder; op = FusedAdamBuilder(); "
        "print(op.compute_capability_args(), op.enable_bf16)"
    )
    found = run(
        "env", "-C", sources["deepspeed"], "DS_ACCELERATOR=cuda", "PYTHONPATH=.",
        f"TORCH_CUDA_ARCH_LIST={match[1]}", sys.executable, "-c", program,
    ).stdout  # fmt: skip
    wanted = [f"sm_{number.replace('.', '')}" for number in match[1].split(";")]
    assert re.findall(r"code=(sm_\d+)", found) == wanted
    assert found.strip().endswith(str(bf16))


def test_base_is_a_stand_in() -> None:
    """The real bases are what the files name by default."""
    for file in DOCKERFILES:
        text = (ROOT / file).read_text()
        assert BASE not in text
        assert re.search(r"^ARG BUILD_BASE=\S+-devel-ubuntu24\.04$", text, re.MULTILINE)
        assert re.search(r"^ARG FINAL_BASE=\S+ubuntu:24\.04$", text, re.MULTILINE)


def test_bake_file(tools: Path) -> None:
    """Both images, with the arguments that their files have, in this version."""
    file = ROOT / "docker/docker-bake.hcl"
    plan = json.loads(run("docker", "buildx", "bake", "--print", "--file", file).stdout)
    for name, dockerfile in zip(("ampere", "volta"), DOCKERFILES, strict=True):
        target = plan["target"][name]
        assert target["dockerfile"] == dockerfile
        assert target["tags"] == [f"sft_job:{__version__}-{name}"]
        text = (ROOT / dockerfile).read_text()
        for argument, value in target["args"].items():
            declared = re.findall(rf"^ARG {argument}=(.*)$", text, re.MULTILINE)
            assert declared, argument
            assert value == declared[0].strip('"'), argument
