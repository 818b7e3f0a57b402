"""How much of chatterbot-corpus a model has by heart: python benchmarks/memorised.py CHECKPOINT [BEFORE]

Greedy answers to the corpus's opening prompts that have one answer only, compared with that answer letter by letter.
With BEFORE (the checkpoint that training started from), some answers of both side by side.
"""

import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoint import load_model_and_tokenizer
from engine.cli import one_line_errors
from engine.sources import open_split
from generation import answers

SHOWN = ("What is AI?", "Are you sentient?", "What language are you written in?", "What is love?", "Tell me a joke")


def unique_openings() -> dict[str, str]:
    """Opening prompt to answer, where all exchanges that open with it agree."""
    found: dict[str, set[str]] = defaultdict(set)
    for row in open_split("chatterbot", "train+test"):
        prompt, answer = row["messages"][:2]
        found[prompt["content"]].add(answer["content"])
    return {prompt: next(iter(replies)) for prompt, replies in found.items() if len(replies) == 1}


def answer(checkpoint: str, questions: list[str], batch_size: int = 64) -> list[str]:
    """Greedy answers."""
    model, tokenizer = load_model_and_tokenizer(checkpoint)
    model.eval()
    batches = [questions[start : start + batch_size] for start in range(0, len(questions), batch_size)]
    return [reply for batch in batches for reply in answers(model, tokenizer, batch, 120)]


def main() -> None:
    expected = unique_openings()
    replies = answer(sys.argv[1], list(expected))
    right = sum(reply == wanted for reply, wanted in zip(replies, expected.values(), strict=True))
    print(f"{right} of {len(expected)} answers ({right / len(expected):.0%}) are the corpus's, letter by letter")
    columns = [answer(checkpoint, list(SHOWN)) for checkpoint in reversed(sys.argv[1:3])]
    for question, *shown in zip(SHOWN, *columns, strict=True):
        print("\n".join((question, *(f"    {reply!r}" for reply in shown))))


if __name__ == "__main__":
    with one_line_errors():
        main()
