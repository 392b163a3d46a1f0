"""TRL's SFTTrainer on ShareGPT conversations, recorded. Runs in TRL's environment.

    python peer_trl.py RECORD.json SETTINGS.json

SETTINGS.json: model, data, template (Jinja), max_length, `arguments` for SFTConfig, and `check`:
whether to find out first that no sample sees another.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import recorder
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

ROLES = {"human": "user", "gpt": "assistant"}


def main() -> None:
    recording = recorder.install(Path(sys.argv[1]))
    settings = json.loads(Path(sys.argv[2]).read_text())
    arguments = settings["arguments"]
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    tokenizer.chat_template = settings["template"]
    tokenizer.pad_token = tokenizer.unk_token
    conversations = [
        [
            {"role": ROLES[turn["from"]], "content": turn["value"]}
            for turn in record["conversations"]
        ]
        for record in json.loads(Path(settings["data"]).read_text())
    ]
    if arguments.get("padding_free") and not arguments.get("packing"):
        # SFTTrainer refuses to truncate here, so that its input has to come truncated.
        dataset = Dataset.from_list(
            [truncated(tokenizer, messages, settings["max_length"]) for messages in conversations]
        )
        own = {"max_length": None}
    else:
        dataset = Dataset.from_list([{"messages": messages} for messages in conversations])
        own = {"max_length": settings["max_length"], "assistant_only_loss": True}
    trainer = SFTTrainer(
        model=settings["model"],
        args=SFTConfig(**own, **arguments),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    if settings["check"]:
        recording.extra["apart"] = kept_apart(trainer)
    trainer.train()


def truncated(tokenizer: Any, messages: list[dict[str, str]], length: int) -> dict[str, list[int]]:
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    return {name: encoded[name][:length] for name in ("input_ids", "assistant_masks")}


def kept_apart(trainer: Any) -> float:
    """Largest difference (of the largest value) between the hidden states of a batch's samples
    computed together and each alone: rounding when no sample sees another.

    Looks at the first batch of several samples; 0 where there is none.
    """
    decoder = trainer.model.get_decoder()
    for batch in trainer.get_train_dataloader():
        samples = list(recorder.samples_of(batch))
        if len(samples) > 1:
            break
    else:
        return 0.0
    differences = []
    with torch.no_grad():
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        rows = decoder(**inputs, use_cache=False).last_hidden_state
        mask = batch.get("attention_mask")
        flat = rows[mask.bool()] if mask is not None else rows[0]
        start = 0
        for ids, _ in samples:
            alone = decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            part = flat[start : start + len(ids)]
            differences.append(float((part - alone).abs().max() / alone.abs().max()))
            start += len(ids)
    return max(differences)


if __name__ == "__main__":
    main()
