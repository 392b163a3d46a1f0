"""Facts of a model: what config.json and the headers of the weight files say, checked.

Read on a login node too: no torch, no transformers. Whatever is wrong with these files is said
here, with the file and the key, before anything is converted.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sft_job import families
from sft_job.errors import ModelError
from sft_job.families import Obstacle
from sft_job.modelfiles import headers, read_object, refuse_quantised, unreadable

# Kinds of RoPE scaling, and the keys that each must have.
ROPE_KINDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
# What any of them may have beside, and the least of each that something can be computed with;
# None: above 0. (Of a factor below 1 transformers warns, and of 0 the angles are infinite.)
ROPE_NUMBERS: dict[str, float | None] = {
    "factor": 1, "low_freq_factor": None, "high_freq_factor": None, "beta_fast": None,
    "beta_slow": None, "attention_factor": None, "mscale": 0, "mscale_all_dim": 0,
    "original_max_position_embeddings": 1, "partial_rotary_factor": None, "short_factor": None,
    "long_factor": None,
}  # fmt: skip

# What transformers, or torch, would not take, of the families that it has built in.
SWITCHES = ("attention_bias", "mlp_bias", "use_sliding_window")
NOT_NEGATIVE = ("rms_norm_eps", "layer_norm_eps", "initializer_range")
_DTYPES = "bfloat16 float16 half float32 float float64 double float8_e4m3fn float8_e5m2"
DTYPES = frozenset(_DTYPES.split())
_ACTIVATIONS = """
    gelu gelu_10 gelu_accurate gelu_fast gelu_new gelu_python gelu_python_tanh gelu_pytorch_tanh
    hardswish laplace leaky_relu linear mish prelu quick_gelu relu relu2 relu6 sigmoid silu
    sqrtsoftplus swish tanh xielu
"""
ACTIVATIONS = frozenset(_ACTIVATIONS.split())


@dataclass(frozen=True)
class ModelFacts:
    """What config.json and the headers of the weight files say.

    Args:
        context: native context in tokens.
        rope: an existing RoPE scaling of the model, as in its config.json, or None.
        parameters: number of elements, tied ones once; None when the weights are not here.
        intermediate: width of the MLP.
        heads, key_heads, head_dim: the attention's shape.
        remote_code: the model brings its own Python code.
        built_in: transformers has a model of this type.
        window: tokens that every layer can look back; None without a limit.
        dropout: share of attention weights that the model drops in training.
        fixed_positions: why its positions cannot be scaled linearly; None where they can.
        obstacles: what keeps it from being trained, or packed; what nothing lifts is raised.
        notes: what is said about it in the plan.
    """

    model_type: str
    layers: int
    hidden: int
    vocabulary: int
    context: int
    rope: Mapping[str, Any] | None
    tied: bool
    parameters: int | None
    intermediate: int | None = None
    heads: int | None = None
    key_heads: int | None = None
    head_dim: int | None = None
    remote_code: bool = False
    built_in: bool = True
    window: int | None = None
    dropout: float = 0.0
    fixed_positions: str | None = None
    obstacles: tuple[Obstacle, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def table_parameters(self) -> int:
        """Elements of the embedding table, and of the head: equal shapes."""
        return self.vocabulary * self.hidden

    @property
    def end_parameters(self) -> int:
        """Elements of what stands before and behind the layers."""
        return self.table_parameters * (1 if self.tied else 2)

    @property
    def layer_parameters(self) -> int:
        """Elements of one decoder layer: counted, else of the LLaMA shape, else 12 hidden^2."""
        if self.parameters is not None:
            return (self.parameters - self.end_parameters) // self.layers
        if self.intermediate is None or self.heads is None:
            return 12 * self.hidden**2
        query, key = self.projections
        return self.hidden * (2 * query + 2 * key + 3 * self.intermediate + 2)

    @property
    def projections(self) -> tuple[int, int]:
        """Widths of a query and of a key projection."""
        heads = self.heads or 1
        dim = self.head_dim or self.hidden // heads
        return heads * dim, (self.key_heads or heads) * dim

    @property
    def attention_scale(self) -> float:
        """See `batching.cost`."""
        return self.layer_parameters / self.hidden


# config.json of models that recipes and plans name: their plan is there before they are.
_SMOLLM2 = ModelFacts("llama", 30, 576, 49152, 8192, None, True, 134_515_008, 1536, 9, 3, 64)
_LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
KNOWN_FACTS = {
    "bundled:smollm2-135m": _SMOLLM2,
    "meta-llama/Llama-2-7b-hf": ModelFacts(
        "llama", 32, 4096, 32000, 4096, None, False, 6_738_415_616, 11008, 32, 32, 128
    ),
    "meta-llama/Llama-2-13b-hf": ModelFacts(
        "llama", 40, 5120, 32000, 4096, None, False, 13_015_864_320, 13824, 40, 40, 128
    ),
    "meta-llama/Llama-2-70b-hf": ModelFacts(
        "llama", 80, 8192, 32000, 4096, None, False, 68_976_648_192, 28672, 64, 8, 128
    ),
    "meta-llama/Llama-3.1-8B": ModelFacts(
        "llama", 32, 4096, 128256, 131072, _LLAMA3_ROPE, False, 8_030_261_248, 14336, 32, 8, 128
    ),
    "meta-llama/Llama-3.1-70B": ModelFacts(
        "llama", 80, 8192, 128256, 131072, _LLAMA3_ROPE, False, 70_553_706_496, 28672, 64, 8, 128
    ),
}


# --- reading -----------------------------------------------------------------------------


def read_facts(folder: Path) -> ModelFacts:
    """Facts of a model folder in Hugging Face layout.

    Raises:
        ModelError: no config.json, or not one of a decoder that can be trained here.
    """
    file = folder / "config.json"
    config = read_config(folder)
    read = _Config(file, families.settled(config))
    name = read.text("model_type")
    remote = bool(config.get("auto_map"))
    found = tuple(families.obstacles(read.config))
    for obstacle in found:
        if obstacle.code or not (obstacle.own or remote):
            raise unsupported(name, obstacle, file)
    layers, hidden = read.whole("num_hidden_layers"), read.whole("hidden_size")
    vocabulary, context = read.whole("vocab_size"), read.whole("max_position_embeddings")
    heads, key_heads, head_dim = read.heads(hidden)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        read.token_ids(key, vocabulary)
    tied = read.switch("tie_word_embeddings")
    if name in families.KNOWN:
        read.what_libraries_take()
    parameters, plain = _count(folder, layers, vocabulary, tied=tied)
    return ModelFacts(
        model_type=name,
        layers=layers,
        hidden=hidden,
        vocabulary=vocabulary,
        context=context,
        rope=read.rope(),
        tied=tied,
        parameters=parameters,
        intermediate=read.whole_or_none("intermediate_size"),
        heads=heads,
        key_heads=key_heads,
        head_dim=head_dim,
        remote_code=remote,
        built_in=name in families.KNOWN,
        window=families.window(read.config, layers),
        dropout=read.share("attention_dropout", "attention_probs_dropout_prob"),
        fixed_positions=families.FIXED_POSITIONS.get(name),
        obstacles=found,
        notes=_notes(config, plain=plain),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    file = folder / "config.json"
    try:
        file.lstat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelError(
            "no config.json in the model folder",
            where=str(folder),
            remedy="model.path must be a folder in Hugging Face layout",
        ) from error
    except OSError as error:
        raise unreadable(file, error) from error
    return read_object(file)


def unsupported(name: str, obstacle: Obstacle, file: Path | str) -> ModelError:
    """A model that is not trained here, or not with this attention."""
    remedy = (
        "use model.attention=own: one sample per forward pass"
        if obstacle.own
        else "use a dense decoder of the LLaMA kind (Llama, Mistral, Qwen, Gemma, OLMo, ...)"
    )
    named = obstacle.key == "model_type" or obstacle.key in obstacle.what
    key = "" if named else f" ({obstacle.key})"
    return ModelError(f"{name} {obstacle.what}{key}", where=str(file), remedy=remedy)


class _Config:
    """config.json, key by key: each value is what it must be, or a ModelError names it."""

    # More than any model has; a typing error gives more.
    LIMITS: ClassVar[dict[str, int]] = {
        "num_hidden_layers": 10**4, "hidden_size": 2**20, "vocab_size": 2**26,
        "max_position_embeddings": 2**40, "intermediate_size": 2**24, "num_attention_heads": 2**16,
        "num_key_value_heads": 2**16, "head_dim": 2**16,
    }  # fmt: skip

    def __init__(self, file: Path, config: Mapping[str, Any]) -> None:
        self.file, self.config = file, config

    def fault(self, key: str, expected: str) -> ModelError:
        value = json.dumps(self.config[key], default=str)
        shown = value if len(value) <= 60 else value[:57] + "..."
        return ModelError(
            f"{key} is {shown}, expected {expected}",
            where=str(self.file),
            remedy="compare it with the file that was published with the model",
        )

    def missing(self, key: str) -> ModelError:
        return ModelError(
            f"config.json has no {key}: not a decoder of the LLaMA kind", where=str(self.file)
        )

    def has(self, key: str) -> None:
        if self.config.get(key) is None:
            raise self.missing(key)

    def text(self, key: str) -> str:
        self.has(key)
        value = self.config[key]
        if not isinstance(value, str) or not value:
            raise self.fault(key, "a name")
        return value

    def whole(self, key: str) -> int:
        self.has(key)
        value = self.config[key]
        if type(value) is not int or not 1 <= value <= self.LIMITS[key]:
            raise self.fault(key, f"a whole number from 1 to {self.LIMITS[key]:,}")
        return value

    def whole_or_none(self, key: str) -> int | None:
        return self.whole(key) if self.config.get(key) is not None else None

    def switch(self, key: str) -> bool:
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.fault(key, "true or false")
        return bool(value)

    def share(self, *keys: str) -> float:
        """The first of some keys that is there."""
        key = next((key for key in keys if self.config.get(key) is not None), None)
        if key is None:
            return 0.0
        if not _number(self.config[key]) or not 0 <= self.config[key] < 1:
            raise self.fault(key, "a number from 0 to less than 1")
        return float(self.config[key])

    def heads(self, hidden: int) -> tuple[int | None, int | None, int | None]:
        """Query heads, key heads and the dimension of one."""
        heads = self.whole_or_none("num_attention_heads")
        keys, dim = self.whole_or_none("num_key_value_heads"), self.whole_or_none("head_dim")
        if heads is not None and dim is None and hidden % heads:
            raise self.fault("num_attention_heads", f"a divisor of hidden_size {hidden}")
        if heads is not None and keys is not None and heads % keys:
            raise self.fault("num_key_value_heads", f"a divisor of num_attention_heads {heads}")
        return heads, keys, dim

    def what_libraries_take(self) -> None:
        """Values that would be refused while the model is made, some of them by no name."""
        for key in SWITCHES:
            self.switch(key)
        for key in NOT_NEGATIVE:
            value = self.config.get(key)
            if value is not None and not (_number(value) and value >= 0):
                raise self.fault(key, "a number of at least 0")
        for key in ("dtype", "torch_dtype"):
            value = self.config.get(key)
            if value is not None and (not isinstance(value, str) or value not in DTYPES):
                raise self.fault(key, "a dtype such as bfloat16")
        for key in ("hidden_act", "hidden_activation", "activation_function"):
            value = self.config.get(key)
            if value is not None and (not isinstance(value, str) or value not in ACTIVATIONS):
                raise self.fault(key, "an activation function that transformers has, such as silu")
        value = self.config.get("quantization_config")
        if value is not None and not isinstance(value, Mapping):
            raise self.fault("quantization_config", "an object or null")

    def token_ids(self, key: str, vocabulary: int) -> None:
        """Ids that have no row of the embedding table would be found by a worker, as an index."""
        value = self.config.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        none = -1 if key == "pad_token_id" else 0  # -1 is how the first LLaMA says "none"
        if any(type(one) is not int or not none <= one < vocabulary for one in ids):
            raise self.fault(key, f"less than vocab_size, {vocabulary} rows of the embedding table")

    def rope(self) -> Mapping[str, Any] | None:
        """The scaling of positions; where layers differ, that of those with full attention."""
        new, old = (self._rope_table(key) for key in ("rope_parameters", "rope_scaling"))
        if isinstance((new or {}).get("full_attention"), Mapping):
            new = (new or {})["full_attention"]
        # As transformers has it: the older key wins.
        key, table = ("rope_scaling", old) if old else ("rope_parameters", new)
        for name, holder in (("rope_theta", self.config), ("rope_theta", table or {})):
            theta = holder.get(name)
            if theta is not None and not (_number(theta) and theta > 0):
                raise self.fault(name if name in self.config else key, "a rope_theta above 0")
        if self.config.get("model_type") == "ministral3" and not _number(
            (table or {}).get("llama_4_scaling_beta")
        ):
            raise self.fault(key, "llama_4_scaling_beta in it") if table else self.missing(key)
        kind = (table or {}).get("rope_type") or (table or {}).get("type")
        if not table or kind in (None, "default"):
            return None
        if self.config.get("model_type") == "phi3" and kind in ("su", "yarn"):
            kind = "longrope"  # as Phi3Config has it
        if kind not in ROPE_KINDS:
            raise self.fault(key, f"a rope_type of {', '.join(ROPE_KINDS)}")
        for name in ROPE_KINDS[kind]:
            value = table.get(name)
            several = isinstance(value, list) and all(map(_number, value)) and value
            if not (several if name.endswith("_factor") and kind == "longrope" else _number(value)):
                raise self.fault(key, f"{name} in it for rope_type {kind}")
        self._rope_numbers(key, kind, table)
        if kind == "longrope":
            self._factors(key, table)
        original = self.config.get("original_max_position_embeddings")
        if original is not None and kind in ("longrope", "yarn", "llama3"):
            return {**table, "original_max_position_embeddings": original}
        return table

    def _rope_numbers(self, key: str, kind: str, table: Mapping[str, Any]) -> None:
        """With others the angles would be infinite, or no numbers."""
        for name, least in ROPE_NUMBERS.items():
            value = table.get(name)
            several: list[Any] = value if isinstance(value, list) else [value]
            for one in several:
                good = _number(one) and (one > 0 if least is None else one >= least)
                if one is not None and not good:
                    bound = "above 0" if least is None else f"of at least {least:g}"
                    raise self.fault(key, f"as {name} a number {bound} in it")
        if kind == "llama3" and not table["low_freq_factor"] < table["high_freq_factor"]:
            raise self.fault(key, "low_freq_factor below high_freq_factor in it")

    def _factors(self, key: str, table: Mapping[str, Any]) -> None:
        """LongRoPE has a factor for each pair of rotated dimensions; one for all would fit too."""
        heads = self.config.get("num_attention_heads") or 1
        dim = self.config.get("head_dim") or self.config["hidden_size"] // heads
        inner, outer = (place.get("partial_rotary_factor") for place in (table, self.config))
        share = next((value for value in (inner, outer) if _number(value)), 1.0)
        pairs = int(dim * share) // 2
        for name in ROPE_KINDS["longrope"]:
            if len(table[name]) != pairs:
                raise self.fault(key, f"{pairs} numbers as {name}, a pair of dimensions each")

    def _rope_table(self, key: str) -> Mapping[str, Any] | None:
        value = self.config.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.fault(key, "an object or null")
        return value


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def _count(folder: Path, layers: int, vocabulary: int, *, tied: bool) -> tuple[int | None, bool]:
    """Elements of the parameters in the weight files, None without files; and whether there are
    any and all of them are plain numbers.

    Raises:
        ModelError: quantised weights, or other sizes than config.json has.
    """
    total, found = 0, -1
    for file, tensors in headers(folder):
        for name, (dtype, shape) in tensors.items():
            refuse_quantised(file, name, dtype)
            if not name.endswith("inv_freq") and not (tied and name == "lm_head.weight"):
                total += math.prod(shape)
            if match := _LAYER.search(name):
                found = max(found, int(match[1]))
            if name.endswith("embed_tokens.weight") and shape[0] != vocabulary:
                raise ModelError(
                    f"vocab_size is {vocabulary:,}, and {name} has {shape[0]:,} rows",
                    where=str(folder / "config.json"),
                    remedy="take weights and config.json of one model",
                )
    if found >= 0 and found + 1 != layers:
        raise ModelError(
            f"num_hidden_layers is {layers}, and the weight files have {found + 1} layers",
            where=str(folder / "config.json"),
            remedy="take weights and config.json of one model",
        )
    return total or None, total > 0


def _notes(config: Mapping[str, Any], *, plain: bool) -> tuple[str, ...]:
    if plain and config.get("quantization_config"):
        return (
            "quantization_config in config.json is left out: the weights are plain numbers, "
            "and so will those of the trained model be",
        )
    return ()
