"""How many bytes one device holds at the peak of a training step. Pure arithmetic.

The formulas follow what the code and the libraries allocate, tensor by tensor, and are held
within 10% of torch's own trackers and of measured runs by `tests/test_memory.py`. Two moments
can be the peak, and both are computed:

    the head       every layer's kept activations, logits, the head and its fp32 gradient
    a layer        kept activations, one layer recomputed and differentiated, its weights and
                   the next one's gathered, gradients on their way to their owners
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from sft_job.facts import ModelFacts

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}

# fp32 logits that exist at a time (`loss.chunked`), bytes. Every chunk reads and writes the
# head's whole fp32 gradient, which larger chunks spread over more rows (measured on a CPU with
# vocabularies of 32,000 to 128,256: 2^25 takes a fifth to a half longer than 2^27, 2^28 is no
# faster).
CHUNK_BYTES = {"cuda": 2**28, "cpu": 2**27, "meta": 2**28}


def chunk_rows(vocabulary: int, device: str) -> int:
    """Rows of logits in a chunk: a multiple of 64, at least 64."""
    return max(CHUNK_BYTES[device] // (4 * vocabulary) // 64, 1) * 64


def liger_rows(supervised: int, vocabulary: int, hidden: int) -> int:
    """Rows of logits in a chunk of Liger's loss, in the compute dtype: the next power of two of a
    share that is rounded up, and never more than there are (liger-kernel 0.8.5,
    ops/fused_linear_cross_entropy.py)."""
    share = math.ceil(supervised / math.ceil(vocabulary / hidden))
    return min(1 << max(share - 1, 0).bit_length(), supervised)


@dataclass(frozen=True)
class Setting:
    """What decides about memory besides the model.

    Args:
        tokens: of a micro-batch; supervised: those of them that are trained on.
        recompute: none, selective or full; saved_products: see `Plan.saved_products`.
        accumulates: a step has several micro-batches, so that gradients are there while the
            next activations are made.
    """

    engine: str
    offload: str
    precision: str
    device: str
    kernel: str
    cross_entropy: str
    world_size: int
    tokens: int
    supervised: int
    recompute: str
    saved_products: int
    accumulates: bool = True


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at the peak, by use.

    Args:
        weights, gradients, optimizer: this rank's shards, fp32 (and ZeRO-3's copy of the
            weights in the compute dtype).
        activations: kept from the forward to the backward pass.
        working: what one layer, or the head, needs while it is worked on.
        logits: logits and the head's gradient.
        buffers: gathered weights, and gradients on their way to their owners.
        host: this rank's masters and Adam's state in host memory (offload).
    """

    moment: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    logits: int
    buffers: int
    host: int = 0

    @property
    def total(self) -> int:
        """On the device; `host` is elsewhere."""
        kinds = (self.weights, self.gradients, self.optimizer, self.activations)
        return sum(kinds) + self.working + self.logits + self.buffers


def estimate(model: ModelFacts, setting: Setting) -> Memory:
    """The larger of the two moments.

    Args:
        model: with `parameters` and the attention's shape.
    """
    moments = _zero3(model, setting) if setting.engine == "zero3" else _fsdp(model, setting)
    return max(moments, key=lambda memory: memory.total)


def product_widths(model: ModelFacts) -> list[int]:
    """Widths of the results of a layer's matrix products, in the order of execution, without
    the last, which is never recomputed: query, key, value, output, gate, up."""
    query, key = model.projections
    wide = model.intermediate or 4 * model.hidden
    return [query, key, key, model.hidden, wide, wide]


def layer_activations(model: ModelFacts, c: int, kernel: str) -> int:
    """Bytes per token that autograd keeps of one layer when nothing is recomputed.

    Two norms (an fp32 copy, the normalised input, the output), rotated queries and keys,
    values, attention's result and log-sum-exp, and four wide tensors of the MLP.
    """
    query, key = model.projections
    wide = model.intermediate or 4 * model.hidden
    norms = 2 * (4 + 2 * c) * model.hidden
    attention = c * (2 * query + 2 * key) + 4 * (model.heads or 1)
    if kernel == "sdpa":
        attention += c * query  # each sample's result, and all of them joined
    if kernel == "xformers":
        attention += c * 2 * (query - key)  # keys and values repeated for their queries
    return norms + attention + 4 * c * wide


def kept_activations(model: ModelFacts, setting: Setting) -> int:
    """Bytes per token and layer from the forward to the backward pass."""
    c = BYTES[setting.precision]
    if setting.recompute == "none":
        return layer_activations(model, c, setting.kernel)
    kept = c * model.hidden  # the layer's input
    if setting.recompute == "selective":
        kept += c * model.projections[0] + 4 * (model.heads or 1)
        kept += c * sum(product_widths(model)[: setting.saved_products])
    return kept


def _layer_work(model: ModelFacts, setting: Setting) -> int:
    """Bytes while a layer is recomputed and differentiated, beyond what is kept of it."""
    c = BYTES[setting.precision]
    wide = model.intermediate or 4 * model.hidden
    recomputed = 0
    if setting.recompute != "none":
        recomputed = layer_activations(model, c, setting.kernel)
    if setting.recompute == "selective":
        # Values, gate and up are kept as they are; queries and keys are rotated anew.
        reused = [0, 0, 1, 0, 1, 1]
        widths = zip(product_widths(model), reused, strict=True)
        recomputed -= c * sum(w * r for w, r in list(widths)[: setting.saved_products])
        recomputed -= c * model.projections[0] + 4 * (model.heads or 1)
    gradients = c * (2 * wide + 2 * model.hidden)
    return (recomputed + gradients) * setting.tokens + c * model.hidden * wide


def _ends(model: ModelFacts, c: int, tokens: int) -> int:
    """The last hidden states with their norm; cosines and sines."""
    dim = model.head_dim or model.hidden // (model.heads or 1)
    return tokens * ((4 + 3 * c) * model.hidden + 2 * c * dim)


def _logits(model: ModelFacts, setting: Setting) -> int:
    """A chunk of logits, and supervised hidden states with their gradient."""
    c = BYTES[setting.precision]
    n = setting.supervised
    if setting.cross_entropy == "liger":
        chunk = liger_rows(n, model.vocabulary, model.hidden) * model.vocabulary * c
    else:
        rows = min(n, chunk_rows(model.vocabulary, setting.device))
        chunk = rows * model.vocabulary * (4 if c == 4 else 6)
    # On a CPU the gradient of a chunk is a product of its own, and oneDNN sums it in fp32.
    product = (c + 4) * model.table_parameters if setting.device == "cpu" and c == 2 else 0
    return chunk + product + 2 * c * n * model.hidden


def _fsdp(model: ModelFacts, setting: Setting) -> Iterator[Memory]:
    c, w, t = BYTES[setting.precision], setting.world_size, setting.tokens
    parameters, layer, table = model.parameters or 0, model.layer_parameters, model.table_parameters
    layers = model.layers
    shards = {"weights": 4 * parameters // w, "optimizer": 8 * parameters // w}
    kept = kept_activations(model, setting) * t
    ends = _ends(model, c, t)
    # A tied table belongs to the root: gathered, with its gradient, until the very end.
    root = 2 * c * table if model.tied else 0
    # gloo reduces a copy of its own
    copies = 2 if setting.device == "cpu" and w > 1 else 1

    def gradients(done: int) -> int:
        """Bytes of the gradients that have reached their owner after `done` elements."""
        return 4 * (parameters if setting.accumulates else done) // w

    head = 0 if model.tied else table
    forward = Memory(
        "the head",
        gradients=gradients(0),
        activations=kept * layers + ends,
        working=0,
        logits=_logits(model, setting) + 4 * table,
        # FSDP2 keeps the last all-gather's output until the next one; a tied table was gathered
        # long before.
        buffers=c * table + c * head,
        **shards,
    )
    yield forward
    yield dataclasses.replace(
        forward,
        logits=2 * c * setting.supervised * model.hidden + c * table,
        buffers=c * table + copies * 4 * head + c * layer,
    )
    for index in {layers, max(layers - 1, 1), 1}:
        reducing = 4 * (head if index == layers and not model.tied else layer)
        yield Memory(
            "a layer",
            gradients=gradients(head + (layers - index) * layer),
            activations=kept * index + t * c * model.hidden,
            working=_layer_work(model, setting),
            logits=0,
            # this layer and the one before it are gathered, the one behind it is reduced
            buffers=2 * c * layer + copies * reducing + root,
            **shards,
        )


def _zero3(model: ModelFacts, setting: Setting) -> Iterator[Memory]:
    """DeepSpeed keeps a copy of the weights in the compute dtype besides the masters, and room
    for all gradients all the time. What is gathered is copied once more out of the message, and
    what is reduced is gathered in a bucket and copied into one."""
    c, w, t = BYTES[setting.precision], setting.world_size, setting.tokens
    parameters, layer, table = model.parameters or 0, model.layer_parameters, model.table_parameters
    masters, adam = 4 * parameters // w, 8 * parameters // w
    offloaded = setting.offload == "cpu"
    shards = {
        "weights": c * parameters // w + (0 if offloaded else masters),
        "gradients": 0 if offloaded else masters,
        "optimizer": 0 if offloaded else adam,
        # masters, their gradients, the gradients accumulated for them, Adam
        "host": 3 * masters + adam if offloaded else 0,
    }
    kept = kept_activations(model, setting) * t
    ends = _ends(model, c, t)
    copies = 2 if w > 1 else 1
    # gloo reduces copies of its own
    clones = 0 if setting.device == "cuda" else (3 if w > 1 else 1)
    bucket = 4 * layer * (2 + clones)
    yield Memory(
        "the head",
        activations=kept * model.layers + ends,
        working=0,
        logits=_logits(model, setting) + 4 * table,
        buffers=c * table + 4 * layer + copies * c * layer,
        **shards,
    )
    yield Memory(
        "the head",
        activations=kept * model.layers + ends,
        working=0,
        logits=2 * c * setting.supervised * model.hidden + 2 * c * table,
        buffers=4 * table * (1 + clones) + 4 * layer + copies * c * layer,
        **shards,
    )
    for index in {model.layers, 1}:
        yield Memory(
            "a layer",
            activations=kept * index + t * c * model.hidden,
            working=_layer_work(model, setting),
            logits=0,
            buffers=2 * copies * c * layer + bucket,
            **shards,
        )
