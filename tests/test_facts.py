"""What a model's files say is read on a login node, and every fault of theirs is named there."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sft_job.errors import ModelError
from sft_job.facts import ACTIVATIONS, DTYPES, ModelFacts, read_facts
from sft_job.modelfiles import check_tokenizer_files, unreadable
from tests.test_layers import BLOCK, python

CONFIG_JSON = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "vocab_size": 32,
    "max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
OLD_LINEAR = {"type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32,
          "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # fmt: skip
YARN = {"type": "yarn", "factor": 4.0}
LONG = {"type": "longrope", "short_factor": [1.0, 1.0, 1, 1], "long_factor": [2, 4, 4, 4]}


def model_folder(folder: Path, **changes: Any) -> Path:
    """A model folder with a config.json."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG_JSON | changes))
    return folder


def weights(path: Path, tensors: dict[str, list[int]], dtype: str = "F32") -> None:
    """A safetensors file of zeros."""
    header, end = {}, 0
    for name, shape in tensors.items():
        size = {"F32": 4, "U8": 1, "BF16": 2}[dtype]
        for number in shape:
            size *= number
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


# --- what is right -------------------------------------------------------------------------


def test_facts_are_read_from_config_and_headers(tmp_path: Path) -> None:
    """Parameters are counted over all weight files, without reading a weight."""
    folder = model_folder(tmp_path / "m", tie_word_embeddings=True)
    weights(folder / "model-00001-of-00002.safetensors", {"a": [32, 8], "b": [8]})
    weights(folder / "model-00002-of-00002.safetensors", {"c": [4, 8]})
    assert read_facts(folder) == ModelFacts("llama", 2, 8, 32, 64, None, True, 296)


def test_what_is_no_parameter_is_not_counted(tmp_path: Path) -> None:
    """Frequencies that older releases wrote, and a head that is the table."""
    folder = model_folder(tmp_path / "m", tie_word_embeddings=True)
    names = {"model.embed_tokens.weight": [32, 8], "lm_head.weight": [32, 8],
             "model.layers.1.self_attn.rotary_emb.inv_freq": [2]}  # fmt: skip
    weights(folder / "model.safetensors", names)
    assert read_facts(folder).parameters == 256


def test_facts_without_weights_have_no_size(tmp_path: Path) -> None:
    """Unknown, not 0."""
    assert read_facts(model_folder(tmp_path / "m")).parameters is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_scaling": OLD_LINEAR}, OLD_LINEAR),
        ({"rope_parameters": LLAMA3}, LLAMA3),
        ({"rope_scaling": None}, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, None),
        # both forms, as exports have them: transformers takes the older key
        ({"rope_parameters": LINEAR, "rope_scaling": LINEAR, "rope_theta": 1e6}, LINEAR),
        # one for each type of layer: what reaches as far as a sample is long
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "default"},
                                 "full_attention": LINEAR}},
            LINEAR,
        ),
        (
            {"model_type": "phi3", "rope_scaling": LONG, "original_max_position_embeddings": 16},
            LONG | {"original_max_position_embeddings": 16},
        ),
    ],
)  # fmt: skip
def test_an_existing_rope_scaling_is_found(
    changes: dict[str, Any], expected: Any, tmp_path: Path
) -> None:
    """Under its old and its new name; the default is none."""
    assert read_facts(model_folder(tmp_path / "m", **changes)).rope == expected


def test_what_a_family_takes_for_a_missing_key(tmp_path: Path) -> None:
    """Gemma ties its head and Seed-OSS drops attention weights though their files do not say so."""
    assert read_facts(model_folder(tmp_path / "a", model_type="gemma")).tied
    assert not read_facts(model_folder(tmp_path / "b")).tied
    assert read_facts(model_folder(tmp_path / "c", model_type="seed_oss")).dropout == 0.1


def test_left_over_quantization_is_said(tmp_path: Path) -> None:
    """Plain numbers are plain numbers, whatever config.json still says of their past."""
    folder = model_folder(tmp_path / "m", quantization_config={"quant_method": "fp8"})
    assert read_facts(folder).notes == ()  # nothing is known of the weights yet
    weights(folder / "model.safetensors", {"a.weight": [8, 8]}, "BF16")
    assert "quantization_config in config.json is left out" in read_facts(folder).notes[0]


# --- config.json ---------------------------------------------------------------------------


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    """Weights in another layout, or the wrong folder, or none."""
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ModelError, match=r"no config\.json in the model folder\n  -> model.pa"):
            read_facts(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read: Expecting property name"),
        ("", "cannot be read: Expecting value"),
        ("[1]", "a JSON list is in it, expected an object"),
        ("null", "a JSON NoneType is in it, expected an object"),
        ('{"a": ' * 20_000, "cannot be read: it is nested too deeply"),
        ('{"a": 1' + "0" * 5000 + "}", "cannot be read: Exceeds the limit"),
        ("version https://git-lfs.github.com/spec/v1\n", "is a pointer of git-lfs"),
    ],
)
def test_a_config_that_is_no_json_object_is_named(
    content: str, message: str, tmp_path: Path
) -> None:
    """With the file, and what is in it."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=rf"^{tmp_path}/config\.json: {message}"):
        read_facts(tmp_path)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    """UTF-16, or a file cut in the middle."""
    (tmp_path / "config.json").write_bytes('{"a": 1}'.encode("utf-16"))
    with pytest.raises(ModelError, match=r"config\.json: cannot be read: 'utf-8' codec"):
        read_facts(tmp_path)


def test_a_folder_or_a_dead_link_in_its_place_is_named(tmp_path: Path) -> None:
    """A hub cache whose blobs were cleaned away; a folder unpacked too deep."""
    (tmp_path / "config.json").symlink_to(tmp_path / "gone")
    with pytest.raises(ModelError, match=r"config\.json: is a link to nothing\n  -> fetch the mod"):
        read_facts(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"config\.json: is a folder, and a file is needed"):
        read_facts(tmp_path)


@contextmanager
def another_user() -> Iterator[None]:
    """Somebody without rights, for the time being."""
    if os.geteuid():
        yield  # not root: a mode of 0 is enough
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that other users may enter, whatever the modes of the folders of tests."""
    folder = Path(tempfile.mkdtemp(prefix="sft-job-test-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_what_a_user_may_not_read_is_not_called_damaged(open_folder: Path) -> None:
    """The reason is the real one, for config.json, weights and the folder itself."""
    folder = model_folder(open_folder / "m")
    weights(folder / "model.safetensors", {"a": [1]})
    for closed in (folder / "model.safetensors", folder / "config.json", folder):
        closed.chmod(0)
        try:
            with another_user(), pytest.raises(ModelError) as error:
                read_facts(folder)
        finally:
            closed.chmod(0o755)
        assert "this user may not read it: Permission denied" in str(error.value)
        assert "chmod +r" in str(error.value)
        assert "fetch" not in str(error.value)


@pytest.mark.parametrize("key", ["model_type", *list(CONFIG_JSON)[1:]])
@pytest.mark.parametrize("value", [None, "x", True, -1, 0, 2.5, [8], {}, 10**13])
def test_a_number_that_cannot_be_is_named_with_its_key(
    key: str, value: Any, tmp_path: Path
) -> None:
    """Whatever stands there: missing, of another type, negative, absurd."""
    if key == "model_type" and value == "x":
        value = ""
    folder = model_folder(tmp_path / "m", **{key: value})
    with pytest.raises(ModelError, match=rf"{key}") as error:
        read_facts(folder)
    assert "config.json" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, "num_attention_heads is 3, expected a divisor of hidden_size"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "expected a divisor of num_attent"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"tie_word_embeddings": "yes"}, 'tie_word_embeddings is "yes", expected true or false'),
        ({"attention_dropout": 1.5}, "attention_dropout is 1.5, expected a number from 0"),
        ({"eos_token_id": 32}, "eos_token_id is 32, expected less than vocab_size, 32 rows"),
        ({"eos_token_id": [2, 40]}, r"eos_token_id is \[2, 40\]"),
        ({"pad_token_id": 32}, "pad_token_id is 32"),
        ({"bos_token_id": "1"}, 'bos_token_id is "1"'),
        ({"rope_scaling": "linear"}, 'rope_scaling is "linear", expected an object or null'),
        ({"rope_scaling": {"type": "ntk", "factor": 2}}, "expected a rope_type of linear, dynamic"),
        ({"rope_scaling": {"type": "linear"}}, "expected factor in it for rope_type linear"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "expected factor in it"),
        ({"rope_scaling": {"type": "longrope", "short_factor": 1, "long_factor": [1]}}, "short_f"),
        ({"rope_scaling": LONG | {"long_factor": [1]}}, "expected 4 numbers as long_factor, a pa"),
        ({"rope_theta": -1}, "rope_theta is -1, expected a rope_theta above 0"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "expected factor in it for rope_type yarn"),
        ({"rope_scaling": OLD_LINEAR | {"factor": 0}}, "as factor a number of at least 1 in it"),
        ({"rope_scaling": OLD_LINEAR | {"factor": -2}}, "as factor a number of at least 1"),
        ({"rope_scaling": YARN | {"beta_fast": "x"}}, "as beta_fast a number above 0"),
        ({"rope_scaling": YARN | {"attention_factor": -1}}, "as attention_factor a number above 0"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor below high_freq"),
        ({"rope_scaling": LONG | {"long_factor": [2, 0, 4, 4]}}, "as long_factor a number above 0"),
        ({"rms_norm_eps": "1e-5"}, 'rms_norm_eps is "1e-5", expected a number of at least 0'),
        ({"initializer_range": -1}, "initializer_range is -1"),
        ({"attention_bias": "yes"}, 'attention_bias is "yes", expected true or false'),
        ({"hidden_act": "nope"}, 'hidden_act is "nope", expected an activation function'),
        ({"dtype": "float8"}, 'dtype is "float8", expected a dtype such as bfloat16'),
        ({"torch_dtype": "torch.float16"}, 'torch_dtype is "torch.float16"'),
        ({"quantization_config": [1]}, r"quantization_config is \[1\], expected an object or null"),
    ],
)
def test_values_that_do_not_fit_each_other_are_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Before any library stumbles over them."""
    with pytest.raises(ModelError, match=message):
        read_facts(model_folder(tmp_path / "m", **changes))


def test_names_of_dtypes_and_activations_are_those_of_the_libraries() -> None:
    """What is refused by name here would be refused by them."""
    import torch
    from transformers.activations import ACT2FN

    assert set(ACT2FN) == ACTIVATIONS
    assert all(getattr(torch, name).is_floating_point for name in DTYPES)


def test_the_first_llamas_have_a_pad_of_minus_one(tmp_path: Path) -> None:
    """That is how they say none."""
    assert read_facts(model_folder(tmp_path / "m", pad_token_id=-1)).vocabulary == 32


# --- weights -------------------------------------------------------------------------------


def test_a_weight_file_that_is_none_is_named(tmp_path: Path) -> None:
    """What git leaves without LFS: 130 bytes of text that are called model.safetensors."""
    folder = model_folder(tmp_path / "m")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 538090408\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(ModelError, match=r"model\.safetensors: is a pointer of git-lfs.*\n.*lfs"):
        read_facts(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "unpack requires a buffer of 8 bytes"),
        (b"123", "unpack requires a buffer of 8 bytes"),
        (struct.pack("<Q", 10**9) + b"{}", "no safetensors file: it does not begin with"),
        (struct.pack("<Q", 2) + b"[]", "no safetensors file: its header is no JSON object"),
        (struct.pack("<Q", 9) + b'{"a": 17}', "no safetensors file: the entry of a is 17"),
        (struct.pack("<Q", 3) + b"{]}", "Expecting property name"),
        (b"\x80\x02}q\x00X" * 40, "no safetensors file"),
    ],
)
def test_a_broken_weight_file_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    """Empty, a pickle under a wrong name, a damaged header."""
    folder = model_folder(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=rf"model\.safetensors: cannot be read: {message}"):
        read_facts(folder)


def test_a_file_cut_off_is_named(tmp_path: Path) -> None:
    """Its header is whole, the numbers are not; and one that goes on."""
    folder = model_folder(tmp_path / "m")
    file = folder / "model.safetensors"
    weights(file, {"a": [8, 8]})
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ModelError, match=r"cut off: \d+ bytes, \d+ expected\n  -> fetch it again"):
        read_facts(folder)
    file.write_bytes(whole + b"x")
    with pytest.raises(ModelError, match="longer than its header says"):
        read_facts(folder)


def test_tensors_without_numbers_are_named(tmp_path: Path) -> None:
    """What one rank of a ZeRO-3 training saves of parameters that it did not gather."""
    folder = model_folder(tmp_path / "m")
    weights(folder / "model.safetensors", {"model.norm.weight": [0]})
    with pytest.raises(ModelError, match=r"model.norm.weight holds nothing .*without gathering it"):
        read_facts(folder)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    """8-bit numbers mean nothing without their scales."""
    folder = model_folder(tmp_path / "m")
    weights(folder / "model.safetensors", {"a.weight": [8, 8]}, "U8")
    with pytest.raises(ModelError, match=r"a.weight is U8: quantised weights cannot be fully fine"):
        read_facts(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "weight_map is no table"),
        ('{"weight_map": []}', "weight_map is no table"),
        ('{"weight_map": {"a": 1}}', "has a in 1, which is no file of this folder"),
        ('{"weight_map": {"a": "../x"}}', r"has a in '\.\./x', which is no file of this folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "which is no file of this folder"),
        ("{", "cannot be read: Expecting property"),
    ],
)
def test_a_broken_index_is_named(content: str, message: str, tmp_path: Path) -> None:
    """Nothing outside the folder is read."""
    folder = model_folder(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=rf"model\.safetensors\.index\.json: .*{message}"):
        read_facts(folder)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    """An index and not all of its files."""
    folder = model_folder(tmp_path / "m")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors: is not there"):
        read_facts(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.layers.2.a": [8]}, "num_hidden_layers is 2, and the weight files have 3 layers"),
        ({"model.layers.0.a": [8]}, "num_hidden_layers is 2, and the weight files have 1 layers"),
        ({"model.embed_tokens.weight": [40, 8]}, "vocab_size is 32, and .* has 40 rows"),
    ],
)
def test_weights_of_another_size_are_refused(
    tensors: dict[str, list[int]], message: str, tmp_path: Path
) -> None:
    """Seen in the headers, before anything is loaded."""
    folder = model_folder(tmp_path / "m")
    weights(folder / "model.safetensors", tensors)
    with pytest.raises(ModelError, match=message):
        read_facts(folder)


# --- the tokenizer -------------------------------------------------------------------------

TOKENS = {"model": {"vocab": {"<s>": 0, "</s>": 1, "a": 2}}, "added_tokens": []}


def tokenizer_folder(folder: Path, tokens: Any = TOKENS, **files: Any) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_tokenizers_of_both_kinds_are_read(tmp_path: Path) -> None:
    """BPE has a table, Unigram a list of pieces with scores; special tokens as texts or objects."""
    settings = {"eos_token": "</s>", "bos_token": {"content": "<s>"}, "unk_token": None,
                "add_bos_token": True}  # fmt: skip
    check_tokenizer_files(tokenizer_folder(tmp_path / "a", tokenizer_config=settings), 3)
    pieces = {"model": {"vocab": [["<s>", 0.0], ["</s>", 0.0], ["a", -1.5]]}}
    check_tokenizer_files(tokenizer_folder(tmp_path / "b", pieces, tokenizer_config=settings), 3)


@pytest.mark.parametrize(
    ("tokens", "files", "message"),
    [
        ([], {}, "tokenizer.json: a JSON list is in it"),
        ({}, {}, "tokenizer.json: has no model.vocab"),
        ({"model": {"vocab": {}}}, {}, "tokenizer.json: has no model.vocab"),
        (TOKENS | {"added_tokens": [1]}, {}, "added_tokens is no list of objects"),
        (TOKENS, {"tokenizer_config": []}, "tokenizer_config.json: a JSON list is in it"),
        (TOKENS, {"tokenizer_config": {"unk_token": ""}}, 'unk_token is "", expected a token or'),
        (TOKENS, {"tokenizer_config": {"eos_token": {"content": ""}}}, "eos_token is {"),
        (TOKENS, {"tokenizer_config": {"pad_token": 3}}, "pad_token is 3, expected a token"),
        (
            TOKENS,
            {"special_tokens_map": {"eos_token": ""}},
            "tokens_map.json: eos_token is",
        ),
        (TOKENS, {"tokenizer_config": {"eos_token": None}}, "eos_token is null: an answer could"),
        (TOKENS, {"tokenizer_config": {"added_tokens_decoder": [1]}}, "added_tokens_decoder is no"),
        (TOKENS, {"generation_config": [1]}, "generation_config.json: a JSON list is in it"),
        (
            TOKENS | {"added_tokens": [{"content": "<e>", "id": 3}]},
            {"tokenizer_config": {"eos_token": "<e>"}},
            r"1 token\(s\) have no row in the embedding table, eos_token '<e>' with id 3: voc",
        ),
        (
            TOKENS,
            {"tokenizer_config": {"added_tokens_decoder": {"7": {"content": "<x>"}}}},
            "such as '<x>' with id 7",
        ),
        (
            TOKENS,
            {"tokenizer_config": {"eos_token": "<new>"}},
            "eos_token '<new>' is no token of tokenizer.json; it would get the id 3, and vocab_size"
            " is 3",
        ),
    ],
)
def test_faults_of_a_tokenizer_are_named(
    tokens: Any, files: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """File, key and number, without the library that would stumble."""
    with pytest.raises(ModelError, match=message):
        check_tokenizer_files(tokenizer_folder(tmp_path / "m", tokens, **files), 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the model folder has no tokenizer"),
        (b"IQ== 0\nIg== 1\n", "is no sentencepiece model but a tiktoken vocabulary"),
        (b"\x80\x02", "is no sentencepiece model"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of git-lfs"),
    ],
)
def test_a_tokenizer_model_that_is_none_is_named(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    """Llama 3's tokenizer.model is tiktoken's, Llama 2's sentencepiece's."""
    if content is not None:
        (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        check_tokenizer_files(tmp_path, 3)


def test_causes_are_told_apart(tmp_path: Path) -> None:
    """What is not there, what may not be read, what is damaged: three remedies."""
    file = tmp_path / "x"
    assert "is not there" in str(unreadable(file, FileNotFoundError(2, "No such file")))
    file.write_text("x")
    assert "may not read it" in str(unreadable(file, PermissionError(13, "Permission denied")))
    assert "cannot be read: bad" in str(unreadable(file, ValueError("bad")))


# --- on a login node -----------------------------------------------------------------------

BOTH = """
import sys
from pathlib import Path
from sft_job import plan, submit
from sft_job.errors import SftJobError

for main, words in ((plan.main, []), (submit.main, ["--dry-run"])):
    try:
        main([sys.argv[1], *words])
    except SftJobError as error:
        print(error.exit_code, str(error).replace(chr(10), " "))
    else:
        print("passed")
"""


@pytest.mark.parametrize(
    ("changes", "data", "message"),
    [
        ({}, {}, None),
        ({"num_local_experts": 8}, {}, "is a mixture of experts"),
        ({"eos_token_id": 32}, {}, "eos_token_id is 32"),
        (
            {"model_type": "mistral", "sliding_window": 16},
            {"preprocess": "lazy"},
            "look back 16 tokens only",
        ),
        ({"model_type": "gemma2", "final_logit_softcapping": None}, {}, "caps its attention sco"),
        ({"rope_scaling": {"type": "ntk", "factor": 2}}, {}, "expected a rope_type"),
    ],
)
def test_plan_and_submit_refuse_without_torch(
    changes: dict[str, Any], data: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    """Exit code 2, before anything is queued; `submit --dry-run` says so too."""
    folder = model_folder(tmp_path / "m", num_attention_heads=1, **changes)
    weights(folder / "model.safetensors", {"model.embed_tokens.weight": [32, 8]})
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "a", "conversations": turns}]))
    job = {
        "model": {"path": str(folder)},
        "data": {"train": [str(tmp_path / "data.json")], "seq_len": 64, **data},
        "run": {"dir": str(tmp_path / "run")},
        "slurm": {"gpus_per_node": 0},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    done = python(BLOCK + BOTH, str(tmp_path / "job.yaml"), cwd=tmp_path)
    said = [line for line in done.stdout.splitlines() if line.startswith(("2 ", "passed"))]
    if message is None:
        assert said[0] == "passed", done.stdout + done.stderr
        assert "model" not in said[1], said  # there is no cluster here
        return
    assert len(said) == 2, done.stdout + done.stderr
    assert all(message in line and line.startswith("2 ") for line in said)
