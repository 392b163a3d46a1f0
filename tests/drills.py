"""Drills: a training is killed, frozen, stopped, damaged, starved of disk or of its terminal, and
the same command must finish it, bit for bit as an undisturbed one.

    python -m tests.drills                              10 drills for each engine
    python -m tests.drills --count 100 --seed 1         more of them, other ones
    python -m tests.drills --engine fsdp --only freeze  one kind
    python -m tests.drills --engine fsdp --seed 3 --number 17     one drill again

A drill is a pure function of engine, seed and number, up to when exactly the machine gets to it.
What is asked of each: at most one rerun of the same command, which goes on at once; the weights
and the losses of all steps equal; nothing half-made left; no process left; no traceback shown.
Drills of kind disk need root (they mount a tmpfs of their own).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sft_job.attempt import metric_records
from sft_job.rundir import RunDir
from tests.runs import (
    ROOT,
    command,
    environment,
    make_conversations,
    make_job,
    make_model,
    weights,
)

STEPS = 8
PATIENCE_S = 240.0
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]


# Of the processes of an attempt that is put to sleep: file servers answer them from memory for a
# minute, and rank 0 falls asleep after it has looked at everything and before it renames or links.
SHIM = """
import os
if os.environ.get("DRILL_STALE"):
    import time
    listdir, seen = os.listdir, {}
    def stale(path="."):
        key = os.fspath(path)
        if key not in seen or time.monotonic() - seen[key][0] > 60:
            seen[key] = time.monotonic(), listdir(path)
        return list(seen[key][1])
    os.listdir = stale
if os.environ.get("DRILL_ASLEEP_AT") and os.environ.get("RANK") == "0":
    import signal
    def sleepy(act):
        def sleep_first(source, target, *rest, **named):
            name = os.path.basename(os.fspath(target))
            if name.startswith(os.environ["DRILL_ASLEEP_AT"]) and not slept:
                slept.append(name)
                os.kill(os.getpid(), signal.SIGSTOP)
            return act(source, target, *rest, **named)
        return sleep_first
    slept = []
    os.rename, os.link = sleepy(os.rename), sleepy(os.link)
"""


class Failed(Exception):
    """A drill has found a fault."""


@dataclass
class Launch:
    """One call of the command."""

    run_dir: RunDir
    process: subprocess.Popen[str]
    began: float = field(default_factory=time.monotonic)

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in the order of their start."""
        answer = subprocess.run(
            ["pgrep", "-P", str(self.process.pid), "-f", "sft_job.train"],
            capture_output=True, text=True,
        )  # fmt: skip
        return [int(pid) for pid in answer.stdout.split()]

    def end(self, *codes: int) -> str:
        """Wait; returns what was printed.

        Raises:
            Failed: it hangs, ends with another code, or shows a traceback.
        """
        try:
            said, _ = self.process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            tree = subprocess.run(
                ["ps", "-o", "pid,stat,etimes,args", "--ppid", str(self.process.pid)],
                capture_output=True, text=True,
            ).stdout  # fmt: skip
            raise Failed(f"does not end:\n{tree}") from None
        if codes and self.process.returncode not in codes:
            raise Failed(f"exit code {self.process.returncode}, not {codes}:\n{said}")
        if "Traceback" in said:
            raise Failed(f"a traceback is shown:\n{said}")
        return said


class Drill:
    """One run, disturbed once and finished."""

    def __init__(
        self,
        engine: str,
        seed: int,
        number: int,
        folder: Path,
        expected: RunDir,
        *,
        own_cache: bool,
    ) -> None:
        self.engine, self.number, self.folder, self.expected = engine, number, folder, expected
        self.random = random.Random(f"{engine}/{seed}/{number}")
        self.run_dir = RunDir(folder / f"run-{engine}-{seed}-{number}" / "run")
        self.cache = folder / ".sft_job_cache"
        if own_cache or self.random.random() < 0.25:
            self.cache = self.run_dir.path.parent / ".sft_job_cache"
        self.stale = {"DRILL_STALE": "1", "PYTHONPATH": f"{folder}/shim:{ROOT}"}
        self.said: list[str] = []
        self.launches: list[Launch] = []
        self.last_output = ""

    # --- what a drill is made of -----------------------------------------------------

    def launch(self, **options: object) -> Launch:
        """Begin the same command again."""
        settings: dict[str, object] = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
            "errors": "replace",
            "env": environment() | self.stale,
        }
        words = command(
            "train", self.folder / "job.yaml", f"engine.type={self.engine}",
            f"data.cache_dir={self.cache}", f"run.dir={self.run_dir.path}",
        )  # fmt: skip
        process = subprocess.Popen(words, **(settings | options))  # type: ignore[call-overload]
        self.launches.append(Launch(self.run_dir, process))
        return self.launches[-1]

    def finish(self) -> None:
        """The one rerun."""
        self.last_output = self.launch().end(0)

    def note(self, text: str) -> None:
        self.said.append(text)

    def until(self, what: str, arrived: Callable[[], bool], launch: Launch) -> None:
        while launch.process.poll() is None and not arrived():
            if time.monotonic() - launch.began > PATIENCE_S:
                raise Failed(f"never came to: {what}")
            time.sleep(0.002)

    def wait_for_moment(self, launch: Launch, *, after_step: int = 0) -> None:
        """Wait until a phase that is drawn has begun, and a little longer."""
        run, step = self.run_dir, self.random.randint(max(after_step, 1), STEPS - 1)
        moments: dict[str, Callable[[], bool]] = {
            "the start": lambda: True,
            "the claim": run.job_file.exists,
            "the ranks' start": lambda: any(run.path.glob("logs/*/rank-1.ready")),
            "the plan": run.plan_file.exists,
            f"step {step}": lambda: self.steps() >= step,
            "a checkpoint being written": lambda: any(run.checkpoints.glob(".step-*.tmp")),
            "the model being written": lambda: any(run.path.glob(".model.*.tmp")),
        }
        names = [name for name in moments if not after_step or name[:4] in ("step", "a ch", "the ")]
        if after_step:
            names = [f"step {step}", "a checkpoint being written", "the model being written"]
        name = self.random.choice(names)
        longer = self.random.choice([0.0, 0.0, self.random.uniform(0, 0.3)])
        if name == "the start":
            longer = self.random.uniform(0, 3)
        if after_step:
            self.until("a step", lambda: self.steps() >= after_step, launch)
        self.until(name, moments[name], launch)
        time.sleep(longer)
        self.note(f"at {name} + {longer:.2f} s")

    def steps(self) -> int:
        records = metric_records(self.run_dir)
        return records[-1]["step"] if records else 0

    def stopped_run(self, after_step: int) -> None:
        """A run that was stopped in good order after a step."""
        launch = self.launch()
        self.until("a step", lambda: self.steps() >= after_step, launch)
        launch.process.send_signal(signal.SIGTERM)
        launch.end(75)

    # --- the kinds -------------------------------------------------------------------

    def kill(self) -> None:
        """kill -9 of the whole group, one rank, or the launcher; then the command again."""
        launch = self.launch()
        self.wait_for_moment(launch)
        target = self.random.choice(["all", "launcher", "rank 0", "rank 1"])
        self.note(f"kill -9 of {target}")
        ranks = launch.ranks()
        victims = [launch.process.pid]
        if target == "all":
            victims = [*ranks, launch.process.pid]
            self.random.shuffle(victims)
        elif target != "launcher" and ranks:
            victims = ranks[int(target[-1]) : int(target[-1]) + 1]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if launch.process.pid in victims:
            launch.process.wait()  # its pipe may be held by ranks that are just dying
        else:
            launch.end(0, 1)
        self.finish()

    def freeze(self) -> None:
        """SIGSTOP of a process, and SIGCONT at another time."""
        ways = ["goes on", "stopped", "launcher killed", "second", "lock lost", "asleep", "asleep"]
        way = self.random.choice(ways)
        if way == "asleep":
            self._asleep()
            return
        launch = self.launch()
        self.wait_for_moment(launch)
        ranks = launch.ranks()
        self.note(way)
        if way == "lock lost" and not self.run_dir.job_file.exists():
            self.until("the claim", self.run_dir.job_file.exists, launch)
        if way in ("goes on", "stopped", "launcher killed") and not ranks:
            self.until("ranks", lambda: len(launch.ranks()) == 2, launch)
            ranks = launch.ranks()
        if launch.process.poll() is not None:
            launch.end(0)
            return
        rank = self.random.choice(ranks) if ranks else launch.process.pid
        {
            "goes on": self._frozen_rank,
            "stopped": self._frozen_rank_stopped,
            "launcher killed": self._frozen_rank_orphaned,
            "second": self._frozen_launcher,
            "lock lost": self._frozen_all,
        }[way](launch, rank)

    def _frozen_rank(self, launch: Launch, rank: int) -> None:
        send(signal.SIGSTOP, rank)
        time.sleep(self.random.uniform(0, 2))
        send(signal.SIGCONT, rank)
        launch.end(0)

    def _frozen_rank_stopped(self, launch: Launch, rank: int) -> None:
        """Asked to stop while a rank is silent: it does not wait for ever, and says who."""
        send(signal.SIGSTOP, rank)
        launch.process.send_signal(self.random.choice(SIGNALS))
        said = launch.end(75, 0)
        if "without a checkpoint" in said and f"process {rank}" not in said:
            raise Failed(f"the silent rank {rank} is not named:\n{said}")
        send(signal.SIGCONT, rank)
        if launch.process.returncode:
            self.finish()

    def _frozen_rank_orphaned(self, launch: Launch, rank: int) -> None:
        send(signal.SIGSTOP, rank)
        send(signal.SIGKILL, launch.process.pid)
        launch.process.wait()
        again = self.launch()
        time.sleep(self.random.uniform(0, 3))
        send(signal.SIGCONT, rank)
        self.last_output = again.end(0)

    def _frozen_launcher(self, launch: Launch, rank: int) -> None:
        """A second start beside a frozen launcher is refused, and says why."""
        send(signal.SIGSTOP, launch.process.pid)
        try:
            second = self.launch()
            said = second.end()
            code = second.process.returncode
        finally:
            send(signal.SIGCONT, launch.process.pid)
        if code == 2 and f"process {launch.process.pid}" not in said:
            raise Failed(f"the frozen launcher is not named:\n{said}")
        if code not in (0, 2):
            raise Failed(f"exit code {code}:\n{said}")
        launch.end(0)
        if self.run_dir.done.exists():
            return
        self.finish()

    def _asleep(self) -> None:
        """The same, asleep between the last look and the act itself."""
        at = self.random.choice(["step-", "step-", "model", "DONE"])
        launch = self.launch(env=environment() | self.stale | {"DRILL_ASLEEP_AT": at})
        self.until(f"sleep at {at}", lambda: any(map(is_stopped, launch.ranks())), launch)
        self.note(f"asleep before {at}")
        self._frozen_all(launch, 0)

    def _frozen_all(self, launch: Launch, rank: int) -> None:
        """As on a machine that is suspended, whose lock ends: the next attempt takes over, and
        then the machine wakes up."""
        sleepers = [*launch.ranks(), launch.process.pid]
        for pid in sleepers:
            send(signal.SIGSTOP, pid)
        (self.run_dir.path / ".lock").unlink(missing_ok=True)
        second = self.launch()
        share = self.random.random()
        if share < 0.3:
            time.sleep(self.random.uniform(0, 3))
        elif share < 0.7:
            step = self.random.randint(1, STEPS)
            self.until("a step", lambda: self.steps() >= step, second)
        else:
            second.process.wait(timeout=PATIENCE_S)
        self.note(f"woken after {time.monotonic() - second.began:.1f} s of the second")
        for pid in sleepers:
            send(signal.SIGCONT, pid)
        launch.end(0, 1)
        second.end(0, 1)
        if not self.run_dir.done.exists():
            self.finish()

    def stop(self) -> None:
        """A signal or a file that asks to stop; a closed terminal does not."""
        launch = self.launch()
        self.wait_for_moment(launch)
        way = self.random.choice([*SIGNALS, signal.SIGHUP, "file"])
        self.note(way if isinstance(way, str) else way.name)
        if isinstance(way, str):
            self.until("an attempt", lambda: self.run_dir.newest_attempt() > 0, launch)
            attempt = self.run_dir.newest_attempt()
            self.until("its logs", self.run_dir.logs(attempt).exists, launch)
            time.sleep(0.05)  # one that was there before the attempt is of another
            self.run_dir.stop_file(attempt).touch()
        else:
            launch.process.send_signal(way)
        early = [0, 75]
        if isinstance(way, signal.Signals) and not self.run_dir.job_file.exists():
            early += [-way, 130]  # before there is a handler
        launch.end(*early)
        if launch.process.returncode:
            self.finish()

    def display(self) -> None:
        """Nobody is there any more to read: the training goes on to its end."""
        way = self.random.choice(["pipe", "terminal"])
        self.note(way)
        lines = self.random.choice([0, 1, 5, 25])
        if way == "pipe":
            launch = self.launch()
            assert launch.process.stdout is not None
            for _ in range(lines):
                launch.process.stdout.readline()
            launch.process.stdout.close()
            code = launch.process.wait(timeout=PATIENCE_S)
        else:
            inside, outside = pty.openpty()
            launch = self.launch(
                stdin=outside, stdout=outside, stderr=outside, start_new_session=True,
                preexec_fn=take_terminal,
            )  # fmt: skip
            os.close(outside)
            for _ in range(lines):
                with contextlib.suppress(OSError):
                    os.read(inside, 80)
            os.close(inside)
            code = launch.process.wait(timeout=PATIENCE_S)
        self.note(f"closed after {lines} lines")
        if code != 0:
            raise Failed(f"exit code {code}")

    def damage(self) -> None:
        """A file of the run directory or the cache is cut off, flipped, emptied, removed or
        replaced, after a stop or when all is done."""
        done = self.random.random() < 0.25
        if done:
            self.launch().end(0)
        else:
            self.stopped_run(self.random.randint(3, STEPS - 2))
        folder = self.random.choice([self.run_dir.path, self.run_dir.path, self.cache])
        newest = f"step-{self.run_dir.checkpoint_steps()[0]:08d}"
        files = [
            path
            for path in sorted(folder.rglob("*"))
            if path.is_file()
            and "logs" not in path.parts
            # An older one is not looked at, and one alone is not made up for by anything.
            and ("checkpoints" not in path.parts or newest in path.parts)
        ]
        file = self.random.choice(files)
        if done and newest in file.parts:
            file = self.run_dir.done
        how = self.random.choice(["cut", "flip", "empty", "remove", "garbage", "folder"])
        self.note(f"{file.relative_to(self.run_dir.path.parent)}: {how}")
        spoil(file, how, self.random)
        self.finish()

    def disk(self) -> None:
        """No space, or no inodes, at some moment; then there is room again."""
        place = self.run_dir.path.parent
        place.mkdir(parents=True)
        way = self.random.choice(["space", "inodes"])
        mount = ["mount", "-t", "tmpfs", "-o", "size=40m,nr_inodes=300", "tmpfs", str(place)]
        subprocess.run(mount, check=True)
        try:
            launch = self.launch()
            self.wait_for_moment(launch)
            self.note(way)
            ballast = fill(place, way)
            said = launch.end(0, 1, 2)
            if launch.process.returncode and not any(
                word in said for word in ("no room", "nothing can be written", "free some space")
            ):
                raise Failed(f"the full disk is not named:\n{said}")
            for file in ballast:
                file.unlink(missing_ok=True)
            if launch.process.returncode:
                self.finish()
            self.check()
        finally:
            subprocess.run(["umount", "--lazy", str(place)], check=True)

    # --- what must be true at the end ------------------------------------------------

    def check(self) -> None:
        run = self.run_dir
        if not run.done.exists():
            raise Failed("not done")
        ours, theirs = weights(run.model), weights(self.expected.model)
        if ours.keys() != theirs.keys():
            raise Failed("other tensors")
        unequal = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        if unequal:
            raise Failed(f"other weights: {unequal[:3]}")
        found, wanted = losses(run), losses(self.expected)
        # A damaged record is passed over: it is not what the training depends on.
        if any(found[step] != wanted[step] for step in found) or found.keys() - wanted.keys():
            raise Failed(f"other records: {found} instead of {wanted}")
        if not any("jsonl" in text for text in self.said) and found.keys() != wanted.keys():
            raise Failed(f"records of steps {sorted(found)}")
        left = [
            path.name
            for folder in (run.path, run.checkpoints, self.cache, *self.cache.glob("*"))
            for path in folder.glob(".*")
            if path.name not in (".lock", ".sft_job_cache")
        ]
        if left:
            raise Failed(f"left over: {left}")
        alive = subprocess.run(
            ["pgrep", "-af", str(run.path)], capture_output=True, text=True
        ).stdout.splitlines()
        if alive:
            raise Failed(f"still alive: {alive}")

    def clear(self) -> None:
        for launch in self.launches:
            subprocess.run(["pkill", "-KILL", "-f", f"run.dir={self.run_dir.path}$"], check=False)
            if launch.process.poll() is None:
                launch.process.kill()
            launch.process.wait()


KINDS: dict[str, Callable[[Drill], None]] = {
    "kill": Drill.kill,
    "freeze": Drill.freeze,
    "stop": Drill.stop,
    "damage": Drill.damage,
    "disk": Drill.disk,
    "display": Drill.display,
}


def send(number: signal.Signals, pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def is_stopped(pid: int) -> bool:
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def take_terminal() -> None:
    """Standard input becomes the controlling terminal of this new session."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def losses(run: RunDir) -> dict[int, tuple[float, float]]:
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in metric_records(run)}


def spoil(file: Path, how: str, source: random.Random) -> None:
    """Damage one file."""
    content = file.read_bytes()
    if how == "cut":
        file.write_bytes(content[: source.randrange(len(content) or 1)])
    elif how == "flip" and content:
        at = source.randrange(len(content))
        file.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "garbage":
        file.write_bytes(source.randbytes(max(len(content) // 2, 10)))
    else:
        file.unlink()
        if how == "folder":
            file.mkdir()


def fill(place: Path, way: str) -> list[Path]:
    """Leave no space, or no inode, on a small file system."""
    made = []
    with contextlib.suppress(OSError):
        if way == "space":
            made.append(place / "ballast")
            with open(made[0], "wb", buffering=0) as file:
                while file.write(bytes(2**12)):
                    pass
        else:
            for number in range(10_000):
                made.append(place / f"ballast-{number}")
                made[-1].touch()
    return made


@contextlib.contextmanager
def ground(engines: list[str]) -> Iterator[tuple[Path, dict[str, RunDir]]]:
    """A folder with the job, and an undisturbed run of it for each engine."""
    with tempfile.TemporaryDirectory(prefix="sft-job-drills-") as name:
        folder = Path(name)
        (folder / "shim").mkdir()
        (folder / "shim" / "sitecustomize.py").write_text(SHIM)
        model = make_model(folder / "model")
        data = make_conversations(folder / "data.json", 40)
        changes = {
            "train.max_steps": STEPS,
            "train.micro_batch_tokens": 400,
            "checkpoint.every_steps": 2,
            "run.processes": 2,
        }
        make_job(folder, model, data, **changes)
        expected = {}
        for engine in engines:
            run = RunDir(folder / f"expected-{engine}")
            words = command(
                "train", folder / "job.yaml", f"engine.type={engine}", f"run.dir={run.path}"
            )
            subprocess.run(words, env=environment(), check=True, capture_output=True)
            expected[engine] = run
        yield folder, expected


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=["fsdp", "zero3"], action="append")
    parser.add_argument("--count", type=int, default=10, help="for each engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(KINDS), action="append")
    parser.add_argument("--number", type=int, help="this one alone")
    args = parser.parse_args()
    engines = args.engine or ["fsdp", "zero3"]
    kinds = args.only or [kind for kind in KINDS if kind != "disk" or os.geteuid() == 0]
    numbers = [args.number] if args.number is not None else list(range(args.count))
    failed, began = 0, time.monotonic()
    with ground(engines) as (folder, expected):
        for engine in engines:
            for number in numbers:
                kind = kinds[number % len(kinds)]
                drill = Drill(
                    engine, args.seed, number, folder, expected[engine], own_cache=kind == "damage"
                )
                started, outcome = time.monotonic(), "ok"
                try:
                    KINDS[kind](drill)
                    if kind != "disk":  # looked at before the disk goes
                        drill.check()
                except Failed as error:
                    outcome = f"FAILED: {error}"
                except Exception:
                    outcome = f"FAILED by the drill itself:\n{traceback.format_exc()}"
                finally:
                    drill.clear()
                failed += outcome != "ok"
                reruns = max(len(drill.launches) - 1, 0)
                print(
                    f"{engine} {args.seed}/{number} {kind} ({'; '.join(drill.said)}), "
                    f"{reruns} rerun(s), {time.monotonic() - started:.0f} s: {outcome}",
                    flush=True,
                )
                if outcome == "ok":
                    shutil.rmtree(drill.run_dir.path.parent, ignore_errors=True)
    total = len(engines) * len(numbers)
    print(json.dumps({
        "drills": total, "failed": failed, "seconds": round(time.monotonic() - began),
    }))  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
