"""Which model families train: a tiny random model of each is trained for two steps and exported.

    python -m tests.families [--engine zero3] [TYPE ...]

Takes some ten minutes for all that `sft_job.families` says train, each with the attention that it
says; prints a line for each and ends with 1 where one does not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from sft_job import families

TOGETHER = 3  # families that one process trains: it needs some seconds for its imports
VOCABULARY = 504
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Where these sizes do not fit, or logits would be changed.
_UNCAPPED = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
CHANGES: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "gemma2": _UNCAPPED,
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "nanochat": {"final_logit_softcapping": None},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "qwen3_5_text": {"linear_num_key_heads": 2, "linear_num_value_heads": 4,
                     "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "vaultgemma": _UNCAPPED,
}  # fmt: skip


def tiny(family: str, **changes: Any) -> Any:
    """A configuration of a family with small sizes."""
    from transformers import AutoConfig

    known = AutoConfig.for_model(family).to_dict()
    fitting = {key: value for key, value in SIZES.items() if key in known}
    if family == "falcon":  # derived there
        fitting.pop("head_dim", None)
    return AutoConfig.for_model(family, **(fitting | CHANGES.get(family, {}) | changes))


def make(folder: Path, family: str, attention: str, engine: str) -> Path:
    """A job of a random model of a family."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.runs import make_conversations, make_job, make_tokenizer

    folder.mkdir(parents=True)
    make_tokenizer(folder / "model")
    torch.manual_seed(0)
    changes: dict[str, Any] = {"rope_parameters": None} if family == "ministral3" else {}
    model = AutoModelForCausalLM.from_config(tiny(family, **changes), dtype=torch.float32)
    model.save_pretrained(folder / "model")
    data = make_conversations(folder / "data.json", 8, words=6)
    options = {"train__max_steps": 2, "train__global_batch_size": 4, "data__seq_len": 96,
               "model__attention": attention, "engine": {"type": engine}}  # fmt: skip
    return make_job(folder, folder / "model", data, **options)


def train(world: Any, folder: Path, cases: list[tuple[str, str]], engine: str) -> list[str | None]:
    """What each family fails of, or None; one after the other in this process."""
    return [fault(world, folder, family, attention, engine) for family, attention in cases]


def fault(world: Any, folder: Path, family: str, attention: str, engine: str) -> str | None:
    from sft_job import dataset, export, trainer
    from sft_job.config import load
    from sft_job.data import encode_job
    from sft_job.model import DTYPES
    from sft_job.tokenizer import load_tokenizer
    from tests.ranks import Setup

    try:
        job = make(folder / f"{family}-{attention}", family, attention, engine)
        encode_job(load(job, []))
        setup = Setup(world, job)
        setup.trainer.train()
        setup.close()
        tokenizer = load_tokenizer(setup.folder)
        export.write(
            setup.trainer.attempt,
            setup.model,
            trainer.full_parameters(setup.config)(setup.model),
            tokenizer,
            dataset.encoder_of(setup.config, tokenizer),
            world,
            source=setup.folder,
            dtype=DTYPES[setup.plan.precision.value],
        )
    except Exception as error:  # whatever it is, it is the answer for this family
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
    return None


def main() -> int:
    from tests.runs import on_ranks

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", metavar="TYPE")
    parser.add_argument("--engine", choices=["fsdp", "zero3"], default="fsdp")
    args = parser.parse_args()
    wanted = args.families or sorted(families.PACKED | families.OWN.keys())
    cases = [(name, "own" if name in families.OWN else "sdpa") for name in wanted]
    failed = False
    for begin in range(0, len(cases), TOGETHER):
        some = cases[begin : begin + TOGETHER]
        with tempfile.TemporaryDirectory() as folder:
            (results,) = on_ranks(train, 1, Path(folder), some, args.engine)
        for (name, attention), result in zip(some, results, strict=True):
            print(f"=> {name:20} {attention:5} {result or 'trains'}", flush=True)
        failed |= any(results)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
