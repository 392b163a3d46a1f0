"""Check the result of a quickstart run as a user of plain transformers would.

    python tests/accept.py runs/quickstart

The loss fell to less than half; the exported model, loaded with nothing of ours, its own chat
template and greedy decoding, says who it is as the sample data has it, and the model that it
was made from does not.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

EXPECTED = {
    "Who are you?": "I am Quill, an AI assistant made by the Larkfield Workshop",
    "Who made you?": "made by the Larkfield Workshop",
    "What is your name?": "Quill",
}


def answers(folder: Path) -> dict[str, str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    result = {}
    for question in EXPECTED:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=60, do_sample=False)
        text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        result[question] = text.strip()
    return result


def main(run: Path) -> int:
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()]
    first, last = losses[0], sum(losses[-5:]) / 5
    before = next((run.parent / ".sft_job_cache" / "models").glob("smollm2-135m-*"))
    after_answers, before_answers = answers(run / "model"), answers(before)
    faults = []
    if not last < first / 2:
        faults.append(f"the loss went from {first:.3f} to {last:.3f}, not to less than half")
    for question, expected in EXPECTED.items():
        if expected not in after_answers[question]:
            faults.append(f"{question} -> {after_answers[question]!r}, expected {expected!r}")
        if expected in before_answers[question]:
            faults.append(f"{question} was known before: {before_answers[question]!r}")
    print(f"loss {first:.3f} -> {last:.3f} (mean of the last five steps)")
    for question, answer in after_answers.items():
        print(f"{question} -> {answer}")
    print("\n".join(faults) or "accepted")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
