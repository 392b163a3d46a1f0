"""The Hugging Face Trainer, with one step done our way.

To the Trainer, one batch is one optimizer step of this rank: a list of micro-batches. It
keeps the loop, clipping, optimizer, schedule and integrations; accumulation and the scale of
the loss are ours, because only here the number of supervised tokens of the whole step is
known. `tests/test_contract.py` probes what is relied on of its private behaviour.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from sft_job import checkpoint, extras, fsdp, identity, loss, rates, selftest, varlen, zero3
from sft_job.attempt import Attempt
from sft_job.attention import KERNELS
from sft_job.cli import StopRequest
from sft_job.dataset import StepBatch, Steps
from sft_job.errors import TrainingError
from sft_job.files import write_atomically
from sft_job.metrics import Meter, Reporter, Tracker, peak_memory_gib
from sft_job.plan import Plan, lost_lines
from sft_job.prepared import Prepared
from sft_job.rundir import RunDir
from sft_job.schema import JobConfig, Zero3
from sft_job.world import World

# So many steps without any gradient are no accident.
STILL_STEPS = 5


def training_arguments(
    config: JobConfig, plan: Plan, run_dir: RunDir, world: World
) -> TrainingArguments:
    """The Trainer's arguments for a plan; `extras` has checked those of the job file."""
    train = config.train
    engine: dict[str, Any] = {}
    if config.engine.type == "zero3":
        # The precision must be said here as well: the integration compares it with DeepSpeed's
        # own section. Under FSDP2 it would add autocast to a model that already casts by itself.
        engine = {
            "deepspeed": zero3.settings(config, plan),
            "bf16": plan.precision.value == "bf16",
            "fp16": plan.precision.value == "fp16",
        }
    return TrainingArguments(
        output_dir=str(run_dir.path),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=plan.steps or -1,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=plan.warmup_steps or 0,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        logging_steps=config.logging.every_steps,
        logging_nan_inf_filter=False,  # it would log a NaN as the mean of the losses so far
        report_to=list(config.logging.report_to) or "none",
        save_strategy="no",  # `Steering` decides when, `_save_checkpoint` how
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=world.device.type == "cpu",
        **{"optim": extras.ADAM[0], **extras.arguments(train.extra)},
        **engine,
    )


class SftTrainer(Trainer):
    """A Trainer whose batch is a whole step of this rank."""

    lr_scheduler: Any

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        config: JobConfig,
        plan: Plan,
        steps: Steps,
        world: World,
        attempt: Attempt,
        stop: StopRequest,
        reporter: Reporter,
        meter: Meter,
        started: Callable[[str], None],
        prepared: Prepared,
    ) -> None:
        """
        Args:
            started: called with the name of each part of the start when it has ended.
        """
        self.config, self.plan, self.steps, self.world = config, plan, steps, world
        self.attempt, self.run_dir = attempt, attempt.run_dir
        self.stop, self.reporter = stop, reporter
        self.prepared = prepared
        self.meter, self.started = meter, started
        self.peak_gib = 0.0
        self.last_saved: int | None = None
        self.loading = False
        """While something is read from a checkpoint: what fails then is its fault."""
        self._samples: list[int] = []
        self._said_lost = 0
        self._still = 0
        super().__init__(
            model=model,
            args=args,
            train_dataset=steps,
            callbacks=[Steering(self)],
            optimizer_cls_and_kwargs=self._offloaded_optimizer(args),
        )
        self.remove_callback(PrinterCallback)  # the reporter says it
        # Trackers begin with the training; the Trainer makes them from report_to.
        self.callback_handler.callbacks = [
            Tracker(one, reporter.say) if ".integrations." in type(one).__module__ else one
            for one in self.callback_handler.callbacks
        ]

    @property
    def _is_zero3(self) -> bool:
        return self.config.engine.type == "zero3"

    @property
    def _offloads(self) -> bool:
        return isinstance(self.config.engine, Zero3) and self.config.engine.offload == "cpu"

    def _offloaded_optimizer(self, args: TrainingArguments) -> tuple[Any, dict[str, Any]] | None:
        """DeepSpeed's CPU Adam where the optimizer is offloaded, else None: the Trainer's own."""
        if not self._offloads:
            return None
        self.reporter.say(
            "loading DeepSpeed's CPU Adam; the first use on a machine compiles it, a minute or so"
        )
        return zero3.cpu_adam(), {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            "adamw_mode": True,
        }

    def create_accelerator_and_postprocess(self) -> None:
        """Under FSDP2 the loss scaler is ours: accelerate's comes with autocast."""
        super().create_accelerator_and_postprocess()
        if self._is_zero3:
            return
        # Nothing wraps this model; accelerate imports DeepSpeed to find that out, 0.6 s.
        self.accelerator.unwrap_model = lambda model, *args, **kwargs: model
        if self._scales_loss:
            self.accelerator.scaler = torch.amp.GradScaler(
                self.args.device.type,
                init_scale=loss.LossScale.initial,
                growth_interval=loss.LossScale.window,
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """A fused optimizer would leave out an overflowed step inside its kernel: accelerate and
        with it the learning rate's schedule would take the step for done."""
        optimizer = super().create_optimizer(model)
        optimizer._step_supports_amp_scaling = False
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The rates that the plan has looked at: Hugging Face's warm-up would begin with 0."""
        if self.lr_scheduler is None:
            share = rates.schedule(self.config, num_training_steps)
            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, share)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    @property
    def _scales_loss(self) -> bool:
        return self.plan.precision.value == "fp16"

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by before the backward pass."""
        if self._is_zero3:
            return float(self.model_wrapped.optimizer.cur_scale)
        return float(self.accelerator.scaler.get_scale())

    @property
    def overflows(self) -> int:
        """Steps that were left out so far; the schedule goes on only at those that were not."""
        return int(self.state.global_step - self.lr_scheduler.last_epoch)

    # --- data ------------------------------------------------------------------------

    def get_train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        """A plain loader: the dataset already is this rank's share, so nothing may be sharded
        again. batch_size=1 and not None, because skipping steps on resume needs a sampler."""
        return torch.utils.data.DataLoader(
            self.steps, batch_size=1, shuffle=False, collate_fn=_only_one
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """The step carries its own number of supervised tokens; nothing has to be counted."""
        asked = time.perf_counter()
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        self.meter.wait(time.perf_counter() - asked)
        return batches, None

    def floating_point_ops(self, inputs: Any) -> int:
        """The Trainer estimates 6 x parameters x tokens of padded batches; not used."""
        return 0

    # --- one step --------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: StepBatch, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Forward and backward over the step's micro-batches.

        The loss of a step is the sum over its supervised tokens / their number, over all
        ranks. Engines average gradients over ranks, hence the factor `world.size`.

        Returns:
            The loss of the whole step, equal on all ranks.
        """
        model.train()
        self._samples = inputs.samples
        count = max(inputs.supervised_tokens, 1)
        total = torch.zeros((), device=self.args.device)
        last = len(inputs.micro_batches) - 1
        # All at once, while nothing computes: a copy to a GPU may wait for what was queued.
        placed = [self._prepare_inputs(micro_batch) for micro_batch in inputs.micro_batches]
        for index, micro_batch in enumerate(placed):
            loss_sum = model(**micro_batch)["loss"]
            total += loss_sum.detach()
            if index == last:
                # Before the last backward pass: under ZeRO-3 that one takes the step as well.
                step_loss = self.world.sum([float(total)])[0] / count
                self._refuse_non_finite("loss", step_loss)
            # Gradients of every micro-batch are reduced at once, so that they stay sharded.
            # DeepSpeed reads from this flag whether to step.
            self.accelerator.gradient_state._set_sync_gradients(index == last)
            self.accelerator.backward(loss_sum * (self.world.size / count))
        if self._scales_loss and not self._is_zero3:
            # Clipped and recorded at their true size.
            self.accelerator.scaler.unscale_(_bare(self.optimizer))
        self.meter.add(inputs.tokens, inputs.squares, inputs.supervised_tokens, inputs.idle_share)
        return torch.tensor(step_loss, device=self.args.device)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        """The global norm as a number; FSDP2's is a DTensor that knows only its shard."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        value = float(norm)
        if not self._scales_loss:  # else the step is left out and the scale halved
            self._refuse_non_finite("gradient norm", value)
        self._refuse_stillness(value)
        return value

    def _refuse_stillness(self, norm: float) -> None:
        """A gradient of exactly 0 trains nothing, and the next one is no different.

        Raises:
            TrainingError: after STILL_STEPS of them in a row.
        """
        self._still = self._still + 1 if norm == 0 else 0
        if self._still == 1:
            self.reporter.say(
                f"note: the gradient of step {self.state.global_step + 1} is exactly 0: "
                "nothing is learnt from it"
            )
        if self._still >= STILL_STEPS:
            raise self._failure(
                f"the gradient was exactly 0 in {STILL_STEPS} steps in a row, the last of them "
                f"{self.state.global_step + 1}: nothing is learnt. Activations or weights are too "
                f"large or too small for {self.plan.precision.value}, or every answer is known by "
                "heart"
            )

    def refuse_lasting_overflow(self) -> None:
        """Called after every step in fp16: one that overflowed has halved the scale.

        Raises:
            TrainingError: it overflowed at the least scale, so that no scale will do.
        """
        if self.loss_scale < loss.LossScale.least:
            raise self._failure(
                f"fp16 overflows at step {self.state.global_step} even at a loss scale of "
                f"{loss.LossScale.least:g}"
            )

    def _refuse_non_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            step = self.state.global_step + 1
            raise self._failure(
                f"the {what} of step {step} is {value}; the step was not taken further"
            )

    def _failure(self, what: str) -> TrainingError:
        names = self.steps.cache.sources(self._samples)
        saved = "no checkpoint has been saved yet"
        if self.last_saved:
            saved = (
                f"the last checkpoint, of step {self.last_saved}, is whole, but was not looked at "
                "for what went wrong here"
            )
        unfit = (
            "the model may not fit fp16, as happens to models trained in bf16: use GPUs that have "
            "bf16, or train.precision=fp32; else "
        )
        return TrainingError(
            f"{what}. Its conversations:\n  " + "\n  ".join(names[:20]),
            where=str(self.run_dir.path),
            remedy=(unfit if self._scales_loss else "")
            + f"look at these conversations, or lower train.learning_rate; {saved}",
        )

    # --- saving and resuming ---------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Published whole instead of written in place."""
        step = self.state.global_step

        def write(folder: Path) -> None:
            if self._is_zero3:
                zero3.save(self.model_wrapped, folder)
            else:
                fsdp.save(self.model, _bare(self.optimizer), folder)
            self._save_rng_state(str(folder))
            self._save_scaler(str(folder))  # FSDP2's, read again by the Trainer itself
            if self.world.is_main:
                torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")
                self.state.log_history.clear()  # metrics.jsonl has it
                self.state.save_to_json(str(folder / "trainer_state.json"))

        began = time.monotonic()
        ours = checkpoint.publish(
            self.attempt,
            step,
            write,
            self.world,
            engine=self.config.engine.type,
            data=self.steps.schedule.fingerprint,
            weights=identity.weights(self.prepared),
            needed_bytes=self.plan.checkpoint_bytes,
        )
        self.last_saved = step
        if not ours:
            self.reporter.say(f"another attempt has saved step {step} already; it verifies")
        if self.world.is_main:  # a job script keeps twice that before the end of its time
            seconds = math.ceil(time.monotonic() - began)
            with contextlib.suppress(OSError):  # the disk may be full now; the script has a least
                write_atomically(self.run_dir.save_seconds, f"{seconds}\n")
        if self.world.is_main:
            checkpoint.drop_old(self.attempt, self.config.checkpoint.keep, step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Called before the optimizer exists; `_load_optimizer_and_scheduler` loads both."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if self._is_zero3:  # loaded with the model by the Trainer's integration
            zero3.check_loaded(self.model_wrapped, self.plan, offload=self._offloads)
        else:
            fsdp.restore(self.model, _bare(self.optimizer), folder)
        state = torch.load(folder / "scheduler.pt", weights_only=True)
        self.lr_scheduler.load_state_dict(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The last that is read of a checkpoint, after training has begun for the Trainer."""
        before, self.loading = self.loading, checkpoint is not None
        super()._load_rng_state(checkpoint)
        self.loading = before

    def _load_scaler(self, checkpoint: str | None) -> None:
        """`precision: auto` may go on in another precision than fp16, on another GPU."""
        if self.accelerator.scaler is not None:
            super()._load_scaler(checkpoint)

    # --- reporting -------------------------------------------------------------------

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add our figures to what every integration gets, and write metrics.jsonl."""
        # The Trainer sees the whole run as one epoch.
        self.state.epoch = self.steps.schedule.epoch(self.state.global_step)
        if "loss" in logs:
            logs |= self.meter.take() | {"peak_memory_gib": round(self.peak_gib, 3)}
            if self._scales_loss:
                logs |= {"loss_scale": self.loss_scale, "overflows": self.overflows}
            record = {"step": self.state.global_step, **logs, "epoch": round(self.state.epoch, 4)}
            if not math.isfinite(logs["grad_norm"]):  # overflowed
                record["grad_norm"] = None  # JSON has no infinity
                del logs["grad_norm"]  # and the integrations draw numbers only
            self.reporter.record(record, self.state.max_steps)
            self._say_lost()
        super().log(logs, start_time)

    def _say_lost(self) -> None:
        """With preprocess: lazy, losses of tokens are known only as they come."""
        lost = sum(self.steps.lost.values())
        if lost > self._said_lost:
            self._said_lost = lost
            self.reporter.say("\n".join(["not trained on so far:", *lost_lines(self.steps.lost)]))


class Steering(TrainerCallback):
    """Decides after every step, on all ranks alike, whether to save and whether to stop."""

    def __init__(self, trainer: SftTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        trainer.loading = False
        trainer.world.timeouts.apply()  # to the groups of the engine as well
        trainer.started("engine")
        fresh = state.global_step == 0
        if fresh and trainer._is_zero3 and trainer.plan.precision.value != "fp32":
            zero3.restore_masters(
                trainer.model, Path(trainer.prepared.model_folder), trainer.plan, trainer.world
            )
        kernel = trainer.plan.attention.value
        selftest.run(
            trainer.model_wrapped,
            vocabulary=trainer.model.config.vocab_size,
            precision=trainer.plan.precision.value,
            kernel=kernel,
            packs=KERNELS[kernel].packs,
            place=trainer._prepare_inputs,
            lengths=selftest.lengths(args.device.type, trainer.plan.window),
            own_attention=lambda: varlen.own_attention(trainer.model),
        )
        trainer.started("self-test")
        trainer.meter.reset()  # the time so far belongs to no step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        if trainer._scales_loss:
            trainer.refuse_lasting_overflow()
        peak = peak_memory_gib(trainer.args.device)
        # Not only at saves: another attempt may have taken over long before the next one.
        newer = trainer.world.is_main and trainer.attempt.superseded_by() is not None
        stop, trainer.peak_gib, superseded = trainer.world.max(
            [float(trainer.stop.requested()), peak, float(newer)]
        )
        if superseded:
            trainer.world.on_main(trainer.attempt.refuse_if_superseded)
        trainer.started("first step")
        done = state.global_step >= state.max_steps
        due = state.global_step % trainer.config.checkpoint.every_steps == 0
        if stop or due or done:
            control.should_save = True
        if stop and not done:
            control.should_training_stop = True


def _only_one(batch: list[Any]) -> Any:
    return batch[0]


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrapper."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


FullParameters = Callable[[PreTrainedModel], Iterator[tuple[str, torch.Tensor]]]


def full_parameters(config: JobConfig) -> FullParameters:
    return zero3.full_parameters if config.engine.type == "zero3" else fsdp.full_parameters
