"""The table of attention kernels: every choice, every refusal, every reason."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sft_job import attention
from sft_job.attention import KERNELS, Heads, Package, choose
from sft_job.errors import HardwareError, ModelError
from sft_job.hardware import Hardware

LLAMA = Heads(128, 32, 8)
ALL = {
    "torch": Package("2.13.0+cu130"),
    "flash-attn": Package("2.8.3.post2"),
    "flash-attn-3": Package("3.0.0"),
    "xformers": Package("0.0.35"),
    "liger-kernel": Package("0.8.5"),
}


def gpu(number: int) -> Hardware:
    """A GPU that says it is of this architecture."""
    capability = divmod(number, 10)
    return Hardware("cuda", 8, f"GPU-{number}", capability, capability >= (8, 0), 80.0)


CPU = Hardware("cpu", 1, "Xeon", None, True, 64.0)


def best(number: int, packages=ALL, precision: str | None = None, heads=LLAMA):
    machine = gpu(number)
    precision = precision or ("bf16" if machine.bf16 else "fp16")
    return choose("auto", machine, precision=precision, heads=heads, packages=packages)


def without(*names: str) -> dict[str, Package]:
    return {name: package for name, package in ALL.items() if name not in names}


# --- what auto takes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "everything", "nothing_but_torch"),
    [
        (70, "xformers", "sdpa"),
        (75, "xformers", "sdpa"),
        (80, "flash_attention_2", "torch_varlen"),
        (86, "flash_attention_2", "torch_varlen"),
        (89, "flash_attention_2", "torch_varlen"),
        (90, "flash_attention_3", "torch_varlen"),
        (100, "flash_attention_2", "torch_varlen"),
        (120, "torch_varlen", "torch_varlen"),
        # Device code of an older architecture with the same major number serves these.
        (87, "flash_attention_2", "torch_varlen"),
        (103, "flash_attention_2", "torch_varlen"),
        (121, "torch_varlen", "torch_varlen"),
        (110, "sdpa", "sdpa"),  # not in the table: what runs anywhere
        (61, "sdpa", "sdpa"),
    ],
)
def test_auto_takes_the_best_kernel_of_the_architecture(
    number: int, everything: str, nothing_but_torch: str
) -> None:
    """With all packages, and with torch alone."""
    assert best(number).value == everything
    assert best(number, {"torch": ALL["torch"]}).value == nothing_but_torch


def test_the_choice_names_its_ground_and_what_was_passed_over() -> None:
    """The reason is made of what was found."""
    assert best(80).reason == "sm_80, bf16, flash-attn 2.8.3.post2"
    assert best(90, without("flash-attn-3")).reason == (
        "sm_90, bf16, flash-attn 2.8.3.post2; not flash_attention_3: flash-attn-3 is not installed"
    )
    assert best(70, without("xformers")).reason == (
        "each sample attended by itself; not xformers: xformers is not installed"
    )
    assert best(110).reason == "sm_110 is not in the table of kernels; this one runs anywhere"
    chosen = choose("auto", CPU, precision="bf16", heads=LLAMA, packages=ALL)
    assert (chosen.value, chosen.reason) == ("sdpa", "CPU: each sample attended by itself")


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        (Package("2.6.3"), "flash-attn 2.6.3 is installed, and 2.7 is needed"),
        (
            Package("2.8.3", "ImportError: undefined symbol: _ZN3c104cuda"),
            "the installed flash-attn 2.8.3 is broken (ImportError: undefined symbol: "
            "_ZN3c104cuda); it must be built for this torch",
        ),
    ],
)
def test_a_package_too_old_or_broken_is_passed_over_with_the_reason(
    package: Package, reason: str
) -> None:
    """Absent, old and broken packages give a reason, never a crash."""
    chosen = best(80, ALL | {"flash-attn": package})
    assert chosen.value == "torch_varlen"
    assert chosen.reason == f"sm_80, bf16, torch 2.13.0+cu130; not flash_attention_2: {reason}"


def test_an_old_torch_leaves_one_sample_at_a_time() -> None:
    """torch's own variable-length attention came with 2.10."""
    assert best(120, {"torch": Package("2.9.1")}).value == "sdpa"


def test_fp32_and_odd_head_dimensions_leave_the_flash_kernels_out() -> None:
    """dtype and head dimension rule kernels out; a dimension of 320 has no flash backward."""
    assert best(80, precision="fp32").value == "sdpa"
    assert best(70, precision="fp32").value == "xformers"
    assert best(80, heads=Heads(320, 8, 8)).value == "sdpa"
    assert best(80, heads=Heads(100, 8, 8)).value == "sdpa"
    assert best(80, heads=Heads(96, 8, 8)).value == "flash_attention_2"
    assert best(80, heads=None).value == "flash_attention_2"


def test_a_model_with_its_own_code_trains_one_sample_per_forward() -> None:
    """auto says so; a packing kernel by name is refused, the model's own is taken."""
    options = {"precision": "bf16", "heads": LLAMA, "packages": ALL, "remote_code": True}
    chosen = choose("auto", gpu(80), **options)
    assert (chosen.value, KERNELS[chosen.value].packs) == ("own", False)
    assert "one sample per forward pass" in chosen.reason
    assert choose("own", gpu(80), **options).value == "own"
    with pytest.raises(ModelError, match="attention cannot be replaced"):
        choose("flash_attention_2", gpu(80), **options)


# --- what is asked for by name ---------------------------------------------------------------


@pytest.mark.parametrize("number", [70, 75, 80, 86, 89, 90, 100, 120, 103, 110])
@pytest.mark.parametrize("name", list(KERNELS))
def test_a_kernel_by_name_is_done_where_it_runs_and_refused_elsewhere(
    name: str, number: int
) -> None:
    """Every row of the table on every architecture; the refusal says what auto would take."""
    machine, kernel = gpu(number), KERNELS[name]
    precision = "bf16" if machine.bf16 else "fp16"

    def ask():
        return choose(name, machine, precision=precision, heads=LLAMA, packages=ALL)

    if not kernel.architectures or attention.base(number, kernel.architectures):
        assert (ask().value, ask().reason.startswith("asked for; sm_")) == (name, True)
        return
    with pytest.raises(HardwareError) as error:
        ask()
    assert str(error.value) == (
        f"model.attention is {name}, but GPU-{number} is sm_{number}, and it runs on "
        f"{', '.join(f'sm_{a}' for a in kernel.architectures)}\n"
        f"  -> use model.attention=auto, which takes {best(number).value} here"
    )


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "xformers"])
def test_a_missing_package_is_named_with_the_remedies(name: str) -> None:
    """The message says what to install."""
    distribution = KERNELS[name].distribution
    with pytest.raises(HardwareError) as error:
        choose(name, gpu(90), precision="bf16", heads=LLAMA, packages=without(distribution))
    assert f"{distribution} is not installed" in str(error.value)
    assert f"or install {distribution}" in str(error.value)


def test_other_refusals_by_name() -> None:
    """dtype, head dimension, CPU."""
    flash = {"packages": ALL, "heads": LLAMA}
    with pytest.raises(HardwareError, match="computation is fp32, and it knows bf16 and fp16"):
        choose("flash_attention_2", gpu(80), precision="fp32", **flash)
    with pytest.raises(HardwareError, match="head dimension is 320, and it takes multiples of 8 "):
        choose("torch_varlen", gpu(80), precision="bf16", heads=Heads(320, 8, 8), packages=ALL)
    with pytest.raises(HardwareError, match="Xeon is not a GPU, and it runs on sm_80"):
        choose("flash_attention_2", CPU, precision="bf16", **flash)


def test_the_table_is_whole() -> None:
    """Every preferred kernel has code for the architecture, and every kernel can be preferred or
    asked for; bf16 kernels are never preferred before Ampere."""
    for number, names in attention.PREFERRED.items():
        for name in names:
            assert attention.base(number, KERNELS[name].architectures) == number
            assert KERNELS[name].packs
    assert set(KERNELS) == {
        "flash_attention_3", "flash_attention_2", "torch_varlen", "xformers", "sdpa", "own",
    }  # fmt: skip


# --- what is installed -----------------------------------------------------------------------


def fake_package(folder: Path, distribution: str, version: str, module: str, code: str) -> None:
    """A distribution with metadata and one module, as pip leaves them."""
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\n"
                                   f"Version: {version}\n")  # fmt: skip
    (folder / module).mkdir()
    (folder / module / "__init__.py").write_text(code)


@pytest.fixture(autouse=True)
def forget_fakes() -> Iterator[None]:
    """A fake package must not be found by other tests (xformers looks for flash_attn)."""
    yield
    sys.modules.pop("flash_attn", None)


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("", None),
        ("raise ImportError('undefined symbol: _ZN3c1021throw')",
         "ImportError: undefined symbol: _ZN3c1021throw"),
        ("import ctypes; ctypes.CDLL('/nowhere/flash.so')", "OSError: /nowhere/flash.so: cannot"),
        ("raise RuntimeError", "RuntimeError"),
    ],
)  # fmt: skip
def test_broken_packages_are_found_by_importing_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, fault: str | None
) -> None:
    """Metadata alone says installed; importing says why it is of no use."""
    fake_package(tmp_path, "flash-attn", "2.8.3", "flash_attn", code)
    monkeypatch.syspath_prepend(tmp_path)
    assert attention.installed()["flash-attn"] == Package("2.8.3")
    found = attention.installed(imported=["flash-attn"])["flash-attn"]
    assert found.version == "2.8.3"
    assert found.fault is None if fault is None else found.fault.startswith(fault)
    if fault:
        assert "flash_attn" not in sys.modules


def test_flash_attn_4_is_not_taken_for_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both bring a module flash_attn; the distribution tells them apart."""
    fake_package(tmp_path, "flash-attn-4", "4.0.0", "flash_attn", "")
    monkeypatch.syspath_prepend(tmp_path)
    assert "flash-attn" not in attention.installed(imported=["flash-attn"])


def test_only_packages_that_matter_are_imported() -> None:
    """A V100 does not wait for flash-attn, nor a CPU for anything."""
    assert attention.candidates("auto", CPU) == set()
    assert attention.candidates("auto", gpu(70)) == {"xformers"}
    assert attention.candidates("auto", gpu(90)) == {
        "flash-attn-3", "flash-attn", "torch", "liger-kernel",
    }  # fmt: skip
    assert attention.candidates("sdpa", gpu(80)) == {"liger-kernel"}
    assert attention.candidates("xformers", gpu(80)) == {"xformers", "liger-kernel"}


def test_the_images_have_what_their_gpus_prefer() -> None:
    """Plans for other machines count on the image that is made for them."""
    for number in (70, 75):
        assert best(number, attention.image_packages(gpu(number))).value == "xformers"
    for number in (80, 90, 100):
        assert best(number, attention.image_packages(gpu(number))).value == "flash_attention_2"
    assert best(120, attention.image_packages(gpu(120))).value == "torch_varlen"
