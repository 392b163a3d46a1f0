"""Executed against necessary FLOPs of one training step, counted on the meta device.

    python -m benchmarks.flops [--out flops.json]

The model has the real Llama-2-7B shape, all 32 layers, and no weights. The step is what each of
the recipe's four GPUs has of it: 32 conversations, with long-tailed lengths. Every operator of
forward and backward pass is seen by torch's FlopCounterMode; nothing is computed, so that neither
a GPU nor memory is needed.

Conventions, the same for what is executed and for what is necessary:

    product       [m, k] @ [k, n] is 2 m k n; norms, activations, softmax, optimizer are 0
    attention     n tokens are n x n (torch's `sdpa_flop_count`, which knows no causal half):
                  4 n^2 heads x dim forward, 2.5 times that backward (the fused kernels compute
                  the scores again; they keep no n x n matrix)

Necessary for a step, forward and backward:

    body          6 x parameters of the layers' matrices x tokens
    attention     14 n^2 heads x dim in each layer, for each conversation by itself
    head          6 x vocabulary x hidden x supervised tokens

FastChat's step on the same conversations: rows padded to seq_len, attention over the padded row
(its train.py) or over the row's real tokens (its train_mem.py), logits for every position, and
the activation checkpointing that its transformers release does: reentrant, every layer's whole
forward pass again. FLOPs are a sum over rows, so its batch size of 2 is of no consequence.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel, logging

from benchmarks import workload
from sft_job.attention import Choice
from sft_job.batching import deal
from sft_job.dataset import collate
from sft_job.encode import Sample
from sft_job.facts import KNOWN_FACTS, ModelFacts
from sft_job.hardware import Hardware
from sft_job.model import build, make_trainable
from sft_job.plan import Plan, resolve
from sft_job.schema import JobConfig

MODEL = "meta-llama/Llama-2-7b-hf"
SEQ_LENS = (2048, 4096)
CONVERSATIONS = 32
MICRO_BATCH_TOKENS = 16384

# Tokens of a conversation: log-normal. Cut at 2,048 their mean is 860, as in the throughput
# benchmark (whose law is one of characters).
MEDIAN_TOKENS, SIGMA = 682.0, 0.86
# Tokens of a question with its answer, and the question's share of them.
EXCHANGE_TOKENS, QUESTION = 250, 0.46

# Executed / necessary, at most: what sft_job is held to.
BOUNDS = {"none": 1.02, "selective": 1.12, "full": 1.36}

# Rows that FastChat's side computes at a time: fewer passes through Python, the same sum.
PADDED_ROWS = 32

Flops = dict[str, int]


# --- what is trained on ---------------------------------------------------------------------


def conversations(count: int, seq_len: int) -> list[Sample]:
    """Samples of log-normal lengths, cut to seq_len.

    Quantiles instead of draws, so that few have the mean of many; in the same order every time.
    Questions and answers alternate. Ids are all 0, since nothing looks at them.
    """
    normal = statistics.NormalDist(math.log(MEDIAN_TOKENS), SIGMA)
    lengths = [round(math.exp(normal.inv_cdf((i + 0.5) / count))) for i in range(count)]
    order = np.random.default_rng(0).permutation(count)
    return [_conversation(min(lengths[i], seq_len)) for i in order]


def _conversation(length: int) -> Sample:
    exchanges = max(1, round(length / EXCHANGE_TOKENS))
    place = np.arange(length) * exchanges / length % 1  # within its exchange, 0 to 1
    return Sample(np.zeros(length, np.uint32), place >= QUESTION)


def necessary(facts: ModelFacts, samples: Sequence[Sample]) -> Flops:
    """FLOPs that the loss of these samples and its gradients need, by the module's convention."""
    query, key = facts.projections
    matrices = facts.hidden * (2 * query + 2 * key + 3 * (facts.intermediate or 0))
    squares = sum(len(sample.input_ids) ** 2 for sample in samples)
    return {
        "body": 6 * facts.layers * matrices * sum(len(sample.input_ids) for sample in samples),
        "attention": 14 * facts.layers * query * squares,
        "head": 6 * facts.table_parameters * supervised_tokens(samples),
    }


def supervised_tokens(samples: Sequence[Sample]) -> int:
    return sum(int(sample.supervised.sum()) for sample in samples)


# --- counting -------------------------------------------------------------------------------


def _accumulated_product(
    total: Sequence[int], a: Sequence[int], b: Sequence[int], *rest: Any, **named: Any
) -> int:
    return 2 * a[0] * a[1] * b[1]


# Products that torch 2.13's counter passes over without a word.
UNKNOWN_TO_TORCH = {torch.ops.aten.addmm_: _accumulated_product}

# Parts of the names of operators that multiply matrices.
PRODUCTS = ("mm", "matmul", "mv", "linear", "dot", "einsum", "conv", "attention", "attn")


class _Watch(TorchDispatchMode):
    """Refuses products that the counter above it would have passed over."""

    def __init__(self, counted: Mapping[Any, Any]) -> None:
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        packet = operator._overloadpacket
        name = packet.__name__.lower()
        if packet not in self.counted and any(part in name for part in PRODUCTS):
            raise NotImplementedError(f"{operator} is a product, and nothing counts its FLOPs")
        return operator(*args, **(kwargs or {}))


def count(step: Callable[[], None]) -> Flops:
    """FLOPs that a function executes, by operator.

    Raises:
        NotImplementedError: it multiplies matrices in a way that is not counted.
    """
    counter = FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_TORCH)
    with _Watch(counter.flop_registry), counter:
        step()
    by_operator = counter.get_flop_counts().get("Global", {})
    return {str(operator): flops for operator, flops in by_operator.items()}


@contextmanager
def on_meta(attention: Callable[..., torch.Tensor] | None = None) -> Iterator[None]:
    """Let a model run without values, as it would on a GPU.

    Args:
        attention: instead of `scaled_dot_product_attention`. The meta device takes the unfused
            one, which keeps the n x n scores; GPUs take a fused kernel, and so does the default.
    """
    with ExitStack() as stack:
        patch = stack.enter_context
        patch(mock.patch.object(F, "scaled_dot_product_attention", attention or fused_attention))
        # It looks at the values of the positions, which our kernels and a causal row ignore.
        patch(mock.patch("transformers.masking_utils.find_packed_sequence_indices", _not_packed))
        yield


def _not_packed(position_ids: torch.Tensor) -> None:
    return None


def fused_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any
) -> torch.Tensor:
    """Causal attention by the operator that GPUs run.

    Args:
        query: `[rows, heads, n, dim]`; key, value may have fewer heads, which share queries.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    operator = torch.ops.aten._scaled_dot_product_flash_attention
    attended: torch.Tensor = operator(query, key, value, 0.0, True, scale=options.get("scale"))[0]
    return attended


def _moved(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def add(left: Flops, right: Flops) -> Flops:
    return {name: left.get(name, 0) + right.get(name, 0) for name in left | right}


# --- our step -------------------------------------------------------------------------------


def write_config(facts: ModelFacts, folder: Path) -> Path:
    """A model folder that has nothing but config.json."""
    LlamaConfig(
        vocab_size=facts.vocabulary,
        hidden_size=facts.hidden,
        intermediate_size=facts.intermediate,
        num_hidden_layers=facts.layers,
        num_attention_heads=facts.heads,
        num_key_value_heads=facts.key_heads,
        max_position_embeddings=facts.context,
        tie_word_embeddings=facts.tied,
    ).save_pretrained(folder)
    return folder


def plan_for(facts: ModelFacts, seq_len: int, micro_batch_tokens: int) -> Plan:
    """The real plan of a job on one device of unknown memory that has SDPA only."""
    job = {
        "model": {"path": MODEL, "attention": "sdpa", "cross_entropy": "torch"},
        "data": {"train": ["conversations.json"], "seq_len": seq_len},
        "train": {
            "micro_batch_tokens": micro_batch_tokens,
            "activation_checkpointing": "none",
            "precision": "bf16",
        },
        "run": {"dir": "run"},
    }
    device = Hardware("cpu", 1, "meta device", None, True, None)
    return resolve(JobConfig.model_validate(job), device, 1, None, facts, {})


def ours(folder: Path, plan: Plan, samples: Sequence[Sample]) -> Flops:
    """FLOPs of sft_job's step on one rank, by operator."""
    model = build(folder, plan, trust_remote_code=False, meta=True)
    make_trainable(model, plan)
    dealt = deal(
        [len(sample.input_ids) for sample in samples],
        world_size=1,
        micro_batch_tokens=plan.micro_batch_tokens,
        attention_scale=plan.attention_scale,
    )
    micro_batches = [collate([samples[i] for i in ranks[0]]) for ranks in dealt]

    def step() -> None:
        for micro_batch in micro_batches:
            model(**_moved(micro_batch))["loss"].backward()

    with on_meta():
        return count(step)


# --- FastChat's step ------------------------------------------------------------------------


def fastchat(
    folder: Path, samples: Sequence[Sample], seq_len: int, *, checkpointing: bool, unpads: bool
) -> Flops:
    """FLOPs of FastChat's step, by operator.

    Args:
        checkpointing: as its recipe's `--gradient_checkpointing True`.
        unpads: attention over each row's real tokens (train_mem.py), not over all of it.
    """
    model = _plain_model(folder)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": True})
    flops: Flops = {}
    for start in range(0, len(samples), PADDED_ROWS):
        rows = samples[start : start + PADDED_ROWS]
        lengths = [len(sample.input_ids) for sample in rows]
        batch = _moved(_padded(rows, seq_len))

        def step(batch: dict[str, Any] = batch) -> None:
            model(**batch, use_cache=False).loss.backward()

        with on_meta(_unpadding(lengths) if unpads else fused_attention):
            flops = add(flops, count(step))
    return flops


def _plain_model(folder: Path) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), attn_implementation="sdpa"
        )
    return model.train()


def _padded(samples: Sequence[Sample], seq_len: int) -> dict[str, torch.Tensor]:
    """`[rows, seq_len]` ids and labels. No mask: what it hides is computed all the same."""
    ids = np.zeros((len(samples), seq_len), np.int64)
    labels = np.full((len(samples), seq_len), -100, np.int64)
    for row, sample in enumerate(samples):
        labels[row, : len(sample.input_ids)] = sample.labels
    return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


def _unpadding(lengths: Sequence[int]) -> Callable[..., torch.Tensor]:
    """Attention that leaves out the padding behind the first so many tokens of each row."""

    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any
    ) -> torch.Tensor:
        rows = []
        for row, length in enumerate(lengths):
            real = (x[row : row + 1, :, :length] for x in (query, key, value))
            padding = (0, 0, 0, query.shape[2] - length)
            rows.append(F.pad(fused_attention(*real, **options), padding))
        return torch.cat(rows)

    return attention


# --- the report -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One way of taking the step.

    Args:
        executed: FLOPs by operator; needed: necessary FLOPs of the same step.
        supervised: tokens trained on in the step.
        bound: of the ratio, None where nothing is promised.
    """

    seq_len: int
    side: str
    recomputation: str
    executed: Flops
    needed: int
    supervised: int
    bound: float | None = None

    @property
    def total(self) -> int:
        return sum(self.executed.values())

    @property
    def ratio(self) -> float:
        return self.total / self.needed

    @property
    def holds(self) -> bool:
        return self.bound is None or self.ratio <= self.bound

    def as_json(self) -> dict[str, Any]:
        figures = {"total": self.total, "ratio": self.ratio, "holds": self.holds}
        return dataclasses.asdict(self) | figures


def levels(facts: ModelFacts) -> list[tuple[str, int]]:
    """(activation_checkpointing, saved_products), from least to most recomputation.

    A layer of LLaMA has 7 products; the last is never done again, so that there are 6 to save.
    """
    return [("none", 0), *(("selective", saved) for saved in range(6, -1, -1)), ("full", 0)]


def our_rows(
    facts: ModelFacts,
    seq_len: int,
    samples: Sequence[Sample],
    wanted: Sequence[tuple[str, int]],
    micro_batch_tokens: int = MICRO_BATCH_TOKENS,
) -> Iterator[Row]:
    """sft_job's step at several levels of recomputation."""
    needed = sum(necessary(facts, samples).values())
    plan = plan_for(facts, seq_len, micro_batch_tokens)
    with tempfile.TemporaryDirectory() as folder:
        write_config(facts, Path(folder))
        for mode, saved in wanted:
            leveled = dataclasses.replace(
                plan, activation_checkpointing=Choice(mode, ""), saved_products=saved
            )
            executed = ours(Path(folder), leveled, samples)
            label = f"selective, {saved} of 6 products kept" if mode == "selective" else mode
            bound = None if mode == "selective" and saved < 6 else BOUNDS[mode]
            supervised = supervised_tokens(samples)
            yield Row(seq_len, "sft_job", label, executed, needed, supervised, bound)


def fastchat_rows(facts: ModelFacts, seq_len: int, samples: Sequence[Sample]) -> Iterator[Row]:
    """FastChat's step: as its recipes run it, and without activation checkpointing."""
    needed, supervised = sum(necessary(facts, samples).values()), supervised_tokens(samples)
    with tempfile.TemporaryDirectory() as folder:
        write_config(facts, Path(folder))
        for script, checkpointing in (
            ("train.py", False),
            ("train.py", True),
            ("train_mem.py", False),
            ("train_mem.py", True),
        ):
            executed = fastchat(
                Path(folder),
                samples,
                seq_len,
                checkpointing=checkpointing,
                unpads=script == "train_mem.py",
            )
            label = "full" if checkpointing else "none"
            yield Row(seq_len, f"FastChat {script}", label, executed, needed, supervised)


def table(rows: Sequence[Row]) -> str:
    header = [
        "seq_len", "step of", "recomputation", "executed / necessary", "bound",
        "PFLOP executed", "GFLOP per supervised token",
    ]  # fmt: skip
    lines = [
        [
            str(row.seq_len),
            row.side,
            row.recomputation,
            f"{row.ratio:.3f}",
            "" if row.bound is None else f"{row.bound:.2f}",
            f"{row.total / 1e15:,.2f}",
            f"{row.total / row.supervised / 1e9:,.1f}",
        ]
        for row in rows
    ]
    return workload.markdown(header, lines)


def measure(facts: ModelFacts, seq_len: int, total: int) -> tuple[dict[str, Any], list[Row]]:
    """What the step is, and every way of taking it."""
    samples = conversations(total, seq_len)
    step = {
        "seq_len": seq_len,
        "conversations": total,
        "tokens": sum(len(sample.input_ids) for sample in samples),
        "supervised_tokens": supervised_tokens(samples),
        "necessary": necessary(facts, samples),
    }
    rows = []
    for row in (
        *our_rows(facts, seq_len, samples, levels(facts)),
        *fastchat_rows(facts, seq_len, samples),
    ):
        workload.say(f"{row.seq_len} {row.side} {row.recomputation}: {row.ratio:.4f}")
        rows.append(row)
    return step, rows


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when a bound is broken."""
    parser = argparse.ArgumentParser(description="Count a training step's FLOPs.")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--conversations", type=int, default=CONVERSATIONS)
    args = parser.parse_args(argv)
    logging.set_verbosity_error()  # transformers on reentrant checkpointing, once a layer
    started = time.perf_counter()
    facts = KNOWN_FACTS[MODEL]
    steps, rows = [], []
    for seq_len in SEQ_LENS:
        step, found = measure(facts, seq_len, args.conversations)
        steps.append(step)
        rows += found
    report = {
        "benchmark": "flops",
        "model": {"path": MODEL, **dataclasses.asdict(facts)},
        "micro_batch_tokens": MICRO_BATCH_TOKENS,
        "steps": steps,
        "rows": [row.as_json() for row in rows],
        "seconds": round(time.perf_counter() - started, 1),
        "versions": workload.versions(),
        "code": workload.code_state(),
    }
    workload.publish(report, table(rows), args.out)
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
