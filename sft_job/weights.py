"""The tensors of a model's weight files: read in parts, compared with what the model has."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

from sft_job.errors import ModelError
from sft_job.modelfiles import headers, refuse_quantised, unreadable

# What older releases wrote beside the parameters: frequencies, masks and positions that every
# model computes by itself. (A bias of that name is a mask where the model has none.)
COMPUTED = re.compile(
    r"(^|\.)(rotary_emb|rotary_pos_emb)\.inv_freq$"
    r"|(^|\.)(attn|attention|self_attn)\.(bias|masked_bias)$"
    r"|(^|\.)position_ids$"
)
# Numbers looked at together when two tensors are compared.
COMPARED = 2**24


class WeightFiles:
    """The tensors of a folder's safetensors files, read in part or whole from the mapped file.

    Args:
        largest: above this, in absolute value, a number does not fit the computation.
    """

    def __init__(self, folder: Path, largest: float = math.inf) -> None:
        self.folder, self.largest = folder, largest
        self.shapes: dict[str, list[int]] = {}
        self._paths: dict[str, Path] = {}
        # Opening a file anew for each of its tensors would read its header as often.
        self._files: dict[Path, Any] = {}
        for file, tensors in headers(folder):
            try:
                self._files[file] = safetensors.safe_open(file, "pt")
            except (OSError, safetensors.SafetensorError) as error:
                raise unreadable(file, error) from error
            for name, (dtype, shape) in tensors.items():
                refuse_quantised(file, name, dtype)
                self.shapes[name], self._paths[name] = shape, file

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """Rows of a tensor along its first dimension, in the file's dtype.

        Raises:
            ModelError: a number that nothing can be computed with.
        """
        handle = self._files[self._paths[name]]
        part: torch.Tensor
        part = handle.get_slice(name)[rows] if self.shapes[name] else handle.get_tensor(name)
        refuse_unfit(name, part, self._paths[name], self.largest)
        return part

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers; read in parts."""
        shape = self.shapes[one]
        if shape != self.shapes[other]:
            return False
        step = max(1, COMPARED // max(1, math.prod(shape[1:])))
        return all(
            torch.equal(*(self.read(name, slice(row, row + step)) for name in (one, other)))
            for row in range(0, shape[0], step)
        )


def refuse_unfit(name: str, part: torch.Tensor, file: Path, largest: float = math.inf) -> None:
    """
    Args:
        file: where the numbers come from.
        largest: above this, in absolute value, a number does not fit the computation.

    Raises:
        ModelError: a number that nothing can be computed with.
    """
    if not part.is_floating_point() or not part.numel():
        return
    # One pass without a temporary; a NaN comes out at both ends.
    ends = [float(end) for end in torch.aminmax(part)]
    if all(abs(end) <= largest and math.isfinite(end) for end in ends):
        return
    if all(map(math.isfinite, ends)):
        raise ModelError(
            f"{name} holds {max(ends, key=abs):g}, and the computation goes to {largest:g} only",
            where=str(file),
            remedy="use train.precision=fp32, or bf16 on hardware that computes in it",
        )
    raise ModelError(
        f"{name} holds {'NaN' if any(map(math.isnan, ends)) else 'infinity'}",
        where=str(file),
        remedy="the file is damaged, or comes from a training that went wrong: fetch it again",
    )


def missing_names(model: nn.Module, files: WeightFiles) -> list[str]:
    """Parameters of the model that the files do not have with the same shape."""
    return [
        name
        for name, parameter in model.named_parameters()
        if files.shapes.get(name) != list(getattr(parameter, "ds_shape", parameter.shape))
    ]


def refuse_other_shapes(model: nn.Module, files: WeightFiles) -> None:
    """
    Raises:
        ModelError: a tensor of the model's own name has another shape than config.json makes it.
    """
    for name, parameter in model.named_parameters():
        found, made = files.shapes.get(name), list(parameter.shape)
        if found is not None and found != made:
            raise ModelError(
                f"{name} is {found} in the weight files, and {made} by config.json",
                where=str(files.folder),
                remedy="take weights and config.json of one model",
            )


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that belong into weight files, such as constants of an activation function."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def fill_buffers(model: nn.Module, files: WeightFiles) -> None:
    """Give the buffers what the files hold of them; what they do not hold is as it was built."""
    with torch.no_grad():
        for name, buffer in persistent_buffers(model):
            if name in files.shapes:
                buffer.copy_(files.read(name).reshape(buffer.shape))


def refuse_surplus(model: nn.Module, files: WeightFiles) -> list[str]:
    """Tensors of the files that the model does not have; returns what is said about them.

    Raises:
        ModelError: one would be trained if the model had it, or is not what it is tied to.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in reversed(list(parameters.items()))}
    for name, parameter in parameters.items():
        tied = first[id(parameter)]
        if tied != name and name in files.shapes and not files.equal(name, tied):
            raise untied_head(name, files.folder)
    known = parameters.keys() | dict(model.named_buffers()).keys()
    surplus = [name for name in files.shapes if name not in known and not COMPUTED.search(name)]
    patterns: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    by_design = [re.compile(pattern) for pattern in patterns]
    left_out = [name for name in surplus if any(p.search(name) for p in by_design)]
    if strange := [name for name in surplus if name not in left_out]:
        raise ModelError(
            f"{len(strange)} tensor(s) in the weight files are none of the model's, such as "
            f"{', '.join(strange[:3])}",
            where=str(files.folder),
            remedy=surplus_remedy(strange),
        )
    if left_out:
        return [f"{len(left_out)} tensors are left out, as transformers does: {left_out[0]}, ..."]
    return []


def surplus_remedy(names: list[str]) -> str:
    biases = all(name.endswith("bias") for name in names)
    keys = " (attention_bias, mlp_bias)" if biases else ""
    return f"config.json describes another model{keys}: take weights and config.json of one model"


def untied_head(name: str, folder: Path) -> ModelError:
    return ModelError(
        f"tie_word_embeddings is true in config.json, and {name} in the weight files differs from "
        "the embedding table",
        where=str(folder),
        remedy="set tie_word_embeddings: false if the model was trained with a head of its own",
    )
