"""Every shipped configuration, sample file and README command works as printed."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sft_job import cli
from sft_job.config import known_keys, load
from sft_job.conversations import read, read_trainable
from sft_job.errors import SftJobError
from tests.runs import ROOT, make_conversations, make_job, make_model, run_job, sft_job

README = (ROOT / "README.md").read_text()
JOB = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1]


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.name)
def test_configs_load(file: Path) -> None:
    """Every configuration is valid as it stands, with its relative paths."""
    config = load(file)
    assert config.data.files()


def test_sample_data_has_its_awkward_cases() -> None:
    """At least 300 conversations, and one of each kind that has to be handled."""
    conversations = read([ROOT / "data/dummy_conversation.json"])
    assert len(conversations) >= 300
    found = read_trainable([ROOT / "data/dummy_conversation.json"])
    kept, lost = found.conversations, found.lost
    for reason in ("leading_assistant_turn", "trailing_user_turn", "empty_turn", "wrong_order",
                   "duplicate"):  # fmt: skip
        assert lost[reason] > 0, reason
    assert any(c.system for c in kept)
    assert sum(len(c.exchanges) > 1 for c in kept) > 50
    assert any("</s>" in e.user + e.assistant for c in kept for e in c.exchanges)


def test_readme_job_is_valid(tmp_path: Path) -> None:
    """The job of the README loads, and names no key that does not exist."""
    file = tmp_path / "job.yaml"
    file.write_text(JOB)
    shutil.copytree(ROOT / "data", tmp_path / "data")
    assert load(file).engine.type == "fsdp"


def test_readme_commands_run(tmp_path: Path) -> None:
    """Each command of the README, in order, on a tiny model in place of the README's."""
    block = next(
        b for b in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "sft-job train" in b
    )
    job = yaml.safe_load(JOB)
    model = make_model(tmp_path / "model", hidden_size=32, intermediate_size=32)
    (tmp_path / "data").mkdir()
    make_conversations(tmp_path / "data" / "dummy.json", 8)
    job["model"]["path"] = str(model)
    job["data"] |= {"train": ["data/dummy.json"], "seq_len": 128}
    job["train"] |= {"max_steps": 1, "global_batch_size": 4}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert len(commands) == 7
    for program, *arguments in commands:
        assert program == "sft-job"
        if arguments[0] == "chat":
            arguments += ["--prompt", "sun", "--max-new-tokens", "4"]
        result = sft_job(*arguments, cwd=tmp_path)
        assert result.returncode == 0, (arguments, result.stdout, result.stderr)
        assert "Traceback" not in result.stderr
    assert (tmp_path / "runs/second/DONE").exists()


def test_readme_plans_for_other_gpus_run() -> None:
    """As printed, from the checkout."""
    commands = re.findall(r"^sft-job (plan .* --gpu .*)$", README, re.MULTILINE)
    assert commands
    for command in commands:
        result = sft_job(*shlex.split(command), cwd=ROOT)
        assert result.returncode == 0, result.stderr
        assert "usable GiB on each GPU" in result.stdout


def test_readme_names_only_commands_and_files_that_exist() -> None:
    """Every `sft-job X`, make target and path in backticks is there."""
    for command in re.findall(r"sft-job (\w+)", README):
        assert command in cli.COMMANDS
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"make (\w+)", README):
        assert target in targets or target in {"it"}
    for path in re.findall(r"`([\w./]+\.(?:py|md|yaml))`", README):
        assert (ROOT / path).exists() or path in JOB, path


def test_config_keys_in_readme_exist() -> None:
    """Dotted keys in the README are keys of the job file."""
    sections = {key for key in known_keys() if "." not in key}
    for key in re.findall(r"`((?:%s)\.\w+)" % "|".join(sections), README):  # noqa: UP031
        assert key in set(known_keys()), key


def test_chat_with_a_finished_run(tmp_path: Path) -> None:
    """--prompt answers and leaves; a run without a model is refused with the way on."""
    model = make_model(tmp_path / "model")
    data = make_conversations(tmp_path / "data.json", 8)
    job = make_job(tmp_path, model, data, train__max_steps=1, data__batching="rows")
    run = run_job(job, "logging.report_to=[tensorboard]")
    assert list(run.tensorboard.glob("events.out.tfevents.*"))
    arguments = ("chat", run.path, "--prompt", "sun", "--prompt", "moon", "--max-new-tokens", "3")
    result = sft_job(*arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("ASSISTANT:") == 2
    shutil.rmtree(run.model)
    result = sft_job(*arguments)
    assert result.returncode == 2
    assert "the run has no model yet" in result.stderr
    assert sft_job("chat", "./nowhere", "--prompt", "x").stderr.startswith("error: ./nowhere: no ")


def test_no_helper_of_the_tests_hides_a_package() -> None:
    """`python tests/accept.py` finds what lies beside it first, and transformers tries many names
    of packages that need not be there."""
    program = "from transformers import AttentionInterface, AutoTokenizer, LlamaForCausalLM"
    beside = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    words = [sys.executable, "-c", program]
    result = subprocess.run(words, env=beside, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_plain_transformers_reads_the_export(tmp_path: Path) -> None:
    """config, generation config and template are as a user of transformers expects them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = make_model(tmp_path / "model")
    data = make_conversations(tmp_path / "data.json", 8)
    options = {"train__max_steps": 1, "train__precision": "bf16", "data__seq_len": 512}
    run = run_job(make_job(tmp_path, model, data, **options))
    config = json.loads((run.model / "config.json").read_text())
    assert config["use_cache"] is True
    assert config["dtype"] == "bfloat16"
    assert config["max_position_embeddings"] == 256
    rope = config["rope_parameters"]
    assert (rope["rope_type"], rope["factor"]) == ("linear", 2.0)
    loaded = AutoModelForCausalLM.from_pretrained(run.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    assert str(loaded.dtype) == "torch.bfloat16"
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)


def test_error_kinds_end_with_their_exit_code(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The shared edge prints one message, and the traceback only with --debug."""

    def fails(argv: object) -> int:
        raise SftJobError("it broke", where="here", remedy="mend it")

    assert cli.run(fails, []) == 1
    captured = capsys.readouterr()
    assert captured.err == "error: here: it broke\n  -> mend it\n"
    assert cli.run(fails, ["--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
