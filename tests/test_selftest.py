"""The check before the first step refuses what would be trained wrong, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from sft_job import model as models
from sft_job import selftest, varlen
from sft_job.attention import Choice
from sft_job.config import load
from sft_job.errors import ModelError
from sft_job.plan import Plan, plan_of
from sft_job.varlen import Attend, Packed
from tests.runs import make_conversations, make_job, make_model

VOCABULARY = 504
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("selftest")
    data = make_conversations(folder / "data.json", 4)
    return plan_of(load(make_job(folder, make_model(folder / "model"), data), []), 1)[0]


@pytest.fixture(autouse=True)
def own_kernel_again() -> Iterator[None]:
    yield
    varlen.register("sdpa")


def build(plan: Plan, precision: str = "fp32", family: str = "llama", **config: Any) -> Any:
    """A random model of a family, made trainable."""
    torch.manual_seed(0)
    name = varlen.register("sdpa")
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **(SHAPE | config)),
        dtype=torch.float32,
        attn_implementation=name,
    ).to(models.DTYPES[precision])
    models.make_trainable(model, plan)
    return model


def run(model: Any, precision: str = "fp32", window: int | None = None) -> None:
    selftest.run(
        model,
        vocabulary=VOCABULARY,
        precision=precision,
        kernel="sdpa",
        packs=True,
        place=lambda batch: batch,
        lengths=selftest.lengths("cpu", window),
        own_attention=lambda: varlen.own_attention(model),
    )


def check(plan: Plan, precision: str = "fp32", family: str = "llama", **config: Any) -> None:
    run(build(plan, precision, family, **config), precision)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spread", [0.02, 0.5])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_false_alarm(plan: Plan, precision: str, spread: float, tied: bool) -> None:
    """Random models of small and large weights pass in every precision."""
    check(plan, precision, initializer_range=spread, tie_word_embeddings=tied)


def leaking() -> Attend:
    """A row is one sample: a sample sees those before it."""
    attend = varlen.sdpa()

    def leak(q: Any, k: Any, v: Any, packed: Packed, *rest: float) -> torch.Tensor:
        ends = torch.tensor([0, len(q)], dtype=torch.int32)
        return attend(q, k, v, Packed([len(q)], ends, len(q)), *rest)

    return leak


def looking_ahead() -> Attend:
    """Samples are kept apart, but their tokens see later ones."""

    def attend(q: Any, k: Any, v: Any, packed: Packed, scale: float, drop: float) -> torch.Tensor:
        parts = []
        for sample in zip(*(x.split(packed.seq_lens) for x in (q, k, v)), strict=True):
            query, key, value = (x.transpose(0, 1)[None] for x in sample)
            attended = F.scaled_dot_product_attention(
                query, key, value, scale=scale, enable_gqa=True
            )
            parts.append(attended[0].transpose(0, 1))
        return torch.cat(parts)

    return attend


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("spread", [0.02, 0.5])
@pytest.mark.parametrize(
    ("kernel", "message"),
    [(leaking, "samples of a row see each other"), (looking_ahead, "tokens see later ones")],
)
def test_attention_that_sees_too_much(
    plan: Plan,
    monkeypatch: pytest.MonkeyPatch,
    kernel: Any,
    message: str,
    spread: float,
    precision: str,
) -> None:
    """A leak between samples and a missing causal mask are refused, each by its name."""
    with monkeypatch.context() as patched:
        patched.setitem(varlen.FUNCTIONS, "sdpa", kernel)
        with pytest.raises(ModelError) as caught:
            check(plan, precision, initializer_range=spread)
    assert f"self-test, attention kernel sdpa: {message}" in str(caught.value)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("spread", [0.02, 0.5])
@pytest.mark.parametrize(
    ("family", "option"),
    [
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.25}),
    ],
)
def test_logits_that_are_scaled(
    plan: Plan, family: str, option: dict[str, Any], spread: float, precision: str
) -> None:
    """Refused even where the weights are so small that the loss hardly depends on them."""
    with pytest.raises(ModelError) as caught:
        check(plan, precision, family, initializer_range=spread, **option)
    assert "self-test: our l" in str(caught.value)
    assert "the model's own forward pass gives" in str(caught.value)
    assert "it scales or caps them" in str(caught.value)


def test_logits_that_are_capped(plan: Plan) -> None:
    """In bf16 too, where the loss alone may differ by no more than rounding."""
    with pytest.raises(ModelError, match="it scales or caps them"):
        check(plan, "bf16", "gemma2", initializer_range=0.1, final_logit_softcapping=3.0,
              attn_logit_softcapping=None, sliding_window=4096)  # fmt: skip


# --- what is looked for at the first tokens, and what is not ---------------------------------


@pytest.mark.parametrize("window", [8, 15, 31, 4096])
def test_a_window_that_no_sample_reaches_is_no_fault(plan: Plan, window: int) -> None:
    """The samples of the test are not longer than those of the job may be."""
    short = dataclasses.replace(plan, longest=window)
    run(build(short, family="mistral", sliding_window=window), window=window)


def test_a_window_shorter_than_a_later_sample_is_found(plan: Plan) -> None:
    """Before the first step, whatever comes in it."""
    later = dataclasses.replace(plan, longest=200)
    with pytest.raises(ModelError, match=r"window of 128 tokens.*the longest sample has 200"):
        run(build(later, family="mistral", sliding_window=128))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("spread", [0.02, 0.1])
@pytest.mark.parametrize("layers", [2, 12])
def test_a_short_convolution_is_found(
    plan: Plan, precision: str, spread: float, layers: int
) -> None:
    """It lets two tokens of the neighbour through, which a mean over all of them hides."""
    shape = {
        "layer_types": ["conv"] + ["full_attention"] * (layers - 1), "num_hidden_layers": layers,
    }  # fmt: skip
    with pytest.raises(ModelError) as caught:
        check(plan, precision, "lfm2", initializer_range=spread, **shape)
    assert "samples of a row see each other, through layers that are not attention" in str(
        caught.value
    )
    assert "-> use model.attention=own: one sample per forward pass" in str(caught.value)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_dropout": 0.5}),
        ("seed_oss", {"attention_dropout": 0.3, "residual_dropout": 0.3}),
        ("biogpt", {}),  # drops hidden states and attention weights
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 64, "dropout": 0.5}),
    ],
)
def test_dropout_is_no_fault(
    plan: Plan, precision: str, family: str, changes: dict[str, Any]
) -> None:
    """It is off while numbers are compared, and on again for the training."""
    model = build(plan, precision, family, **changes)
    run(model, precision)
    assert all(module.training for module in model.modules())


def test_noise_of_the_training_is_no_fault(plan: Plan) -> None:
    """NEFTune adds some to the embeddings, while the model is in training mode."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    model = build(plan)
    table = model.get_input_embeddings()
    table.neftune_noise_alpha = 5.0
    table.register_forward_hook(neftune_post_forward_hook)
    run(model)


def test_noise_that_is_never_off_is_named(plan: Plan) -> None:
    """Not taken for a leak, nor for tokens that see later ones."""
    model = build(plan)

    def noise(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + torch.randn_like(output)

    model.get_input_embeddings().register_forward_hook(noise)
    with pytest.raises(ModelError, match=r"the same row computed twice gives other logits"):
        run(model)
    assert model.training


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_kernel_that_computes_something_else_is_found(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Packed and alone agree, since both take the kernel; the model's own attention does not."""
    attend = varlen.sdpa()

    def other(q: Any, k: Any, v: Any, packed: Packed, scale: float, drop: float) -> torch.Tensor:
        return attend(q, k, v, packed, scale / 2, drop)

    with monkeypatch.context() as patched:
        patched.setitem(varlen.FUNCTIONS, "sdpa", lambda: other)
        model = build(plan, precision, initializer_range=0.15)
    with pytest.raises(ModelError, match="it computes something else than the model's own attenti"):
        run(model, precision)


def test_positions_that_go_on_are_found(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned positions of a sample behind another: nothing is seen, and all is different."""
    given = models._packed_inputs

    def going_on(*arguments: Any, **row: Any) -> dict[str, Any]:
        length = row["input_ids"].shape[1]
        return given(*arguments, **row) | {"position_ids": torch.arange(length)[None]}

    with monkeypatch.context() as patched:
        patched.setattr(models, "_packed_inputs", going_on)
        model = build(plan, family="opt", ffn_dim=64, word_embed_proj_dim=64, init_std=0.2)
    with pytest.raises(ModelError, match=r"a sample is computed otherwise in a row than alone"):
        run(model)


def test_alone_tokens_that_see_later_ones_are_found(plan: Plan) -> None:
    """With the model's own attention as well, where nothing is packed."""
    alone = dataclasses.replace(plan, attention=Choice("own", ""))
    model = build(alone, family="gemma3_text", use_bidirectional_attention=True,
                  sliding_window=64)  # fmt: skip
    model.config._attn_implementation = "eager"
    with pytest.raises(ModelError, match=r"tokens see later ones.*\n  -> use a model that is a de"):
        selftest.run(
            model, vocabulary=VOCABULARY, precision="fp32", kernel="own", packs=False,
            place=lambda batch: batch, lengths=selftest.LENGTHS["cpu"],
            own_attention=lambda: varlen.own_attention(model),
        )  # fmt: skip
