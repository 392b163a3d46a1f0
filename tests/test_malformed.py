"""Whatever is wrong with a model folder ends in one message, in the plan and while encoding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_job.config import load
from sft_job.data import encode_job
from sft_job.errors import ModelError
from sft_job.plan import plan_of
from tests.runs import make_conversations, make_job, make_model

Damage = Callable[[Path], None]


def put(name: str, content: str | bytes) -> Damage:
    """A file with this content."""

    def damage(folder: Path) -> None:
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)

    return damage


def change(name: str, **values: Any) -> Damage:
    """Keys of a JSON object; `__` stands for a point between keys, None of Ellipsis removes."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        for key, value in values.items():
            *outer, last = key.split("__")
            inner = content
            for step in outer:
                inner = inner[step]
            if value is ...:
                del inner[last]
            else:
                inner[last] = value
        (folder / name).write_text(json.dumps(content))

    return damage


def folder_instead(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return damage


def without(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


CONFIG, TOKENIZER, SETTINGS = "config.json", "tokenizer.json", "tokenizer_config.json"
DEEP = '{"a":' * 100_000
# What is done -> (the file or key that is named, whether the plan sees it without torch)
DAMAGES: dict[str, tuple[Damage, str, bool]] = {
    "no config": (without(CONFIG), "no config.json in the model folder", True),
    "config cut": (put(CONFIG, '{"model_type": "lla'), "config.json: cannot be read", True),
    "config deep": (put(CONFIG, DEEP), "config.json: cannot be read: it is nested", True),
    "config binary": (put(CONFIG, b"\xff\xfe\x00"), "config.json: cannot be read", True),
    "config folder": (folder_instead(CONFIG), "config.json: is a folder", True),
    "type of another case": (change(CONFIG, model_type="Llama"), "Llama is no causal", True),
    "type a number": (change(CONFIG, model_type=5), "model_type is 5", True),
    "activation": (change(CONFIG, hidden_act="nonsense"), 'hidden_act is "nonsense"', True),
    "activation a number": (change(CONFIG, hidden_act=7), "hidden_act is 7", True),
    "epsilon": (change(CONFIG, rms_norm_eps="small"), "rms_norm_eps is", True),
    "bias": (change(CONFIG, attention_bias="yes"), "attention_bias is", True),
    "dtype": (change(CONFIG, dtype="floaty"), 'dtype is "floaty"', True),
    "old dtype": (change(CONFIG, dtype=..., torch_dtype="floaty"), "torch_dtype is", True),
    "labels": (change(CONFIG, id2label=[1]), "config.json: ", False),
    "layer types": (change(CONFIG, layer_types=["strange"]), "config.json: ", False),
    "odd heads": (change(CONFIG, head_dim=15), "even rotary dimension", False),
    "rope": (change(CONFIG, rope_parameters=7), "rope_parameters is 7", True),
    "rope of an unknown type": (
        change(CONFIG, rope_parameters={"rope_type": "ntk", "factor": 2.0}),
        "expected a rope_type of linear",
        True,
    ),
    "rope scaling a list": (change(CONFIG, rope_scaling=[2]), "rope_scaling is [2]", True),
    "rope factors of another length": (
        change(CONFIG, rope_parameters={"rope_type": "longrope", "short_factor": [1.0],
                                        "long_factor": [1.0], "rope_theta": 1e4}),
        "expected 8 numbers as short_factor",
        True,
    ),
    "pad beyond": (change(CONFIG, pad_token_id=503), "pad_token_id is 503", True),
    "eos beyond": (change(CONFIG, eos_token_id=503), "eos_token_id is 503", True),
    "vocabulary": (change(CONFIG, vocab_size=400), "vocab_size is 400", True),
    "layers": (change(CONFIG, num_hidden_layers=4), "num_hidden_layers is 4", True),
    "width of the MLP": (
        change(CONFIG, intermediate_size=130),
        "mlp.gate_proj.weight is [128, 64] in the weight files, and [130, 64] by config.json",
        False,
    ),
    "width": (change(CONFIG, hidden_size=32), "in the weight files, and [", False),
    "heads": (change(CONFIG, num_attention_heads=5), "divisor of num_attention_heads 5", True),
    "experts": (change(CONFIG, num_local_experts=8), "is a mixture of experts", True),
    "vision": (change(CONFIG, vision_config={"a": 1}), "is a wrapper around", True),
    "untied": (change(CONFIG, tie_word_embeddings=True), "differs from the embedding", False),
    "no tokenizer": (without(TOKENIZER), "no tokenizer (tokenizer.json or", True),
    "tokenizer cut": (put(TOKENIZER, '{"model": {"vocab": {"a"'), "tokenizer.json: cannot", True),
    "tokenizer empty": (put(TOKENIZER, "{}"), "tokenizer.json: has no model.vocab", True),
    "tokenizer deep": (put(TOKENIZER, DEEP), "tokenizer.json: cannot be read", True),
    "tokenizer binary": (put(TOKENIZER, b"\x00\xff" * 9), "tokenizer.json: cannot", True),
    "tokenizer folder": (folder_instead(TOKENIZER), "tokenizer.json: is a folder", True),
    "tokenizer kind": (change(TOKENIZER, model__type="Nope"), "the tokenizer cannot be r", False),
    "tokenizer ids": (
        put(TOKENIZER, '{"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}'),
        "with id b",
        True,
    ),
    "tokenizer ids apart": (
        put(TOKENIZER, '{"model": {"type": "BPE", "vocab": {"a": 7000}, "merges": []}}'),
        "'a' with id 7000",
        True,
    ),
    "merges": (change(TOKENIZER, model__merges=[["zz", "yy"]]), "the tokenizer cannot b", False),
    "pre-tokenizer": (
        change(TOKENIZER, pre_tokenizer={"type": "Nope"}), "the tokenizer cannot be read", False
    ),
    "decoder": (change(TOKENIZER, decoder={"type": 3}), "the tokenizer cannot be read", False),
    "added tokens": (change(TOKENIZER, added_tokens=[7]), "added_tokens is no list", True),
    "token beyond": (
        change(TOKENIZER, added_tokens=[{"id": 503, "content": "<x>", "special": True,
               "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}]),
        "'<x>' with id 503",
        True,
    ),
    "settings a list": (put(SETTINGS, "[1]"), "tokenizer_config.json: a JSON list", True),
    "settings cut": (put(SETTINGS, '{"unk'), "tokenizer_config.json: cannot be read", True),
    "settings folder": (folder_instead(SETTINGS), "tokenizer_config.json: is a folder", True),
    "empty unknown token": (change(SETTINGS, unk_token=""), 'unk_token is ""', True),
    "empty stop token": (change(SETTINGS, eos_token=""), 'eos_token is ""', True),
    "a number for a token": (change(SETTINGS, bos_token=3), "bos_token is 3", True),
    "a list for a token": (change(SETTINGS, pad_token=["<pad>"]), "pad_token is [", True),
    "no stop token": (change(SETTINGS, eos_token=None), "eos_token is null", True),
    "a new stop token": (
        change(SETTINGS, eos_token="<new>", added_tokens_decoder={"502": {"content": "<x>"}}),
        "eos_token '<new>' is no token of tokenizer.json; it would get the id 503",
        True,
    ),
    "no word of a stop token": (
        change(SETTINGS, eos_token=...), "no end-of-sequence token", False
    ),
    "length a word": (change(SETTINGS, model_max_length="long"), "the tokenizer cannot", False),
    "post-processor": (  # breaks off in Rust, with what is no Exception
        change(TOKENIZER, post_processor={
            "type": "TemplateProcessing", "pair": [], "special_tokens": {},
            "single": [{"SpecialToken": {"id": "<z>", "type_id": 0}}]}),
        "the tokenizer cannot be read",
        False,
    ),
    "class a number": (change(SETTINGS, tokenizer_class=5), "the tokenizer cannot be", False),
    "further tokens": (change(SETTINGS, extra_special_tokens=5), "the tokenizer cannot", False),
    "table of added tokens": (
        change(SETTINGS, added_tokens_decoder={"a": 1}), "added_tokens_decoder is no", True
    ),
    "token map": (put("special_tokens_map.json", "[]"), "special_tokens_map.json: a JSON", True),
    "empty token in the map": (
        put("special_tokens_map.json", '{"eos_token": ""}'), "special_tokens_map.json: eos", True
    ),
    "generation": (put("generation_config.json", "[]"), "generation_config.json: a JSON", True),
    "generation cut": (put("generation_config.json", "{"), "generation_config.json: cannot", True),
    "no weights": (without("model.safetensors"), "no weights in the model folder", False),
    "weights cut": (
        lambda folder: _cut(folder / "model.safetensors"), "model.safetensors: cannot", True
    ),
    "weights a pointer": (
        put("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
        "is a pointer of git-lfs",
        True,
    ),
    "weights a folder": (folder_instead("model.safetensors"), "safetensors: is a folder", True),
    "index": (put("model.safetensors.index.json", "{}"), "index.json: weight_map is no", True),
    "index elsewhere": (
        put("model.safetensors.index.json", '{"weight_map": {"a": "../../x"}}'),
        "which is no file of this folder",
        True,
    ),
    "pickles": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "the weights cannot be read",
        False,
    ),
}  # fmt: skip


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good model, its data and a job."""
    folder = tmp_path_factory.mktemp("whole")
    make_model(folder / "model")
    make_conversations(folder / "data.json", 4)
    return folder


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_is_one_message(name: str, whole: Path, tmp_path: Path) -> None:
    """A ModelError, which ends the program with 2: file, key, reason; and nothing is converted."""
    damage, said, seen_early = DAMAGES[name]
    model = Path(shutil.copytree(whole / "model", tmp_path / "model"))
    damage(model)
    config = load(make_job(tmp_path, model, whole / "data.json"), [])
    if seen_early:
        with pytest.raises(ModelError) as early:
            plan_of(config, 1)
        assert said in str(early.value)
        assert str(model) in str(early.value)
    with pytest.raises(ModelError) as error:
        encode_job(config)
    assert said in str(error.value)
    assert str(model) in str(error.value)
    assert "\n" not in error.value.what
    assert not list(config.cache_dir.glob("*/*"))


def test_the_undamaged_model_is_none(whole: Path, tmp_path: Path) -> None:
    """The messages above are of the damage."""
    encode_job(load(make_job(tmp_path, whole / "model", whole / "data.json"), []))


def test_what_was_mended_is_in_every_plan(whole: Path, tmp_path: Path) -> None:
    """Said where the job is shown, not only once while the data is encoded."""
    model = Path(shutil.copytree(whole / "model", tmp_path / "model"))
    (model / "generation_config.json").write_text('{"temperature": 0.5}')
    config = load(make_job(tmp_path, model, whole / "data.json"), [])
    encode_job(config)
    said = [note for note in plan_of(config, 1)[0].notes if "generation_config.json" in note]
    assert len(said) == 1
    assert "do_sample is set to true" in said[0]
