"""Activation checkpointing repeats only what it says, and nothing is gathered more often."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_job import model as models
from sft_job.attention import Choice
from sft_job.config import load
from sft_job.dataset import TokenCache, collate
from sft_job.plan import plan_of
from tests import ranks
from tests.runs import encode, make_conversations, make_job, make_model, on_ranks

# torch's operators about attention that no training pass ends in: compositions of others, what
# has no backward pass, and what writes into a tensor that it is given.
NOT_KEPT = {
    "aten::scaled_dot_product_attention",
    "aten::_scaled_dot_product_attention_math",
    "aten::_scaled_dot_product_attention_math_for_mps",
    "aten::_native_multi_head_attention",
    "aten::_triton_multi_head_attention",
    "aten::_triton_scaled_dot_attention",
    "aten::_flash_attention_forward_no_dropout_inplace",
    "torch_attn::_varlen_attn_out",
}
LAYERS, PRODUCTS = 4, 7  # query, key, value, output; gate, up, down
VARIANTS = [("none", None), ("full", None), ("selective", 0), ("selective", 4), ("selective", 6)]
ENGINES = ["fsdp", "zero3"]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Encoded jobs of four steps: untied and tied head."""
    made = {}
    for name in ("untied", "tied"):
        folder = tmp_path_factory.mktemp(name)
        model = make_model(folder / "model", tied=name == "tied", num_hidden_layers=LAYERS)
        data = make_conversations(folder / "data.json", 64)
        made[name] = make_job(folder, model, data, train__max_steps=4)
        encode(made[name])
    return made


@pytest.mark.parametrize("bias", [False, True])
def test_what_is_computed_again(jobs: dict[str, Path], bias: bool) -> None:
    """full: all of a layer but its last product; selective: neither attention nor what is kept."""
    config = load(jobs["untied"], [])
    plan, prepared = plan_of(config, 1)
    assert prepared is not None
    cache = TokenCache(Path(prepared.data_folder))
    batch = collate([cache[0]])
    folder = Path(prepared.model_folder)
    counted, gradients = {}, {}
    for mode, saved in [*VARIANTS, *(("selective", k) for k in (1, 2, 3, 5))]:
        variant = dataclasses.replace(
            plan, activation_checkpointing=Choice(mode, ""), saved_products=saved
        )
        torch.manual_seed(0)
        model = models.build(folder, variant, trust_remote_code=False, meta=False)
        if bias:
            for module in models.decoder_layers(model)[0].modules():
                if isinstance(module, torch.nn.Linear):
                    module.bias = torch.nn.Parameter(torch.zeros(module.out_features))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        models.make_trainable(model, variant)
        with ranks.Count() as forward:
            value = model(**batch)["loss"]
        with ranks.Count() as backward:
            value.backward()
        assert forward.counts["attention"] == LAYERS
        counted[mode, saved] = (backward.counts["product"], backward.counts["attention"])
        gradients[mode, saved] = [p.grad for p in model.parameters()]
    necessary = 2 * PRODUCTS * LAYERS  # the head's gradients are made in the forward pass
    assert counted["none", None] == (necessary, 0)
    assert counted["full", None] == (necessary + (PRODUCTS - 1) * LAYERS, LAYERS)
    for saved in range(PRODUCTS):
        again = (PRODUCTS - 1 - saved) * LAYERS
        assert counted["selective", saved] == (necessary + again, 0)
    for values in gradients.values():
        assert all(map(torch.equal, values, gradients["none", None]))


@pytest.fixture(scope="module")
def single(jobs: dict[str, Path]) -> list[tuple[float, float]]:
    """Records of one process that trains on one conversation a step."""
    ((result,),) = on_ranks(
        ranks.trainings, 1, [(jobs["untied"], ["train.global_batch_size=1"], None)]
    )
    return result.records


@pytest.fixture(scope="module", params=ENGINES)
def trained(request: pytest.FixtureRequest, jobs: dict[str, Path]) -> dict[Any, Any]:
    """Two processes, one training after the other: every variant of recomputation, a tied head
    and several micro-batches, and one conversation for two ranks."""
    engine = f"engine.type={request.param}"
    recompute = "train.activation_checkpointing"
    runs: dict[Any, tuple[Path, list[str], int | None]] = {
        (mode, saved): (jobs["untied"], [engine, f"{recompute}={mode}"], saved)
        for mode, saved in VARIANTS
    }
    # Several micro-batches: under ZeRO-3 each gathers other weights than the one before.
    several = [engine, "train.micro_batch_tokens=300"]
    runs["several"] = (jobs["untied"], [*several, f"{recompute}=selective"], 5)
    runs["tied"] = (jobs["tied"], several, None)
    lonely = [engine, "train.global_batch_size=1"]
    runs["lonely"] = (jobs["untied"], lonely, None)
    runs["lonely full"] = (jobs["untied"], [*lonely, f"{recompute}=full"], None)
    first, second = on_ranks(ranks.trainings, 2, list(runs.values()))
    for ours, theirs in zip(first, second, strict=True):
        assert (ours.records, ours.gathers) == (theirs.records, theirs.gathers)
    return {"engine": request.param, **dict(zip(runs, first, strict=True))}


def test_recomputation_changes_no_number_and_gathers_no_more(trained: dict[Any, Any]) -> None:
    """Bit-equal records; a layer's weights come once for the forward, once for the backward."""
    for variant in VARIANTS:
        assert trained[variant].records == trained["none", None].records
        gathers = {n: count for n, count in trained[variant].gathers.items() if ".layers." in n}
        assert gathers
        # ZeRO-3 keeps what stands near the turning point
        assert set(gathers.values()) <= ({2} if trained["engine"] == "fsdp" else {1, 2})
    several = trained["several"]
    assert several.micro_batches > 1
    assert max(several.gathers.values()) <= 2
    for ours, theirs in zip(several.records, trained["none", None].records, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_engines_compute_no_product_in_vain(trained: dict[Any, Any]) -> None:
    """The products of a real step: the last one of a layer is never repeated."""
    necessary = trained["none", None].products
    again = {("full", None): 6, ("selective", 0): 6, ("selective", 4): 2, ("selective", 6): 0}
    for variant, count in again.items():
        assert trained[variant].products == necessary + count * LAYERS


def test_ends_are_gathered_once_however_many_chunks_the_loss_has(trained: dict[Any, Any]) -> None:
    """The head comes once, for forward and backward pass together."""
    fsdp = trained["engine"] == "fsdp"
    for variant in VARIANTS:
        gathers = trained[variant].gathers
        assert gathers["lm_head.weight"] == 1
        # DeepSpeed does not know that the gradient of a look-up needs no table.
        assert gathers["model.embed_tokens.weight"] == (1 if fsdp else 2)
    tied = trained["tied"]
    assert tied.micro_batches > 1
    # FSDP2 keeps it from the look-up on; ZeRO-3 gathers for the look-up, for the head, and for
    # the look-up's backward pass.
    assert tied.gathers["model.embed_tokens.weight"] == (1 if fsdp else 3)


def test_a_rank_without_a_conversation(
    trained: dict[Any, Any], single: list[tuple[float, float]]
) -> None:
    """One conversation a step for two ranks: the other one takes part, and counts nothing."""
    for name in ("lonely", "lonely full"):
        for ours, theirs in zip(trained[name].records, single, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


# --- which operators are attention -------------------------------------------------------------


def test_every_attention_operator_of_torch_is_kept() -> None:
    """Whatever the installed torch can end in; what it changes in place could not be kept."""
    import torch.nn.attention.varlen  # defines its operators

    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    about = {
        name
        for name in names
        if name.startswith(("aten::", "torch_attn::"))
        and ("attention" in name or "attn" in name)
        and not name.endswith("_backward")
    }
    assert about
    assert about - NOT_KEPT == {n for n in about if n in models.ATTENTION_OPERATORS}
    for name in models.ATTENTION_OPERATORS & names:
        schema = torch._C._dispatch_find_schema_or_throw(name, "").schema()
        assert not schema.is_mutable, name
        assert str(schema.returns[0].type) == "Tensor"


def test_every_attention_operator_of_xformers_is_kept() -> None:
    """Those that it tries on NVIDIA GPUs, in its order, as its files name them."""
    found = importlib.util.find_spec("xformers")
    if found is None:
        pytest.skip("xformers is not installed")
    folder = Path(next(iter(found.submodule_search_locations or []))) / "ops" / "fmha"
    dispatch = ast.parse((folder / "dispatch.py").read_text())
    (tried,) = (
        node
        for node in ast.walk(dispatch)
        if isinstance(node, ast.FunctionDef) and node.name == "_dispatch_fw_priority_list"
    )
    files = {
        node.value.id
        for node in ast.walk(tried)
        if isinstance(node, ast.Attribute)
        and node.attr == "FwOp"
        and isinstance(node.value, ast.Name)
    }
    # AMD's, and one for inference alone.
    files -= {"ck", "triton_splitk"}
    assert {"flash3", "flash", "cutlass"} <= files
    for name in files:
        (operator,) = (
            ast.literal_eval(call.args[0]) + "::" + ast.literal_eval(call.args[1])
            for node in ast.walk(ast.parse((folder / f"{name}.py").read_text()))
            if isinstance(node, ast.ClassDef) and node.name == "FwOp"
            for call in ast.walk(node)
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "get_operator"
        )
        assert operator in models.ATTENTION_OPERATORS
