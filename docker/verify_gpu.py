#!/usr/bin/env python3
"""What an image does on the GPUs of this machine: run inside it by docker/verify-gpu.sh.

    python docker/verify_gpu.py [--scratch DIR] [--shape SHAPE] [CHECK...]

Each check is a process of its own, since a GPU that has failed once fails in everything after.
Prints their output, then a table; ends with 1 if one of them failed. Needs tests/ and benchmarks/
beside its own folder; sft_job itself is the image's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS = 3
TIMEOUT_S = 7200
# GiB of all GPUs together that training the benchmark's 1b shape takes, and its head.
ROOM_FOR_1B = 32.0
RUNS = {
    "fsdp": ["engine.type=fsdp"],
    "zero3": ["engine.type=zero3"],
    "zero3-offload": ["engine.type=zero3", "engine.offload=cpu"],
}


# --- the checks, each in its own process --------------------------------------------------


def gpus(_: argparse.Namespace) -> int:
    """What is here, and that this image is for it and torch can use it."""
    import torch

    from sft_job import hardware, world
    from sft_job.errors import HardwareError

    found = hardware.detect_for_training()
    if found.device == "cpu":
        raise HardwareError(
            "there is no GPU", remedy="run this on the machine whose GPUs it is about"
        )
    print(f"{found.count} x {found.name}, driver {found.driver}, {found.interconnect or 'one GPU'}")
    if not torch.cuda.is_available():
        raise hardware.unusable(found, torch.__version__, torch.version.cuda)
    world._refuse_missing_code(found.capability or (0, 0), torch.cuda.get_arch_list())
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_arch_list()}")
    return 0


def ops(_: argparse.Namespace) -> int:
    """DeepSpeed's own optimizers against torch's, on the GPU and on the host."""
    import torch
    from deepspeed.ops.adam import FusedAdam

    from sft_job import zero3

    kinds = [torch.float32, torch.float16]
    if torch.cuda.get_device_capability() >= (8, 0):
        kinds.append(torch.bfloat16)
    cases = [("FusedAdam", FusedAdam, "cuda", kind) for kind in kinds]
    cases.append(("CPUAdam", zero3.cpu_adam(), "cpu", torch.float32))
    wrong = 0
    for name, optimizer, device, kind in cases:
        difference = adam_difference(optimizer, device, kind)
        wrong += not difference <= 1
        verdict = "ok   " if difference <= 1 else "WRONG"
        print(f"{verdict} {name} {kind}: differs from AdamW by {difference:.2f} of its rounding")
    return int(wrong > 0)


def adam_difference(optimizer: Any, device: str, kind: Any) -> float:
    """Of parameters after some steps, from torch's AdamW in fp32; in units of 8 eps of `kind`."""
    import torch

    # Steps and gradients so large that they are seen in bf16, and no square vanishes in fp16.
    settings = {"lr": 0.1, "weight_decay": 0.1}
    values = torch.linspace(-1, 1, 5000, device=device).to(kind)
    ours, exact = (torch.nn.Parameter(v) for v in (values.clone(), values.float()))
    first, second = optimizer([ours], **settings), torch.optim.AdamW([exact], **settings)
    for step in range(STEPS):
        gradient = (0.5 + 0.25 * torch.sin(9 * values.float() + step)).to(kind)
        ours.grad, exact.grad = gradient.clone(), gradient.float()
        first.step()
        second.step()
    difference = float((ours.detach().float() - exact.detach()).abs().max())
    return difference / (8 * torch.finfo(kind).eps)


def train(engine: str) -> Callable[[argparse.Namespace], int]:
    def check(args: argparse.Namespace) -> int:
        """A small model from job file to exported model; what its metrics say."""
        from tests import runs

        folder = args.scratch / engine
        folder.mkdir(parents=True)
        shape = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 512}
        model = runs.make_model(folder / "model", **shape)
        data = runs.make_conversations(folder / "data.json", 16 * STEPS)
        auto = {"train.precision": "auto", "train.activation_checkpointing": "auto"}
        job = runs.make_job(folder, model, data, **{"train.max_steps": STEPS}, **auto)
        # In the words of a user: the image's own command.
        command = ["sft-job", "train", str(job), *RUNS[engine]]
        code = subprocess.run(command, cwd=folder).returncode
        if code:
            return code
        records = runs.metrics(runs.RunDir(folder / "run"))
        losses = [record["loss"] for record in records]
        print(f"losses {losses}, MFU {[record['mfu'] for record in records]}")
        if len(losses) != STEPS or not all(math.isfinite(loss) for loss in losses):
            print(f"error: {STEPS} finite losses were expected", file=sys.stderr)
            return 1
        return 0

    return check


def speed(args: argparse.Namespace) -> int:
    """Tokens/s/GPU and MFU of the kernel that a job would take, under both engines."""
    from sft_job import attention, hardware

    found = hardware.detect()
    packages = attention.installed(imported=attention.candidates("auto", found))
    precision, heads = "bf16" if found.bf16 else "fp16", attention.Heads(64, 32, 32)
    kernel = attention.choose("auto", found, precision=precision, heads=heads, packages=packages)
    room = (found.memory_gib or 0) * found.count
    shape = args.shape or ("1b" if room >= ROOM_FOR_1B else "tiny")
    if shape == "tiny":
        print(f"{room:.0f} GiB are too few for the 1b shape; the tiny one says nothing of speed")
    report = args.scratch / "speed.json"
    command = [
        sys.executable, "-m", "benchmarks.gpu", "--shape", shape, "--kernels", kernel.value,
        "--seq-len", "2048" if shape != "tiny" else "128", "--steps", "8", "--recompute", "auto",
        "--out", str(report),
    ]  # fmt: skip
    code = subprocess.run(command).returncode
    rows = json.loads(report.read_text())["rows"] if report.exists() else []
    return code or int(not rows or any("fault" in row for row in rows))


CHECKS: dict[str, Callable[[argparse.Namespace], int]] = {
    "gpus": gpus,
    "ops": ops,
    **{engine: train(engine) for engine in RUNS},
    "speed": speed,
}


# --- all of them ---------------------------------------------------------------------------


def command_of(check: str, args: argparse.Namespace) -> list[str]:
    if check == "image":
        flavour = os.environ.get("SFT_JOB_FLAVOUR", "")
        return [sys.executable, str(ROOT / "docker" / "check_image.py"), flavour]
    if check == "kernels":
        return [sys.executable, "-m", "tests.kernel_checks"]
    shape = ["--shape", args.shape] if args.shape else []
    this = [sys.executable, str(Path(__file__).resolve())]
    return [*this, "--inside", "--scratch", str(args.scratch), *shape, check]


ALL = ("gpus", "image", "kernels", "ops", *RUNS, "speed")


def run_all(checks: Sequence[str], args: argparse.Namespace) -> int:
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    rows = []
    for check in checks:
        print(f"=== {check}", flush=True)
        began = time.monotonic()
        said = subprocess.run(
            command_of(check, args),
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
            timeout=TIMEOUT_S,
        )
        rows.append((check, said.returncode, time.monotonic() - began))
        if check == "gpus" and said.returncode:
            break  # nothing else can be said
    print(table(rows))
    return int(any(code for _, code, _ in rows))


def table(rows: Sequence[tuple[str, int, float]]) -> str:
    lines = ["", "| check | result | seconds |", "|---|---|---|"]
    for check, code, seconds in rows:
        result = "ok" if code == 0 else f"FAILED ({code})"
        lines.append(f"| {check} | {result} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--scratch", type=Path, help="a folder with room for a model; default: TMPDIR"
    )
    parser.add_argument("--shape", help="of the speed check, as python -m benchmarks.gpu has them")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "checks", nargs="*", choices=[*ALL, []], metavar="CHECK", help=", ".join(ALL)
    )
    args = parser.parse_args()
    if args.inside:
        from sft_job import cli

        (check,) = args.checks
        return cli.run(lambda _: CHECKS[check](args), [])
    with tempfile.TemporaryDirectory(prefix="verify-gpu-", dir=args.scratch) as scratch:
        args.scratch = Path(scratch)
        return run_all(args.checks or ALL, args)


if __name__ == "__main__":
    sys.exit(main())
