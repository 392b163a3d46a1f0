"""What is derived from a job: every value and its reason."""

import ast
import dataclasses
import json
import os
from array import array
from pathlib import Path

import pytest

from sft_job import conversations, hardware, plan
from sft_job.attention import LIGER, Package, image_packages
from sft_job.batching import Schedule
from sft_job.config import load
from sft_job.errors import ConfigError, HardwareError, ModelError
from sft_job.facts import ModelFacts, read_facts
from sft_job.families import Obstacle
from sft_job.files import publish_dir
from sft_job.hardware import Hardware
from sft_job.plan import LOST, lost_lines, plan_of, processes, resolve, schedule_of, show
from sft_job.prepared import DataStats, find_prepared, model_facts, prepared_key, write_stamp

A100 = Hardware("cuda", 8, "NVIDIA A100-SXM4-80GB", (8, 0), True, 80.0)
V100 = Hardware("cuda", 8, "Tesla V100-SXM2-32GB", (7, 0), False, 32.0)
CPU = Hardware("cpu", 1, "Old Xeon", None, False, 64.0)
CPU_BF16 = Hardware("cpu", 1, "New Xeon", None, True, 64.0)
LLAMA = ModelFacts("llama", 32, 4096, 32000, 4096, None, False, 6_738_415_616)


def stats(lengths=None, **changes) -> DataStats:
    """Statistics of encoded data; without lengths as preprocess: lazy leaves them."""
    count = len(lengths) if lengths is not None else 10
    values = {
        "fingerprint": "f",
        "conversations": count,
        "samples": count,
        "lengths": lengths,
        "supervised_tokens": sum(lengths) // 2 if lengths is not None else None,
        "lost": {},
        "begin": "<s>",
        "end": "</s>",
    }
    return DataStats(**(values | changes))


@pytest.fixture
def resolved(job_file):
    """Resolve the minimal job with overrides."""

    def resolve_job(*overrides, machine=A100, world=1, data=None, facts=LLAMA):
        packages = image_packages(machine)
        return resolve(load(job_file, overrides), machine, world, data, facts, packages)

    return resolve_job


# --- precision and attention ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "asked", "value", "reason"),
    [
        (A100, "auto", "bf16", "NVIDIA A100-SXM4-80GB computes in bf16"),
        (A100, "bf16", "bf16", "asked for"),
        (A100, "fp32", "fp32", "asked for"),
        (V100, "auto", "fp16", "Tesla V100-SXM2-32GB has no bf16 arithmetic; the loss is scaled"),
        (V100, "fp16", "fp16", "asked for"),
        (V100, "fp32", "fp32", "asked for"),
        (CPU, "auto", "fp32", "Old Xeon has no bf16 arithmetic"),
        (CPU, "fp32", "fp32", "asked for"),
        (CPU, "bf16", "bf16", "asked for"),
        (CPU_BF16, "auto", "bf16", "New Xeon computes in bf16"),
    ],
)
def test_precision_is_chosen_by_auto_alone(machine, asked, value, reason, resolved):
    """auto takes what the hardware computes in; a name is done."""
    precision = resolved(f"train.precision={asked}", machine=machine).precision
    assert precision.value == value
    assert precision.reason.startswith(reason)


def test_bf16_on_an_old_gpu_is_refused_with_the_way_out(resolved):
    """Never an emulated bf16, whatever torch says it supports."""
    with pytest.raises(HardwareError) as error:
        resolved("train.precision=bf16", machine=V100)
    assert str(error.value) == (
        "train.precision: bf16, but Tesla V100-SXM2-32GB has no bf16 arithmetic (compute "
        "capability 8.0 or newer has; torch would emulate it)\n"
        "  -> use train.precision=fp16 or auto"
    )


@pytest.mark.parametrize(
    ("machine", "kernel"), [(A100, "flash_attention_2"), (V100, "xformers"), (CPU, "sdpa")]
)
def test_attention_is_chosen_for_the_hardware(machine, kernel, resolved):
    """auto chooses and says why (tests/test_attention.py has the table); a name is done."""
    chosen = resolved(machine=machine).attention
    assert chosen.value == kernel
    assert not chosen.reason.startswith("asked for")
    assert resolved("model.attention=sdpa", machine=machine).attention.reason.startswith("asked")


def test_rows_need_a_kernel_that_packs(resolved):
    """One sample per forward pass and packed rows exclude each other."""
    own = dataclasses.replace(LLAMA, remote_code=True)
    trust = "model.trust_remote_code=true"
    assert resolved(trust, facts=own).attention.value == "own"
    with pytest.raises(ModelError, match=r"rows packs samples.*own takes one sample per forward"):
        resolved(trust, "data.batching=rows", facts=own)


@pytest.mark.parametrize(
    ("asked", "machine", "packages", "value", "reason"),
    [
        ("auto", A100, {LIGER: Package("0.8.5")}, "liger", "liger-kernel 0.8.5: one pass"),
        ("liger", A100, {LIGER: Package("0.8.5")}, "liger", "asked for; liger-kernel 0.8.5"),
        ("torch", A100, {LIGER: Package("0.8.5")}, "torch", "asked for"),
        ("auto", A100, {}, "torch", "not liger: liger-kernel is not installed"),
        ("auto", A100, {LIGER: Package("0.8.5", "no")}, "torch", "not liger: the installed liger"),
        ("auto", V100, {LIGER: Package("0.8.5")}, "torch", "not liger: Triton needs a GPU of"),
        ("auto", CPU, {LIGER: Package("0.8.5")}, "torch", "not liger: Triton needs a GPU of"),
        ("liger", V100, {LIGER: Package("0.8.5")}, None, "liger, but Triton needs a GPU of cap"),
        ("liger", A100, {}, None, "model.cross_entropy is liger, but liger-kernel is not inst"),
    ],
)
def test_cross_entropy_is_ligers_where_triton_runs(
    job_file, asked, machine, packages, value, reason
):
    """auto takes it on capability 8.0 and newer; by name it is done or refused."""
    config = load(job_file, [f"model.cross_entropy={asked}"])
    if value is None:
        with pytest.raises(HardwareError, match=reason):
            resolve(config, machine, 1, None, LLAMA, packages)
        return
    chosen = resolve(config, machine, 1, None, LLAMA, packages).cross_entropy
    assert chosen.value == value
    assert chosen.reason.startswith(reason)


@pytest.mark.parametrize(
    ("precision", "value"), [("bf16", "liger"), ("fp32", "liger"), ("fp16", "torch")]
)
def test_cross_entropy_of_fp16_keeps_small_probabilities(job_file, precision, value):
    """Liger's kernel loses them there, on whatever GPU: never chosen, by name refused."""
    packages = {LIGER: Package("0.8.5")}
    job = [f"train.precision={precision}"]
    chosen = resolve(load(job_file, job), A100, 1, None, LLAMA, packages).cross_entropy
    assert chosen.value == value
    asked = load(job_file, [*job, "model.cross_entropy=liger"])
    if value == "liger":
        assert resolve(asked, A100, 1, None, LLAMA, packages).cross_entropy.value == "liger"
        return
    assert chosen.reason == "not liger: in fp16 it loses the gradients of small probabilities"
    with pytest.raises(HardwareError, match="liger, but in fp16 it loses the gradients of small"):
        resolve(asked, A100, 1, None, LLAMA, packages)


def test_the_device_is_named_as_it_is(resolved):
    """GPUs with their number, a CPU by its name."""
    assert resolved(world=8).device == "8 x NVIDIA A100-SXM4-80GB"
    assert resolved(machine=CPU, world=2).device == "Old Xeon"


def test_rates_with_which_nothing_is_trained_are_refused(resolved):
    """Before and after the data is encoded (tests/test_rates.py has the cases)."""
    for data in (None, stats([10] * 9)):
        with pytest.raises(ConfigError, match="the greatest of all steps is 1e-20"):
            resolved("train.learning_rate=1e-20", data=data)
    with pytest.raises(ConfigError, match="10,000 epochs are 20,000,000 steps, more than"):
        resolved(
            "train.num_train_epochs=10000", "train.global_batch_size=1", data=stats([9] * 2000)
        )


@pytest.mark.parametrize(
    ("override", "work", "most"),
    [
        ("train.num_train_epochs=1000", plan.IDLE_WORK, 401),
        ("train.max_steps=10000000", plan.IDLE_WORK, 401),
        ("train.num_train_epochs=3", 10, 2),  # as for a step of a million, or as many ranks
    ],
)
def test_a_plan_looks_at_a_bounded_number_of_steps(resolved, monkeypatch, override, work, most):
    """However long the run and however many its ranks: each epoch costs a shuffle of its own."""
    dealt, epochs = [], set()
    deal, step = plan.deal, Schedule.step
    monkeypatch.setattr(plan, "IDLE_WORK", work)
    monkeypatch.setattr(plan, "deal", lambda *a, **b: dealt.append(1) or deal(*a, **b))
    monkeypatch.setattr(
        Schedule, "step", lambda self, i: epochs.add(i // self.steps_per_epoch) or step(self, i)
    )
    resolved("train.global_batch_size=2", override, world=8, data=stats([10] * 300))
    assert len(dealt) <= most
    assert epochs <= {0, 1, 2}


@pytest.mark.parametrize("count", ["0", "-1", "131073", "9" * 30, "x"])
def test_a_number_of_gpus_that_is_none_is_refused(job_file, capsys, count):
    """0 was taken for 1; a number with thirty digits took for ever."""
    with pytest.raises(SystemExit) as ended:
        plan.main([str(job_file), "--gpu", "a100-80", f"--count={count}"])
    assert ended.value.code == 2
    assert "--count" in capsys.readouterr().err


# --- RoPE ----------------------------------------------------------------------------------

LINEAR = {"rope_type": "linear", "factor": 4.0}  # Vicuna 16k
OLD_LINEAR = {"type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
AUTO, NONE = "auto", "none"


def linear(factor: float) -> str:
    return f"{{type: linear, factor: {factor}}}"


@pytest.mark.parametrize(
    ("asked", "seq_len", "context", "existing", "value", "factor", "reason"),
    [
        # no scaling in the model
        (AUTO, 4096, 4096, None, "none", None, "data.seq_len fits the native context of 4,096"),
        (NONE, 2048, 4096, None, "none", None, "data.seq_len fits the native context of 4,096"),
        (AUTO, 4097, 4096, None, "linear x2", 2.0, "ceil(data.seq_len 4,097 / native"),
        (AUTO, 16384, 2048, None, "linear x8", 8.0, "ceil(data.seq_len 16,384 / native"),
        (linear(2), 2048, 4096, None, "linear x2", 2.0, "asked for"),
        (linear(2.5), 10000, 4096, None, "linear x2.5", 2.5, "asked for"),
        # the model's own is good enough, and left alone
        (AUTO, 16384, 4096, LINEAR, "linear x4", None, "the model's own, good for 16,384"),
        (AUTO, 16384, 4096, OLD_LINEAR, "linear x4", None, "the model's own, good for 16,384"),
        (linear(4), 16384, 4096, LINEAR, "linear x4", None, "the model's own, good for 16,384"),
        (AUTO, 2048, 4096, LINEAR, "linear x4", None, "the model's own, good for 16,384"),
        (AUTO, 131072, 131072, LLAMA3, "llama3 x8", None, "the model's own, good for 131,072"),
        # yarn: some families state the scaled context, some the original one
        (AUTO, 131072, 131072, YARN, "yarn x4", None, "the model's own, good for 131,072"),
        (AUTO, 131072, 32768, YARN, "yarn x4", None, "the model's own, good for 131,072"),
    ],
)
def test_rope_is_decided(asked, seq_len, context, existing, value, factor, reason, resolved):
    """The value, the factor to set (None: positions stay as they are), and why."""
    facts = dataclasses.replace(LLAMA, context=context, rope=existing)
    overrides = [f"model.rope={asked}", f"data.seq_len={seq_len}"]
    done = resolved(*overrides, "train.micro_batch_tokens=200000", facts=facts)
    assert (done.rope.value, done.rope_factor) == (value, factor)
    assert done.rope.reason.startswith(reason)


@pytest.mark.parametrize(
    ("asked", "seq_len", "context", "existing", "expected"),
    [
        (NONE, 4097, 4096, None, "longer than the native context of 4,096 and model.rope is none"),
        (linear(2), 8193, 4096, None, "factor 2 x native context 4,096 is less than .* 8,193"),
        (AUTO, 16385, 4096, LINEAR, r"already scales .*\(linear x4, context 16,384\)"),
        (AUTO, 131073, 131072, LLAMA3, r"already scales .*\(llama3 x8, context 131,072\)"),
        (AUTO, 131073, 32768, YARN, r"already scales .*\(yarn x4, context 131,072\)"),
        (NONE, 2048, 4096, LINEAR, "with model.rope none does not fit"),
        (linear(2), 2048, 4096, LINEAR, "with model.rope linear x2 does not fit"),
        (linear(8), 2048, 131072, LLAMA3, "with model.rope linear x8 does not fit"),
    ],
)
def test_rope_that_cannot_be_had_is_refused(asked, seq_len, context, existing, expected, resolved):
    """Never a second scaling on top of the model's own, never a context that is too short."""
    facts = dataclasses.replace(LLAMA, context=context, rope=existing)
    overrides = [f"model.rope={asked}", f"data.seq_len={seq_len}"]
    with pytest.raises(ModelError, match=rf"^bundled:smollm2-135m: .*{expected}(.|\n)*\n  -> use "):
        resolved(*overrides, "train.micro_batch_tokens=200000", facts=facts)


def test_the_remedy_of_a_small_factor_is_a_factor_that_works(resolved):
    """What the message proposes is accepted."""
    with pytest.raises(ModelError, match="use a factor of at least 3"):
        resolved(f"model.rope={linear(2)}", "data.seq_len=9000")
    assert resolved(f"model.rope={linear(3)}", "data.seq_len=9000").rope_factor == 3


def test_without_config_json_rope_is_unknown(resolved):
    """Unknown stays unknown."""
    done = resolved(facts=None)
    assert (done.rope.value, done.rope_factor) == ("unknown", None)
    assert done.parameters is None


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0],
            "original_max_position_embeddings": 4096}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}


@pytest.mark.parametrize(
    ("existing", "context", "limit", "remedy"),
    [
        (DYNAMIC, 4096, 4096, "use data.seq_len=4096$"),
        (LONGROPE, 131072, 4096, "use data.seq_len=4096 or model.attention=own, one sample"),
    ],
)
def test_positions_that_depend_on_the_row_are_refused(existing, context, limit, remedy, resolved):
    """Dynamic NTK and LongRoPE look at the longest sample of a row: those up to the limit are
    computed alike, longer ones would change their neighbours."""
    facts = dataclasses.replace(LLAMA, context=context, rope=existing)
    job = ["data.seq_len=8192", "train.micro_batch_tokens=200000"]
    assert resolved(*job, facts=facts, data=stats([limit, 10])).rope_factor is None
    resolved(*job, facts=facts)  # before encoding nobody knows
    with pytest.raises(ModelError, match=rf"depend on the longest sample of a row beyond {limit:,} "
                       rf"tokens.*one has {limit + 1:,}\n  -> {remedy}"):  # fmt: skip
        resolved(*job, facts=facts, data=stats([limit + 1, 10]))
    with pytest.raises(ModelError, match="one has 8,192"):
        resolved(*job, "data.preprocess=lazy", facts=facts, data=stats())
    alone = resolved(*job, "model.attention=own", facts=facts, data=stats([limit])).attention
    assert alone.value == "own"


def test_longrope_alone_is_what_the_model_computes(resolved):
    """One sample per forward pass takes the factors of its own length."""
    facts = dataclasses.replace(LLAMA, context=131072, rope=LONGROPE)
    job = ["data.seq_len=8192", "train.micro_batch_tokens=200000", "model.attention=own"]
    assert resolved(*job, facts=facts, data=stats([8000])).rope.value == "longrope x1"


def test_learned_positions_cannot_be_scaled(resolved):
    """A vector for each position: the context is what it is."""
    facts = dataclasses.replace(LLAMA, model_type="opt", context=2048, fixed_positions="are x")
    assert resolved(facts=facts).rope.value == "none"
    for asked in (["data.seq_len=4096"], ["model.rope={type: linear, factor: 2}"]):
        with pytest.raises(
            ModelError, match=r"of opt are x: its.*\n.*auto with data.seq_len <= 2048"
        ):
            resolved(*asked, facts=facts)


def test_where_layers_differ_it_is_said_which_are_scaled(resolved):
    """Layers with a window see no distance beyond it."""
    facts = dataclasses.replace(LLAMA, model_type="gemma3_text")
    done = resolved("data.seq_len=8192", facts=facts)
    assert (done.rope.value, done.rope_factor) == ("linear x2", 2.0)
    assert "in layers with full attention, those with a window keep theirs" in done.rope.reason


# --- windows -------------------------------------------------------------------------------

MISTRAL = dataclasses.replace(LLAMA, model_type="mistral", window=128)


def test_a_window_shorter_than_the_longest_sample_is_refused(resolved):
    """With both numbers and what can be done; not at step 31."""
    with pytest.raises(ModelError) as error:
        resolved(facts=MISTRAL, data=stats([10, 198, 20]))
    assert str(error.value) == (
        "bundled:smollm2-135m: the longest sample has 198 tokens, and layers of mistral look back "
        "128 tokens only (sliding_window), which no attention kernel here does\n"
        "  -> use data.seq_len=128, or model.attention=own, which attends through windows: one "
        "sample per forward pass"
    )
    with pytest.raises(ModelError, match=r"-> use data.seq_len=128$"):
        resolved("data.batching=rows", facts=MISTRAL, data=stats([10, 198]))


def test_a_window_that_no_sample_reaches_is_no_obstacle(resolved):
    """Whatever data.seq_len would allow; the model's own attention attends through windows."""
    assert resolved(facts=MISTRAL, data=stats([128, 20])).longest == 128
    asked = resolved("model.attention=own", facts=MISTRAL, data=stats([198]))
    assert asked.attention.value == "own"


def test_before_encoding_a_short_window_is_a_note(resolved):
    """The job may start; what would stop it is said."""
    done = resolved(facts=MISTRAL)
    assert done.longest is None
    assert any("a longer sample would be refused when the data is encoded" in n for n in done.notes)
    assert not resolved("data.seq_len=128", facts=MISTRAL).notes


def test_lazy_data_needs_a_window_for_the_longest_that_may_come(resolved):
    """Nobody looks at the lengths before the start."""
    lazy = ["data.preprocess=lazy", "data.seq_len=160"]
    with pytest.raises(ModelError, match=r"with data.preprocess: lazy a sample may have 160"):
        resolved(*lazy, facts=MISTRAL, data=stats())
    assert resolved("data.preprocess=lazy", "data.seq_len=128", facts=MISTRAL, data=stats()).longest


# --- what a model is -----------------------------------------------------------------------

CAPS = Obstacle("caps its attention scores", "attn_logit_softcapping", own=True)


def test_what_only_the_models_own_attention_does_is_refused_with_the_way_out(resolved):
    """No kernel, named or chosen; model.attention=own trains it."""
    facts = dataclasses.replace(LLAMA, model_type="gemma2", obstacles=(CAPS,))
    for attention in ("auto", "sdpa"):
        with pytest.raises(ModelError, match=r"gemma2 caps its attention scores \("
                           r"attn_logit_softcapping\)\n  -> use model.attention=own"):  # fmt: skip
            resolved(f"model.attention={attention}", facts=facts)
    assert resolved("model.attention=own", facts=facts).attention.value == "own"


def test_code_that_is_not_needed_is_not_run(resolved):
    """A type that transformers has built in is built in, and said; with trust its code is run."""
    facts = dataclasses.replace(LLAMA, remote_code=True)
    done = resolved(facts=facts)
    assert done.attention.value == "flash_attention_2"
    assert [note for note in done.notes if "auto_map" in note] == [
        "the Python code that comes with the model (auto_map in config.json) is not run: "
        "transformers has llama built in; model.trust_remote_code=true runs it"
    ]
    trusted = resolved("model.trust_remote_code=true", facts=facts)
    assert trusted.attention.value == "own"
    assert not any("auto_map" in note for note in trusted.notes)


def test_code_that_is_needed_is_not_run_unasked(resolved):
    """Before anything is read or converted."""
    facts = dataclasses.replace(LLAMA, model_type="new", remote_code=True, built_in=False)
    with pytest.raises(ModelError, match=r"which is not run unasked\n  -> read the code, then set"):
        resolved(facts=facts)
    assert resolved("model.trust_remote_code=true", facts=facts).attention.value == "own"


def test_a_model_that_drops_attention_gets_a_kernel_that_can(resolved):
    """torch_varlen and flash-attn 3 cannot: refused by name, passed over by auto."""
    facts = dataclasses.replace(LLAMA, heads=32, dropout=0.1)
    assert resolved(facts=facts).attention.value == "flash_attention_2"
    with pytest.raises(HardwareError, match=r"the model drops attention weights \(0.1\), which it"):
        resolved("model.attention=torch_varlen", facts=facts)


# --- steps ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "overrides", "steps", "per_epoch", "warmup"),
    [
        (1000, [], 24, 8, 1),  # ceil(1000 / 128) = 8, 3 epochs, ceil(0.03 x 24) = 1
        (1024, [], 24, 8, 1),
        (1025, [], 27, 9, 1),
        (1000, ["train.global_batch_size=10", "train.warmup_ratio=0.1"], 300, 100, 30),
        (1000, ["train.global_batch_size=10", "train.warmup_ratio=0"], 300, 100, 0),
        (1000, ["train.max_steps=5", "train.warmup_ratio=0.5"], 5, 8, 3),
        (1000, ["train.max_steps=100", "train.warmup_ratio=1"], 100, 8, 99),
        (3, [], 3, 1, 1),
        (3, ["train.max_steps=1"], 1, 1, 0),  # the only step is no warm-up
        (3, ["train.num_train_epochs=1", "train.warmup_ratio=1"], 1, 1, 0),
        (1000, ["train.lr_scheduler_type=constant"], 24, 8, 0),  # it has none
    ],
)
def test_steps_and_warm_up_are_counted(samples, overrides, steps, per_epoch, warmup, resolved):
    """Steps of an epoch, of the run, and of the rise of the learning rate."""
    done = resolved(*overrides, data=stats([10] * samples))
    assert (done.steps, done.steps_per_epoch, done.warmup_steps) == (steps, per_epoch, warmup)


def test_steps_of_lazy_data_are_known_and_its_tokens_are_not(resolved):
    """Structure is checked before the start, lengths come with the steps."""
    done = resolved("data.preprocess=lazy", "train.global_batch_size=4", data=stats())
    assert (done.steps, done.samples) == (9, 10)
    assert (done.tokens, done.supervised_tokens, done.micro_batches) == (None, None, None)


def test_an_epoch_of_less_than_a_step_is_said(resolved):
    """The tail is the whole epoch: the published batch size is not reached."""
    note = "one epoch is a single step: 3 conversations are fewer than train.global_batch_size"
    assert any(text.startswith(note) for text in resolved(data=stats([10] * 3)).notes)
    assert resolved("train.global_batch_size=3", data=stats([10] * 3)).notes == ()


def test_micro_batches_are_counted_over_full_and_last_steps(resolved):
    """10 samples of 8 tokens, 8 tokens a micro-batch: 4, 4 and 2 on one rank; half on two."""
    overrides = [
        "data.seq_len=8",
        "train.micro_batch_tokens=8",
        "train.global_batch_size=4",
    ]
    data = stats([8] * 10)
    assert resolved(*overrides, data=data).micro_batches == (2, 4)
    assert resolved(*overrides, world=2, data=data).micro_batches == (1, 2)
    assert resolved(*overrides, world=2, data=data).idle_share == pytest.approx(0)


def test_waiting_ranks_are_said(resolved):
    """Two samples on eight ranks cannot be levelled."""
    done = resolved("train.global_batch_size=2", world=8, data=stats([10] * 4))
    assert done.idle_share == pytest.approx(0.75)
    assert any(note.startswith("ranks wait 75% of the time") for note in done.notes)


def test_rows_are_units_of_rows(resolved):
    """With batching: rows a step counts rows of seq_len tokens."""
    overrides = ["data.batching=rows", "data.seq_len=8", "train.global_batch_size=2"]
    done = resolved(*overrides, data=stats([4] * 10))
    assert (done.batching, done.steps_per_epoch) == ("rows", 3)


def test_the_schedule_is_the_one_of_the_job(job_file):
    """Every value that decides the order is handed on."""
    config = load(job_file, ["train.seed=3", "train.max_steps=7", "data.seq_len=64"])
    assert schedule_of(config, stats([10] * 4)) == Schedule(
        sample_count=4,
        fingerprint="f",
        seed=3,
        batching="conversations",
        global_batch_size=128,
        num_train_epochs=3,
        max_steps=7,
        seq_len=64,
        lengths=[10] * 4,
    )


# --- sizes ---------------------------------------------------------------------------------


def test_sizes_on_disk(resolved):
    """A checkpoint is weights and two moments in fp32; the model is in the compute dtype."""
    done = resolved()
    assert done.checkpoint_bytes == 12 * LLAMA.parameters
    assert done.model_bytes == 2 * LLAMA.parameters
    assert resolved("train.precision=fp32").model_bytes == 4 * LLAMA.parameters
    assert resolved(facts=None).checkpoint_bytes is None


def test_the_scale_of_attention_is_body_by_layers_and_width():
    """12 x hidden for the LLaMA shape, which also stands in for an unknown size."""
    assert LLAMA.attention_scale == pytest.approx(12 * 4096, rel=0.01)
    assert dataclasses.replace(LLAMA, parameters=None).attention_scale == 12 * 4096
    tied = dataclasses.replace(LLAMA, tied=True)
    assert tied.attention_scale - LLAMA.attention_scale == pytest.approx(32000 / 32)


@pytest.mark.parametrize(
    ("engine", "precision", "said"),
    [("zero3", "bf16", True), ("zero3", "fp32", False), ("fsdp", "bf16", False)],
)
def test_rounded_masters_of_zero3_are_said(engine, precision, said, resolved):
    """DeepSpeed starts from bf16-rounded weights, and what is done about it."""
    notes = resolved(f"engine.type={engine}", f"train.precision={precision}").notes
    assert any("ZeRO-3 makes its fp32 masters" in note for note in notes) is said


# --- processes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "machine", "expected"),
    [("null", CPU, 1), ("2", CPU, 2), ("null", A100, 8), ("1", A100, 1), ("8", A100, 8)],
)
def test_one_process_per_gpu_and_one_on_a_cpu(asked, machine, expected, job_file):
    """null means all GPUs; a CPU takes as many as are asked for."""
    assert processes(load(job_file, [f"run.processes={asked}"]), machine) == expected


def test_more_processes_than_gpus_are_refused(job_file):
    """Two processes on one GPU would only wait for each other."""
    expected = r"run.processes is 9, but this machine has 8 GPU\(s\)\n  -> use run.processes=8 or"
    with pytest.raises(HardwareError, match=expected):
        processes(load(job_file, ["run.processes=9"]), A100)


# --- shown ---------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [None, stats([10] * 300), stats()])
@pytest.mark.parametrize("facts", [None, LLAMA])
def test_a_plan_can_be_stored_as_json(data, facts, resolved):
    """The run directory keeps it; reading it back gives the same values."""
    done = resolved(data=data, facts=facts)
    stored = json.loads(json.dumps(dataclasses.asdict(done)))
    assert stored["precision"] == {"value": "bf16", "reason": done.precision.reason}
    assert stored["steps"] == done.steps
    assert set(stored) == {field.name for field in dataclasses.fields(done)}


def test_a_plan_before_encoding_says_what_is_not_known_yet(resolved):
    """Nothing is guessed, and how to know it is said."""
    lines = show(resolved(world=8)).splitlines()
    assert "model        bundled:smollm2-135m  (6,738.4 M parameters)" in lines
    assert "engine       fsdp, 8 process(es) on 8 x NVIDIA A100-SXM4-80GB" in lines
    assert "steps        known after encoding (sft-job data encode job.yaml)" in lines
    assert not [line for line in lines if line.startswith(("tokens", "step ", "stop token"))]
    assert not [line for line in lines if "None" in line]


def test_a_plan_after_encoding_shows_the_arithmetic(resolved):
    """Samples, tokens, steps, warm-up, micro-batches, sizes, losses."""
    data = stats([100] * 300, conversations=310, lost={"overlong_dropped": 10, "duplicate": 0})
    lines = show(resolved(data=data)).splitlines()
    assert "data         310 conversations -> 300 samples" in lines
    assert "tokens       30,000 an epoch, 15,000 (50%) trained on, no padding" in lines
    assert "stop token   '</s>' after every answer; '<s>' at the beginning" in lines
    assert "steps        9 of 128 conversations (3 an epoch), 1 of them warm-up" in lines
    assert "step         1 micro-batch(es) on each of 1; predicted idle share 0.0%" in lines
    assert "disk         75.31 GiB a checkpoint, 12.55 the model, 87.86 in all" in lines
    assert lines[-2:] == ["not trained on:", "        10  conversations dropped as overlong"]


def test_a_plan_of_good_data_speaks_of_no_losses(resolved):
    """No heading without lines below it."""
    assert "not trained on" not in show(resolved(data=stats([10] * 300, lost={})))


def test_a_tokenizer_that_begins_with_nothing_is_said(resolved):
    """SmolLM2 has no begin-of-sequence id."""
    text = show(resolved(data=stats([10] * 300, begin=None)))
    assert "'</s>' after every answer; nothing at the beginning" in text


def test_notes_come_last(resolved):
    """They are what a reader must not miss."""
    assert show(resolved(data=stats([10]))).splitlines()[-1].startswith("note: one epoch is a")


def test_every_reason_of_a_loss_has_a_text():
    """A reason that is counted anywhere can be printed."""
    counted = set()
    for path in Path(plan.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("lost"):
                texts = (n.value for n in ast.walk(node.slice) if isinstance(n, ast.Constant))
                counted |= {text for text in texts if isinstance(text, str)}
    assert {"empty_turn", "trailing_user_turn", "no_complete_exchange", "duplicate"} <= counted
    assert counted - set(LOST) == set()


def test_every_reason_that_is_drawn_has_a_text():
    """The policy in the docstring of conversations.py and the printed texts agree."""
    policy = conversations.__doc__.partition("Policy.")[2].splitlines()
    drawn = {line.split()[0] for line in policy if line.startswith("    ")}
    assert len(drawn) == 8
    assert drawn - set(LOST) == set()


def test_losses_are_shown_with_their_counts():
    """One line each; what was not lost is not shown."""
    assert lost_lines({"wrong_order": 12345, "empty_turn": 0}) == [
        "    12,345  turns after the roles stopped alternating, dropped"
    ]


# --- what is on disk -----------------------------------------------------------------------


def model_folder(folder: Path, **changes: object) -> Path:
    """A model folder with a config.json, and no weights yet."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "vocab_size": 32,
        "max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    return folder


def test_facts_of_a_hub_model_come_from_the_local_hub_cache(job_file, tmp_path, monkeypatch):
    """By branch through refs/, by commit directly; None when it is not here."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    config = load(job_file, ["model.path=org/name"])
    assert model_facts(config, None) is None
    repository = tmp_path / "hub/models--org--name"
    model_folder(repository / "snapshots/abc")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    assert model_facts(config, None).layers == 2
    by_commit = load(job_file, ["model.path=org/name", "model.revision=abc"])
    assert model_facts(by_commit, None).layers == 2
    other = load(job_file, ["model.path=org/name", "model.revision=v2"])
    assert model_facts(other, None) is None


def test_facts_of_a_local_model_come_from_its_folder(job_file, tmp_path):
    """An absolute path is read as it is."""
    folder = model_folder(tmp_path / "m")
    assert model_facts(load(job_file, [f"model.path={folder}"]), None) == read_facts(folder)


def test_facts_of_the_bundled_model_need_nothing(job_file):
    """The plan is there before the weights are."""
    assert model_facts(load(job_file), None).parameters == 134_515_008


# --- what was prepared ---------------------------------------------------------------------


def test_the_key_changes_when_a_file_of_the_data_changes(job_file):
    """Its size or its time: nothing is read for it."""
    before = prepared_key(load(job_file))
    path = job_file.parent / "conversations.json"
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    touched = prepared_key(load(job_file))
    path.write_text(path.read_text() + "\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len({before, touched, prepared_key(load(job_file))}) == 3


def test_the_key_changes_when_a_pattern_matches_more(job_file):
    """A new file is new data."""
    job_file.write_text(job_file.read_text().replace("conversations.json", "'*.json'"))
    before = prepared_key(load(job_file))
    (job_file.parent / "more.json").write_text("[]")
    assert prepared_key(load(job_file)) != before


def test_the_key_changes_when_a_file_of_the_model_changes(job_file, tmp_path):
    """The tokenizer and the weights are read from there."""
    folder = model_folder(tmp_path / "m")
    config = load(job_file, [f"model.path={folder}"])
    before = prepared_key(config)
    (folder / "tokenizer.json").write_text("{}")
    assert prepared_key(config) != before


@pytest.mark.parametrize(
    "override",
    [
        "data.seq_len=512",
        "data.preprocess=lazy",
        "data.overlong=drop",
        "model.path=org/name",
        "model={path: org/name, revision: v2}",
    ],
)
def test_the_key_changes_with_what_is_prepared(override, job_file):
    """Other ids, other labels, another model."""
    assert prepared_key(load(job_file, [override])) != prepared_key(load(job_file))


@pytest.mark.parametrize(
    "override",
    [
        "run.dir=elsewhere",
        "data.cache_dir=elsewhere",
        "data.batching=rows",
        "train.seed=1",
        "train.global_batch_size=2",
        "engine.type=zero3",
    ],
)
def test_the_key_does_not_change_with_what_comes_later(override, job_file):
    """Another run of the same data finds it ready."""
    assert prepared_key(load(job_file, [override])) == prepared_key(load(job_file))


def prepare(job_file: Path, model: Path | None = None, **changes: object) -> Path:
    """Encoded data and a model, as `data encode` leaves them; the data folder."""
    cache = job_file.parent / ".sft_job_cache"
    meta = {
        "fingerprint": "f",
        "conversations": 3,
        "samples": 2,
        "tokens": 30,
        "supervised_tokens": 12,
        "lost": {"empty_turn": 1},
        "begin": None,
        "end": "<|im_end|>",
    }
    folder = cache / "tokens/f"
    with publish_dir(folder) as building:
        (building / "meta.json").write_text(json.dumps(meta | changes))
        (building / "lengths.bin").write_bytes(array("I", [10, 20]).tobytes())
    write_stamp(
        load(job_file), model or model_folder(cache / "models/m"), folder, ["a note of the model"]
    )
    return folder


@pytest.fixture
def prepared(job_file: Path) -> Path:
    return prepare(job_file)


def test_what_was_prepared_is_found(job_file, prepared):
    """Statistics with the length of every sample."""
    found = find_prepared(load(job_file))
    assert found.data_folder == str(prepared)
    assert list(found.stats.lengths) == [10, 20]
    assert (found.stats.conversations, found.stats.supervised_tokens) == (3, 12)


def test_lazy_data_has_no_lengths(job_file):
    """tokens is null in what was prepared."""
    prepare(job_file, tokens=None)
    assert find_prepared(load(job_file)).stats.lengths is None


@pytest.mark.parametrize("gone", ["tokens/f/meta.json", "models/m", "prepared"])
def test_what_has_vanished_is_prepared_again(gone, job_file, prepared):
    """Somebody may empty a cache at any time."""
    path = prepared.parents[1] / gone
    path.rename(path.with_name("away"))
    assert find_prepared(load(job_file)) is None


def test_nothing_is_prepared_for_another_job(job_file, prepared):
    """The stamp is of this very job file."""
    assert find_prepared(load(job_file, ["data.seq_len=512"])) is None


def test_the_plan_of_a_prepared_job_knows_its_steps(job_file, prepared, monkeypatch, capsys):
    """`sft-job plan` with --json and without, for this machine."""
    monkeypatch.setattr(hardware, "detect", lambda: CPU)
    assert plan.main([str(job_file), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["steps"], shown["tokens"], shown["precision"]["value"]) == (3, 30, "fp32")
    assert "a note of the model" in shown["notes"]
    plan.main([str(job_file), "train.global_batch_size=1"])
    assert "steps        6 of 1 conversations (2 an epoch)" in capsys.readouterr().out


def test_a_plan_may_be_made_for_another_number_of_processes(job_file, monkeypatch):
    """Under srun the world is larger than this machine."""
    monkeypatch.setattr(hardware, "detect", lambda: A100)
    assert plan_of(load(job_file), 64)[0].world_size == 64
    assert plan_of(load(job_file))[0].world_size == 8
