"""What a user of plain transformers reads from exported models, under whatever release is there.

    python tests/reader.py OUT FOLDER ...

Logits, ids of a text and of a chat, stop token and dtype, as one dictionary that torch reads.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

IDS = [5, 9, 200, 7, 33, 410, 6, 77, 12, 3, 8, 100]


def read(folder: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi  there"}], add_generation_prompt=True, return_dict=False
    )
    with torch.no_grad():
        logits = model.eval()(torch.tensor([IDS])).logits[0]
    return {
        "logits": logits,
        "text": tokenizer("sun moon </s> été").input_ids,
        "chat": list(chat),
        "end": GenerationConfig.from_pretrained(folder).eos_token_id,
        "dtype": str(model.dtype),
    }


if __name__ == "__main__":
    import transformers

    found = {folder: read(Path(folder)) for folder in sys.argv[2:]}
    torch.save(found | {"release": transformers.__version__}, sys.argv[1])
