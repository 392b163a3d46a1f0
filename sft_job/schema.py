"""The job file's keys: what may be given, its unit, its default and what null means.

Nothing is rewritten after validation; what is derived from these values is in `plan.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from sft_job.paths import expand
from sft_job.yamltext import number


def _written(kind: str) -> BeforeValidator:
    """Reads a number that is written as text, in one way only (`yamltext.number`).

    Args:
        kind: as the message has it, "integer" or "number".
    """

    def read(value: Any) -> Any:
        if isinstance(value, bool):  # Python takes true for 1
            raise ValueError(f"input should be a number, not {value}")
        if not isinstance(value, str):
            return value
        try:
            found = number(value)
        except ValueError as error:
            why = f": {error}" if str(error) else ""
            raise ValueError(f"input should be a valid {kind}, not {shown(value)}{why}") from error
        whole = kind == "integer" and isinstance(found, float) and found.is_integer()
        return int(found) if whole else found  # 1e3

    return BeforeValidator(read)


def shown(value: Any) -> str:
    """A value in a message: numbers and switches without quotes, and never a whole page."""
    if isinstance(value, str):
        try:
            number(value)
            return value
        except ValueError:
            text = value if value in ("true", "false") else repr(value)
    elif isinstance(value, list):
        text = f"[{', '.join(shown(item) for item in value[:9])}]"
    else:
        text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text):,} characters)"


_SLURM_TIME = re.compile(
    r"(?P<m>\d{1,6}):(?P<s>[0-5]?\d)"
    r"|(?P<h>\d{1,6}):(?P<hm>[0-5]?\d):(?P<hs>[0-5]?\d)"
    r"|(?P<d>\d{1,6})-(?P<dh>\d\d?)(:(?P<dm>[0-5]?\d)(:(?P<ds>[0-5]?\d))?)?",
    re.ASCII,
)


def _minutes(value: Any) -> Any:
    """A time as Slurm writes it, in minutes, rounded up."""
    if not isinstance(value, str) or not re.search(
        "[:-]|infinite|unlimited", value.strip()[1:], re.I
    ):
        return value
    match = _SLURM_TIME.fullmatch(value.strip())
    if match is None:
        raise ValueError(
            f"{shown(value)} is not a time: write minutes, or as Slurm minutes:seconds, "
            "hours:minutes:seconds, days-hours, days-hours:minutes or days-hours:minutes:seconds"
        )
    part = {name: int(digits) for name, digits in match.groupdict(default="0").items()}
    minutes = part["m"] + part["hm"] + part["dm"]
    minutes += 60 * (part["h"] + part["dh"] + 24 * part["d"])
    return minutes + (part["s"] + part["hs"] + part["ds"] > 0)


Text = Annotated[str, Field(min_length=1, max_length=4096)]
PathText = Annotated[str, Field(min_length=1)]  # `paths` says how long
Whole = Annotated[int, _written("integer")]
Number = Annotated[float, _written("number")]
Seconds = Annotated[Whole, Field(ge=1, le=10**6)]
Minutes = Annotated[Whole, BeforeValidator(_minutes)]


# At one step a second, four months: what a slip of the keyboard does not stay below. Bounds of
# other numbers are in the same spirit: wide, and such that nothing overflows.
MOST_STEPS = 10**7
MOST_PROCESSES = 2**17


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class LinearRope(Section):
    type: Literal["linear"]
    factor: Number = Field(ge=1, le=1000)
    """Positions are divided by this factor; the context grows by it."""


class Model(Section):
    path: PathText
    """Hub id, local folder, or bundled:smollm2-135m."""
    revision: Text | None = None
    """Branch, tag or commit of a hub model; null means the default branch."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: such models are refused."""
    rope: Literal["auto", "none"] | LinearRope = "auto"
    """auto scales positions linearly by ceil(seq_len / native context) when the native
    context is too short, as the published Vicuna-16k recipe did."""
    attention: Literal[
        "auto",
        "flash_attention_3",
        "flash_attention_2",
        "torch_varlen",
        "xformers",
        "sdpa",
        "own",
    ] = "auto"
    """The attention kernel; auto takes the best one that the GPU and the installed packages
    have. own is the model's own attention, one sample per forward pass."""
    cross_entropy: Literal["auto", "torch", "liger"] = "auto"
    """What computes the loss from hidden states; auto takes Liger's kernel on GPUs that run
    Triton (capability 8.0 and newer) where it is installed, but not in fp16."""

    @property
    def on_hub(self) -> bool:
        return not self.path.startswith("bundled:") and not Path(self.path).is_absolute()


class Data(Section):
    train: Annotated[list[PathText], Field(min_length=1)]
    """Files and globs, ShareGPT or messages form, .json or .jsonl."""
    template: Literal["vicuna"] = "vicuna"
    """How a conversation becomes text."""
    seq_len: Whole = Field(2048, ge=8, le=2**24)
    """Longest sample in tokens; with batching: rows also the length of a row."""
    batching: Literal["conversations", "rows"] = "conversations"
    """What global_batch_size counts: conversations (the published recipe) or packed rows of
    seq_len tokens (fixed shapes, most tokens per step)."""
    preprocess: Literal["cached", "lazy"] = "cached"
    """cached tokenises everything once before the start; lazy tokenises each step as it comes."""
    overlong: Literal["truncate", "split", "drop", "error"] = "truncate"
    """What happens to a conversation of more than seq_len tokens."""
    cache_dir: PathText | None = None
    """Token cache and converted weights; null means .sft_job_cache beside run.dir."""

    def files(self) -> list[Path]:
        """The files of `train`, each once, in the order given."""
        return list(dict.fromkeys(path for pattern in self.train for path in expand(pattern)))


class Train(Section):
    global_batch_size: Whole = Field(128, ge=1, le=10**6)
    """Conversations (or rows) per optimizer step, over all ranks and micro-batches."""
    micro_batch_tokens: Annotated[Whole, Field(ge=8, le=2**28)] | Literal["auto"] = 16384
    """At most so many tokens per rank and forward: the memory knob. Does not change the result.
    auto takes what the plan says is fastest and fits."""
    num_train_epochs: Whole = Field(3, ge=1, le=10_000)
    max_steps: Whole | None = Field(None, ge=1, le=MOST_STEPS)
    """Stop after so many optimizer steps instead of after num_train_epochs."""
    learning_rate: Number = Field(2e-5, gt=0, le=1)
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = "cosine"
    warmup_ratio: Number = Field(0.03, ge=0, le=1)
    """Share of all steps over which the learning rate rises, never the last one. Step i of w such
    steps has (i + 1) / (w + 1) of learning_rate: from 0 on, as in Hugging Face's schedules, the
    first step of every run would change nothing."""
    weight_decay: Number = Field(0.0, ge=0, le=100)
    max_grad_norm: Number = Field(1.0, ge=0, le=10**9)
    """Gradients are scaled down to this global norm; 0 never scales."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """dtype of the computation; master weights and reductions are always fp32. auto is bf16
    where the hardware computes in it, fp16 with dynamic loss scaling on older GPUs, fp32 on
    other CPUs."""
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """full recomputes every decoder layer in the backward pass: about a quarter more time,
    least memory. selective keeps the results of attention and of as many matrix products as
    there is room for, and recomputes the rest. auto takes the least recomputation that the
    plan says fits."""
    deterministic: bool = False
    """Refuse kernels whose result depends on the order of execution."""
    seed: Whole = Field(0, ge=0, lt=2**32)
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further Hugging Face TrainingArguments by name; `extras` says which."""


class Fsdp(Section):
    type: Literal["fsdp"]


class Zero3(Section):
    type: Literal["zero3"]
    offload: Literal["none", "cpu"] = "none"
    """cpu keeps masters and Adam's state in host memory and steps there (DeepSpeed's CPU Adam)."""
    stage3_max_live_parameters: Whole | None = Field(None, ge=0, le=10**15)
    """Gathered parameters kept at a time; null derives it from the model's layers, 0 frees at
    once."""
    stage3_max_reuse_distance: Whole | None = Field(None, ge=0, le=10**15)
    """A parameter needed again within so many elements is not freed; null as above."""
    stage3_param_persistence_threshold: Whole | None = Field(None, ge=0, le=10**15)
    """Parameters smaller than this stay whole on every rank; null as above."""


Engine = Annotated[Fsdp | Zero3, Field(discriminator="type")]


class Checkpoint(Section):
    every_steps: Whole = Field(200, ge=1, le=MOST_STEPS)
    """Optimizer steps between two checkpoints; the last step is always saved."""
    keep: Whole | None = Field(None, ge=1, le=MOST_STEPS)
    """Keep only the newest so many checkpoints; null deletes nothing."""


class Logging(Section):
    every_steps: Whole = Field(1, ge=1, le=MOST_STEPS)
    """Optimizer steps between two records."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(default_factory=list)
    """Handed to the Trainer's own integrations."""


class Run(Section):
    dir: PathText
    """The run directory: configuration, logs, checkpoints, exported model."""
    processes: Whole | None = Field(None, ge=1, le=1024)
    """Training processes on this machine; null means one per GPU, or one on a CPU."""
    online: bool = False
    """May fetch from the model hub. Compute nodes usually cannot."""
    start_timeout_s: Seconds = 300
    """How long the processes may take to find each other; then the missing ones are named."""
    nccl_timeout_s: Seconds = 600
    """A rank waits so long for another in an exchange between GPUs before the job fails: what a
    GPU or a link that has dropped out costs. Longer than the slowest step, the writing of 5 GB of
    the exported model, and the first compilation of kernels."""
    gloo_timeout_s: Seconds = 1800
    """The same between hosts, where ranks also wait for one that converts, saves or verifies: a
    70B model on a slow file system may need more. On CPUs it is the limit of every exchange."""


class Apptainer(Section):
    type: Literal["apptainer"]
    image: PathText
    """A .sif file or an unpacked image, there on every compute node."""
    bind: list[PathText] = Field(default_factory=list)
    """Further files and folders to be seen inside, at the same place. Data, model, caches and the
    run directory are seen anyway; the home folder is not."""
    python: PathText = "python3"
    """The interpreter inside the image that has this package."""


class Pyxis(Section):
    type: Literal["pyxis"]
    image: PathText
    """A .sqsh file or a registry address, as `srun --container-image` takes it."""
    bind: list[PathText] = Field(default_factory=list)
    """As for Apptainer."""
    python: PathText = "python3"
    """As for Apptainer."""


class Slurm(Section):
    """What `sft-job submit` asks for. One task is started for each GPU."""

    nodes: Whole = Field(1, ge=1, le=16_384)
    """Machines; all take part in the same training."""
    gpus_per_node: Whole = Field(ge=0, le=64)
    """0 on clusters without GPUs; run.processes then says how many tasks a node has."""
    gpu: Text | None = None
    """The GPU as `sft-job plan --gpu` knows it, e.g. a100-80; the plan must fit it before anything
    is queued. null: not checked."""
    gres: Text | None = None
    """For sites without --gpus-per-node: e.g. gpu:a100:4, with the same number."""
    time_min: Minutes = Field(1440, ge=1, le=10**6)
    """Time limit of one attempt, in minutes or as Slurm writes times (24:00:00, 1-12); a job that
    is not done by then saves itself and is requeued."""
    grace_s: Whole | None = Field(None, ge=1, le=65535)
    """At least so many seconds before its end a job saves itself; null takes what the plan
    expects, 120 or more. Twice what the last save took is kept in any case."""
    partition: Text | None = None
    """As sbatch --partition; null is the site's own."""
    account: Text | None = None
    """As sbatch --account; null is the site's own."""
    qos: Text | None = None
    """As sbatch --qos; null is the site's own."""
    constraint: Text | None = None
    """As sbatch --constraint; null is the site's own."""
    reservation: Text | None = None
    """As sbatch --reservation; null is the site's own."""
    comment: Text | None = None
    """As sbatch --comment; null is the site's own."""
    exclusive: bool = True
    """Whole nodes, with all their processors and memory."""
    cpus_per_task: Whole | None = Field(None, ge=1, le=4096)
    """null shares the node's processors among its tasks."""
    requeue: bool = True
    """Go on by itself after preemption, a time limit or a lost node, until the job is done."""
    setup: list[Text] = Field(default_factory=list)
    """Shell lines before anything else, as `module load apptainer`."""
    extra: dict[str, Text | int | bool] = Field(default_factory=dict)
    """Further sbatch options by their long names; true for those without a value."""

    def tasks_per_node(self, run: Run) -> int:
        return self.gpus_per_node or run.processes or 1


class JobConfig(Section):
    """One training job. Precedence: defaults < job file < overrides."""

    model: Model
    data: Data
    train: Train = Field(default_factory=Train)
    engine: Engine = Fsdp(type="fsdp")
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    logging: Logging = Field(default_factory=Logging)
    run: Run
    container: Annotated[Apptainer | Pyxis, Field(discriminator="type")] | None = None
    """Where the processes of a submitted job run; null is this very Python."""
    slurm: Slurm | None = None
    """Needed by `sft-job submit` alone."""

    @property
    def cache_dir(self) -> Path:
        if self.data.cache_dir is not None:
            return Path(self.data.cache_dir)
        return Path(self.run.dir).parent / ".sft_job_cache"

    def identity(self) -> dict[str, Any]:
        """The values that decide which numbers come out, by dotted key.

        A run directory is resumed only by a job with the same identity. Left out: how much
        is done at a time, how often something is written, how many processes share the work,
        and where data and model are: those are known by their content (`identity.py`).
        """
        given = self.model_dump(mode="json")
        for section in ("checkpoint", "logging", "run", "container", "slurm"):
            del given[section]
        for key in ("micro_batch_tokens", "activation_checkpointing"):
            del given["train"][key]
        for key in ("cache_dir", "train"):
            del given["data"][key]
        for key in ("path", "revision"):
            del given["model"][key]
        given["engine"] = {"type": self.engine.type}
        return dict(_flatten(given))


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
