"""What is relied on of the private behaviour of transformers, accelerate, torch and DeepSpeed.

When a new version changes one of these, the test says which of our lines leans on it.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    modeling_utils,
)

from sft_job import zero3
from sft_job.schema import JobConfig


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("training_step", ["self", "model", "inputs", "num_items_in_batch"]),
        ("get_batch_samples", ["self", "epoch_iterator", "num_batches", "device"]),
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
        ("_load_optimizer_and_scheduler", ["self", "checkpoint"]),
        ("_get_grad_norm", ["self", "model", "grad_norm"]),
        ("create_optimizer", ["self", "model"]),
        ("create_scheduler", ["self", "num_training_steps", "optimizer"]),
        ("_save_scaler", ["self", "output_dir"]),
        ("_load_scaler", ["self", "checkpoint"]),
        ("_save_rng_state", ["self", "output_dir"]),
        ("_load_rng_state", ["self", "checkpoint"]),
        ("log", ["self", "logs", "start_time"]),
    ],
)
def test_trainer_still_has_what_is_overridden(method: str, parameters: list[str]) -> None:
    """SftTrainer overrides or calls these; another signature means another protocol."""
    assert list(inspect.signature(getattr(Trainer, method)).parameters) == parameters, (
        f"transformers changed Trainer.{method}; read sft_job/trainer.py against the new version"
    )


def test_trainer_does_not_wrap_a_model_that_shards_itself() -> None:
    """sft_job/fsdp.py sets this flag so that accelerate does not wrap the model in DDP."""
    source = inspect.getsource(Trainer._prepare_for_training)
    assert "self.is_distributed_loading_by_transformers" in source
    model = LlamaForCausalLM(LlamaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=8,
                                         num_attention_heads=1, intermediate_size=8))  # fmt: skip
    assert model.is_distributed_loading_by_transformers is False
    model._is_distributed_loading_by_transformers = True
    assert model.is_distributed_loading_by_transformers is True


def test_deepspeed_steps_when_gradients_are_said_to_be_synchronised() -> None:
    """sft_job/trainer.py steers accumulation through this flag alone."""
    from accelerate.utils.deepspeed import DeepSpeedEngineWrapper

    calls: list[str] = []

    class Engine:
        def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
            calls.append(f"boundary {is_boundary}")

        def backward(self, loss: torch.Tensor) -> None:
            calls.append("backward")

        def step(self) -> None:
            calls.append("step")

    wrapper = DeepSpeedEngineWrapper(Engine())
    wrapper.backward(torch.zeros(()), sync_gradients=False)
    wrapper.backward(torch.zeros(()), sync_gradients=True)
    assert calls == ["boundary False", "backward", "boundary True", "backward", "step"]


def test_deepspeed_converts_a_parameter_without_sending_it_around() -> None:
    """sft_job/zero3.py partitions empty parameters one by one, by this method and by their own."""
    zero3.prepare_environment(torch.device("cpu"))
    from deepspeed.runtime.zero.partition_parameters import Init

    assert list(inspect.signature(Init._convert_to_deepspeed_param).parameters) == ["self", "param"]
    source = inspect.getsource(Init._convert_to_deepspeed_param)
    assert "param.partition = partition" in source
    assert "dist.broadcast" not in source


def test_transformers_lets_others_partition_in_its_zero3_mode() -> None:
    """sft_job/model.py builds under this; else every parameter is made whole on every rank."""
    assert not modeling_utils._is_ds_init_called
    with modeling_utils.set_zero3_state():
        assert modeling_utils._is_ds_init_called
    assert "not _is_ds_init_called" in inspect.getsource(PreTrainedModel._from_config)


def test_only_unwrapping_a_model_asks_for_deepspeed() -> None:
    """sft_job/trainer.py replaces this method of accelerate's where nothing wraps the model."""
    assert list(inspect.signature(Accelerator.unwrap_model).parameters)[:2] == ["self", "model"]
    assert "unwrap_model(model" in inspect.getsource(Trainer.__init__)


def test_attention_function_gets_the_lengths_and_no_mask() -> None:
    """Extra arguments of the decoder reach a registered attention function; ours needs them. A
    name without a mask function gets no mask, and nobody looks at the positions' values."""
    seen: list[object] = []

    def spy(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
            attention_mask: object, seq_lens: object = None, **kwargs: object):  # fmt: skip
        seen.append((attention_mask, seq_lens))
        return query.transpose(1, 2), None

    AttentionInterface.register("contract_spy", spy)
    config = LlamaConfig(hidden_size=8, num_hidden_layers=2, vocab_size=8, num_attention_heads=1,
                         intermediate_size=8)  # fmt: skip
    config._attn_implementation = "contract_spy"
    with torch.device("meta"):  # where asking for a value is an error
        model = LlamaForCausalLM(config)
        ids = torch.tensor([[1, 2, 3, 4]])
        position_ids = torch.tensor([[0, 1, 0, 1]])
    model.model(input_ids=ids, position_ids=position_ids, use_cache=False, seq_lens=[2, 2])
    assert seen == [(None, [2, 2])] * 2


def test_every_config_key_is_read_somewhere() -> None:
    """A key that nobody reads is a promise that nobody keeps."""
    from pathlib import Path

    import sft_job
    from sft_job.config import known_keys

    folder = Path(sft_job.__file__).parent
    text = "".join(f.read_text() for f in folder.glob("*.py") if f.name != "config.py")
    sections = set(JobConfig.model_fields)
    for key in known_keys():
        name = key.rpartition(".")[2]
        if name not in sections | {"type", "factor"}:
            own = (folder / "config.py").read_text()
            assert f".{name}" in text or f'"{name}"' in text or f"self.{name}" in own, key
