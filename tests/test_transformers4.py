"""Exports are read by transformers 4 as they are by transformers 5, number for number."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_job import settings
from tests.families import tiny
from tests.reader import IDS, read
from tests.runs import (
    ROOT,
    environment,
    make_conversations,
    make_job,
    make_model,
    make_tokenizer,
    on_ranks,
)

# Kept from run to run; outside of the repository, where nobody takes it for a part of it.
STATE = Path(os.environ.get("SFT_JOB_TRANSFORMERS4", "/tmp/sft-transformers-4.57"))
REQUIREMENTS = ["transformers==4.57.*", "huggingface-hub<1", "tokenizers<0.23"]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip


@pytest.fixture(scope="module")
def transformers_4() -> Path:
    """A folder with transformers 4.57 and what it needs in other versions; torch is our own."""
    if not STATE.is_dir():
        beside = Path(tempfile.mkdtemp(prefix=f".{STATE.name}.", dir=STATE.parent))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        made = subprocess.run(
            [*pip, "--target", str(beside), "--no-deps", *REQUIREMENTS],
            capture_output=True,
            text=True,
        )
        if made.returncode:
            shutil.rmtree(beside)
            reason = f"no transformers 4.57 can be fetched: {made.stderr.strip()[-300:]}"
            if os.environ.get("SFT_JOB_CI"):
                pytest.fail(reason)
            pytest.skip(reason)
        beside.chmod(0o755)
        try:
            beside.rename(STATE)
        except OSError:  # another run was first
            shutil.rmtree(beside)
    assert STATE.stat().st_uid == os.getuid(), f"{STATE} belongs to somebody else"
    return STATE


@dataclass
class Export:
    """A folder, and the logits of the model that it was written from."""

    folder: Path
    expected: torch.Tensor


# --- exported by the real engine -----------------------------------------------------------

CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, []),
    "llama3": ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, []),
    "linear": ({}, ["data.seq_len=512"]),
}


def exports(world: Any, jobs: list[Path], overrides: list[list[str]]) -> list[torch.Tensor]:
    """Load each job's model as training does and export it; its logits before."""
    from sft_job import dataset, export, fsdp
    from sft_job.config import load
    from sft_job.data import encode_job
    from sft_job.encode import Sample
    from sft_job.tokenizer import load_tokenizer
    from tests.ranks import Setup

    expected = []
    for job, options in zip(jobs, overrides, strict=True):
        encode_job(load(job, options))
        setup = Setup(world, job, *options)
        sample = Sample(
            torch.tensor(IDS, dtype=torch.int64).numpy(), torch.arange(len(IDS)).numpy() > 5
        )
        row = dataset.collate([sample])
        del row["supervised"], row["targets"]
        with torch.no_grad():
            expected.append(setup.model(own_forward=True, **row)["logits"][0])
        tokenizer = load_tokenizer(setup.folder)
        export.write(
            setup.trainer.attempt,
            setup.model,
            fsdp.full_parameters(setup.model),
            tokenizer,
            dataset.encoder_of(setup.config, tokenizer),
            world,
            source=setup.folder,
            dtype=torch.float32,
        )
        setup.close()
    return expected


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Export]:
    """Exports of the real engine, by case."""
    folder = tmp_path_factory.mktemp("trained")
    jobs, overrides = [], []
    for name, (changes, options) in CASES.items():
        (folder / name).mkdir()
        model = make_model(folder / name / "base", **changes)
        data = make_conversations(folder / name / "data.json", 8)
        jobs.append(make_job(folder / name, model, data))
        overrides.append(options)
    (logits,) = on_ranks(exports, 1, jobs, overrides)
    runs = (job.parent / "run" / "model" for job in jobs)
    return {name: Export(*one) for name, *one in zip(CASES, runs, logits, strict=True)}


# --- other families and kinds of scaling ----------------------------------------------------

LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope", "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75],
    "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5],
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama-yarn": ("llama", YARN, {}),
    "llama-dynamic": ("llama", {"rope_type": "dynamic", "factor": 2.0}, {}),
    "llama-longrope": ("llama", LONGROPE, {}),
    "phi3-longrope": ("phi3", LONGROPE | {"partial_rotary_factor": 1.0}, {}),
    "gemma3_text-linear": ("gemma3_text", LINEAR, {}),
    "olmo2-linear": ("olmo2", LINEAR, {}),
    "glm4-half": ("glm4", {"rope_type": "default", "partial_rotary_factor": 0.5}, {}),
    "persimmon-half": ("persimmon", LINEAR | {"partial_rotary_factor": 0.5}, {}),
    "qwen3-yarn": ("qwen3", YARN, {}),
    "smollm3-linear": ("smollm3", LINEAR, {"no_rope_layer_interval": 2}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Export]:
    """Random models with configurations as exports have them, by case."""
    return {name: make(tmp_path_factory.mktemp(name), *case) for name, case in FAMILIES.items()}


def make(folder: Path, family: str, table: dict[str, Any], changes: dict[str, Any]) -> Export:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    description = tiny(family, **changes)
    table = table | {"rope_theta": 1e6}
    nested = "full_attention" in description.rope_parameters
    description.rope_parameters = (
        description.rope_parameters | {"full_attention": table} if nested else table
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(description, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    make_tokenizer(folder)
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    settings.rewrite(folder / "config.json", settings.for_transformers_4)
    settings.rewrite(folder / "tokenizer_config.json", settings.tokenizer_for_transformers_4)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    tensors = {n: p.detach().clone() for n, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        return Export(folder, model(torch.tensor([IDS])).logits[0])


# --- read by both --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four(
    transformers_4: Path, trained: dict[str, Export], made: dict[str, Export], tmp_path_factory: Any
) -> dict[str, Any]:
    """What transformers 4.57 reads, by folder."""
    out = tmp_path_factory.mktemp("four") / "read.pt"
    folders = [str(export.folder) for export in (*trained.values(), *made.values())]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "tests" / "reader.py"), str(out), *folders],
        env=environment() | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(transformers_4)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = torch.load(out)
    assert found["release"].startswith("4.57.")
    return found


@pytest.mark.parametrize("case", CASES)
def test_an_export_is_the_same_model_in_both_releases(
    case: str, four: dict[str, Any], trained: dict[str, Export]
) -> None:
    """Base frequency, LLaMA 3's and linear scaling: logits equal those that were trained, and so do
    token ids, chat template, stop token and dtype."""
    export = trained[case]
    old, new = four[str(export.folder)], read(export.folder)
    torch.testing.assert_close(old.pop("logits"), export.expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(new.pop("logits"), export.expected, rtol=0, atol=1e-5)
    assert old == new
    assert (new["end"], new["dtype"]) == (2, "torch.float32")


def test_the_exports_are_different_models(trained: dict[str, Export]) -> None:
    """The comparison can tell."""
    logits = [export.expected for export in trained.values()]
    assert all(float((a - b).abs().max()) > 1e-3 for a, b in itertools.pairwise(logits))


@pytest.mark.parametrize("case", FAMILIES)
def test_every_kind_of_scaling_is_read_by_both_releases(
    case: str, four: dict[str, Any], made: dict[str, Export]
) -> None:
    """Nested for each type of layer, a share of each head, YaRN, dynamic, LongRoPE."""
    export = made[case]
    for found in (four[str(export.folder)], read(export.folder)):
        torch.testing.assert_close(found["logits"], export.expected, rtol=0, atol=1e-4)
