"""The checks of an image at its build, as far as they can be tried without one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docker" / "check_image.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_image", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_image = load()

NO_FLASH_ATTN = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed here"
)
WITHOUT_FLASH_ATTN = "flash_attn cannot be imported: No module named 'flash_attn'"
LOCK = {"torch": "2.10.0", "flash-attn": "2.8.3.post2", "ninja": "1.13.2"}


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        ({}, {}, []),
        ({"sft-job": "0.1.0", "pip": "26.1"}, {}, []),
        ({"ninja": None}, {}, ["ninja is not installed, the lock has 1.13.2"]),
        ({"torch": "2.13.0"}, {}, ["torch 2.13.0 is installed, the lock has 2.10.0"]),
        ({"kernels": "0.17.2"}, {}, ["kernels 0.17.2 is installed, the lock has none"]),
        ({"flash-attn": None}, {"left_out": frozenset({"flash-attn"})}, []),
        (
            {},
            {"left_out": frozenset({"flash-attn"})},
            ["flash-attn 2.8.3.post2 is installed, and this build is without it"],
        ),
        ({"flash-attn-3": "3.0.0"}, {"added": frozenset({"flash-attn-3"})}, []),
        (
            {},
            {"added": frozenset({"flash-attn-3"})},
            ["flash-attn-3 is not installed, and this build is with it"],
        ),
    ],
)
def test_the_environment_is_the_lock(
    change: dict[str, str | None], options: dict[str, frozenset[str]], expected: list[str]
) -> None:
    """Nothing missing, nothing else, nothing beside it but what the build says."""
    installed = {name: version for name, version in (LOCK | change).items() if version}
    assert check_image.package_faults(LOCK, installed, **options) == expected


@pytest.mark.parametrize(
    ("flavour", "flags", "missing"),
    [
        ("ampere", "sm_70 sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", []),
        ("volta", "sm_70 sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", []),
        ("volta", "sm_75 sm_80 sm_86 sm_90 sm_100 sm_103 sm_120", ["sm_70"]),
        ("ampere", "sm_80 sm_90a compute_100", ["sm_90", "sm_100"]),
        ("cpu", "", []),
    ],
)
def test_torch_has_the_architectures(flavour: str, flags: str, missing: list[str]) -> None:
    """As its wheels on PyPI say it, 2.10 and 2.11."""
    wanted = check_image.ARCHITECTURES[flavour]
    assert check_image.missing_architectures(wanted, flags) == missing


def test_device_code_of_a_real_library() -> None:
    """xformers' wheel, whose architectures cuobjdump lists as sm_75, sm_80 and sm_90a."""
    library = check_image.library_of("xformers._C")
    assert check_image.device_code(library) == {75, 80, 90}
    assert check_image.code_faults("xformers", library, (75, 80)) == []
    assert check_image.code_faults("xformers", library, (70, 75)) == [
        f"xformers is built without sm_70: {library} has sm_75, sm_80, sm_90"
    ]


def fat_binary(*entries: tuple[int, int]) -> bytes:
    """(kind, architecture) of each entry, as nvcc lays them out."""
    parts = [
        struct.pack("<HHIQIIHHI", kind, 0x101, 64, 8, 0, 0, 0, 1, number).ljust(64, b"\0")
        + b"code...."
        for kind, number in entries
    ]
    body = b"".join(parts)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_text_for_the_driver_to_compile_is_not_device_code(tmp_path: Path) -> None:
    """PTX (kind 1) counts for nothing, and neither does a magic number that stands by chance."""
    library = tmp_path / "op.so"
    chance = struct.pack("<I", 0xBA55ED50)
    library.write_bytes(chance + b"x" * 99 + fat_binary((1, 90), (2, 80)) + b"yy" + chance)
    assert check_image.device_code(library) == {80}
    assert check_image.code_faults("fused_adam", library, (80, 90)) == [
        f"fused_adam is built without sm_90: {library} has sm_80"
    ]


def test_a_cpu_build_has_no_device_code() -> None:
    """What DS_BUILD_FUSED_ADAM=1 gives where DeepSpeed takes the machine for a CPU."""
    library = check_image.library_of("torch._C")
    assert check_image.device_code(library) == set()
    assert "has no device code" in check_image.code_faults("fused_adam", library, (80,))[0]


def test_bf16_adam_is_told_by_its_kernel(tmp_path: Path) -> None:
    """The names that a build of DeepSpeed 0.19.8 registers."""
    kernel = "_Z25multi_tensor_apply_kernelI18TensorListMetadataILi4EE11AdamFunctorI{}lEJffEE"
    library = tmp_path / "fused_adam_op.so"
    library.write_bytes(
        kernel.format("fE").encode() + b"\0" + kernel.format("N3c104HalfE").encode()
    )
    assert not check_image.has_bf16_adam(library)
    library.write_bytes(library.read_bytes() + kernel.format("N3c108BFloat16E").encode())
    assert check_image.has_bf16_adam(library)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    environ = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, capture_output=True, text=True, env=environ)


def errors(said: subprocess.CompletedProcess[str]) -> list[str]:
    return re.findall(r"(?m)^error: (.*)$", said.stderr)


@pytest.fixture(scope="module")
def lock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the environment that the tests run in."""
    file = tmp_path_factory.mktemp("lock") / "here.txt"
    pins = [f"{d.metadata['Name']}=={d.version} \\" for d in importlib.metadata.distributions()]
    file.write_text("\n".join(pins) + "\n")
    return file


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is a CUDA build")
def test_a_right_environment_passes(lock: Path) -> None:
    """The CPU image is an environment like this one."""
    said = run("cpu", "--lock", str(lock))
    assert errors(said) == []
    assert said.returncode == 0
    assert said.stdout.count(": ok\n") == 4


@NO_FLASH_ATTN
def test_all_faults_of_a_wrong_image_are_named(lock: Path, tmp_path: Path) -> None:
    """No check stops at the first fault, and none keeps another from running."""
    wrong = tmp_path / "wrong.txt"
    wrong.write_text(re.sub(r"(?m)^ninja==\S+", "ninja==0.1", lock.read_text()) + "nobody==1 \\\n")
    said = run("ampere", "--lock", str(wrong))
    assert said.returncode == 1
    found = errors(said)
    version = importlib.metadata.version("ninja")
    assert f"ninja {version} is installed, the lock has 0.1" in found
    assert "nobody is not installed, the lock has 1" in found
    assert WITHOUT_FLASH_ATTN in found
    assert "DeepSpeed's op fused_adam is not built: build it with DS_BUILD_FUSED_ADAM=1" in found


@NO_FLASH_ATTN
def test_a_build_without_flash_attn_uses_torch(lock: Path) -> None:
    """WITH_FLASH_ATTN=0: the choice falls on torch's kernel, and that is right."""
    said = run("ampere", "--lock", str(lock), WITH_FLASH_ATTN="0")
    assert "attention kernels import and are chosen: ok\n" in said.stdout
