"""`sft-job chat RUN_DIR_OR_MODEL`: talk to a run's model, a local model or a bundled one."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from sft_job import cli
from sft_job.errors import ModelError
from sft_job.prepared import BUNDLED, hub_folder
from sft_job.rundir import CacheDir, RunDir
from sft_job.schema import Model


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="sft-job chat", description=__doc__)
    parser.add_argument("model", help="run directory, model folder, hub id or bundled:NAME")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="answer this and leave; may be repeated"
    )
    parser.add_argument("--system", help="system text instead of the model's default")
    parser.add_argument("--max-new-tokens", type=_tokens, default=256, metavar="N")
    parser.add_argument(
        "--temperature", type=_temperature, default=0.0, help="0 (default) is greedy decoding"
    )
    parser.add_argument("--cache-dir", type=Path, default=Path("runs/.sft_job_cache"))
    parser.add_argument("--online", action="store_true", help="may fetch from the model hub")
    parser.add_argument("--debug", action="store_true", help="show the traceback of any error")
    args = parser.parse_args(argv)
    refuse_unknown(args.model, online=args.online)
    if args.prompt is None and (sys.stdin is None or not sys.stdin.isatty()):
        parser.error("standard input is not a terminal; give --prompt TEXT")
    partner = Partner(
        find_model(args.model, args.cache_dir, online=args.online),
        system=args.system,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
    )
    if args.prompt is not None:
        for prompt in args.prompt:
            print(f"USER: {prompt}\nASSISTANT:", end="", flush=True)
            partner.answer(prompt)
            partner.forget()
        return 0
    return converse(partner)


def _tokens(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text[:9]) < 10**8:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 100:  # nor nan
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 100")
    return value


def refuse_unknown(name: str, *, online: bool) -> None:
    """Before anything is fetched, loaded or asked.

    Raises:
        ModelError: nothing of that name is here, or it cannot be looked into.
    """
    remedy = "give a run directory, a model folder, a hub id or bundled:NAME"
    path = Path(name)
    try:
        if name and path.is_dir():
            os.scandir(path).close()
        elif name and os.path.lexists(path):
            raise ModelError("not a folder", where=name, remedy=remedy)
        elif not name or name[0] in "./~" or len(path.parts) > 2:
            raise ModelError("no such folder", where=name or "''", remedy=remedy)
        elif not online and name not in BUNDLED and not hub_folder(name).is_dir():
            raise ModelError(
                "neither a folder nor in the local hub cache",
                where=name,
                remedy=f"{remedy}; --online fetches a model from the hub",
            )
    except OSError as error:
        raise ModelError(
            f"cannot be looked into: {error.strerror}", where=name[:80], remedy=remedy
        ) from error


def converse(partner: Partner) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C ends an answer
    print("Empty line to leave, /new for a new conversation.")
    while True:
        try:
            line = input("USER: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if not line:
            return 0
        if line == "/new":
            partner.forget()
            continue
        print("ASSISTANT:", end="", flush=True)
        try:
            partner.answer(line)
        except KeyboardInterrupt:
            print(" [stopped]")
            partner.forget()


def find_model(name: str, cache_dir: Path, *, online: bool) -> Path:
    """The folder of a model.

    Raises:
        ModelError: a run without a model yet, or nothing of that name.
    """
    if not online:
        os.environ["HF_HUB_OFFLINE"] = "1"
    path = Path(name)
    if path.is_dir():
        run_dir = RunDir(path)
        if run_dir.job_file.exists():
            if not run_dir.model.is_dir():
                raise ModelError(
                    "the run has no model yet",
                    where=name,
                    remedy="it is written when the training ends; "
                    "run `sft-job train` with its job file again to finish it",
                )
            return run_dir.model
        path = path.absolute()
    elif name[:1] in "./~":
        raise ModelError("no such folder", where=name, remedy="give a run directory or a model")
    from sft_job.source import prepare_folder

    source = Model(path=str(path) if path.is_dir() else name)
    return prepare_folder(source, CacheDir(cache_dir.absolute()), online=online)


class Partner:
    """A model with its own chat template, and the conversation so far."""

    def __init__(
        self, folder: Path, *, system: str | None, max_new_tokens: int, temperature: float
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        if not self.tokenizer.chat_template:
            raise ModelError(
                "the model has no chat template: it was not trained to talk",
                where=str(folder),
                remedy="fine-tune it first",
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device)
        self.model.generation_config.pad_token_id = self.model.generation_config.eos_token_id
        self._sampling: dict[str, float] = {
            "do_sample": temperature > 0,
            "max_new_tokens": max_new_tokens,
        }
        if temperature > 0:
            self._sampling["temperature"] = temperature
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = []

    def forget(self) -> None:
        self.messages = []

    def answer(self, text: str) -> str:
        """Answer, printing while it is made."""
        from transformers import TextStreamer

        self.messages.append({"role": "user", "content": text})
        inputs = self.tokenizer.apply_chat_template(
            [*self._system, *self.messages],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).to(self.model.device)
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        output = self.model.generate(**inputs, **self._sampling, streamer=streamer)
        new = output[0, inputs["input_ids"].shape[1] :]
        reply: str = self.tokenizer.decode(new, skip_special_tokens=True).strip()
        self.messages.append({"role": "assistant", "content": reply})
        return reply


if __name__ == "__main__":
    sys.exit(cli.run(main))
