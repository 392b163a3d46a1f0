"""The text of a job file: values stay what they look like, and no text is slow or deep to read."""

from __future__ import annotations

from typing import Any

import pytest

from sft_job.config import load
from sft_job.errors import ConfigError
from sft_job.yamltext import DEEPEST, MOST_VALUES, Source, as_text, number, resolved


def values(text: str) -> Any:
    return as_text(Source("job.yaml", text).value)


def fault(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        Source("job.yaml", text)
    (only,) = caught.value.faults
    return only


# --- numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5), ("+5", 5), ("-3", -3), ("0", 0), ("1.5", 1.5), (".5", 0.5), ("5.", 5.0),
        ("2e-5", 2e-5), ("2E5", 2e5), ("1e-08", 1e-8), ("-.inf", float("-inf")), ("0.10", 0.1),
    ],
)  # fmt: skip
def test_a_number_is_what_it_looks_like(text, value):
    """Decimal digits, a point, an exponent."""
    found = number(text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "how"),
    [
        ("1:30", "base 60; write 90"), ("24:00:00", "base 60; write 86400"), ("-1:30", "write -90"),
        ("010", "write 10 or 8"), ("-010", "write -10 or -8"), ("089", "write 89"),
        ("007.5", "write 7.5"), ("0x1F", "write 31"), ("0o17", "write 15"), ("0b101", "write 5"),
        ("1_000", "write 1000"), ("1,000", "write 1000"), ("12 000", "write 12000"),
        ("1_0.5", "write 10.5"),
    ],
)  # fmt: skip
def test_a_number_of_another_notation_is_refused_with_the_way_to_write_it(text, how):
    """What YAML 1.1 would turn into another number, or a reader may take for another one."""
    with pytest.raises(ValueError, match=how):
        number(text)


@pytest.mark.parametrize("text", ["many", "", "yes", "2026-10-10", "1.2.3", "e5", "٣", "9" * 99])
def test_what_is_no_number_is_none(text):
    with pytest.raises(ValueError, match=r"^$"):
        number(text)


NUMBERS = ["train.global_batch_size", "train.seed", "data.seq_len", "checkpoint.keep",
           "train.learning_rate", "train.warmup_ratio", "train.micro_batch_tokens"]  # fmt: skip


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("text", ["1:30", "010", "0x10", "1_000", "1:30.5", "0o17", "2026-10-10"])
def test_no_number_of_a_job_becomes_another_one(job_file, key, text):
    """In the file, in an override, and in quotes, which YAML would not turn into a number."""
    section, _, name = key.partition(".")
    good = job_file.read_text()
    for written in (text, f'"{text}"'):
        with pytest.raises(ConfigError, match=rf"override {key}: .*{text[:3]}"):
            load(job_file, [f"{key}={written}"])
        if section == "train":
            job_file.write_text(good + f"train: {{{name}: {written}}}\n")
            with pytest.raises(ConfigError, match=rf"job\.yaml:4: {key}: "):
                load(job_file)
            job_file.write_text(good)


def test_a_whole_number_may_be_written_with_an_exponent(job_file):
    assert load(job_file, ["train.max_steps=1e3"]).train.max_steps == 1000


# --- text ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["010", "1:30", "16:00", "1e5", "12", "0x1F", "1_000", "yes", "no", "on", "off", "true",
             "2026-10-10", "2026-10-10 12:00:00", "=", "1.10"]
)  # fmt: skip
def test_text_is_kept_as_it_is_written(job_file, text):
    """A commit, an account or a reservation that YAML would take for a number, a date, a switch."""
    job_file.write_text(
        job_file.read_text()
        + f"slurm: {{gpus_per_node: 1, account: {text}, extra: {{begin: {text}}}}}\n"
    )
    options = ["model.path=org/name", f"model.revision={text}", f"slurm.qos={text}"]
    config = load(job_file, options)
    assert config.model.revision == text
    assert (config.slurm.account, config.slurm.qos) == (text, text)
    given = config.slurm.extra["begin"]
    assert given is True if text == "true" else str(given) == text


def test_switches_are_read_where_one_is_meant(job_file):
    """yes and on are switches of YAML 1.1; in a switch they can mean nothing else."""
    for text, value in {"true": True, "yes": True, "on": True, "no": False, "False": False}.items():
        assert load(job_file, [f"run.online={text}"]).run.online is value


def test_values_of_extra_sections_are_what_they_look_like(job_file):
    """Decimal numbers and switches; everything else stays text, also in lists and mappings."""
    text = "{a: 1, b: 1.5, c: true, d: yes, e: 010, f: 16:00, g: null, h: [1:30, 2], i: '5'}"
    found = resolved(Source("x", text).value)
    assert found == {
        "a": 1, "b": 1.5, "c": True, "d": "yes", "e": "010", "f": "16:00", "g": None,
        "h": ["1:30", 2], "i": "5",
    }  # fmt: skip
    assert {type(found["a"]), type(found["d"])} == {int, str}


def test_sbatch_reads_its_options_itself(job_file):
    """A number that is not written as Python writes it goes to sbatch as it is."""
    extra = "{mem: 010, delay-boot: 1.50, nice: 100, overcommit: true, hint: no}"
    slurm = load(job_file, [f"slurm={{gpus_per_node: 1, extra: {extra}}}"]).slurm
    assert slurm.extra == {
        "mem": "010", "delay-boot": "1.50", "nice": 100, "overcommit": True, "hint": "no",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("1440", 1440), ("24:00:00", 1440), ("1:30", 2), ("90:00", 90), ("0:30", 1),
        ("01:00:00", 60), ("00:00:01", 1), ("100:00:00", 6000), ("1-0", 1440), ("1-12", 2160),
        ("2-01:30", 2970), ("1-00:00:01", 1441), ('"12:00:00"', 720),
    ],
)  # fmt: skip
def test_a_time_limit_may_be_written_as_slurm_writes_it(job_file, text, minutes):
    """In minutes, rounded up; the same in an override and in the file."""
    section = f"{{gpus_per_node: 1, time_min: {text}}}"
    assert load(job_file, [f"slurm={section}"]).slurm.time_min == minutes
    job_file.write_text(job_file.read_text() + f"slurm: {section}\n")
    assert load(job_file).slurm.time_min == minutes
    assert load(job_file, [f"slurm.time_min={text}"]).slurm.time_min == minutes


@pytest.mark.parametrize(
    "text", ["0", "0:00", "010", "1:2:3:4", "1-2-3", "UNLIMITED", "infinite", "1:90", "1:90:00",
             "-5", "1.5", "90 min", "1d", "1-", "9999999:00:00"]
)  # fmt: skip
def test_what_is_no_time_limit_is_refused(job_file, text):
    with pytest.raises(ConfigError, match=r"override slurm\.time_min: "):
        load(job_file, [f"slurm={{gpus_per_node: 1, time_min: {text}}}"])


# --- structure -----------------------------------------------------------------------------


def test_anchors_and_merge_keys_are_read():
    """As YAML has them: what is written out wins, then the first of several."""
    text = "a: &a {x: 1, y: 2}\nb: &b {y: 3, z: 4}\nc: {<<: [*a, *b], x: 0}\nd: *a\ne: {<<: *b}\n"
    found = values(text)
    assert found["c"] == {"x": "0", "y": "2", "z": "4"}
    assert found["d"] == found["a"]
    assert found["d"] is not found["a"]  # paths are changed in place
    assert found["e"] == {"y": "3", "z": "4"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &x [*x]", "*x stands inside of what it stands for"),
        ("a: &x {b: *x}", "*x stands inside of what it stands for"),
        ("a: *x", "found undefined alias 'x'"),
        ("? [a]\n: b", "a key must be a word, not a list or a mapping"),
        ("{a: {b: c}, {d: e}: f}", "a key must be a word, not a list or a mapping"),
        ("a: &x b\n*x : c", "a key must be written out"),
        ("{'': 1}", "an empty key"),
        ("a: {<<: 5}", "<< takes mappings"),
        ("a: !!int 010", "the tag !!int is not read; write the value alone"),
        ("a: !!binary aGk=", "the tag !!binary is not read"),
        ("a: !!python/object/apply:os.system [id]", "the tag !!python/object/apply:os.system is"),
        ("a: !!set {b}", "the tag !!set is not read"),
        ('a: "\\ud800"', "half of a character"),
        ('a: "\\UFFFFFFFF"', "not valid YAML: "),
        ("%YAML " + "1" * 5000 + ".1\n--- a", "not valid YAML: "),
        ("a: \x00", "not valid YAML: unacceptable character #x0000"),
        ("a: \ud800", "not a character"),
    ],
)  # fmt: skip
def test_what_a_job_file_does_not_take(text, said):
    """One message with its line, whatever PyYAML would have made of it."""
    found = fault("# a comment\n" + text if not text.startswith("%") else text)
    assert said in found
    assert found.startswith("job.yaml:")
    assert "\n" not in found


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join(9 * [f'*a{n - 1}'])}]\n" for n in range(1, 12)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 99))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 5000, f"nested more than {DEEPEST} deep"),
        ("{a: " * 5000, f"nested more than {DEEPEST} deep"),
        ("- " * 5000, f"nested more than {DEEPEST} deep"),
        (CHAIN, f"nested more than {DEEPEST} deep"),
        (LAUGHS, f"more than {MOST_VALUES:,} values"),
        ("a: [" + "1," * 20_000, f"more than {MOST_VALUES:,} values"),
        ("".join(f"key{n}: 1\n" for n in range(999)), "more than 300 keys in one section"),
    ],
    ids=["lists", "mappings", "dashes", "aliases", "laughs", "items", "keys"],
)
def test_reading_is_bounded(text, said):
    """Deep, wide, and aliases of aliases: refused where it becomes too much."""
    assert said in fault(text)


def test_every_item_has_its_line():
    source = Source("job.yaml", "data:\n  train:\n    - a\n    - b\nrun: {dir: x}\n")
    assert source.place("data.train.1") == "job.yaml:4"
    assert source.place("data.train.7") == "job.yaml:2"
    assert source.place("run.dir") == "job.yaml:5"
    assert source.place("nothing") == "job.yaml"


# --- overrides -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.dir=", "override run.dir: has no value; write null where none is meant"),
        ("train.max_steps= ", "override train.max_steps: has no value"),
        ("run.dir=runs/x #2", "YAML would read 'runs/x #2' as 'runs/x'; put it in quotes"),
        ("run.dir=#2", "YAML would read '#2' as None; put it in quotes"),
        ("run.dir=&a b", "put it in quotes"),
        ("run.dir=a\nb", "put it in quotes"),
        ("run.dir=--- a", "put it in quotes"),
        ("=", "'=': an override is written section.key=value"),
        ("=5", "'=5': an override is written section.key=value"),
        ("seed", "'seed': an override is written section.key=value"),
        (".seed=5", "an override is written section.key=value"),
        ("train.=5", "an override is written section.key=value"),
        ("train..seed=5", "an override is written section.key=value"),
        ("a." * 999 + "a=5", "an override is written section.key=value"),
        ("a.b.c.d=1", "override a: unknown key"),
        ("train=5", "override train: input should be a valid dictionary"),
        ("train=null", "override train: input should be a valid dictionary"),
        ("train.seed.x=5", "override train.seed: input should be a valid integer"),
        ("data.train.x=5", "override data.train: input should be a valid list"),
        ("data.train=[a", "override data.train:1: not valid YAML: "),
        ("train.seed={x: 1, x: 2}", "override train.seed:1: x: given twice"),
        ("train.seed=*x", "found undefined alias"),
        ("model.revision=@x", "cannot start any token"),
    ],
)
def test_overrides_that_mean_nothing(job_file, override, said):
    """Named, with what is wrong; none is taken for something else."""
    with pytest.raises(ConfigError) as caught:
        load(job_file, [override])
    assert said in str(caught.value)


def test_a_quoted_override_is_what_stands_in_the_quotes(job_file):
    hub = ["model.path=org/name", "model.revision='&a b'"]
    loaded = load(job_file, ['run.dir="runs/x #2"', *hub])
    assert loaded.run.dir.endswith("runs/x #2")
    assert loaded.model.revision == "&a b"
