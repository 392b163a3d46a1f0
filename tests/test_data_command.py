"""`sft-job data encode` and `show` on data that says what is trained on, with a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from sft_job import data, plan
from sft_job.config import load
from sft_job.dataset import TextCache, TokenCache, encoder_of
from sft_job.errors import DataError, ModelError
from sft_job.prepared import find_prepared
from sft_job.tokenizer import load_tokenizer
from tests.runs import make_job, make_model

ASKED = [("user", "sun?"), ("assistant", "moon"), ("user", "star?"), ("assistant", "rain")]
TURNS = [{"role": role, "content": text} for role, text in ASKED]
RECORDS = [
    {"id": "plain", "messages": TURNS, "source": "s"},
    {
        "id": "first-off",
        "messages": [TURNS[0], TURNS[1] | {"weight": 0}, *TURNS[2:]],
        "source": "s",
    },
    {"id": "last-off", "messages": [*TURNS[:3], TURNS[3] | {"train": False, "time": 1}]},
    {"id": "all-off", "messages": TURNS, "loss": False},
    {"id": "system", "messages": TURNS, "system": "Be brief."},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A random model of 32 channels."""
    return make_model(tmp_path_factory.mktemp("tiny"), hidden_size=32, intermediate_size=32)


@pytest.fixture
def job(tiny, tmp_path, monkeypatch) -> Path:
    """A job on the records above; what encoding puts into the environment is taken out again."""
    for name in ("TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "1" if name == "HF_HUB_OFFLINE" else "cpu")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    return make_job(tmp_path, tiny, tmp_path / "data.json", train__global_batch_size=2)


def trained_texts(sample, tokenizer) -> list[str]:
    """The text of each supervised run."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.supervised, [0]])))
    return [tokenizer.decode(sample.input_ids[a:b]) for a, b in edges.reshape(-1, 2)]


BOTH = [" moon</s>", " rain</s>"]
EXPECTED = [BOTH, BOTH[1:], BOTH[:1], BOTH]
SAID = [
    "not trained on:",
    "         1  conversations without an answer that is to be trained on, dropped",
    "         4  answers flagged as not to be trained on",
    "keys that mean nothing here: source (2 conversations), time (1 turn)",
]


def test_encode_honours_flags_and_system_and_says_what_it_found(job, capsys):
    """In what it prints, in the cache, and in the plan of the prepared job."""
    for _ in range(2):  # the second finds it ready, and says the same
        data.main(["encode", str(job)])
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("5 conversations -> 4 samples, ")
        assert lines[1:5] == SAID
    prepared = find_prepared(load(job))
    cache, tokenizer = (
        TokenCache(Path(prepared.data_folder)),
        load_tokenizer(Path(prepared.model_folder)),
    )
    assert [trained_texts(cache[i], tokenizer) for i in range(len(cache))] == EXPECTED
    assert cache[0].input_ids.tolist() == cache[1].input_ids.tolist() == cache[2].input_ids.tolist()
    assert tokenizer.decode(cache[3].input_ids).startswith("Be brief. USER: sun?")
    plan.main([str(job)])
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line in SAID] == [SAID[3], *SAID[:3]]


def test_lazy_preprocessing_trains_on_the_same_tokens(job, capsys):
    """The texts in its cache carry the flags."""
    data.main(["encode", str(job), "data.preprocess=lazy"])
    assert SAID[3] in capsys.readouterr().out.splitlines()
    config = load(job, ["data.preprocess=lazy"])
    prepared = find_prepared(config)
    tokenizer = load_tokenizer(Path(prepared.model_folder))
    texts = TextCache(Path(prepared.data_folder))
    results, lost = encoder_of(config, tokenizer).encode([texts[i] for i in range(len(texts))])
    assert [trained_texts(sample, tokenizer) for (sample,) in results] == EXPECTED
    assert +lost == {}


def test_show_marks_the_answers_that_are_trained_on(job, capsys):
    """In brackets where there are no colours; the others stand there unmarked."""
    data.main(["show", "first-off", str(job)])
    shown = " ".join(capsys.readouterr().out.split())
    assert "moon" in shown
    assert "[Ġ" not in shown.partition("moon")[0]
    assert "1 answers flagged as not to be trained on" in shown
    marked = [word for word in shown.split() if word.startswith("[") and word.endswith("]")]
    assert marked[-1] == "[</s>]"
    assert shown.count("[</s>]") == 1
    assert shown.count(" </s>") == 1
    data.main(["show", "all-off", str(job)])
    shown = capsys.readouterr().out.partition("conversation ")[2]
    assert "[" not in shown
    assert "1  conversations without an answer that is to be trained on, dropped" in shown


def test_data_that_is_refused_is_refused_before_anything_is_made(job, tmp_path):
    """By every command alike, with nothing left in the cache."""
    (tmp_path / "data.json").write_text(json.dumps([RECORDS[0] | {"tools": [{"name": "f"}]}]))
    for command in (["validate"], ["encode"], ["show", "0"]):
        with pytest.raises(DataError, match="'plain': `tools`: tools are not supported"):
            data.main([*command, str(job)])
    assert not (tmp_path / ".sft_job_cache").exists()


def test_a_sample_beyond_the_window_is_refused_while_encoding(job, tiny, tmp_path) -> None:
    """Its length is known only then; a plan says the same afterwards."""
    model = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    windows = {"model_type": "mistral", "sliding_window": 8, "architectures": None}
    (model / "config.json").write_text(json.dumps(config | windows))
    config = load(job, [f"model.path={model}"])
    for ask in (data.encode_job, plan.plan_of):
        with pytest.raises(ModelError, match="tokens, and layers of mistral look back 8 tokens"):
            ask(config)
