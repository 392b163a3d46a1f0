"""What users get wrong ends in one clear message; nothing that was there is damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sft_job.rundir import RunDir
from tests import ranks
from tests.runs import make_conversations, make_job, make_model, metrics, on_ranks, sft_job


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def job(tmp_path: Path, model: Path) -> Path:
    return make_job(tmp_path, model, make_conversations(tmp_path / "data.json", 8))


def refused(job: Path, *overrides: str, code: int = 2) -> str:
    """Run `train`; it must end with `code`, one message and no traceback."""
    result = sft_job("train", job, *overrides)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert result.stderr.count("error:") == 1
    return result.stderr


def replace_data(job: Path, content: str, name: str = "data.json") -> Path:
    file = job.parent / name
    file.write_text(content)
    return file


def test_wrong_key(job: Path) -> None:
    job.write_text(job.read_text().replace("seq_len", "seq_length"))
    message = refused(job)
    assert f"{job}:2: data.seq_length: unknown key; did you mean data.seq_len?" in message


def test_wrong_type(job: Path) -> None:
    message = refused(job, "train.learning_rate=fast")
    assert "override train.learning_rate" in message
    assert "'fast'" in message


def test_missing_data_file(job: Path) -> None:
    (job.parent / "data.json").unlink()
    message = refused(job)
    assert f"data.train: no file matches {job.parent / 'data.json'}" in message


def test_missing_job_file(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in refused(tmp_path / "no.yaml")


@pytest.mark.parametrize("content", ["[]", "", "[ ]\n"])
def test_empty_data_set(job: Path, content: str) -> None:
    file = replace_data(job, content)
    assert f"{file}: " in (message := refused(job))
    assert "no conversations in the file" in message or "the file is empty" in message


def test_conversation_without_an_assistant_turn(job: Path) -> None:
    record = {"id": "lonely", "conversations": [{"from": "human", "value": "Hi"}]}
    file = replace_data(job, json.dumps([record], indent=1))
    message = refused(job)
    assert f"{file}:2: conversation 'lonely': no assistant turn" in message


def test_json_syntax_error(job: Path) -> None:
    file = replace_data(job, '[\n {"conversations": [}\n]')
    assert f"{file}:2: not valid JSON" in refused(job)


def test_unknown_role_and_every_other_fault_at_once(job: Path) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "robot", "value": "Hello"}]
    records = [{"id": "a", "conversations": turns}, {"id": "b", "conversations": 3}]
    file = replace_data(job, json.dumps(records))
    message = refused(job)
    assert "2 faults of the data" in message
    assert f"{file}[0]: conversation 'a', turn 2: unknown role 'robot'" in message
    assert f"{file}[1]: conversation 'b': `conversations` must be a list" in message


def test_model_folder_without_weights(job: Path, tmp_path: Path, model: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    message = refused(job, f"model.path={bare}")
    assert f"{bare}: no weights in the model folder" in message


def test_model_with_a_missing_tensor(job: Path, tmp_path: Path, model: Path) -> None:
    """A tensor that is not there is not made up at random."""
    part = Path(shutil.copytree(model, tmp_path / "part"))
    tensors = load_file(part / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
    message = refused(job, f"model.path={part}")
    assert "missing: model.layers.1.mlp.up_proj.weight" in message


def test_truncated_weight_file(job: Path, tmp_path: Path, model: Path) -> None:
    cut = Path(shutil.copytree(model, tmp_path / "cut"))
    with open(cut / "model.safetensors", "r+b") as file:
        file.truncate(5000)
    assert "model.safetensors" in refused(job, f"model.path={cut}")


def test_hub_model_without_network(job: Path) -> None:
    message = refused(job, "model.path=some-org/some-model")
    assert "model 'some-org/some-model' is not here" in message
    assert "run.online is false" in message


def test_unknown_bundled_model(job: Path) -> None:
    assert "known: bundled:smollm2-135m" in refused(job, "model.path=bundled:gpt-5")


def test_folder_of_somebody_else(job: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    assert "holds no job" in refused(job, f"run.dir={other}")
    assert [p.name for p in other.iterdir()] == ["thesis.tex"]


def test_unknown_training_argument(job: Path) -> None:
    message = refused(job, "train.extra={adam_beta9: 0.5, seed: 1}")
    assert "train.extra.adam_beta9: not a Hugging Face TrainingArguments field" in message
    assert "did you mean adam_beta" in message
    assert "train.extra.seed: decided by the job file's own keys" in message


def test_existing_rope_scaling_that_is_too_short(job: Path, tmp_path: Path, model: Path) -> None:
    scaled = Path(shutil.copytree(model, tmp_path / "scaled"))
    config = json.loads((scaled / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    (scaled / "config.json").write_text(json.dumps(config))
    options = [f"model.path={scaled}", "data.seq_len=1000"]
    message = refused(job, *options)
    assert "already scales its positions (linear x2, context 512)" in message


def test_model_that_scales_its_logits(job: Path, tmp_path: Path, model: Path) -> None:
    """Its own loss is not the one we would train on; said by the plan, before weights are there."""
    from transformers import AutoConfig

    config = AutoConfig.for_model("granite", vocab_size=504, logits_scaling=16.0)
    config.save_pretrained(tmp_path / "granite")
    shutil.copy(model / "tokenizer.json", tmp_path / "granite")
    result = sft_job("plan", job, f"model.path={tmp_path / 'granite'}")
    assert result.returncode == 2
    said = "granite changes its logits before the loss (logits_scaling 16.0)\n  -> use a dense"
    assert f"error: {tmp_path}/granite/config.json: {said}" in result.stderr


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 12 MB of its own; only root may make one."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)])
    if mounted.returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_no_room_at_the_start(job: Path, small_disk: Path) -> None:
    """Refused before anything is trained, with the numbers."""
    (small_disk / "ballast").write_bytes(bytes(11 * 2**20))
    message = refused(job, f"run.dir={small_disk}/run", code=1)
    assert "no room: one checkpoint and the model need" in message
    assert not RunDir(small_disk / "run").metrics_file.exists()


def test_no_room_for_a_later_checkpoint(job: Path, small_disk: Path) -> None:
    """The earlier checkpoints stay good; with room again the job goes on."""
    options = (f"run.dir={small_disk}/run", "checkpoint.every_steps=1", "run.processes=2")
    message = refused(job, *options, code=1)
    run = RunDir(small_disk / "run")
    saved = run.checkpoint_steps()
    assert "no room: the checkpoint of step" in message
    assert f"resumes from the checkpoint of step {saved[0]}, if it verifies" in message
    assert [p.name for p in run.checkpoints.glob(".*")] == []
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    result = sft_job("train", job, *options)
    assert result.returncode == 0, result.stderr
    assert f"resuming after step {saved[0]}" in result.stdout
    assert metrics(run)[-1]["step"] == 10


def test_every_rank_says_that_the_disk_is_full(tmp_path: Path) -> None:
    """Also one that finds the folder removed by another."""
    assert on_ranks(ranks.full_disk, 2, str(tmp_path / "run")) == ["DiskSpaceError"] * 2


def test_quantised_weights(job: Path, tmp_path: Path, model: Path) -> None:
    """8-bit values with the model's own shapes are not taken for its weights."""
    import torch

    small = Path(shutil.copytree(model, tmp_path / "fp8"))
    tensors = load_file(small / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, small / "model.safetensors", metadata={"format": "pt"})
    message = refused(job, f"model.path={small}")
    assert f"{name} is F8_E4M3: quantised weights" in message


def test_offloading_without_a_compiler(job: Path, tmp_path: Path) -> None:
    """DeepSpeed compiles its CPU Adam; what is missing is said before the training. Nobody waits
    for torch's own lock, which a killed compilation leaves for ever."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "built" / "cpu_adam").mkdir(parents=True)
    (tmp_path / "built" / "cpu_adam" / "lock").touch()
    environment = {"PATH": str(tmp_path / "bin"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "built")}
    result = sft_job("train", job, "engine={type: zero3, offload: cpu}", env=environment)
    assert result.returncode == 2
    assert "engine.offload is cpu, but DeepSpeed's CPU Adam cannot be compiled" in result.stderr
    assert "c++: not found" in result.stderr
    assert "install a C++ compiler (g++) and Python's headers, or use engine.offload=none" in (
        result.stderr
    )
    assert "Traceback" not in result.stdout + result.stderr
