"""The images' locks against the dependency list that they are made from. Needs no network:
`docker/lock.sh --check` resolves anew."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from sft_job.attention import IMAGES

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# What pip sees in each image: the interpreter, and Linux on x86-64.
PYTHON = {"ampere": "3.12", "volta": "3.12", "cpu": "3.11"}
PIN = re.compile(r"([a-z0-9][a-z0-9-]*)==(\S+)((?: --hash=sha256:[0-9a-f]{64})+)")


def lines(flavour: str) -> list[str]:
    """The lock's requirements, one a line, without comments."""
    text = (ROOT / "docker" / "locks" / f"{flavour}.txt").read_text()
    joined = re.sub(r"\s*\\\n\s*", " ", re.sub(r"(?m)^\s*#.*\n", "", text))
    return [line.strip() for line in joined.splitlines() if line.strip()]


def pins(flavour: str) -> dict[str, Version]:
    matches = [PIN.fullmatch(line) for line in lines(flavour)]
    return {match[1]: Version(match[2]) for match in matches if match}


def requirements(flavour: str) -> list[Requirement]:
    """What docker/lock.sh resolves for a flavour, as pyproject.toml has it."""
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    texts = [
        *project["dependencies"],
        *extras["train"],
        *extras[flavour],
        *PROJECT["dependency-groups"]["build"],
        *PROJECT["build-system"]["requires"],
    ]
    found = [Requirement(text) for text in texts]
    environment = {"python_version": PYTHON[flavour], "sys_platform": "linux"}
    return [r for r in found if r.marker is None or r.marker.evaluate(environment)]


@pytest.mark.parametrize("flavour", PYTHON)
def test_every_requirement_is_satisfied_by_a_pin(flavour: str) -> None:
    """Else pyproject.toml has moved on: run docker/lock.sh."""
    locked = pins(flavour)
    wrong = [
        f"{requirement}: docker/locks/{flavour}.txt has {locked.get(name)}"
        for requirement in requirements(flavour)
        for name in [canonicalize_name(requirement.name)]
        if name not in locked or locked[name] not in requirement.specifier
    ]
    assert wrong == [], "run docker/lock.sh"


@pytest.mark.parametrize("flavour", PYTHON)
def test_every_line_is_a_pin_with_hashes(flavour: str) -> None:
    """No index, no option, no path: whoever installs says where from, and gets these files."""
    assert [line for line in lines(flavour) if not PIN.fullmatch(line)] == []
    text = (ROOT / "docker" / "locks" / f"{flavour}.txt").read_text()
    assert f"#    docker/lock.sh {flavour}\n" in text
    assert "://" not in text


def test_the_gpu_images_differ_in_their_kernels_alone() -> None:
    """One torch, one transformers, one DeepSpeed for both."""
    ampere, volta = (set(pins(flavour).items()) for flavour in ("ampere", "volta"))
    assert {name for name, _ in ampere - volta} == {"flash-attn", "liger-kernel"}
    assert {name for name, _ in volta - ampere} == {"xformers"}


@pytest.mark.parametrize("flavour", PYTHON)
def test_the_locks_take_the_released_sources(flavour: str) -> None:
    """Where a release has no wheel, its sdist is the only file that it has."""
    hashed = {match[1]: match[3].split() for match in map(PIN.fullmatch, lines(flavour)) if match}
    assert len(hashed["deepspeed"]) == 1
    assert len(hashed.get("flash-attn", ["-"])) == 1
    if flavour == "cpu":  # PyPI's other builds of this release are not taken
        assert len(hashed["torch"]) == 1
        assert pins("cpu")["torch"].local == "cpu"
        assert not [name for name in hashed if name.startswith("nvidia-")]


@pytest.mark.parametrize("flavour", IMAGES)
def test_plans_for_the_images_know_their_packages(flavour: str) -> None:
    """`sft-job plan --gpu` chooses kernels by what the image of that GPU has."""
    locked = pins(flavour)
    assert {name: str(locked[name]) for name in IMAGES[flavour]} == {
        name: package.version for name, package in IMAGES[flavour].items()
    }


def test_wheels_are_built_with_the_group_build() -> None:
    """docker/steps/sources.sh names them again, since the image has no pyproject.toml."""
    script = (ROOT / "docker/steps/sources.sh").read_text()
    (names,) = re.findall(r"^names=\$\(python closure\.py (.*)\)$", script, re.MULTILINE)
    group = [Requirement(line).name for line in PROJECT["dependency-groups"]["build"]]
    assert sorted(names.split()) == sorted(["torch", *group])


def test_metadata_given_by_hand_is_of_the_locked_release() -> None:
    """uv ignores it for another release, and then fails at building flash-attn's."""
    (given,) = PROJECT["tool"]["uv"]["dependency-metadata"]
    assert Version(given["version"]) == pins("ampere")[given["name"]]
    assert set(given["requires-dist"]) <= set(pins("ampere"))
