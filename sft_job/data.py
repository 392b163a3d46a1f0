"""`sft-job data`: check, encode and look at the conversations of a job."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sft_job import choices, cli, launcher
from sft_job.config import load
from sft_job.conversations import (
    NOTHING_LEFT,
    Conversation,
    cut,
    read,
    read_trainable,
    trainable,
)
from sft_job.errors import DataError
from sft_job.facts import read_facts
from sft_job.formats import IgnoredKeys, ignored_line
from sft_job.plan import lost_lines
from sft_job.prepared import Prepared, find_prepared, write_stamp
from sft_job.records import Faults
from sft_job.rundir import CacheDir
from sft_job.schema import JobConfig


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="sft-job data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("validate", help="read all conversations, list every fault")
    encode = commands.add_parser("encode", help="make model and token cache ready, on any CPU")
    look = commands.add_parser("show", help="one conversation token by token, trained ones marked")
    look.add_argument("which", metavar="N", help="position (from 0) or id of the conversation")
    for command in (check, encode, look):
        cli.add_job_arguments(command)
    args = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # what is in the data can be in any script
        sys.stdout.reconfigure(errors="backslashreplace")
    config = load(args.job, args.overrides)
    if args.command == "validate":
        validate(config)
    elif args.command == "encode":
        cli.stop_at_once()
        if launcher.ENCODES_FOR in os.environ:
            launcher.die_with_parent(int(os.environ[launcher.ENCODES_FOR]), signal.SIGTERM)
        cli.output_is_not_essential()
        encode_job(config)
    else:
        show(config, args.which)
    return 0


def validate(config: JobConfig) -> None:
    """Read everything and print what would be trained on; torch-free.

    Raises:
        DataError: every fault of every file.
    """
    ignored = IgnoredKeys()
    conversations = read(config.data.files(), ignored, shown=Faults.KEPT)
    kept, lost = cut(conversations)
    answers = sum(exchange.trained for one in kept for exchange in one.exchanges)
    print(
        f"{len(conversations):,} conversations read, {len(kept):,} to train on, {answers:,} answers"
    )
    _print_losses(lost, ignored.counted())
    if not kept:
        raise DataError([NOTHING_LEFT])


def _print_losses(lost: Mapping[str, int], ignored: Mapping[str, Mapping[str, int]]) -> None:
    if lines := lost_lines(dict(sorted(lost.items()))):
        print("\n".join(["not trained on:", *lines]))
    if line := ignored_line(ignored):
        print(line)


def encode_job(config: JobConfig) -> Prepared:
    """Make everything ready that training reads from disk; prints what it found.

    Raises:
        DataError, ModelError: what is wrong with the data or the model.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not config.run.online:
        os.environ["HF_HUB_OFFLINE"] = "1"
    ready = find_prepared(config)
    if ready is None:
        # Before the imports: a fault of the data is found sooner than torch is loaded.
        conversations = read_trainable(config.data.files()).conversations
        os.environ["DS_ACCELERATOR"] = "cpu"  # nothing here runs on a GPU; else it warns
        from transformers.utils.logging import disable_progress_bar

        from sft_job import dataset, settings, source
        from sft_job.tokenizer import check_converted, load_tokenizer

        disable_progress_bar()  # one per tensor is noise
        cache = CacheDir(config.cache_dir)
        notes: list[str] = []
        folder = source.prepare_folder(
            config.model, cache, online=config.run.online, trains=config, say=notes.append
        )
        tokenizer = load_tokenizer(folder, config.model.trust_remote_code)
        check_converted(folder, conversations)
        notes += settings.rehearse(
            folder,
            source.described(folder, config)[0],
            tokenizer,
            dataset.encoder_of(config, tokenizer),
            trust_remote_code=config.model.trust_remote_code,
        )
        data_folder = dataset.build(config, tokenizer)
        ready = write_stamp(config, folder, data_folder, notes)
    stats = ready.stats
    tokens = f", {sum(stats.lengths):,} tokens" if stats.lengths is not None else ""
    print(f"{stats.conversations:,} conversations -> {stats.samples:,} samples{tokens}")
    _print_losses(stats.lost, stats.ignored_keys)
    print(f"model {ready.model_folder}\ndata  {ready.data_folder}")
    # Again, now that the length of every sample is known.
    choices.check_model(config, read_facts(Path(ready.model_folder)), ready.stats)
    for note in ready.notes:
        print(f"note: {note}")
    return ready


def show(config: JobConfig, which: str) -> None:
    """Print one conversation token by token; what is trained on is green.

    Raises:
        DataError: no such conversation.
    """
    conversation = _choose(config, which)
    from rich.console import Console
    from rich.text import Text

    from sft_job import dataset, source
    from sft_job.tokenizer import load_tokenizer

    if not config.run.online:
        os.environ["HF_HUB_OFFLINE"] = "1"
    cache = CacheDir(config.cache_dir)
    folder = source.prepare_folder(config.model, cache, online=config.run.online)
    tokenizer = load_tokenizer(folder, config.model.trust_remote_code)
    encoder = dataset.encoder_of(config, tokenizer)
    console = Console(highlight=False)
    whole, lost = trainable(conversation)
    samples = []
    if whole is not None:
        results, losses = encoder.encode([whole])
        samples, lost = results[0], lost + losses
    console.print(f"{conversation.where}: conversation {conversation.id!r}", markup=False)
    for number, sample in enumerate(samples, 1):
        if len(samples) > 1:
            console.print(f"part {number} of {len(samples)}")
        line = Text()
        for token, trained in zip(sample.input_ids, sample.supervised, strict=True):
            piece = tokenizer.convert_ids_to_tokens(int(token))
            # Without colours (a pipe, a log) brackets mark the same.
            plain = f"[{piece}]" if trained and not console.is_terminal else piece
            line.append(plain + " ", style="bold green" if trained else "dim")
        console.print(line)
        trained_count = int(sample.supervised.sum())
        console.print(f"{len(sample.input_ids)} tokens, {trained_count} trained on")
    for text in lost_lines(lost):
        console.print(text)


def _choose(config: JobConfig, which: str) -> Conversation:
    conversations = read(config.data.files())
    named = [c for c in conversations if c.id == which]
    if named:
        return named[0]
    if which.isdigit() and int(which) < len(conversations):
        return conversations[int(which)]
    raise DataError(
        [f"no conversation with id or position {which!r}; there are {len(conversations):,}"]
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
