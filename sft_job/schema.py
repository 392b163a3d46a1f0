"""The job file's keys: what may be given, its unit, its default and what null means.

Nothing is rewritten after validation; what is derived from these values is in `plan.py`.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _not_a_bool(value: Any) -> Any:
    """YAML reads `yes` and `on` as true, and Python takes true for 1."""
    if isinstance(value, bool):
        raise ValueError(f"input should be a number, not {value}")
    return value


Text = Annotated[str, Field(min_length=1)]
Whole = Annotated[int, BeforeValidator(_not_a_bool)]
Seconds = Annotated[Whole, Field(ge=1, le=10**6)]
Number = Annotated[float, BeforeValidator(_not_a_bool)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class LinearRope(Section):
    type: Literal["linear"]
    factor: Number = Field(ge=1)
    """Positions are divided by this factor; the context grows by it."""


class Model(Section):
    path: Text
    """Hub id, local folder, or bundled:smollm2-135m."""
    revision: str | None = None
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
    train: Annotated[list[str], Field(min_length=1)]
    """Files and globs, ShareGPT or messages form, .json or .jsonl."""
    template: Literal["vicuna"] = "vicuna"
    """How a conversation becomes text."""
    seq_len: Whole = Field(2048, ge=8)
    """Longest sample in tokens; with batching: rows also the length of a row."""
    batching: Literal["conversations", "rows"] = "conversations"
    """What global_batch_size counts: conversations (the published recipe) or packed rows of
    seq_len tokens (fixed shapes, most tokens per step)."""
    preprocess: Literal["cached", "lazy"] = "cached"
    """cached tokenises everything once before the start; lazy tokenises each step as it comes."""
    overlong: Literal["truncate", "split", "drop", "error"] = "truncate"
    """What happens to a conversation of more than seq_len tokens."""
    cache_dir: Text | None = None
    """Token cache and converted weights; null means .sft_job_cache beside run.dir."""

    def files(self) -> list[Path]:
        """The files of `train`, each once, in the order given."""
        return list(dict.fromkeys(path for pattern in self.train for path in expand(pattern)))


class Train(Section):
    global_batch_size: Whole = Field(128, ge=1)
    """Conversations (or rows) per optimizer step, over all ranks and micro-batches."""
    micro_batch_tokens: Annotated[Whole, Field(ge=8)] | Literal["auto"] = 16384
    """At most so many tokens per rank and forward: the memory knob. Does not change the result.
    auto takes what the plan says is fastest and fits."""
    num_train_epochs: Whole = Field(3, ge=1)
    max_steps: Whole | None = Field(None, ge=1)
    """Stop after so many optimizer steps instead of after num_train_epochs."""
    learning_rate: Number = Field(2e-5, gt=0)
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = "cosine"
    warmup_ratio: Number = Field(0.03, ge=0, le=1)
    """Share of all steps over which the learning rate rises from 0."""
    weight_decay: Number = Field(0.0, ge=0)
    max_grad_norm: Number = Field(1.0, ge=0)
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
    seed: Whole = Field(0, ge=0)
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further Hugging Face TrainingArguments by name."""


class Fsdp(Section):
    type: Literal["fsdp"]


class Zero3(Section):
    type: Literal["zero3"]
    offload: Literal["none", "cpu"] = "none"
    """cpu keeps masters and Adam's state in host memory and steps there (DeepSpeed's CPU Adam)."""
    stage3_max_live_parameters: Whole | None = Field(None, ge=0)
    """Gathered parameters kept at a time; null derives it from the model's layers, 0 frees at
    once."""
    stage3_max_reuse_distance: Whole | None = Field(None, ge=0)
    """A parameter needed again within so many elements is not freed; null as above."""
    stage3_param_persistence_threshold: Whole | None = Field(None, ge=0)
    """Parameters smaller than this stay whole on every rank; null as above."""


class Checkpoint(Section):
    every_steps: Whole = Field(200, ge=1)
    """Optimizer steps between two checkpoints; the last step is always saved."""
    keep: Whole | None = Field(None, ge=1)
    """Keep only the newest so many checkpoints; null deletes nothing."""


class Logging(Section):
    every_steps: Whole = Field(1, ge=1)
    """Optimizer steps between two records."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(default_factory=list)
    """Handed to the Trainer's own integrations."""


class Run(Section):
    dir: Text
    """The run directory: configuration, logs, checkpoints, exported model."""
    processes: Whole | None = Field(None, ge=1)
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
    image: Text
    """A .sif file or an unpacked image, there on every compute node."""
    bind: list[Text] = Field(default_factory=list)
    """Further files and folders to be seen inside, at the same place. Data, model, caches and the
    run directory are seen anyway; the home folder is not."""
    python: Text = "python3"
    """The interpreter inside the image that has this package."""


class Pyxis(Section):
    type: Literal["pyxis"]
    image: Text
    """A .sqsh file or a registry address, as `srun --container-image` takes it."""
    bind: list[Text] = Field(default_factory=list)
    """As for Apptainer."""
    python: Text = "python3"
    """As for Apptainer."""


class Slurm(Section):
    """What `sft-job submit` asks for. One task is started for each GPU."""

    nodes: Whole = Field(1, ge=1)
    """Machines; all take part in the same training."""
    gpus_per_node: Whole = Field(ge=0)
    """0 on clusters without GPUs; run.processes then says how many tasks a node has."""
    gpu: Text | None = None
    """The GPU as `sft-job plan --gpu` knows it, e.g. a100-80; the plan must fit it before anything
    is queued. null: not checked."""
    gres: Text | None = None
    """For sites without --gpus-per-node: e.g. gpu:a100:4, with the same number."""
    time_min: Whole = Field(1440, ge=1)
    """Time limit of one attempt; a job that is not done by then saves itself and is requeued."""
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
    cpus_per_task: Whole | None = Field(None, ge=1)
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
    engine: Annotated[Fsdp | Zero3, Field(discriminator="type")] = Fsdp(type="fsdp")
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


def expand(pattern: str) -> list[Path]:
    """The files of one entry of `data.train`, sorted."""
    if Path(pattern).is_file():
        return [Path(pattern)]
    return sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
