"""What is built: contents, labels, bill of materials; and builds that must fail."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sft_job import __version__, cli
from tests.images import containers
from tests.images.containers import ROOT, STAND_IN, run

HERE = Path(__file__).parent


def inside(image: str, *words: str) -> str:
    """As root, who may look everywhere."""
    return run("docker", "run", "--rm", "--network", "none", "--user", "0", image, *words).stdout


def test_structure(image: str) -> None:
    run(
        "container-structure-test", "test", "--no-color", "--driver", "docker",
        "--image", image, "--config", HERE / "structure.yaml",
    )  # fmt: skip


def test_configuration_for_signals(image: str) -> None:
    found = run("docker", "inspect", "--format", "{{.Config.StopSignal}}", image).stdout
    assert found.strip() == "SIGTERM"


def test_v100_file_builds_on_the_same_layers(image: str) -> None:
    """But for its last steps it is the other file: from Docker's cache."""
    arguments = ["--file", ROOT / "docker/Dockerfile.v100", "--build-arg", "FLAVOR=cpu"]
    secret = HERE / "no-index.conf"
    build = ["docker", "build", *STAND_IN, *arguments, "--secret", f"id=pip_conf,src={secret}"]
    run(*build, "--tag", "localhost/sft_job:v100", ROOT, timeout=400)
    assert "sft-job " + __version__ in inside("localhost/sft_job:v100", "--version")


def test_build_info_says_what_was_built(image: str) -> None:
    info = json.loads(inside(image, "cat", "/opt/sft_job/BUILD_INFO.json"))
    assert info["version"] == __version__
    assert info["flavor"] == "cpu"
    assert info["packages"]["torch"] == "2.13.0+cpu"
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", info["revision"])
    assert inside(image, "cat", "/opt/sft_job/commands").split() == list(cli.COMMANDS)


def test_bill_of_materials_is_valid_and_whole(tools: Path, image: str, tmp_path: Path) -> None:
    """By CycloneDX's own schema; every package of the lock and of the system, each once."""
    file = tmp_path / "sbom.cdx.json"
    file.write_text(inside(image, "cat", "/opt/sft_job/sbom.cdx.json"))
    program = (
        "import sys; from cyclonedx.schema import SchemaVersion; "
        "from cyclonedx.validation.json import JsonStrictValidator; "
        "fault = JsonStrictValidator(SchemaVersion.V1_6).validate_str(open(sys.argv[1]).read()); "
        "sys.exit(str(fault) if fault else 0)"
    )
    run(tools / "lint/bin/python", "-c", program, file)
    components = json.loads(file.read_text())["components"]
    found = [component["bom-ref"] for component in components]
    assert len(found) == len(set(found))
    lock = (ROOT / "docker/locks/cpu.txt").read_text()
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", lock, re.MULTILINE):
        assert f"pkg:pypi/{name}@{version.replace('+', '%2B')}" in found
    assert any(ref.startswith("pkg:deb/debian/tini@") for ref in found)


def test_nothing_of_the_builder_is_left(image: str) -> None:
    """Neither its package settings nor files that other users could not read or could change."""
    find = "find / -xdev ( -path /proc -o -path /sys ) -prune -o"
    loose = inside(image, *find.split(), "-type", "f", "-perm", "-o+w", "-print")
    assert loose == ""
    hidden = inside(image, "find", "/opt", "!", "-perm", "-o+r", "!", "-type", "l")
    assert hidden == ""
    history = run("docker", "history", "--no-trunc", "--format", "{{.CreatedBy}}", image).stdout
    assert "index-url" not in history
    assert "no-index = true" not in history


# --- builds that must not succeed --------------------------------------------------------------


def refused(*words: str | Path, said: str) -> None:
    result = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=300
    )
    assert result.returncode != 0
    assert said in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["image", "--flavor", "hopper"], "--flavor hopper is not known"),
        (["image", "--flavor", "volta", "--fa3", "x"], "flash-attn has no kernels for V100"),
        (["image", "--fa3", "/elsewhere/flash_attn_3-3.0.0.whl"], "the build sees no other folder"),
        (["image", "--tool", "kaniko"], "docker, buildah or podman"),
        (["image", "--tag"], "--tag needs a value"),
        (["image", "--offline", "--pip-conf", "x"], "--offline asks no mirror"),
        (["save", "--tag", "localhost/nothing:here", "/dev/null"], "cannot be saved by docker"),
        (["sif", "/nowhere.tar", "x.sif"], "/nowhere.tar is not there"),
        (["fly"], "unknown command fly"),
    ],
)
def test_build_sh_refuses(tools: Path, arguments: list[str], said: str) -> None:
    refused(ROOT / "docker/build.sh", *arguments, said=said)


def test_fa3_wheel_goes_in_by_its_hash_alone(wheels: Path, tmp_path: Path) -> None:
    """The stage of the flash-attn 3 wheel, with a file of that name."""
    wheel = wheels / "flash_attn_3-0.0.0-cp39-abi3-linux_x86_64.whl"
    wheel.write_bytes(b"not what you think")
    try:
        stage = ["docker", "build", *STAND_IN, "--target", "wheel-fa3", "--build-arg", "WITH_FA3=1"]
        for digest, said in (("", "needs FA3_SHA256"), ("0" * 64, "has the SHA-256 000")):
            refused(*stage, "--build-arg", f"FA3_SHA256={digest}", ROOT, said=said)
        digest = run("sha256sum", wheel).stdout.split()[0]
        run(*stage, "--build-arg", f"FA3_SHA256={digest}", ROOT)
    finally:
        wheel.unlink()


def test_a_package_with_another_hash_is_refused(wheels: Path, tmp_path: Path) -> None:
    """In a copy of the checkout whose lock names another hash for one wheel."""
    edit_lock(tmp_path, r"(?m)^(filelock==\S+ \\\n)(?: +--hash=\S+( \\)?\n)+",
              rf"\1    --hash=sha256:{'0' * 64}\n")  # fmt: skip
    refused(*stage("environment", tmp_path), said="DO NOT MATCH THE HASHES")


def edit_lock(copy: Path, pattern: str, new: str) -> None:
    """Copy what a build sees of the checkout, with another text in the cpu lock."""
    shutil.copytree(ROOT / "docker", copy / "docker", copy_function=_link)
    lock = copy / "docker/locks/cpu.txt"
    text = lock.read_text()
    lock.unlink()
    lock.write_text(re.sub(pattern, new, text))
    assert lock.read_text() != text


def stage(target: str, context: Path = ROOT) -> list[str | Path]:
    return [
        "docker", "build", *STAND_IN, "--build-arg", "FLAVOR=cpu", "--target", target,
        "--secret", f"id=pip_conf,src={HERE / 'no-index.conf'}", "--progress", "plain",
        "--file", ROOT / "Dockerfile", context,
    ]  # fmt: skip


def _link(source: str, target: str) -> None:
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)


def test_wheelhouse_is_what_the_lock_names(image: str, tmp_path: Path) -> None:
    """The target behind `docker/build.sh wheelhouse`, from a wheelhouse: the same files again."""
    run(*stage("wheelhouse"), "--output", f"type=local,dest={tmp_path}", timeout=400)
    found = {file.name for file in tmp_path.iterdir()}
    lock = (ROOT / "docker/locks/cpu.txt").read_text()
    assert len(found) == len(re.findall(r"^[\w.-]+==", lock, re.MULTILINE))
    assert found <= {file.name for file in (ROOT / "docker/wheels").iterdir()}


@pytest.mark.widest
@pytest.mark.parametrize("tool", ["buildah", "podman"])
def test_other_tools_build_it_too(wheels: Path, tool: str) -> None:
    tag = containers.build(tool, "--tag", f"localhost/sft_job:{tool}")
    words = ["podman", "run", "--rm", "--network", "none", tag, "--version"]
    assert __version__ in run(*words).stdout


@pytest.mark.widest
def test_nothing_is_compiled_again_for_another_change(image: str, tmp_path: Path) -> None:
    """The lock loses a package that nothing compiled needs, and docker/wheels gains a file."""
    edit_lock(tmp_path, r"(?m)^werkzeug==(.*\n)( .*\n)+", "")
    (tmp_path / "docker/wheels/another.txt").write_text("not of the lock")
    said = run(*stage("wheel-deepspeed", tmp_path), timeout=400).stderr
    steps = dict(re.findall(r"^#(\d+) \[([\w-]+ \d+/\d+)\] RUN", said, re.MULTILINE))
    again = {name for number, name in steps.items() if f"#{number} CACHED" not in said}
    assert {name.split()[0] for name in again} == {"environment", "sources"}


@pytest.mark.widest
def test_a_site_without_internet_builds_on_prepared_bases(wheels: Path) -> None:
    """docs/images.md: bases that have the system packages, docker/wheels, and no network at all."""
    bases = []
    for name, target in (("FINAL", "python-base"), ("BUILD", "compiler-base")):
        tag = f"localhost/prepared:{target}"
        run(*stage(target), "--tag", tag, timeout=400)
        bases += ["--build-arg", f"{name}_BASE={tag}"]
    build_sh = [ROOT / "docker/build.sh", "image", "--tool", "docker", "--flavor", "cpu"]
    run(*build_sh, "--offline", "--tag", "localhost/sft_job:inside", "--", "--network", "none",
        *bases, timeout=800)  # fmt: skip
    assert __version__ in inside("localhost/sft_job:inside", "--version")
