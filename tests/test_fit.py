"""What fits on which GPUs, and what is said when it does not."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from sft_job import fit, hardware, plan
from sft_job.attention import image_packages
from sft_job.config import load
from sft_job.errors import HardwareError
from sft_job.facts import KNOWN_FACTS
from sft_job.hardware import Hardware
from sft_job.memory import estimate
from sft_job.plan import Plan, plan_for, resolve
from tests.runs import ROOT

LLAMA = KNOWN_FACTS["meta-llama/Llama-2-7b-hf"]
CPU = Hardware("cpu", 1, "Xeon", None, True, 64.0)


@pytest.fixture
def planned(job_file: Path):
    """The plan of the minimal job as a Llama-2-7B, for GPUs that are not here."""

    def make(gpu: str, count: int, *overrides: str) -> Plan:
        machine = hardware.named(gpu, count)
        config = load(job_file, overrides)
        return resolve(config, machine, count, None, LLAMA, image_packages(machine))

    return make


def level(made: Plan) -> tuple[str, int | None]:
    return made.activation_checkpointing.value, made.saved_products


def test_auto_takes_the_least_recomputation_that_fits(planned) -> None:
    """The more memory, the less is recomputed; what is taken fits, the next better does not."""
    order = [("none", None), *(("selective", k) for k in range(6, -1, -1)), ("full", None)]
    places = []
    for count in (4, 5, 6, 8, 12, 32):
        made = planned("a100-40", count, "train.micro_batch_tokens=8192")
        assert made.remedy is None
        places.append(order.index(level(made)))
        assert made.memory.total <= made.memory_room
        better = places[-1] - 1
        if better >= 0:
            question = fit.question_of(
                load_config(made), hardware.named("a100-40", count), count, LLAMA, made.step,
                made.precision, made.attention, made.cross_entropy,
            )  # fmt: skip
            setting = dataclasses.replace(
                question.setting, tokens=8192, supervised=8192,
                recompute=order[better][0], saved_products=order[better][1] or 0,
            )  # fmt: skip
            assert estimate(LLAMA, setting).total > made.memory_room
    assert places == sorted(places, reverse=True)
    assert len(set(places)) >= 3


def load_config(made: Plan):
    """A configuration with the settings that matter here."""
    return load(ROOT / "configs/vicuna-7b.yaml", [f"data.seq_len={made.seq_len}"])


def test_a_named_degree_is_done_whether_or_not_it_fits(planned) -> None:
    """Only auto chooses; selective keeps as much as fits."""
    full = planned("a100-80", 8, "train.activation_checkpointing=full")
    assert (level(full), full.activation_checkpointing.reason) == (("full", None), "asked for")
    none = planned("a100-40", 4, "train.activation_checkpointing=none")
    assert level(none) == ("none", None)
    assert none.memory.total > none.memory_room
    assert "train.activation_checkpointing=" in none.remedy
    room = planned("a100-80", 8, "train.activation_checkpointing=selective")
    tight = planned("a100-40", 5, "train.activation_checkpointing=selective",
                    "train.micro_batch_tokens=8192")  # fmt: skip
    assert room.saved_products == 6 > tight.saved_products
    assert "of the first 6 matrix products of a layer" in tight.activation_checkpointing.reason


def test_unknown_memory_takes_the_least_and_refuses_auto_sizes(job_file: Path) -> None:
    """Nothing is guessed about a device that says nothing."""
    machine = Hardware("cuda", 4, "NVIDIA X1", (8, 0), True, None)
    packages = image_packages(machine)
    made = resolve(load(job_file), machine, 4, None, LLAMA, packages)
    assert level(made) == ("full", None)
    assert made.activation_checkpointing.reason == (
        "the memory of this device is not known: the least memory"
    )
    assert made.remedy is None
    with pytest.raises(HardwareError) as error:
        resolve(load(job_file, ["train.micro_batch_tokens=auto"]), machine, 4, None, LLAMA,
                packages)  # fmt: skip
    assert str(error.value) == (
        "train.micro_batch_tokens is auto, but the memory of this device is not known\n"
        "  -> give a number, such as 8192"
    )


def test_a_model_that_is_not_here_takes_the_least_memory(job_file: Path) -> None:
    """Without its shape nothing can be computed; the plan says so."""
    machine = hardware.named("a100-80", 8)
    made = resolve(load(job_file), machine, 8, None, None, image_packages(machine))
    assert level(made) == ("full", None)
    assert "the model is not here yet" in made.activation_checkpointing.reason
    assert made.memory is None


def test_auto_sizes_fit_and_grow_with_the_memory(planned) -> None:
    """At least a longest sample, at most what a step needs; a slow link wants larger rows."""
    sizes = {}
    for gpu, count in (("a100-40", 4), ("a100-80", 8), ("a100-pcie-80", 8)):
        made = planned(gpu, count, "train.micro_batch_tokens=auto")
        assert made.memory.total <= made.memory_room
        assert made.seq_len <= made.micro_batch_tokens <= fit.MOST_TOKENS
        assert made.micro_batch_reason == "the fastest that fits"
        sizes[gpu] = made.micro_batch_tokens
    assert sizes["a100-40"] <= sizes["a100-80"] <= sizes["a100-pcie-80"]
    assert fit.token_options(2048, 3000) == [2048, 4096]
    assert fit.token_options(3000, 10**6) == [3000, 4096, 8192, 16384, 32768]
    assert fit.token_options(100_000, 10**6) == [100_000, 131_072]


def test_processes_of_one_cpu_share_its_memory() -> None:
    """A GPU is one rank's; a machine's memory is divided."""
    alone, shared = fit.capacity(CPU, 1), fit.capacity(CPU, 4)
    assert alone == int((64 - 1) * 0.95 * 2**30)
    assert shared == int((16 - 1) * 0.95 * 2**30)
    gpu = hardware.named("a100-40", 8)
    assert fit.capacity(gpu, 8) == fit.capacity(gpu, 1) == int((40 - 1.5) * 0.95 * 2**30)
    assert fit.capacity(Hardware("cpu", 1, "small", None, True, 0.5), 1) == 0


@pytest.mark.parametrize(
    ("gpu", "count", "overrides", "remedy"),
    [
        # time only
        ("a100-40", 4, ["train.micro_batch_tokens=32768"], "train.micro_batch_tokens=2048"),
        ("a100-80", 8, ["train.activation_checkpointing=none", "train.micro_batch_tokens=16384"],
         "train.activation_checkpointing=selective"),
        # host memory
        ("a100-80", 1, [], "engine.type=zero3 engine.offload=cpu with 126 GiB of host memory"),
        ("a100-40", 1, [], "engine.type=zero3 engine.offload=cpu train.micro_batch_tokens="),
        # more GPUs
        ("t4", 1, ["train.micro_batch_tokens=2048"], "16 such GPUs"),
        # nothing
        ("t4", 1, ["data.seq_len=65536", "train.micro_batch_tokens=65536",
                   "model.rope={type: linear, factor: 16}"], "a smaller model, a shorter"),
    ],
)  # fmt: skip
def test_the_remedy_is_the_cheapest_change_that_fits(
    gpu: str, count: int, overrides: list[str], remedy: str, planned
) -> None:
    """Overrides to copy; first what costs time, then host memory, then more GPUs."""
    made = planned(gpu, count, *overrides)
    assert made.memory.total > made.memory_room
    assert made.remedy.startswith(remedy), made.remedy
    assert f"DOES NOT FIT; the cheapest change that fits: {remedy}" in plan.show(made)


def test_the_remedy_really_fits(planned) -> None:
    """Following the advice gives a plan without one."""
    overrides = ["train.activation_checkpointing=none", "train.micro_batch_tokens=16384"]
    made = planned("a100-80", 8, *overrides)
    assert made.remedy is not None
    again = planned("a100-80", 8, *overrides, *made.remedy.split())
    assert again.remedy is None
    assert again.memory.total <= again.memory_room


# --- the recipes -----------------------------------------------------------------------------

# What each was made for, and its verdict there.
RECIPES = {
    "vicuna-7b": ("a100-40", 4, "fsdp", "bf16", "flash_attention_2"),
    "vicuna-13b": ("a100-80", 8, "fsdp", "bf16", "flash_attention_2"),
    "llama-3.1-8b": ("h100-sxm", 8, "fsdp", "bf16", "flash_attention_2"),
    "vicuna-7b-v100": ("v100-32", 16, "zero3", "fp16", "xformers"),
    "vicuna-7b-16k": ("a100-80", 8, "fsdp", "bf16", "flash_attention_2"),
    "llama-2-70b": ("h100-sxm", 64, "fsdp", "bf16", "flash_attention_2"),
}


def test_every_recipe_but_the_quickstart_is_listed() -> None:
    """A new file in configs/ needs a verdict here."""
    names = {file.stem for file in (ROOT / "configs").glob("*.yaml")}
    assert names == {*RECIPES, "quickstart"}


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_fit_what_they_are_made_for(name: str) -> None:
    """Verdict, engine, precision and kernel on the GPUs that the file names in its head."""
    gpu, count, engine, precision, kernel = RECIPES[name]
    file = ROOT / f"configs/{name}.yaml"
    assert f"sft-job plan configs/{name}.yaml --gpu {gpu} --count {count}" in file.read_text()
    made = plan_for(load(file), gpu, count, None)
    assert (made.engine, made.precision.value, made.attention.value) == (engine, precision, kernel)
    assert made.remedy is None
    assert made.memory.total <= made.memory_room
    assert made.seconds_per_step > 0
    # one and a half times as much would not have been needed, a quarter would not do
    quarter = plan_for(load(file), gpu, max(count // 8, 1), None)
    assert quarter.remedy is not None


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_keep_the_published_hyper_parameters(name: str) -> None:
    """FastChat's table: 128 conversations a step, 2e-5, 3 epochs, cosine, no decay."""
    train = load(ROOT / f"configs/{name}.yaml").train
    assert (train.global_batch_size, train.learning_rate, train.num_train_epochs) == (128, 2e-5, 3)
    assert (train.lr_scheduler_type, train.weight_decay, train.max_grad_norm) == ("cosine", 0, 1)
    assert train.warmup_ratio == (0.04 if name == "vicuna-13b" else 0.03)


def test_the_long_context_recipe_scales_positions() -> None:
    """16k from 4k: linear, by 4."""
    made = plan_for(load(ROOT / "configs/vicuna-7b-16k.yaml"), "a100-80", 8, None)
    assert (made.rope_factor, made.seq_len) == (4.0, 16384)


def test_plan_command_for_gpus_that_are_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    """--gpu and --count; --mfu changes the time alone; --json is whole."""
    job = str(ROOT / "configs/vicuna-7b.yaml")
    assert plan.main([job, "--gpu", "a100-40", "--count", "4"]) == 0
    shown = capsys.readouterr().out
    assert "4 process(es) on 4 x A100-SXM4-40GB" in shown
    for row in ("memory", "operations", "time", "disk"):
        assert any(line.startswith(row) for line in shown.splitlines())
    plan.main([job, "--gpu", "a100-40", "--count", "4", "--json"])
    one = json.loads(capsys.readouterr().out)
    plan.main([job, "--gpu", "a100-40", "--count", "4", "--json", "--mfu", "0.25"])
    other = json.loads(capsys.readouterr().out)
    changed = {key for key in one if one[key] != other[key]}
    assert changed == {"mfu", "seconds_per_step"}
    assert other["seconds_per_step"] / one["seconds_per_step"] == pytest.approx(one["mfu"] / 0.25)


@pytest.mark.parametrize(
    "arguments", [["--count", "4"], ["--mfu", "0.4"], ["--gpu", "a100-40", "--mfu", "40"]]
)
def test_plan_options_that_mean_nothing_are_refused(arguments, capsys) -> None:
    """argparse's exit code 2 and a sentence."""
    with pytest.raises(SystemExit) as error:
        plan.main([str(ROOT / "configs/vicuna-7b.yaml"), *arguments])
    assert error.value.code == 2
    assert "--" in capsys.readouterr().err


def test_cost_orders_what_fits(planned) -> None:
    """Among what fits, nothing is cheaper than what is chosen."""
    machine = hardware.named("a100-40", 4)
    made = planned("a100-40", 4, "train.micro_batch_tokens=auto")
    question = fit.question_of(
        load(ROOT / "configs/vicuna-7b.yaml"), machine, 4, LLAMA, made.step,
        made.precision, made.attention, made.cross_entropy,
    )  # fmt: skip
    every = list(fit.candidates(question))
    fitting = [found for found in every if found.memory.total <= made.memory_room]
    assert 0 < len(fitting) < len(every)
    chosen = fit.choose(question, made.memory_room)
    assert chosen.cost == min(found.cost for found in fitting)
    assert len(every) == len(list(itertools.product(question.tokens, question.levels)))
