"""FastChat's own code, recorded. Runs in FastChat's environment.

    python peer_fastchat.py train RECORD.json --model_name_or_path ... (FastChat's arguments)
    python peer_fastchat.py preprocess MODEL_FOLDER CONVERSATIONS.json SEQ_LEN
    python peer_fastchat.py tokenizer MODEL_FOLDER TOKENIZER.json

`fastchat/train/train.py` runs as installed. Only the order of the conversations is taken from
the file, as on all sides, instead of from a random sampler.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def train(record: Path) -> None:
    import recorder
    import torch
    from transformers import Trainer

    def in_order(self: Any, *_: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    recorder.install(record)
    Trainer._get_train_sampler = in_order
    from fastchat.train.train import train as fastchat_train

    fastchat_train()


def preprocess(model: Path, conversations: Path, seq_len: int) -> None:
    """Time FastChat's tokenising and label-making; prints what it took and made."""
    from fastchat.train.train import preprocess as fastchat_preprocess
    from transformers import AutoTokenizer

    # As train.py loads it.
    tokenizer = AutoTokenizer.from_pretrained(
        model, model_max_length=seq_len, padding_side="right", use_fast=False
    )
    tokenizer.pad_token = tokenizer.unk_token
    sources = [record["conversations"] for record in json.loads(conversations.read_text())]
    fastchat_preprocess(sources[:8], tokenizer)
    start, cpu = time.perf_counter(), time.process_time()
    made = fastchat_preprocess(sources, tokenizer)
    figures = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "conversations": len(sources),
        "tokens": int(made["attention_mask"].sum()),
        "supervised": int((made["labels"] != -100).sum()),
    }
    print(json.dumps(figures))


def write_tokenizer(model: Path, target: Path) -> None:
    """tokenizer.json of a sentencepiece model, by this environment's transformers."""
    from transformers import LlamaTokenizerFast

    tokenizer = LlamaTokenizerFast.from_pretrained(model, legacy=True)
    tokenizer.backend_tokenizer.save(str(target))


if __name__ == "__main__":
    command, first = sys.argv[1], Path(sys.argv[2])
    del sys.argv[1:3]  # what follows of `train` is FastChat's
    if command == "train":
        train(first)
    elif command == "preprocess":
        preprocess(first, Path(sys.argv[1]), int(sys.argv[2]))
    else:
        write_tokenizer(first, Path(sys.argv[1]))
