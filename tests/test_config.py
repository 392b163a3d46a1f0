"""The job file: defaults, precedence, paths, and every fault with its place."""

import glob
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from sft_job import paths, schema
from sft_job.config import NOT_YET, known_keys, load
from sft_job.errors import ConfigError
from sft_job.paths import expand
from sft_job.schema import Fsdp, JobConfig, Section, Zero3


def add(job_file: Path, text: str) -> Path:
    """The minimal job (lines 1 to 3) with more lines, the first of them line 4."""
    job_file.write_text(job_file.read_text() + text)
    return job_file


def faults(job_file: Path, *overrides: str) -> list[str]:
    """The faults that loading a job reports, with the file's folder taken away."""
    with pytest.raises(ConfigError) as caught:
        load(job_file, overrides)
    return [fault.replace(f"{job_file.parent}/", "") for fault in caught.value.faults]


# --- values --------------------------------------------------------------------------------


def test_the_defaults_are_the_published_recipe(job_file):
    """Vicuna: 2e-5, cosine, 3% warm-up, no decay, 128 conversations, 3 epochs, 2048 tokens."""
    config = load(job_file)
    train = config.train
    assert (train.learning_rate, train.lr_scheduler_type, train.warmup_ratio) == (
        2e-5,
        "cosine",
        0.03,
    )
    assert (train.weight_decay, train.max_grad_norm, train.seed) == (0.0, 1.0, 0)
    assert (train.global_batch_size, train.num_train_epochs, train.max_steps) == (128, 3, None)
    assert (config.data.seq_len, config.data.template) == (2048, "vicuna")
    assert (config.data.batching, config.data.overlong) == ("conversations", "truncate")


def test_nothing_is_deleted_fetched_or_chosen_by_default(job_file):
    """Checkpoints are kept, the hub is not asked, choices are left to `auto`."""
    config = load(job_file)
    assert (config.checkpoint.keep, config.run.online, config.run.processes) == (None, False, None)
    assert (config.train.precision, config.model.attention, config.model.rope) == ("auto",) * 3
    assert not config.model.trust_remote_code
    assert config.engine.type == "fsdp"


def test_the_file_wins_over_the_default_and_leaves_its_neighbours(job_file):
    """A value in the file replaces that default only."""
    train = load(add(job_file, "train: {seed: 7}\n")).train
    assert (train.seed, train.global_batch_size) == (7, 128)


def test_an_override_wins_over_the_file_and_leaves_its_neighbours(job_file):
    """`section.key=value` replaces one value of the file."""
    add(job_file, "train: {seed: 7, num_train_epochs: 1}\n")
    train = load(job_file, ["train.seed=8"]).train
    assert (train.seed, train.num_train_epochs) == (8, 1)


def test_the_last_of_two_overrides_wins(job_file):
    """As on every command line."""
    assert load(job_file, ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_an_override_may_open_a_section_that_the_file_lacks(job_file):
    """The file need not mention what an override sets."""
    assert load(job_file, ["logging.report_to=[wandb]"]).logging.report_to == ["wandb"]


def test_an_override_may_be_null_and_may_hold_equal_signs(job_file):
    """The value is parsed as YAML, and only the first = separates."""
    add(job_file, "train: {max_steps: 3}\n")
    assert load(job_file, ["train.max_steps=null"]).train.max_steps is None
    hub = ["model.path=org/name", "model.revision=a=b"]
    assert load(job_file, hub).model.revision == "a=b"


@pytest.mark.parametrize("text", ["2e-5", "2E-5", "2.0e-05", "0.00002"])
def test_numbers_in_short_scientific_form_are_numbers(text, job_file):
    """PyYAML reads 2e-5 as text; the job file means a number, in the file and in overrides."""
    assert load(job_file, [f"train.learning_rate={text}"]).train.learning_rate == 2e-5
    assert load(add(job_file, f"train: {{learning_rate: {text}}}\n")).train.learning_rate == 2e-5


def test_numbers_in_short_scientific_form_are_numbers_among_the_extra_arguments(job_file):
    """train.extra reaches TrainingArguments as it is; an adam_epsilon of text stops torch."""
    config = load(job_file, ["train.extra={adam_epsilon: 1e-8}"])
    assert config.train.extra == {"adam_epsilon": 1e-8}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(rate=st.floats(min_value=0, max_value=1, exclude_min=True))
def test_any_positive_learning_rate_arrives_unchanged(job_file, rate):
    """However Python writes a number, the override reads back the same one."""
    assert load(job_file, [f"train.learning_rate={rate!r}"]).train.learning_rate == rate


def test_the_configuration_cannot_be_changed(job_file):
    """What was checked stays what is used."""
    config = load(job_file)
    with pytest.raises(ValidationError, match="frozen"):
        config.train.seed = 1


def test_one_file_needs_no_brackets(job_file):
    """`train: file` means `train: [file]`, in the file and in overrides."""
    expected = [str(job_file.parent / "conversations.json")]
    text = job_file.read_text().replace("[conversations.json]", "conversations.json")
    job_file.write_text(text)
    assert load(job_file).data.train == expected
    assert load(job_file, [f"data.train={expected[0]}"]).data.train == expected


# --- paths ---------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, which is not the job file's folder."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_relative_paths_of_the_file_are_taken_from_its_folder(job_file, elsewhere):
    """A job file can be started from anywhere."""
    job_file.write_text(
        "model: {path: ./llama}\n"
        "data: {train: [conversations.json], cache_dir: ../cache}\n"
        "run: {dir: run}\n"
    )
    (job_file.parent / "llama").mkdir()
    config = load(job_file)
    here = job_file.parent
    assert config.data.train == [str(here / "conversations.json")]
    assert config.run.dir == str(here / "run")
    assert config.model.path == str(here / "llama")
    assert config.cache_dir == here.parent / "cache"


def test_relative_paths_of_overrides_are_taken_from_the_working_directory(job_file, elsewhere):
    """What is typed in a shell means what the shell means."""
    (elsewhere / "more.json").write_text("[]")
    (elsewhere / "llama").mkdir()
    config = load(
        job_file,
        ["data.train=[more.json]", "run.dir=x", "model.path=./llama", "data.cache_dir=../cache"],
    )
    assert config.data.train == [str(elsewhere / "more.json")]
    assert config.run.dir == str(elsewhere / "x")
    assert config.model.path == str(elsewhere / "llama")
    assert config.cache_dir == elsewhere.parent / "cache"


def test_an_image_of_an_override_is_a_path_where_the_file_says_apptainer(job_file, elsewhere):
    """What kind of container it is may stand in the file, or in another override."""
    add(job_file, "container: {type: apptainer, image: a.sif}\n")
    assert load(job_file).container.image == str(job_file.parent / "a.sif")
    assert load(job_file, ["container.image=b.sif"]).container.image == str(elsewhere / "b.sif")
    other = load(job_file, ["container.type=pyxis", "container.image=nvcr.io#b"]).container
    assert other.image == "nvcr.io#b"


def test_the_home_folder_may_be_written_as_a_tilde(job_file, tmp_path, monkeypatch):
    """~ is the user's home in every path."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load(job_file, ["run.dir=~/runs/x"]).run.dir == str(tmp_path / "home/runs/x")


def test_a_hub_id_stays_a_hub_id(job_file, elsewhere):
    """org/name is a path only where such a folder exists."""
    assert load(job_file, ["model.path=org/name"]).model.path == "org/name"
    (elsewhere / "org/name").mkdir(parents=True)
    assert load(job_file, ["model.path=org/name"]).model.path == str(elsewhere / "org/name")


def test_a_bundled_model_is_not_a_path(job_file):
    """bundled:NAME is left as it is."""
    assert load(job_file).model.path == "bundled:smollm2-135m"


def test_the_cache_lies_beside_the_run_directory(job_file):
    """Never in the home folder, which is small on a cluster."""
    assert load(job_file).cache_dir == job_file.parent / ".sft_job_cache"


def test_globs_give_files_sorted(tmp_path, monkeypatch):
    """In the order of their names, whatever that of the file system is; folders are no files."""
    for name in ("b.json", "a.json", "c.txt"):
        (tmp_path / name).touch()
    (tmp_path / "d.json").mkdir()
    found = glob.glob
    monkeypatch.setattr(
        paths.glob, "glob", lambda *args, **options: sorted(found(*args, **options), reverse=True)
    )
    assert [path.name for path in expand(str(tmp_path / "*.json"))] == ["a.json", "b.json"]


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path):
    """data[1].json is taken literally where it exists."""
    path = tmp_path / "data[1].json"
    path.touch()
    assert expand(str(path)) == [path]


# --- faults --------------------------------------------------------------------------------


def test_all_faults_are_reported_at_once(job_file):
    """Unknown key, wrong type, wrong choice, out of range, twice the same key: one message."""
    add(
        job_file,
        "train:\n"
        "  learning_rat: 1\n"
        "  seed: many\n"
        "  precision: fp8\n"
        "  warmup_ratio: 2\n"
        "logging: {every_steps: 1, every_steps: 2}\n",
    )
    found = faults(job_file, "data.seq_len=4", "nonsense")
    assert [fault.split(": ")[0] for fault in sorted(found)] == [
        "'nonsense'",
        "job.yaml:5",
        "job.yaml:6",
        "job.yaml:7",
        "job.yaml:8",
        "job.yaml:9",
        "override data.seq_len",
    ]


def test_faults_between_keys_are_reported_at_once(job_file):
    """Two pairs of values that do not fit together are two faults of one message."""
    overrides = ["data.preprocess=lazy", "data.batching=rows", "train.micro_batch_tokens=8"]
    found = " ".join(faults(job_file, *overrides))
    assert "lazy cannot be combined" in found
    assert "micro_batch_tokens (8) is smaller" in found


def test_missing_files_are_reported_with_the_other_faults(job_file):
    """A wrong path is found in the same run as a wrong number."""
    found = " ".join(faults(job_file, "data.train=no.json", "train.seed=many"))
    assert "train.seed" in found
    assert "no file matches" in found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "train: {learning_rat: 1}",
            "job.yaml:4: train.learning_rat: unknown key; did you mean train.learning_rate?",
        ),
        (
            "learning_rate: 1",
            "job.yaml:4: learning_rate: unknown key; did you mean train.learning_rate?",
        ),
        (
            "checkpoint:\n  keep: 3\n  seq_len: 5",
            "job.yaml:6: checkpoint.seq_len: unknown key; did you mean data.seq_len?",
        ),
        ("trian: {seed: 1}", "job.yaml:4: trian: unknown key; did you mean train?"),
        (
            "logging: {colour: red}",
            "job.yaml:4: logging.colour: unknown key; logging has: every_steps, report_to",
        ),
    ],
)
def test_unknown_keys_are_answered_with_the_near_ones(text, expected, job_file):
    """File, line, key and a did-you-mean, or what the section has."""
    assert faults(add(job_file, text)) == [expected]


def test_unknown_keys_of_overrides_are_answered_too(job_file):
    """The place of an override is the override."""
    expected = "override train.sede: unknown key; did you mean train.seed?"
    assert faults(job_file, "train.sede=3") == [expected]


@pytest.mark.parametrize("key", [k for k in known_keys() if k.startswith("train.")])
def test_every_training_key_is_recognised_without_its_last_letter(key, job_file):
    """The did-you-mean of a slip of the keyboard is the key that was meant."""
    assert faults(job_file, f"{key[:-1]}=1")[0].endswith(f"did you mean {key}?")


def test_every_key_is_known_to_the_did_you_mean():
    """The list of known keys has sections, their keys and the options of every engine."""
    keys = list(known_keys())
    assert len(keys) == len(set(keys))
    assert {"model", "model.path", "run.dir", "engine.type"} <= set(keys)
    assert "engine.stage3_max_live_parameters" in keys


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("engine={type: fsdp, offload: cpu}",
         "engine.offload: unknown key of type fsdp; it belongs to type zero3"),
        ("engine={type: fsdp, ofload: cpu}",
         "engine.ofload: unknown key of type fsdp; did you mean engine.offload of type zero3?"),
        ("engine={type: zero3, ofload: cpu}",
         "engine.ofload: unknown key; did you mean engine.offload?"),
        ("engine.offload=cpu", "engine: engine.type must be fsdp or zero3, not {'offload': 'cpu'}; "
         "engine.type=zero3 has offload"),
        ("model.rope={type: linear, facter: 2}",
         "model.rope.facter: unknown key; did you mean model.rope.factor?"),
        ("model.rope={type: linear, factor: x}",
         "model.rope.factor: input should be a valid number, not 'x'"),
        ("model.rope=yarn", "model.rope: 'yarn' is not one of 'auto' or 'none'"),
        ("container={type: pyxis, image: x, imag: y}",
         "container.imag: unknown key; did you mean container.image?"),
        ("engine={type: [[1]], x: 1}", "engine: engine.type must be fsdp or zero3, not {"),
        ("slurm={gpus_per_node: 4, extra: {mem: null}}",
         "slurm.extra.mem: must be text, a number, true or false, not None"),
        ("logging.report_to=[wandb, wandb]", "logging.report_to: names a tracker twice"),
    ],
)  # fmt: skip
def test_a_key_of_another_kind_of_section_is_answered_with_its_kind(override, expected, job_file):
    """Never with the very key that was written."""
    assert any(f"override {expected}" in found for found in faults(job_file, override))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n  seed: 1\n  seed: 2", "job.yaml:6: train.seed: given twice (first in line 5)"),
        ("run: {dir: other}", "job.yaml:4: run: given twice (first in line 3)"),
    ],
)
def test_a_key_given_twice_is_a_fault(text, expected, job_file):
    """YAML would silently take the last one."""
    assert expected in faults(add(job_file, text))


def test_a_missing_section_is_named(job_file):
    """The place of what is not there is the file."""
    job_file.write_text(job_file.read_text().replace("run: {dir: run}\n", ""))
    assert faults(job_file) == ["job.yaml: run is missing"]


def test_a_missing_key_is_named_with_the_line_of_its_section(job_file):
    """The user sees where to write it."""
    job_file.write_text(job_file.read_text().replace("{dir: run}", "{online: true}"))
    assert faults(job_file) == ["job.yaml:3: run: run.dir is missing"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.seed=many", "input should be a valid integer.*not 'many'"),
        ("train.seed=-1", "input should be greater than or equal to 0, not -1"),
        ("train.global_batch_size=1.5", "valid integer.*not 1.5"),
        ("train.global_batch_size=0", "greater than or equal to 1, not 0"),
        ("train.learning_rate=0", "greater than 0, not 0"),
        ("train.learning_rate=[1]", r"valid number, not \[1\]"),
        ("train.learning_rate=.nan", "finite number, not nan"),
        ("train.weight_decay=null", "valid number, not None"),
        ("run.nccl_timeout_s=0", "greater than or equal to 1, not 0"),
        ("run.gloo_timeout_s=10 minutes", "valid integer.*not '10 minutes'"),
        ("run.start_timeout_s=1000000000000", "less than or equal to 1000000, not 1000000000000"),
        ("run.online=perhaps", "valid boolean.*not 'perhaps'"),
        ("model.revision=[12]", r"valid string, not \[12\]"),
        ("run.dir=null", "valid string, not None"),
        ("data.train=[]", r"at least 1 item.*not \[\]"),
        ("train=5", "valid dictionary or instance of Train, not 5"),
        ("train.micro_batch_tokens=4", "must be a whole number of at least 8, or auto, not 4"),
        ("train.micro_batch_tokens=big", "must be a whole number of at least 8, or auto, not 'big"),
        ("train.precision=fp8", "'fp8' is not one of 'auto', 'bf16', 'fp16' or 'fp32'"),
        ("logging.report_to=[tensorbord]", "'tensorbord' is not one of 'tensorboard'"),
        ("train.extra=3", "valid dictionary, not 3"),
    ],
)
def test_wrong_values_are_refused_with_what_was_given(override, expected, job_file):
    """What is wrong with it and what it was."""
    with pytest.raises(ConfigError, match=expected):
        load(job_file, [override])


@pytest.mark.parametrize(
    "override",
    ["train.global_batch_size=yes", "train.seed=true", "train.learning_rate=on"],
)
def test_yes_is_not_a_number(override, job_file):
    """A switch where a number belongs is a mistake, not the number 1."""
    with pytest.raises(ConfigError, match=r"override train\."):
        load(job_file, [override])


def test_an_infinite_learning_rate_is_refused(job_file):
    """It cannot even be stored: job.json would hold null, and no resume could read it."""
    with pytest.raises(ConfigError, match=r"override train\.learning_rate"):
        load(job_file, ["train.learning_rate=.inf"])


@pytest.mark.parametrize("key", ["run.dir", "model.path", "data.cache_dir"])
def test_an_empty_path_is_no_path(key, job_file):
    """There are no sentinels: an empty text would mean the working directory."""
    with pytest.raises(ConfigError, match=f"override {key}"):
        load(job_file, [f"{key}=''"])


@pytest.mark.parametrize(
    "override",
    ["data.train=[5]", "model.rope={type: linear, factor: 0}", "train={seed: many}"],
)
def test_a_fault_inside_an_overridden_value_names_the_override(override, job_file):
    """The line of the file that the override replaced is innocent."""
    add(job_file, "train: {seed: 1}\n")
    assert [fault for fault in faults(job_file, override) if fault.startswith("job.yaml")] == []


@pytest.mark.parametrize("override", ["train.seed", "=3", "train.seed:3"])
def test_an_override_without_equal_sign_is_explained(override, job_file):
    """The form of an override is part of the message."""
    assert faults(job_file, override) == [f"{override!r}: an override is written section.key=value"]


def test_an_override_that_is_no_yaml_names_the_override(job_file):
    """A bracket too few in a shell command."""
    assert faults(job_file, "data.train=[a")[0].startswith("override data.train:1: not valid YAML")


def test_a_single_fault_is_one_line(job_file):
    """No list around one fault."""
    with pytest.raises(ConfigError) as caught:
        load(job_file, ["train.seed=-1"])
    assert str(caught.value).startswith("override train.seed: ")


# --- variants ------------------------------------------------------------------------------


def test_the_options_of_zero3_belong_to_zero3(job_file):
    """An option that means nothing for an engine cannot be set."""
    add(job_file, "engine: {type: fsdp, stage3_max_live_parameters: 0}\n")
    assert "job.yaml:4: engine.stage3_max_live_parameters: unknown key" in faults(job_file)[0]
    engine = load(job_file, ["engine.type=zero3"]).engine
    assert engine == Zero3(type="zero3")


def test_another_engine_drops_the_options_of_the_file(job_file):
    """engine.type=fsdp over a ZeRO-3 job is a plain FSDP job."""
    add(job_file, "engine: {type: zero3, stage3_max_live_parameters: 0}\n")
    assert load(job_file, ["engine.type=fsdp"]).engine == Fsdp(type="fsdp")


def test_the_same_engine_keeps_the_options_of_the_file(job_file):
    """Naming the engine that is there already drops nothing."""
    add(job_file, "engine: {type: zero3, stage3_max_live_parameters: 7}\n")
    assert load(job_file, ["engine.type=zero3"]).engine.stage3_max_live_parameters == 7


def test_the_order_of_overrides_of_different_keys_does_not_matter(job_file):
    """An option given before the engine's type is not lost."""
    overrides = ["engine.type=zero3", "engine.stage3_max_live_parameters=5"]
    expected = Zero3(type="zero3", stage3_max_live_parameters=5)
    assert load(job_file, overrides).engine == expected
    assert load(job_file, overrides[::-1]).engine == expected


@pytest.mark.parametrize("text", ["{type: deepspeed}", "{}", "{type: null}"])
def test_an_unknown_engine_is_answered_with_the_known_ones(text, job_file):
    """The names are fsdp and zero3."""
    found = faults(add(job_file, f"engine: {text}\n"))
    assert len(found) == 1
    assert found[0].startswith("job.yaml:4: engine: engine.type must be fsdp or zero3")


def test_rope_is_a_word_or_a_factor(job_file):
    """auto, none, or {type: linear, factor: N} with N of at least 1."""
    assert load(job_file, ["model.rope=none"]).model.rope == "none"
    assert load(job_file, ["model.rope={type: linear, factor: 2}"]).model.rope.factor == 2
    assert any("not 0.5" in f for f in faults(job_file, "model.rope={type: linear, factor: 0.5}"))
    assert any("'yarn'" in f for f in faults(job_file, "model.rope={type: yarn, factor: 2}"))


@pytest.mark.parametrize("section", ["zero3", "fsdp"])
def test_a_section_named_like_an_engine_is_an_unknown_key(section, job_file):
    """The name of a variant is a key like any other where it does not belong."""
    found = faults(add(job_file, f"{section}: {{stage: 3}}\n"))
    assert len(found) == 1
    assert found[0].startswith(f"job.yaml:4: {section}: unknown key")


def test_a_hugging_face_argument_named_like_an_engine_is_an_unknown_key(job_file):
    """train.fsdp is an argument of the Trainer, and no key of ours."""
    found = faults(add(job_file, "train: {fsdp: full_shard}\n"))
    assert len(found) == 1
    assert found[0].startswith("job.yaml:4: train.fsdp: unknown key")


# --- refused by name -----------------------------------------------------------------------

NOT_YET_WRITTEN = {
    "data.eval": "data.eval=null",
    "checkpoint.asynchronous": "checkpoint.asynchronous=true",
}


@pytest.mark.parametrize(("key", "override"), NOT_YET_WRITTEN.items())
def test_keys_of_later_versions_are_refused_by_name(key, override, job_file):
    """A key that is accepted and then ignored is worse than one that is refused."""
    (found,) = faults(job_file, override)
    assert found.endswith(f"{NOT_YET[key]} is not available in this version; remove the key")
    assert key in found


def test_every_key_of_later_versions_is_tried():
    """The table above is the whole of it, and none of it is in the schema."""
    assert set(NOT_YET_WRITTEN) == set(NOT_YET)
    assert not set(NOT_YET) & set(known_keys())


def test_several_keys_of_later_versions_are_refused_at_once(job_file):
    """Each by its name."""
    found = faults(job_file, *NOT_YET_WRITTEN.values())
    assert len(found) == len(NOT_YET)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("container=x.sif", "container: must be {type: apptainer} or {type: pyxis}, not 'x.sif'"),
        ("container={type: docker, image: x}",
         "container: container.type must be apptainer or pyxis, not {'type': 'docker', "),
        ("container={type: pyxis}", "container: container.image is missing"),
        ("container={type: pyxis, image: x, nv: true}", "container.nv: unknown key; container "),
        ("slurm={gpus_per_node: 4, partitoin: x}",
         "slurm.partitoin: unknown key; did you mean slurm.partition?"),
        ("slurm={nodes: 2}", "slurm: slurm.gpus_per_node is missing"),
        ("slurm={gpus_per_node: 4, time_min: 0}", "slurm.time_min: input should be greater than"),
    ],
)  # fmt: skip
def test_faults_of_the_cluster_sections(override, said, job_file):
    (found,) = faults(job_file, override)
    assert f"override {said}" in found


def test_processes_are_the_gpus_of_a_submitted_job(job_file):
    (found,) = faults(job_file, "slurm={gpus_per_node: 4}", "run.processes=2")
    assert found.startswith(
        "override run.processes: processes (2) differs from slurm.gpus_per_node"
    )


def test_a_job_has_no_more_processes_than_any_cluster(job_file):
    """Each number is possible, the product is not."""
    (found,) = faults(job_file, "slurm={nodes: 16384, gpus_per_node: 64}")
    assert "slurm.nodes: 16,384 nodes with 64 tasks each are more than 131,072 pro" in found


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.batching=rows"], "lazy cannot be combined with data.batching: rows, because"),
        (["data.overlong=split"], "lazy cannot be combined with data.overlong: split, because"),
        (["data.overlong=error"], "lazy cannot be combined with data.overlong: error, because"),
    ],
)
def test_lazy_refuses_what_needs_all_lengths_at_the_start(overrides, expected, job_file):
    """The reason and the ways out are part of the message."""
    with pytest.raises(ConfigError, match=f"data.preprocess: {expected}.*use cached"):
        load(job_file, ["data.preprocess=lazy", *overrides])


@pytest.mark.parametrize("overlong", ["truncate", "drop"])
def test_lazy_allows_the_rest(overlong, job_file):
    """Cutting and dropping need one conversation at a time."""
    overrides = ["data.preprocess=lazy", f"data.overlong={overlong}"]
    assert load(job_file, overrides).data.preprocess == "lazy"


def test_a_micro_batch_holds_at_least_one_whole_sample(job_file):
    """A sample of full length must fit somewhere; equal is enough."""
    overrides = ["data.seq_len=512", "train.micro_batch_tokens=511"]
    with pytest.raises(ConfigError, match=r"micro_batch_tokens \(511\) is smaller than .*\(512\)"):
        load(job_file, overrides)
    assert load(job_file, ["data.seq_len=512", "train.micro_batch_tokens=512"])


# --- files ---------------------------------------------------------------------------------


def test_missing_data_and_model_are_named(job_file):
    """Before anything is started: which pattern matches nothing, which folder is not there."""
    text = job_file.read_text().replace("[conversations.json]", "[conversations.json, no/*.json]")
    job_file.write_text(text.replace('"bundled:smollm2-135m"', "./llama"))
    assert faults(job_file) == [
        "job.yaml:2: data.train: no file matches no/*.json",
        "job.yaml:1: model.path: no such folder: llama",
    ]


def test_a_job_file_that_is_not_there_is_named(tmp_path):
    """What the system says, with the path."""
    with pytest.raises(ConfigError, match=r"nope\.yaml: cannot be read: No such file"):
        load(tmp_path / "nope.yaml")


def test_a_folder_is_no_job_file(tmp_path):
    """A run directory given instead of its job file."""
    with pytest.raises(ConfigError, match=f"^{tmp_path}: cannot be read: Is a directory"):
        load(tmp_path)


def test_a_job_file_that_is_no_text_is_named(tmp_path):
    """A model file given instead of a job file."""
    path = tmp_path / "job.yaml"
    path.write_bytes(b"\x80\x81\xff")
    with pytest.raises(ConfigError, match=r"job\.yaml: cannot be read: not UTF-8 text"):
        load(path)


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("a:\n  b: [1, 2\nc: 3\n", 3, "expected ',' or ']'"),
        ("a: 1\nb: c: d\n", 2, "mapping values are not allowed here"),
        ("a: 1\n\tb: 2\n", 2, "cannot start any token"),
        ("a: 1\n---\nb: 2\n", 2, "found another document"),
        ("a: *nowhere\n", 1, "found undefined alias"),
    ],
)
def test_a_syntax_error_has_its_line(text, line, what, tmp_path):
    """File, line and what YAML expected."""
    path = tmp_path / "job.yaml"
    path.write_text(text)
    (found,) = faults(path)
    assert found.startswith(f"job.yaml:{line}: not valid YAML: ")
    assert what in found


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "train\n"])
def test_a_file_without_keys_is_no_job(text, tmp_path):
    """An empty file, a list, a word."""
    path = tmp_path / "job.yaml"
    path.write_text(text)
    assert faults(path) == ["job.yaml: the job file must hold keys such as model:, data:, run:"]


# --- identity ------------------------------------------------------------------------------

# How much is done at a time, how often something is written, who shares the work.
SAME_JOB = [
    "train.micro_batch_tokens=4096",
    "train.activation_checkpointing=none",
    "data.cache_dir=/tmp/cache",
    "checkpoint.every_steps=5",
    "checkpoint.keep=2",
    "logging.every_steps=3",
    "logging.report_to=[wandb]",
    "run.dir=/tmp/other",
    "run.processes=2",
    "run.online=true",
    "run.start_timeout_s=60",
    "run.nccl_timeout_s=60",
    "run.gloo_timeout_s=7200",
]
# Known by their content (`identity.py`), not by where they are.
SAME_JOB += ["model.path=org/name", "model={path: org/name, revision: v2}"]
OTHER_JOB = [
    "model.trust_remote_code=true",
    "model.rope={type: linear, factor: 2}",
    "model.attention=sdpa",
    "model.cross_entropy=torch",
    "data.seq_len=512",
    "data.batching=rows",
    "data.preprocess=lazy",
    "data.overlong=drop",
    "train.global_batch_size=64",
    "train.num_train_epochs=2",
    "train.max_steps=3",
    "train.learning_rate=1e-5",
    "train.lr_scheduler_type=linear",
    "train.warmup_ratio=0.1",
    "train.weight_decay=0.1",
    "train.max_grad_norm=0",
    "train.precision=fp32",
    "train.deterministic=true",
    "train.seed=1",
    "train.extra={adam_beta2: 0.95}",
    "engine.type=zero3",
]


@pytest.mark.parametrize(
    "override", [*SAME_JOB, "slurm={gpus_per_node: 4}", "container={type: pyxis, image: x}"]
)
def test_identity_ignores_what_does_not_change_the_numbers(override, job_file):
    """A job may be resumed with other values of these."""
    assert load(job_file, [override]).identity() == load(job_file).identity()


@pytest.mark.parametrize("override", OTHER_JOB)
def test_identity_contains_what_changes_the_numbers(override, job_file):
    """A job is not resumed with other values of these; the changed key is named."""
    before, now = load(job_file).identity(), load(job_file, [override]).identity()
    changed = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
    assert changed
    assert all(key.startswith(override.partition("=")[0]) for key in changed)


def test_identity_ignores_the_options_of_an_engine(job_file):
    """They say what is kept in memory, not what is computed."""
    plain = load(job_file, ["engine.type=zero3"]).identity()
    changed = "engine={type: zero3, stage3_max_live_parameters: 0, offload: cpu}"
    option = load(job_file, [changed]).identity()
    assert plain == option


def test_every_key_is_on_one_side_of_the_identity():
    """A new key must be sorted into one of the two lists above."""
    sections = {"model", "data", "train", "engine", "checkpoint", "logging", "run"}
    sections |= {"slurm", "container"}
    sorted_keys = {item.partition("=")[0] for item in [*SAME_JOB, *OTHER_JOB]}
    # One file cannot stand for two here, there is only one template, and a revision needs a hub's
    # name beside it.
    apart = {"data.train", "data.template", "model.revision"}
    parts = ("engine.stage3_", "engine.off", "model.rope.", "slurm.", "container.")
    options = {key for key in known_keys() if key.startswith(parts)}
    assert set(known_keys()) == sections | sorted_keys | apart | options


def test_identity_contains_the_template_and_not_where_the_data_is(job_file):
    """The two keys that the lists above cannot vary."""
    identity = load(job_file).identity()
    assert "data.train" not in identity
    assert identity["data.template"] == "vicuna"


def test_identity_is_by_dotted_key(job_file):
    """So that a difference can be shown as the user wrote it."""
    identity = load(job_file, ["model.rope={type: linear, factor: 2}"]).identity()
    assert identity["model.rope.factor"] == 2
    assert not any(isinstance(value, dict) and value for value in identity.values())


def test_a_stored_configuration_is_the_same_job(job_file):
    """What the run directory stores reads back as what it was."""
    config = load(job_file, ["train.extra={adam_beta2: 0.95}", "engine.type=zero3"])
    assert JobConfig.model_validate_json(config.model_dump_json()) == config


# --- the schema ----------------------------------------------------------------------------

# Names of Hugging Face TrainingArguments, which their documentation explains.
HUGGING_FACE = {
    "num_train_epochs",
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "seed",
}


def sections() -> Iterator[type[BaseModel]]:
    """All sections and variants that config.py declares, the job itself apart."""
    for value in vars(schema).values():
        a_section = isinstance(value, type) and issubclass(value, Section)
        if a_section and value not in (Section, JobConfig):
            yield value


def test_every_field_is_explained():
    """A docstring under each field, or a name that Hugging Face explains; a tag explains itself."""
    bare = [
        f"{section.__name__}.{name}"
        for section in sections()
        for name, field in section.model_fields.items()
        if not field.description and name not in HUGGING_FACE and name != "type"
    ]
    assert bare == []


def test_every_section_refuses_unknown_keys_and_changes():
    """extra=forbid and frozen hold for every section."""
    for section in sections():
        assert section.model_config["extra"] == "forbid"
        assert section.model_config["frozen"] is True


def test_numbers_have_a_range():
    """-1 means nothing anywhere, and no number is so large that something later overflows, waits
    for ever, or cannot be stored."""
    unbounded = []
    for section in sections():
        kinds = section.model_json_schema()["properties"]
        for name, field in section.model_fields.items():
            given = {kind.get("type") for kind in (kinds[name], *kinds[name].get("anyOf", []))}
            if not given & {"integer", "number"}:
                continue
            adapter = TypeAdapter(Annotated[field.annotation, field])
            for value in (-1, "-1", 10**30, "1e30", 1e300, math.inf, math.nan, ".nan"):
                try:
                    adapter.validate_python(value)
                except ValidationError:
                    continue
                unbounded.append((f"{section.__name__}.{name}", value))
    assert unbounded == []


@pytest.mark.parametrize("name", ["org/name", "gpt2", "Org-1/a.b_c-d", "x/y"])
def test_a_name_that_a_hub_takes(job_file, name):
    """As huggingface_hub checks it."""
    assert load(job_file, [f"model.path={name}"]).model.path == name
    validate_repo_id(name)


@pytest.mark.parametrize("name", ["a/b/c", "org/na me", "-org/name", "org/name.", "a--b", "n" * 97])
def test_a_name_that_no_hub_takes(job_file, name):
    """Seen before anything asks a hub."""
    with pytest.raises(ConfigError, match="no folder here, and no name that a hub takes"):
        load(job_file, [f"model.path={name}"])
    with pytest.raises(HFValidationError):
        validate_repo_id(name)


@pytest.mark.parametrize("path", ["bundled:smollm2-135m", "."])
def test_a_revision_is_of_a_hub_model(job_file, path):
    """It would be ignored."""
    with pytest.raises(ConfigError, match=r"model\.revision: a revision is of a hub model"):
        load(job_file, [f"model.path={path}", "model.revision=main"])
