"""Measure how fast conversations become batches: render, mask and pack chitchat on one core.

    python benchmarks/data_pipeline.py [--width 2048] [--vocab-size 100277]

Compared with tiktoken alone, without template, mask or batch, and with `apply_chat_template` and its assistant mask.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import TypeVar

import tyro
from rivals import BATCH_SIZE, transformers_tokenizer  # first: sets the environment

from data.pieces import tokenize_row
from data.sources import open_split
from datacollator import Batch, DataCollator, Piece, pack_best_fit
from tokenizer import Tokenizer

Result = TypeVar("Result")
Messages = list[dict[str, str]]
FEW = 400  # conversations for transformers, which is slow


@dataclass
class Options:
    # Tokens per row.
    width: int = 2048
    vocab_size: int | None = None
    # Measurements of each; the fastest counts.
    repeats: int = 3


def fastest(work: Callable[[], Result], repeats: int) -> tuple[Result, float]:
    """Return the work's result and its shortest time in seconds."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - began)
    return result, min(times)


def render(tokenizer: Tokenizer, conversations: list[Messages], width: int) -> list[Piece]:
    rendered = [tokenizer.render(messages) for messages in conversations]
    return [(ids[:width], mask[:width]) for ids, mask in rendered]


def collate(rendered: list[Piece], rows: list[list[int]], collator: DataCollator) -> list[Batch]:
    return [
        collator([[rendered[i] for i in row] for row in rows[start : start + BATCH_SIZE]])
        for start in range(0, len(rows), BATCH_SIZE)
    ]


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    tokenizer = Tokenizer(vocab_size=options.vocab_size)
    conversations = [row["messages"] for row in open_split("chitchat", "train")]
    texts = [message["content"] for messages in conversations for message in messages]
    collator = DataCollator(options.width, tokenizer.pad_token_id)

    encoded, alone = fastest(lambda: [tokenizer.encode(text) for text in texts], options.repeats)
    rendered, rendering = fastest(lambda: render(tokenizer, conversations, options.width), options.repeats)
    data = [{"messages": messages} for messages in conversations]
    _, tokenizing = fastest(lambda: [tokenize_row(row, tokenizer, options.width) for row in data], options.repeats)
    lengths = [len(ids) for ids, _ in rendered]
    rows, packing = fastest(lambda: pack_best_fit(lengths, options.width), options.repeats)
    batches, collating = fastest(lambda: collate(rendered, rows, collator), options.repeats)
    # The rate of rendering counts whole conversations, that of packing what fits a row.
    whole, cut = sum(len(tokenizer.render(messages)[0]) for messages in conversations), sum(lengths)
    assert sum(int((batch["sequence_ids"] > 0).sum()) for batch in batches) == cut
    per_token = rendering / whole + (packing + collating) / cut

    with TemporaryDirectory() as directory:
        theirs = transformers_tokenizer(tokenizer, directory)
    wanted = {"return_dict": True, "return_assistant_tokens_mask": True}
    few = conversations[:FEW]
    templated, templating = fastest(lambda: [theirs.apply_chat_template(m, **wanted) for m in few], options.repeats)

    rates = {
        "render and mask": whole / rendering,
        "tokenize_row: check, render, split": whole / tokenizing,
        "pack": cut / packing,
        "collate": cut / collating,
        "all three": 1 / per_token,
        "tiktoken alone": sum(map(len, encoded)) / alone,
        "apply_chat_template with mask": sum(len(output["input_ids"]) for output in templated) / templating,
    }
    print(f"{len(conversations):,} conversations, {whole:,} tokens, rows of {options.width:,}; one core")
    for name, rate in rates.items():
        print(f"{name:36}{rate / 1e6:8.2f} million tokens/s{rates['all three'] / rate:8.2f}")
    padded = sum(BATCH_SIZE * max(lengths[i : i + BATCH_SIZE]) for i in range(0, len(lengths), BATCH_SIZE))
    print(
        f"padding: {1 - cut / (len(rows) * options.width):.2%} packed; {1 - cut / padded:.0%} in batches of "
        f"{BATCH_SIZE} padded to the longest"
    )


if __name__ == "__main__":
    main()
