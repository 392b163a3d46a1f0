"""How models get their attention: a kernel of ours, or one sample at a time for their own code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from sft_job import varlen
from sft_job.attention import KERNELS
from sft_job.model import empty
from tests.runs import (
    make_conversations,
    make_job,
    make_model,
    metrics,
    run_job,
    sft_job,
    weights,
)

# A LLaMA written anew: its forward passes take token ids alone, its attention is its own, and it
# knows nothing of gradient checkpointing.
CODE = """
import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class Norm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x):
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


def rotate(x, theta):
    length, dim = x.shape[-2:]
    inverse = theta ** (-torch.arange(0, dim, 2, device=x.device).float() / dim)
    angles = torch.arange(length, device=x.device).float()[:, None] * inverse
    angles = torch.cat([angles, angles], -1)
    a, b = x.chunk(2, -1)
    return x * angles.cos().to(x.dtype) + torch.cat([-b, a], -1) * angles.sin().to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dim = config.hidden_size // config.num_attention_heads
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.theta = config.rope_parameters["rope_theta"]
        narrow = self.dim * config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = (
            p(x).view(batch, length, -1, self.dim).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, self.theta), rotate(k, self.theta)
        k, v = (t.repeat_interleave(self.groups, 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) / self.dim**0.5
        ahead = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scores = scores.float().masked_fill(ahead, float("-inf")).softmax(-1).to(x.dtype)
        return self.o_proj((scores @ v).transpose(1, 2).reshape(batch, length, -1))


class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        for name in ("gate_proj", "up_proj"):
            layer = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
            setattr(self, name, layer)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), Mlp(config)
        self.input_layernorm, self.post_attention_layernorm = Norm(config), Norm(config)

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Base(PreTrainedModel):
    config_class = LlamaConfig
    base_model_prefix = "model"


class Decoder(Base):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config)
        self.post_init()

    def forward(self, input_ids):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return (self.norm(x),)


class OwnForCausalLM(Base):
    def __init__(self, config):
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids):
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids)[0]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def job(folder: Path) -> Path:
    """The same weights twice: as a plain LLaMA, and under code of their own."""
    plain = make_model(folder / "plain")
    own = Path(shutil.copytree(plain, folder / "own"))
    (own / "modeling_own.py").write_text(CODE)
    config = json.loads((own / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (own / "config.json").write_text(json.dumps(config))
    data = make_conversations(folder / "data.json", 32)
    changes = {"train.max_steps": 4, "train.activation_checkpointing": "full"}
    return make_job(folder, plain, data, **changes)


@pytest.fixture(scope="module")
def plain(folder: Path, job: Path):
    return run_job(job, f"run.dir={folder}/plain-run")


@pytest.mark.parametrize(
    ("engine", "processes", "recompute"),
    [("fsdp", 1, "full"), ("fsdp", 2, "selective"), ("zero3", 2, "full")],
)
def test_a_model_with_its_own_code_equals_the_plain_one(
    folder: Path, job: Path, plain, engine: str, processes: int, recompute: str
) -> None:
    """The same curve and weights as a packed LLaMA; exported with its code."""
    run = run_job(
        job,
        f"run.dir={folder}/own-{engine}-{processes}",
        f"model.path={folder}/own",
        "model.trust_remote_code=true",
        f"engine.type={engine}",
        f"run.processes={processes}",
        f"train.activation_checkpointing={recompute}",
    )
    plan = json.loads(run.plan_file.read_text())
    assert plan["attention"]["value"] == "own"
    assert plan["micro_batches"][1] == 16 // processes  # conversations of a step
    for ours, theirs in zip(metrics(run), metrics(plain), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    trained, expected = weights(run.model), weights(plain.model)
    for name in expected:
        torch.testing.assert_close(trained[name], expected[name], rtol=0, atol=1e-5)
    assert (run.model / "modeling_own.py").read_text() == CODE


def test_its_attention_cannot_be_replaced(folder: Path, job: Path) -> None:
    """Asked for by name, a packing kernel is refused with the reason."""
    own = f"model.path={folder}/own"
    options = ["model.trust_remote_code=true", "model.attention=sdpa", f"run.dir={folder}/sdpa"]
    result = sft_job("train", job, own, *options)
    assert result.returncode == 2
    assert "model.attention is sdpa, but the model brings its own Python code" in result.stderr
    assert "use model.attention=own or auto: one sample per forward pass" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr


def test_code_beside_a_model_that_is_built_in_is_left_alone(folder: Path, job: Path) -> None:
    """Unasked, a LLaMA is transformers' own, and the plan says so; its export names no code."""
    own = [f"model.path={folder}/own", f"run.dir={folder}/unasked"]
    planned = sft_job("plan", job, *own)
    assert planned.returncode == 0, planned.stderr
    assert "note: the Python code that comes with the model (auto_map" in planned.stdout
    run = run_job(job, *own)
    plan = json.loads(run.plan_file.read_text())
    assert plan["attention"]["value"] == "sdpa"
    assert "auto_map" not in json.loads((run.model / "config.json").read_text())
    assert not list(run.model.glob("*.py"))


def test_code_that_is_needed_is_not_run_unasked(folder: Path, job: Path) -> None:
    """A type that transformers does not know; refused by the plan and before encoding alike."""
    strange = Path(shutil.copytree(folder / "own", folder / "strange"))
    config = json.loads((strange / "config.json").read_text()) | {"model_type": "strange"}
    (strange / "config.json").write_text(json.dumps(config))
    for command in (["plan"], ["data", "encode"]):
        result = sft_job(*command, job, f"model.path={strange}")
        assert result.returncode == 2
        assert "the model brings its own Python code, which is not run unasked" in result.stderr


def test_every_row_of_the_table_is_trained(tmp_path: Path) -> None:
    """torch leaves the pad's row out, which in many models is that of the stop token."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=2
    )
    model = empty(config, where=tmp_path, trust_remote_code=False, meta=False)
    torch.nn.init.ones_(model.get_input_embeddings().weight)
    model.get_input_embeddings()(torch.tensor([2])).sum().backward()
    assert float(model.get_input_embeddings().weight.grad[2].sum()) == 8


@pytest.mark.parametrize("kernel", [name for name, row in KERNELS.items() if row.packs])
def test_transformers_builds_a_model_for_every_kernel(
    monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    """It takes the name of a kernel as it is, and looks for no kernel of its own behind it."""
    attend = varlen.FUNCTIONS["sdpa"]()
    calls = []

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(arguments[3].seq_lens)
        return attend(*arguments)

    monkeypatch.setitem(varlen.FUNCTIONS, kernel, lambda: counted)
    config = LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    name = varlen.register(kernel)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=name)
    packed = varlen.Packed([1, 2], torch.tensor([0, 1, 3], dtype=torch.int32), 2)
    model(torch.tensor([[1, 2, 3]]), position_ids=torch.tensor([[0, 0, 1]]), packed=packed)
    assert calls == [[1, 2]]
