"""Ids and labels: equal to FastChat's where it was right, exact at every boundary."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import mistral_common
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_job import schema
from sft_job.conversations import Conversation, Exchange, Trainable, Turn, read, trainable
from sft_job.encode import Encoder, Sample, check_tokenizer, spec_of
from sft_job.errors import DataError, ModelError
from sft_job.rundir import CacheDir
from sft_job.settings import as_messages, chat_template
from sft_job.source import prepare_folder
from sft_job.tokenizer import check_converted, convert_sentencepiece, load_tokenizer
from tests.runs import ROOT, make_tokenizer

GOLDEN = json.loads((ROOT / "tests/golden/fastchat_labels.json").read_text())
CASES = [
    (name, size) for name, case in GOLDEN["cases"].items() for size in case if size[:3] == "max"
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory):
    """A real 32,000-piece tokenizer, converted from a bare tokenizer.model by our loader."""
    folder = tmp_path_factory.mktemp("llama")
    source = Path(mistral_common.__file__).parent / "data/tokenizer.model.v1"
    shutil.copyfile(source, folder / "tokenizer.model")
    target = folder / "converted"
    target.mkdir()
    convert_sentencepiece(folder, target)
    return load_tokenizer(target)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    """A byte-level tokenizer without a begin-of-sequence id."""
    return make_tokenizer(tmp_path_factory.mktemp("small"))


@functools.lru_cache(4)  # parsing 32,000 pieces takes longer than the tests
def _backends(tokenizer) -> Encoder:
    return Encoder(spec_of(tokenizer), "vicuna", 512, "truncate")


def encoder(tokenizer, seq_len: int = 512, overlong: str = "truncate") -> Encoder:
    made = copy.copy(_backends(tokenizer))
    made.seq_len, made.overlong = seq_len, overlong
    return made


def conversation(
    *texts: str, system: str | None = None, untrained: Collection[int] = ()
) -> Trainable:
    """A conversation of these texts; answers are counted from 0."""
    pairs = zip(texts[::2], texts[1::2], strict=True)
    exchanges = (Exchange(a, b, i not in untrained) for i, (a, b) in enumerate(pairs))
    return Trainable("c", "here", system, tuple(exchanges))


def one(tokenizer, *texts: str, **options) -> Sample:
    results, _ = encoder(tokenizer, **options).encode([conversation(*texts)])
    (sample,) = results[0]
    return sample


@pytest.mark.parametrize(("name", "size"), CASES)
def test_equals_fastchat(llama, name: str, size: str) -> None:
    """Ids and labels are those of FastChat's own code, truncated ones included."""
    case = GOLDEN["cases"][name]
    expected = case[size]
    turns = [Turn({"human": "user", "gpt": "assistant"}[t["from"]], t["value"])
             for t in case["conversations"]]  # fmt: skip
    cut, _ = trainable(Conversation(name, "here", tuple(turns)))
    results, lost = encoder(llama, int(size.rpartition("_")[2])).encode([cut])
    if expected["supervised_tokens"] == 0:
        # FastChat trains on the row all the same, on nothing; here it is dropped and counted.
        assert results == [[]]
        assert lost["overlong_nothing_left"] == 1
        return
    (sample,) = results[0]
    assert sample.input_ids.tolist() == expected["input_ids"]
    assert sample.labels.tolist() == expected["labels"]
    assert int(sample.supervised.sum()) == expected["supervised_tokens"]


def test_golden_file_covers_both_sizes_of_every_case() -> None:
    """No case is left out by the parametrisation above."""
    assert len(CASES) == 2 * len(GOLDEN["cases"]) == 16


def test_converted_tokenizer_is_compared_with_sentencepiece(llama, tmp_path: Path) -> None:
    """A conversion with merges in another order is refused, naming the text."""
    folder = tmp_path / "broken"
    shutil.copytree(llama.name_or_path, folder)
    file = folder / "tokenizer.json"
    backend = json.loads(file.read_text())
    backend["model"]["merges"].reverse()
    file.write_text(json.dumps(backend))
    with pytest.raises(ModelError, match="sentencepiece reads"):
        check_converted(folder, [conversation("x", "def f():\n    return a + b")])
    check_converted(Path(llama.name_or_path), [conversation("x", "def f():\n    return 1")])


def test_runs_of_equal_characters_are_cut_as_sentencepiece_cuts_them(llama) -> None:
    """Pieces that are made in several ways, of one score: spaces, rules, digits, of any length."""
    import sentencepiece

    folder = Path(llama.name_or_path)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for character in " \t\n=-#*.0aо":
        for count in range(1, 80):
            text = f"x{character * count}y {character * count}"
            assert llama(text, add_special_tokens=False).input_ids == pieces.encode(text), (
                character, count,
            )  # fmt: skip


@pytest.mark.parametrize("which", ["llama", "small"])
def test_control_tokens_typed_in_text_stay_text(which: str, request) -> None:
    """`</s>` and `<s>` in a turn never become control tokens, in question or answer."""
    tokenizer = request.getfixturevalue(which)
    sample = one(tokenizer, "what is </s>?", "It is <s> and </s>.", "so <s>", "yes</s>")
    ends = np.flatnonzero(sample.input_ids == tokenizer.eos_token_id)
    assert len(ends) == 2
    begins = int((sample.input_ids == tokenizer.bos_token_id).sum())
    assert begins == len(spec_of(tokenizer).begin)
    plain = tokenizer.decode(sample.input_ids, skip_special_tokens=False)
    assert plain.count("</s>") == 2 + 3


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Co", "Cn"]), min_size=1)


@settings(max_examples=150, deadline=None)
@given(turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), which=st.booleans())
def test_supervised_tokens_are_exactly_the_answers(llama, small, turns, which) -> None:
    """Whatever the text, the supervised ids of each run are one answer and its stop token."""
    tokenizer = llama if which else small
    enc = encoder(tokenizer, seq_len=100_000)
    texts = [text for turn in turns for text in turn]
    results, lost = enc.encode([conversation(*texts)])
    (sample,) = results[0]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.supervised, [0]])))
    runs = [sample.input_ids[a:b] for a, b in edges.reshape(-1, 2)]
    assert len(runs) == len(turns)
    prompt: list = []
    for (question, answer), run in zip(turns, runs, strict=True):
        assert run[-1] == tokenizer.eos_token_id
        if lost["straddling_token"] == 0:
            text = tokenizer.decode(run[:-1], skip_special_tokens=False)
            assert text.lstrip(" ") == answer.lstrip(" ")
        prompt.append((question, answer))


@pytest.mark.parametrize("which", ["llama", "small"])
def test_prompt_is_a_prefix_of_the_training_ids(which: str, request) -> None:
    """What is typed at inference has exactly the ids that were trained, after every turn."""
    tokenizer = request.getfixturevalue(which)
    exchanges = [Exchange("Hi", "Hello!"), Exchange("Count\n", "1. one"), Exchange("?", " x ")]
    enc = encoder(tokenizer)
    for system in (None, "Be brief."):
        whole = Trainable("c", "here", system, tuple(exchanges))
        (sample,) = enc.encode([whole])[0][0]
        ids = sample.input_ids.tolist()
        template = chat_template(tokenizer, enc)
        for count, exchange in enumerate(exchanges):
            prompt = enc.prompt(system, exchanges[:count], exchange.user)
            assert ids[: len(prompt)] == prompt
            assert sample.supervised[len(prompt)]
            assert not sample.supervised[len(prompt) - 1]
            messages = as_messages(system, exchanges[:count], exchange.user)
            render = {"chat_template": template, "return_dict": False}
            assert prompt == tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, **render
            )
            # Without the generation prompt, and closed by the answer: prefixes as well.
            closed = [*messages, {"role": "assistant", "content": exchange.assistant}]
            text = tokenizer.apply_chat_template(closed, **render)
            assert ids[: len(text)] == text
            opened = tokenizer.apply_chat_template(messages, **render)
            assert prompt[: len(opened)] == opened


def test_tokenizer_with_a_first_word_space_only_at_the_start(tmp_path: Path, llama) -> None:
    """legacy: false puts the dummy space before the first word only, also in training."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copyfile(Path(llama.name_or_path) / "tokenizer.model", source / "tokenizer.model")
    (source / "tokenizer_config.json").write_text('{"legacy": false}')
    target = tmp_path / "converted"
    target.mkdir()
    convert_sentencepiece(source, target)
    tokenizer = load_tokenizer(target)
    sample = one(tokenizer, "Hi", "Hello!", "Who?", "Me.")
    tokens = tokenizer.convert_ids_to_tokens(sample.input_ids.tolist())
    after = tokens.index("</s>") + 1
    assert tokens[1] == "▁A"
    assert tokens[after] == "USER"  # with legacy: true it is ▁US, ER
    enc = encoder(tokenizer)
    check_tokenizer(tokenizer, enc, [conversation("Hi", "Hello!", "Who?", "Me.")])
    template = chat_template(tokenizer, enc)
    ids = tokenizer.apply_chat_template(
        as_messages(None, [Exchange("Hi", "Hello!")], "Who?"),
        chat_template=template, add_generation_prompt=True, return_dict=False,
    )  # fmt: skip
    assert ids == sample.input_ids[: len(ids)].tolist()


def test_tokenizer_that_reads_the_whole_differently_is_refused(small) -> None:
    """A control token that swallows the text around it cannot be trained segment by segment."""
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(small)
    tokenizer.add_special_tokens({"eos_token": AddedToken("<end>", rstrip=True, special=True)})
    enc = encoder(tokenizer)
    check_tokenizer(tokenizer, enc, [conversation("a", "b")])
    spaced = enc.template.__class__("spaced", "", " USER: ", " ASSISTANT:", " ")
    enc.template = spaced
    with pytest.raises(ModelError, match="differently"):
        check_tokenizer(tokenizer, enc, [conversation("a", "b", "c", "d")])


LONG = conversation(*[f"question {i} " + "sun " * 8 for i in range(12)])


def test_truncate_cuts_and_counts(small) -> None:
    """The kept prefix has its exact labels; every lost token is counted."""
    whole = encoder(small, 10_000).encode([LONG])[0][0][0]
    results, lost = encoder(small, 100).encode([LONG])
    (sample,) = results[0]
    assert sample.input_ids.tolist() == whole.input_ids[:100].tolist()
    assert sample.supervised.tolist() == whole.supervised[:100].tolist()
    assert lost["overlong"] == 1
    assert lost["overlong_tokens"] == len(whole.input_ids) - 100
    assert lost["overlong_supervised_tokens"] == whole.supervised.sum() - sample.supervised.sum()


def test_split_keeps_every_answer_once(small) -> None:
    """Parts hold whole exchanges with the system text; no answer is lost or doubled."""
    enc = encoder(small, 110, "split")
    results, lost = enc.encode([LONG])
    answers = []
    for sample in results[0]:
        assert len(sample.input_ids) <= 110
        text = small.decode(sample.input_ids)
        assert text.startswith("A chat between a curious user")
        edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.supervised, [0]])))
        answers += [small.decode(sample.input_ids[a : b - 1]) for a, b in edges.reshape(-1, 2)]
    assert answers == [" " + exchange.assistant for exchange in LONG.exchanges]
    assert len(results[0]) > 1
    assert lost["overlong"] == 1
    assert lost["overlong_supervised_tokens"] == 0


def test_split_truncates_what_is_too_long_by_itself(small) -> None:
    """An exchange longer than seq_len is cut and counted, the others are kept whole."""
    long = conversation("a", "b", "c", "moon " * 200, "d", "e")
    results, lost = encoder(small, 60, "split").encode([long])
    assert [len(s.input_ids) for s in results[0]][1] == 60
    assert len(results[0]) == 3
    assert lost["overlong_tokens"] > 100


def test_drop_and_error(small) -> None:
    """drop counts the conversation; error names it with its length."""
    results, lost = encoder(small, 100, "drop").encode([LONG, conversation("a", "b")])
    assert [len(samples) for samples in results] == [0, 1]
    assert lost["overlong_dropped"] == 1
    with pytest.raises(DataError, match=r"here: conversation 'c' has \d+ tokens"):
        encoder(small, 100, "error").encode([LONG])


def runs(sample: Sample, tokenizer) -> list[str]:
    """The text of each supervised run, its stop token included."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.supervised, [0]])))
    return [tokenizer.decode(sample.input_ids[a:b]) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("which", ["llama", "small"])
@pytest.mark.parametrize("untrained", [{0}, {1}, {2}, {0, 1}, {0, 2}, {1, 2}])
def test_an_untrained_answer_is_context(which: str, untrained: set[int], request) -> None:
    """The ids stay as they are, its stop token too; labels are those of the other answers."""
    tokenizer = request.getfixturevalue(which)
    texts = ("q0", "sun", "q1", "moon", "q2", "star")
    whole = one(tokenizer, *texts)
    results, lost = encoder(tokenizer).encode([conversation(*texts, untrained=untrained)])
    (sample,) = results[0]
    assert sample.input_ids.tolist() == whole.input_ids.tolist()
    ends = np.flatnonzero(whole.input_ids == tokenizer.eos_token_id)
    expected = whole.supervised.copy()
    for number in untrained:
        start = ends[number - 1] + 1 if number else 0
        expected[start : ends[number] + 1] = False
    assert sample.supervised.tolist() == expected.tolist()
    assert len(runs(sample, tokenizer)) == 3 - len(untrained)
    assert +lost == {}


def test_answers_of_either_kind_are_checked_in_every_sample(small, monkeypatch) -> None:
    """A label too many or too few is found, whatever made it."""
    enc = encoder(small)
    told = conversation("a", "sun", "b", "moon", untrained={0})
    for trained, shift in ((lambda e: True, 0), (lambda e: not e.trained, 0),
                           (lambda e: e.trained, 1), (lambda e: e.trained, -1)):  # fmt: skip

        def wrong(e, trained=trained, shift=shift):
            return (np.arange(len(e.input_ids)) >= e.first + shift) & trained(e)

        with monkeypatch.context() as patch:
            patch.setattr("sft_job.encode._Encoded.supervised", property(wrong))
            with pytest.raises(AssertionError, match="exactly the trained answers"):
                enc.encode([told])


def test_truncation_keeps_what_is_trained_and_counts_the_rest(small) -> None:
    """Untrained answers at either end change no label; without a trained one nothing is left."""
    whole = encoder(small, 10_000).encode([LONG])[0][0][0]
    ends = np.flatnonzero(whole.input_ids == small.eos_token_id) + 1
    for untrained in ({0}, {5}, {0, 5}, {1, 2, 3, 4, 5}, {0, 1}):
        told = untrain(LONG, untrained)
        full = encoder(small, 10_000).encode([told])[0][0][0]
        results, lost = encoder(small, 200).encode([told])
        assert results[0][0].supervised.tolist() == full.supervised[:200].tolist()
        assert lost["overlong_tokens"] == len(whole.input_ids) - 200
        assert lost["overlong_supervised_tokens"] == full.supervised[200:].sum()
    results, lost = encoder(small, int(ends[4])).encode([untrain(LONG, range(5))])
    assert results == [[]]
    assert lost["overlong_nothing_left"] == 1
    assert lost["overlong_tokens"] == len(whole.input_ids)  # all of it
    assert lost["overlong_supervised_tokens"] == whole.supervised[ends[4] :].sum()


def test_split_drops_parts_without_a_trained_answer(small) -> None:
    """Every trained answer is in one part, with its context; what is dropped is counted."""
    enc = encoder(small, 160, "split")
    parts = enc.encode([LONG])[0][0]
    assert [len(runs(part, small)) for part in parts] == [2, 2, 2]
    for gone in range(3):
        results, lost = enc.encode([untrain(LONG, {2 * gone, 2 * gone + 1})])
        kept = [part.input_ids.tolist() for number, part in enumerate(parts) if number != gone]
        assert [sample.input_ids.tolist() for sample in results[0]] == kept
        assert lost["overlong_nothing_left"] == 1
        assert lost["overlong_tokens"] == len(parts[gone].input_ids)
        assert lost["overlong_supervised_tokens"] == 0
    answers = []
    for sample in enc.encode([untrain(LONG, {0, 3, 5})])[0][0]:
        answers += runs(sample, small)
    assert answers == [f" {LONG.exchanges[number].assistant}</s>" for number in (1, 2, 4)]


def test_split_of_an_untrained_answer_that_is_too_long(small) -> None:
    """There is nothing to truncate it to."""
    texts = ("a", "b", "c", "moon " * 200, "d", "e")
    results, lost = encoder(small, 60, "split").encode([conversation(*texts, untrained={1})])
    assert [runs(sample, small) for sample in results[0]] == [[" b</s>"], [" e</s>"]]
    assert lost["overlong_nothing_left"] == 1
    assert lost["overlong_supervised_tokens"] == 0


def test_drop_counts_the_supervised_tokens_only(small) -> None:
    """Not those of untrained answers."""
    told = untrain(LONG, range(5))
    (sample,) = encoder(small, 10_000).encode([told])[0][0]
    _, lost = encoder(small, 100, "drop").encode([told])
    assert lost["overlong_supervised_tokens"] == sample.supervised.sum()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.text("ab ", min_size=1, max_size=60), st.booleans()), min_size=1)
    .filter(lambda turns: any(trained for _, trained in turns)),
    st.integers(60, 200),
    st.sampled_from(["truncate", "split", "drop"]),
)  # fmt: skip
def test_no_policy_trains_on_an_untrained_answer(small, turns, seq_len, overlong) -> None:
    """Every supervised run is a trained answer, or the beginning of one that was cut off."""
    exchanges = tuple(
        Exchange(f"q{i}", f"{i}:{text}", trained) for i, (text, trained) in enumerate(turns)
    )
    told = Trainable("c", "here", None, exchanges)
    results, lost = encoder(small, seq_len, overlong).encode([told])
    found = [text for sample in results[0] for text in runs(sample, small)]
    wanted = [f" {e.assistant}</s>" for e in exchanges if e.trained]
    assert all(any(text == full or full.startswith(text) for full in wanted) for text in found)
    if not lost["overlong"]:
        assert found == wanted
    if overlong == "split" and not lost["overlong_supervised_tokens"]:
        assert found == wanted  # each once, in order


def untrain(told: Trainable, untrained: Collection[int]) -> Trainable:
    """The same conversation with answers flagged as not to be trained on."""
    exchanges = (replace(e, trained=i not in untrained) for i, e in enumerate(told.exchanges))
    return replace(told, exchanges=tuple(exchanges))


def test_straddling_token_is_counted_and_not_trained(small) -> None:
    """A token across the boundary belongs to the prompt; the answer is trained from the next."""
    import json as js

    spec = spec_of(small)
    backend = js.loads(spec.first)
    vocabulary = backend["model"]["vocab"]
    # A merge that glues the colon to the space after it.
    vocabulary[":Ġ"] = max(vocabulary.values()) + 1
    backend["model"]["merges"].insert(0, [":", "Ġ"])
    backend["pre_tokenizer"]["use_regex"] = False
    text = js.dumps(backend)
    from dataclasses import replace

    enc = Encoder(replace(spec, first=text, following=text), "vicuna", 512, "truncate")
    results, lost = enc.encode([conversation("sun", "moon")])
    (sample,) = results[0]
    assert lost["straddling_token"] == 1
    first = int(np.flatnonzero(sample.supervised)[0])
    assert sample.input_ids[first - 1] == vocabulary[":Ġ"]
    texts = ("sun", "moon", "star", "rain")
    _, lost = enc.encode([conversation(*texts, untrained={0})])
    assert lost["straddling_token"] == 1  # what is not trained on is no loss


def test_sample_without_anything_to_train_on_cannot_exist() -> None:
    """The type refuses what would train on nothing or on the first token."""
    ids = np.arange(3, dtype=np.uint32)
    with pytest.raises(ValueError, match="not a sample"):
        Sample(ids, np.zeros(3, bool))
    with pytest.raises(ValueError, match="not a sample"):
        Sample(ids, np.array([True, False, False]))
    with pytest.raises(ValueError, match="not a sample"):
        Sample(ids, np.ones(4, bool))


def test_shipped_conversations_encode_with_every_policy(small) -> None:
    """The sample data holds the awkward cases; nothing in it is refused."""
    conversations = [trainable(c)[0] for c in read([ROOT / "data/dummy_conversation.json"])]
    kept = [c for c in conversations if c is not None]
    assert len(kept) >= 300
    for overlong in ("truncate", "split", "drop"):
        results, _ = encoder(small, 256, overlong).encode(kept)
        assert sum(map(len, results)) >= 300
    check_tokenizer(small, encoder(small), kept)


def test_model_folder_with_bare_tokenizer_model_is_converted_once(tmp_path: Path, llama) -> None:
    """Weights are linked, the tokenizer converted; a second call finds it."""
    from tests.runs import make_model

    source = make_model(tmp_path / "model", vocab_size=32000, hidden_size=16, intermediate_size=16)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (source / file).unlink(missing_ok=True)
    shutil.copyfile(Path(llama.name_or_path) / "tokenizer.model", source / "tokenizer.model")
    own = {"tokenizer_config.json": '{"legacy": true, "add_bos_token": true}\n',
           "special_tokens_map.json": '{"bos_token": "<s>"}\n'}  # fmt: skip
    for name, text in own.items():
        (source / name).write_text(text)
    cache = CacheDir(tmp_path / "cache")
    asked = schema.Model(path=str(source))
    folder = prepare_folder(asked, cache, online=False)
    assert (folder / "model.safetensors").is_symlink()
    for name, text in own.items():
        assert (source / name).read_text() == text, f"the user's {name} was written over"
    assert load_tokenizer(folder)("Hi").input_ids == llama("Hi").input_ids
    assert load_tokenizer(folder).pad_token == "<unk>"
    assert prepare_folder(asked, cache, online=False) == folder
