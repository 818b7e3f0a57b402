"""How well does a chat model answer?

    python benchmarks/answers.py CHECKPOINT [CHECKPOINT ...] [--out answers.jsonl]

Count greedy answers of three kinds for each checkpoint:

- memorised: openings of chatterbot with exactly one answer in the data, reproduced verbatim;
- paraphrased: the 30 rewordings of such openings in tests/data/paraphrases.json, which no run trains on, answered like
  the original;
- whole sentences: replies to the first turns of 100 held-out chitchat conversations that `is_whole` accepts.

--out writes all replies to a file.
"""

import argparse
import itertools
import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoint import load_model_and_tokenizer
from data.sources import open_split
from generation import Prompt, answers
from launch.command_line import one_line_errors

PARAPHRASES = Path(__file__).resolve().parents[1] / "tests/data/paraphrases.json"
MAX_NEW_TOKENS = 80


def unique_openings() -> dict[str, str]:
    """Map each opening of chatterbot to its answer, if all exchanges with that opening have the same one."""
    found: dict[str, set[str]] = defaultdict(set)
    for row in open_split("chatterbot", "train+test"):
        prompt, answer = row["messages"][:2]
        found[prompt["content"]].add(answer["content"])
    return {prompt: next(iter(replies)) for prompt, replies in found.items() if len(replies) == 1}


def first_turns(number: int) -> list[str]:
    """Return the first message of each of the first `number` held-out chitchat conversations."""
    return [row["messages"][0]["content"] for row in open_split("chitchat", f"test[:{number}]")]


def is_whole(reply: str) -> bool:
    """Return whether a reply begins with a capital letter, digit or quote, ends with a full stop, question mark or
    exclamation mark (a smiley or a quote may follow), and repeats no word or sentence immediately."""
    text = reply.strip()
    sentences = [sentence.strip().lower() for sentence in re.split(r"(?<=[.!?])\s+", text)]
    words = re.findall(r"[\w']+", text.lower())
    repeats = any(a == b for parts in (words, sentences) for a, b in itertools.pairwise(parts))
    return bool(re.fullmatch(r"[A-Z0-9\"'].*[.!?]+[\"')(:;DP\s]*", text, re.DOTALL)) and not repeats


def answer(checkpoint: str, questions: Sequence[str], batch_size: int = 64) -> list[str]:
    """Return the greedy answers, with an ellipsis after each one that does not end within MAX_NEW_TOKENS."""
    model, tokenizer = load_model_and_tokenizer(checkpoint)
    model.eval()
    prompts: list[Prompt] = [[{"role": "user", "content": question}] for question in questions]
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    replies = [reply for batch in batches for reply in answers(model, tokenizer, batch, MAX_NEW_TOKENS)]
    return [reply.text if reply.stopped else f"{reply.text}…" for reply in replies]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--out", metavar="PATH", help="file for all replies, one JSON object per line")
    options = parser.parse_args()
    openings, paraphrases, turns = unique_openings(), json.loads(PARAPHRASES.read_text()), first_turns(100)
    lines = []
    print(f"{'':40}{'memorised':>12}{'paraphrased':>14}{'whole sentences':>18}")
    for checkpoint in options.checkpoints:
        memorised = zip(answer(checkpoint, list(openings)), openings.values(), strict=True)
        found = answer(checkpoint, list(paraphrases))
        same = [
            reply.strip() == openings[opening].strip()
            for reply, opening in zip(found, paraphrases.values(), strict=True)
        ]
        replies = answer(checkpoint, turns)
        whole = [is_whole(reply) for reply in replies]
        right = sum(reply == expected for reply, expected in memorised)
        print(f"{checkpoint:40}{right:8} of {len(openings)}{sum(same):7} of {len(same)}{sum(whole):11} of {len(whole)}")
        for question, reply, good in zip((*paraphrases, *turns), (*found, *replies), (*same, *whole), strict=True):
            lines.append({"checkpoint": checkpoint, "question": question, "reply": reply, "counted": good})
    if options.out:
        Path(options.out).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


if __name__ == "__main__":
    with one_line_errors():
        main()
