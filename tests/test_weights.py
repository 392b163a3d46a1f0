"""The tensors of weight files: all of them or a reason, and numbers that can be computed with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft_job import model as models
from sft_job import schema
from sft_job.config import load
from sft_job.data import encode_job
from sft_job.errors import ModelError
from sft_job.rundir import CacheDir
from sft_job.source import prepare_folder
from sft_job.weights import WeightFiles, fill_buffers, persistent_buffers
from tests.families import tiny
from tests.runs import make_conversations, make_job, make_model, on_ranks


def edit(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Add, replace or (None) take away tensors of a model folder; `__` stands for a point."""
    file = folder / "model.safetensors"
    state: dict[str, Any] = load_file(file)
    for key, tensor in tensors.items():
        name = key.replace("__", ".")
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    save_file(state, file, metadata={"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def prepared(folder: Path) -> tuple[Path, list[str]]:
    """The folder that training would read, and what is said."""
    notes: list[str] = []
    cache = CacheDir(folder.parent / "cache")
    source = schema.Model(path=str(folder))
    return prepare_folder(source, cache, online=False, say=notes.append), notes


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


# --- surplus -------------------------------------------------------------------------------


def test_a_whole_model_is_read_where_it_is(model: Path) -> None:
    """Nothing is converted, nothing is said."""
    assert prepared(model) == (model, [])


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model__layers__0__self_attn__q_proj__bias", 64),
        ("model__layers__2__mlp__down_proj__bias", 64),
        ("model__norm__bias", 64),
        ("score__weight", 64),
    ],
)
def test_tensors_that_the_model_does_not_have_are_refused(
    name: str, shape: int, model: Path
) -> None:
    """Biases of another configuration, another head: they would be dropped silently."""
    edit(model, **{name: torch.zeros(shape)})
    with pytest.raises(ModelError) as error:
        prepared(model)
    assert f"1 tensor(s) in the weight files are none of the model's, such as {name}".replace(
        "__", "."
    ) in str(error.value)
    assert ("attention_bias" in str(error.value)) == name.endswith("bias")
    assert not (model.parent / "cache").exists()


def test_what_every_model_computes_by_itself_is_no_surplus(model: Path) -> None:
    """Frequencies, masks and positions that older releases saved."""
    edit(
        model,
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8),
        model__layers__0__attention__masked_bias=torch.ones(1),
        model__position_ids=torch.arange(8),
    )
    assert prepared(model) == (model, [])


def test_a_tied_head_that_is_another_is_refused(tmp_path: Path) -> None:
    """Equal to the table it is the table; else the model was trained with a head of its own."""
    folder = make_model(tmp_path / "model", tied=True)
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit(folder, lm_head__weight=table.clone())
    assert prepared(folder) == (folder, [])
    table[-1, -1] += 1e-3
    edit(folder, lm_head__weight=table)
    with pytest.raises(ModelError, match=r"tie_word_embeddings is true in config.json, and lm_"):
        prepared(folder)
    configure(folder, tie_word_embeddings=False)
    assert prepared(folder) == (folder, [])


def test_old_formats_are_held_to_the_same(tmp_path: Path) -> None:
    """A pickled checkpoint with biases, another head, or without a tensor: nothing is converted."""
    folder = make_model(tmp_path / "model", tied=True)
    file = folder / "model.safetensors"
    state = load_file(file)
    file.unlink()
    pickled = folder / "pytorch_model.bin"
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    head = {"lm_head.weight": state["model.embed_tokens.weight"] + 1}
    nan = {"model.norm.weight": torch.full((64,), math.nan)}
    for changed, message in (
        (state | nan, "model.norm.weight holds NaN"),
        (state | bias, "are none of the model's, such as model.layers.0.self_attn.q_proj.bias"),
        (state | head, "lm_head.weight in the weight files differs from the embedding table"),
        ({k: v for k, v in state.items() if "norm.weight" not in k}, "are not complete, missing"),
    ):
        torch.save(changed, pickled)
        with pytest.raises(ModelError, match=message):
            prepared(folder)
        assert not list((tmp_path / "cache").glob("models/*"))
    torch.save(state, pickled)
    converted, notes = prepared(folder)
    assert (converted.parent.name, notes) == ("models", [])


def test_what_transformers_leaves_out_by_design_is_said(tmp_path: Path) -> None:
    """Layers that predict further tokens, in families whose model does not have them."""
    from transformers import AutoModelForCausalLM

    from sft_job.weights import refuse_surplus

    network = AutoModelForCausalLM.from_config(tiny("qwen3_5_text"))
    state = {name: p.detach().clone() for name, p in network.named_parameters()}
    state["mtp.layers.0.weight"] = torch.zeros(2)
    save_file(state, tmp_path / "model.safetensors")
    assert refuse_surplus(network, WeightFiles(tmp_path)) == [
        "1 tensors are left out, as transformers does: mtp.layers.0.weight, ..."
    ]


# --- numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("value", "said"), [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity")]
)
def test_numbers_that_nothing_can_be_computed_with_are_found_while_loading(
    value: float, said: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """By the rank that reads their rows, with tensor and file; the other rows are good."""
    tensor = torch.ones(6, 4, dtype=dtype)
    tensor[4, 1] = value
    file = tmp_path / "model.safetensors"
    save_file({"a.weight": tensor, "b.weight": torch.ones(3), "c": torch.tensor(value)}, file)
    files = WeightFiles(tmp_path)
    assert torch.equal(files.read("a.weight", slice(0, 4)), tensor[:4])
    assert files.read("a.weight", slice(6, 6)).numel() == 0
    assert torch.equal(files.read("b.weight"), torch.ones(3))
    for name in ("a.weight", "c"):
        with pytest.raises(ModelError) as error:
            files.read(name)
        assert str(error.value).startswith(f"{file}: {name} holds {said}\n  -> the file is damaged")


def test_numbers_beyond_the_computation_are_found_while_loading(tmp_path: Path) -> None:
    """70,000 is a number in bf16 and infinity in fp16."""
    save_file({"a": torch.tensor([1.0, -7e4])}, tmp_path / "model.safetensors")
    assert WeightFiles(tmp_path).read("a")[1] == -7e4
    with pytest.raises(ModelError, match=r"a holds -70000, and the computation goes to 65504 only"):
        WeightFiles(tmp_path, torch.finfo(torch.float16).max).read("a")


def test_whole_numbers_are_not_looked_at(tmp_path: Path) -> None:
    """Positions and masks of older releases."""
    save_file({"a": torch.arange(3), "b": torch.tensor([True])}, tmp_path / "model.safetensors")
    assert WeightFiles(tmp_path).read("a").tolist() == [0, 1, 2]


def test_equal_compares_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of the last part."""
    monkeypatch.setattr("sft_job.weights.COMPARED", 8)
    table = torch.arange(28.0).reshape(7, 4)
    other = table.clone()
    other[6, 3] += 1
    tensors = {"a": table, "b": table.clone(), "c": other, "d": table[:6].clone()}
    save_file(tensors, tmp_path / "model.safetensors")
    files = WeightFiles(tmp_path)
    assert [files.equal("a", name) for name in "bcd"] == [True, False, False]


def test_constants_of_the_files_are_the_models(tmp_path: Path) -> None:
    """Apertus' activation has constants in its weight files; what is not there stays as built."""
    description = tiny("apertus")
    network = models.empty(description, where=tmp_path, trust_remote_code=False)
    names = [name for name, _ in persistent_buffers(network)]
    assert {name.rpartition(".")[2] for name in names} == {"beta", "eps"}
    save_file({names[0]: torch.tensor([0.75])}, tmp_path / "model.safetensors")
    kept = network.get_buffer(names[1]).clone()
    fill_buffers(network, WeightFiles(tmp_path))
    assert float(network.get_buffer(names[0])) == 0.75
    assert torch.equal(network.get_buffer(names[1]), kept)


def loads(world: Any, job: Path, engines: list[str]) -> list[str]:
    """What each engine says while it loads the job's model on this rank."""
    from tests.ranks import Setup

    said = []
    for engine in engines:
        try:
            Setup(world, job, f"engine.type={engine}")
        except ModelError as error:
            said.append(str(error))
    return said


def test_each_rank_looks_at_the_rows_that_it_reads(tmp_path: Path) -> None:
    """Under both engines, on both of two ranks; no conversation is blamed for it at step 1."""
    folder = make_model(tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = load_file(folder / "model.safetensors")[name]
    tensor[0, 0] = tensor[-1, -1] = math.nan
    edit(folder, **{name.replace(".", "__"): tensor})
    job = make_job(tmp_path, folder, make_conversations(tmp_path / "data.json", 8))
    encode_job(load(job, []))
    for said in on_ranks(loads, 2, job, ["fsdp", "zero3"]):
        assert len(said) == 2
        assert all(
            line.startswith(f"{folder}/model.safetensors: {name} holds NaN") for line in said
        )
