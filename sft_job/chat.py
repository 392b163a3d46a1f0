"""`sft-job chat RUN_DIR_OR_MODEL`: talk to a run's model, a local model or a bundled one."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sft_job import cli
from sft_job.errors import ModelError
from sft_job.rundir import CacheDir, RunDir
from sft_job.schema import Model


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="sft-job chat", description=__doc__)
    parser.add_argument("model", help="run directory, model folder, hub id or bundled:NAME")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="answer this and leave; may be repeated"
    )
    parser.add_argument("--system", help="system text instead of the model's default")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default) is greedy decoding"
    )
    parser.add_argument("--cache-dir", type=Path, default=Path("runs/.sft_job_cache"))
    parser.add_argument("--online", action="store_true", help="may fetch from the model hub")
    parser.add_argument("--debug", action="store_true", help="show the traceback of any error")
    args = parser.parse_args(argv)
    if args.prompt is None and not sys.stdin.isatty():
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


def converse(partner: Partner) -> int:
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
