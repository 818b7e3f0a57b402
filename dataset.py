"""Conversations from anywhere, checked row by row and tokenised once.

    Hub, directory, file or built-in ──open_split──▶ rows ──read_row──▶ messages ──Tokenizer.render──▶ ids, mask

Everything goes through `datasets`, so the result lies on disk, is read by memory map, and is found again by its
fingerprint: what was read, the tokenizer, `max_seq_len` and the code that all of it passes.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.fingerprint import Hasher

import tokenizer as tokenizer_module
from config import UserError
from engine import formats, sources, vocabulary
from engine.formats import Message, RowError
from tokenizer import Tokenizer


@dataclass
class DataReport:
    """What a split holds, after truncation and without the rows that were dropped."""

    name: str
    split: str
    conversations: int
    tokens: int
    trained_tokens: int
    truncated: int
    # Reason to number of rows.
    dropped: dict[str, int]

    def __str__(self) -> str:
        dropped = "; ".join(f"{count:,} dropped: {reason}" for reason, count in self.dropped.items())
        return (
            f"{self.name}, {self.split}: {self.conversations:,} conversations, {self.tokens:,} tokens, "
            f"{self.trained_tokens / self.tokens:.0%} of them trained on; {self.truncated:,} conversations truncated; "
            + (dropped or "none dropped")
        )


def load_dataset_split(
    name: str, split: str, tokenizer: Tokenizer, max_seq_len: int, num_proc: int = 1, skip_bad_rows: bool = False
) -> tuple[datasets.Dataset, DataReport]:
    """One split, tokenised: columns input_ids (int32 list, at most max_seq_len) and mask (int8 list), and a report.

    name: a Hub name, a local directory, a .jsonl, .json or .parquet file, or a key of `BUILT_IN` (engine/sources.py).
    split: one of its splits, or a part of one, like "train[:95%]". A file's only split is "train".
    skip_bad_rows: drop and count malformed rows; otherwise the first raises UserError with its place and what is wrong.
    Every row kept has something to learn. Raises UserError if there is no such data, or none is left.
    """
    rows = sources.open_split(name, split)
    if len(rows) == 0:
        raise UserError(f"{name}, split {split}, is empty")
    tokenized = tokenize(rows, tokenizer, max_seq_len, num_proc)

    for i, error in zip(tokenized["row"], tokenized["error"], strict=True):
        if error and not skip_bad_rows:
            raise UserError(f"{name}, {sources.place(rows, i, split)}: {error} (--skip-bad-rows drops such rows)")
    reasons = tokenized["reason"][:]
    dropped = dict(Counter(reason for reason in reasons if reason))
    if sum(dropped.values()) == len(rows):
        causes = ", ".join(f"{count} for {reason}" for reason, count in dropped.items())
        raise UserError(f"{name}, split {split}: all {len(rows)} rows were dropped: {causes}")
    if dropped:
        tokenized = tokenized.select([i for i, reason in enumerate(reasons) if not reason]).flatten_indices()

    report = DataReport(
        name=name,
        split=split,
        conversations=len(tokenized),
        tokens=sum(tokenized["length"]),
        trained_tokens=sum(tokenized["targets"]),
        truncated=sum(tokenized["truncated"]),
        dropped=dropped,
    )
    return tokenized.select_columns(["input_ids", "mask"]), report


# ---------------------------------------------------------------- tokenising

STRING, INTEGER = datasets.Value("string"), datasets.Value("int32")
TOKENIZED = datasets.Features(
    {
        # Which row it comes from; a text that is longer than max_seq_len becomes several.
        "row": INTEGER,
        "input_ids": datasets.List(INTEGER),
        "mask": datasets.List(datasets.Value("int8")),
        "length": INTEGER,
        # Tokens that are learned: the first of a row is never a target.
        "targets": INTEGER,
        "truncated": datasets.Value("bool"),
        # Why the row is dropped, or nothing; and for a malformed row, what is wrong with it.
        "reason": STRING,
        "error": STRING,
    }
)
# What is tokenised depends on their code.
CODE = (sources, formats, tokenizer_module, vocabulary)


def tokenize(rows: datasets.Dataset, tokenizer: Tokenizer, max_seq_len: int, num_proc: int) -> datasets.Dataset:
    """Every row as TOKENIZED has it; from the cache if that was done before."""
    code = [Path(file).read_bytes() for file in (__file__, *(str(module.__file__) for module in CODE))]
    fingerprint = Hasher.hash([rows._fingerprint, tokenizer.fingerprint(), max_seq_len, *code])
    cache = Path(datasets.config.HF_DATASETS_CACHE, "sft-from-scratch")
    cache.mkdir(parents=True, exist_ok=True)
    return rows.map(
        tokenize_batch,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        fn_kwargs={"tokenizer": tokenizer, "max_seq_len": max_seq_len},
        num_proc=num_proc if len(rows) > 5000 and num_proc > 1 else None,  # processes take a second to start
        features=TOKENIZED,
        new_fingerprint=fingerprint,
        cache_file_name=str(cache / f"{fingerprint}.arrow"),
        desc="Tokenising",
    )


def tokenize_batch(
    batch: dict[str, list], indices: list[int], tokenizer: Tokenizer, max_seq_len: int
) -> dict[str, list]:
    """Rows, and their numbers in the dataset, to the columns of TOKENIZED."""
    out: dict[str, list] = defaultdict(list)
    for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
        for piece in tokenize_row(dict(zip(batch, values, strict=True)), tokenizer, max_seq_len):
            out["row"].append(index)
            for column, value in piece.items():
                out[column].append(value)
    return out


def tokenize_row(row: dict[str, Any], tokenizer: Tokenizer, max_seq_len: int) -> Iterator[dict[str, Any]]:
    """The pieces that a row becomes, or an empty one that says what is wrong with it."""
    try:
        content = formats.read_row(formats.parse_line(row["json"]) if row.keys() == sources.LINES.keys() else row)
    except RowError as problem:
        yield piece([], [], reason=problem.reason, error=str(problem))
        return
    if isinstance(content, str):
        yield from tokenize_document(content, tokenizer, max_seq_len)
    else:
        yield tokenize_conversation(content, tokenizer, max_seq_len)


def tokenize_conversation(messages: list[Message], tokenizer: Tokenizer, max_seq_len: int) -> dict[str, Any]:
    """Its first max_seq_len tokens."""
    ids, mask = tokenizer.render(shorten(messages, (max_seq_len + 1) * tokenizer.max_token_bytes))
    kept = mask[:max_seq_len]
    if not any(kept[1:]):
        return piece([], [], len(ids) > max_seq_len, reason="nothing to learn within max_seq_len tokens")
    return piece(ids[:max_seq_len], kept, len(ids) > max_seq_len)


def shorten(messages: list[Message], room: int) -> list[Message]:
    """The beginning of a conversation that has at most `room` characters, so that a row of 50 MB costs no more."""
    if sum(len(message["content"]) for message in messages) <= room:
        return messages
    kept = []
    for message in messages:
        kept.append({"role": message["role"], "content": message["content"][: max(room, 0)]})
        room -= len(message["content"])
        if room <= 0:
            break
    return kept


def tokenize_document(text: str, tokenizer: Tokenizer, max_seq_len: int) -> Iterator[dict[str, Any]]:
    """All of it, ended by a control token, in pieces of at most max_seq_len tokens; every token is trained on."""
    ids = [*tokenizer.encode(text), tokenizer.pad_token_id]
    for start in range(0, max(len(ids) - 1, 1), max_seq_len):  # no piece of a single token, unless there is no other
        part = ids[start : start + max_seq_len]
        yield piece(part, [1] * len(part), reason="" if len(part) > 1 else "a single token")


def piece(
    ids: list[int], mask: list[int], truncated: bool = False, reason: str = "", error: str = ""
) -> dict[str, Any]:
    """One of TOKENIZED's entries, without its row."""
    return {
        "input_ids": ids,
        "mask": mask,
        "length": len(ids),
        "targets": sum(mask[1:]),
        "truncated": truncated,
        "reason": reason,
        "error": error,
    }
