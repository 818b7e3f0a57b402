"""Conversations from anywhere, checked row by row and tokenised once.

    Hub, directory, file or built-in ──open_splits──▶ rows ──tokenize_row──▶ pieces ──hold_out──▶ trained on, held out

Everything goes through `datasets`, so the result lies on disk, is read by memory map, and is found again by its
fingerprint: what was read, the tokenizer, `max_seq_len`, `long_conversations` and the code that all of it passes.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from config import DataConfig, UserError, check
from data import sources, text_files
from data.pieces import SPEAKERS, tokenize
from data.report import DataReport
from tokenizer import Tokenizer


class Data(NamedTuple):
    """What a run trains on and evaluates on. The datasets' columns: data/pieces.py."""

    train: datasets.Dataset
    held_out: datasets.Dataset | None
    # For each source what is trained on, then for each what is held out.
    reports: list[DataReport]
    # What was decided about splits, a line each.
    notes: list[str]
    # Whether there was a source without the split to evaluate on, of which eval_fraction was held out.
    divided: bool
    # Malformed rows: source, place, error and row.
    skipped: list[dict[str, Any]]


def load_data(data: DataConfig, tokenizer: Tokenizer, seed: int, want_eval: bool) -> Data:
    """Exactly what a run with this configuration sees.

    A source without a split `eval_split` has `eval_fraction` of what it would train on held out. Raises UserError where
    there is no such data or nothing of it is left, where training and evaluation overlap, and for malformed rows unless
    they are to be skipped.
    """
    trained, held_out, to_divide, notes = [], [], [], []
    for source in data.dataset:
        name, weight = parse_source(source)
        splits = sources.open_splits(name)
        train_split, eval_split = choose_splits(name, splits, data, want_eval)
        if train_split != data.train_split:
            notes.append(f"{name} has no split {data.train_split!r}; its only one, {train_split!r}, is trained on")
        notes += unused_parts(name, splits, f"{train_split}+{data.eval_split}", want_eval and not eval_split)
        trained.append(read_part(name, train_split, tokenizer, data, weight))
        if eval_split:
            held_out.append(replace(read_part(name, eval_split, tokenizer, data), held_out=True))
        elif want_eval:
            to_divide.append(trained[-1])
    skipped = bad_rows(trained + held_out, data.skip_bad_rows)
    for part in trained + held_out:
        part.check_not_empty()
    if to_divide:
        divided, said = hold_out(to_divide, data, seed, needed=not held_out)
        held_out, notes = held_out + divided, notes + said
    drop_copies(held_out, trained)
    return Data(
        datasets.concatenate_datasets([part.dataset() for part in trained for _ in range(part.weight)]),
        datasets.concatenate_datasets([part.dataset() for part in held_out]) if held_out else None,
        make_reports(trained) + (make_reports(held_out) if held_out else []),
        notes,
        bool(to_divide),
        skipped,
    )


def load_dataset_split(
    name: str,
    split: str,
    tokenizer: Tokenizer,
    max_seq_len: int,
    num_proc: int = 1,
    skip_bad_rows: bool = False,
    long_conversations: Literal["split", "truncate"] = "truncate",
) -> tuple[datasets.Dataset, DataReport]:
    """One split of one source, and a report. Arguments and errors as DataConfig and `load_data` have them."""
    data = DataConfig(
        max_seq_len=max_seq_len,
        num_proc=num_proc,
        skip_bad_rows=skip_bad_rows,
        long_conversations=long_conversations,
    )
    part = read_part(name, split, tokenizer, data)
    bad_rows([part], skip_bad_rows)
    part.check_not_empty()
    return part.dataset(), make_reports([part])[0]


def column(dataset: datasets.Dataset, name: str) -> np.ndarray:
    """A column of numbers, without a loop over rows."""
    values = dataset.data.column(name).to_numpy()
    return values if dataset._indices is None else values[dataset._indices.column(0).to_numpy()]


# ---------------------------------------------------------------- sources and their splits


def parse_source(source: str) -> tuple[str, int]:
    """ "a.jsonl:2" to its name and how often it is passed an epoch. Raises UserError."""
    name, _, weight = source.rpartition(":")
    if not name or not re.fullmatch(r"[-+.\d]+", weight) or Path(source).exists():
        return source, 1
    check(weight.isdecimal() and int(weight) > 0, f"dataset {source}: {weight} must be a whole number above 0")
    return name, int(weight)


def choose_splits(name: str, splits: dict[str, datasets.Dataset], data: DataConfig, want_eval: bool) -> tuple[str, str]:
    """The split to train on, the only one if there is no other; and that to evaluate on, "" if there is none.
    Raises UserError where they overlap, or do not exist."""
    train, evaluation = data.train_split, data.eval_split
    if len(splits) == 1 and train not in splits and not re.search(r"[\[+]", train):
        (train,) = splits
    known = splits.keys() & split_names(evaluation)
    if not want_eval or (data.eval_fraction and not known):
        return train, ""
    nothing = f"{name} has no split {evaluation!r}, only {', '.join(splits)}, and eval_fraction is 0"
    check(bool(known), f"{nothing}; --eval-steps 0 evaluates nothing")
    for trained_split, trained in sources.parts_of(name, splits, train):
        for split, rows in sources.parts_of(name, splits, evaluation):
            apart = trained_split != split or max(rows.start, trained.start) >= min(rows.stop, trained.stop)
            check(apart, f"{name}: train_split {train} and eval_split {evaluation} overlap; name parts, like train[5:]")
    return train, evaluation


def split_names(split: str) -> set[str]:
    """Of "train[5:]+test": train and test."""
    return set(re.sub(r"\[.*?\]", "", split).split("+"))


def unused_parts(name: str, splits: Iterable[str], used: str, lacks_eval: bool) -> Iterator[str]:
    """Which splits and files of a source play no part, a line each."""
    rest = [split for split in splits if split not in split_names(used)]
    if rest:
        hint = f" (--eval-split {rest[0]})" * lacks_eval
        yield f"{name}: neither trained on nor evaluated on: split {', '.join(rest)}{hint}"
    files = sources.unread_files(name)
    if files:
        more = f" and {len(files) - MOST_LISTED:,} more" * (len(files) > MOST_LISTED)
        yield f"{name}: not read: {', '.join(files[:MOST_LISTED])}{more}"


@dataclass
class Part:
    """A split of a source, tokenised, and which of its pieces are used."""

    source: str
    split: str
    weight: int
    rows: datasets.Dataset
    pieces: datasets.Dataset
    # Numbers of pieces.
    used: np.ndarray
    # Reason to number of rows.
    dropped: dict[str, int]
    # Tokens to learn that are in no piece.
    lost: int
    held_out: bool = False

    def column(self, name: str) -> np.ndarray:
        """Of the pieces that are used."""
        return column(self.pieces, name)[self.used]

    @property
    def conversations(self) -> int:
        return int((self.column("piece") == 0).sum())

    def dataset(self) -> datasets.Dataset:
        return self.pieces.select(self.used)

    def check_not_empty(self) -> None:
        causes = ", ".join(f"{count} for {reason}" for reason, count in self.dropped.items())
        number = sum(self.dropped.values())
        check(len(self.used) > 0, f"{self.source}, split {self.split}: all {number} rows were dropped: {causes}")


def read_part(name: str, split: str, tokenizer: Tokenizer, data: DataConfig, weight: int = 1) -> Part:
    """A split of a source with all its pieces. Raises UserError if there are no rows."""
    rows = sources.open_split(name, split)
    check(len(rows) > 0, f"{name}, split {split}, is empty")
    tokenized = tokenize(rows, tokenizer, data.max_seq_len, data.long_conversations, data.num_proc)
    reasons = tokenized.data.column("reason")
    dropped = dict(Counter(pc.filter(reasons, pc.not_equal(reasons, "")).to_pylist()))
    used = np.flatnonzero(pc.equal(reasons, "").to_numpy())
    lost = int(column(tokenized, "lost").sum())
    return Part(name, split, weight, rows, tokenized, used, dropped, lost)


# ---------------------------------------------------------------- malformed rows

MOST_LISTED = 20


def bad_rows(parts: list[Part], skip: bool) -> list[dict[str, Any]]:
    """Source, place, error and row of each. Raises UserError that lists them, unless they are to be skipped."""
    found = []
    for part in parts:
        errors = part.pieces.data.column("error")
        table = pa.table({"row": part.pieces.data.column("row"), "error": errors}).filter(pc.not_equal(errors, ""))
        numbers, said = table.to_pydict().values()
        places = sources.places(part.source, part.split, part.rows, numbers) if numbers else []
        found += [(part, *row) for row in zip(numbers, places, said, strict=True)]
    listed = [f"{part.source}, {place}: {error}" for part, _, place, error in found[:MOST_LISTED]]
    if len(found) == 1 and not skip:
        raise UserError(f"{listed[0]} (--skip-bad-rows drops such rows)")
    rest = [f"and {len(found) - MOST_LISTED:,} more"] * (len(found) > MOST_LISTED)
    problems = "\n  ".join([f"{len(found):,} rows cannot be used (--skip-bad-rows drops them):", *listed, *rest])
    check(skip or not found, problems)
    return [
        {"source": part.source, "place": place, "error": error, "row": text_files.as_text(part.rows[i])}
        for part, i, place, error in found
    ]


# ---------------------------------------------------------------- what is held out


def hold_out(parts: list[Part], data: DataConfig, seed: int, needed: bool) -> tuple[list[Part], list[str]]:
    """Divide the parts: of each another one, with the conversations whose number in a lottery is below eval_fraction.

    The number depends on the seed and on what is said, so that a conversation stays on its side when others come, and
    copies lie on the same side. needed: if so few conversations would leave none, the lowest number is held out.
    """
    numbers = [lottery(part.column("content"), seed) for part in parts]
    drawn, limit = np.concatenate(numbers), data.eval_fraction
    if needed and not (drawn < limit).any():
        limit = np.nextafter(drawn.min(initial=1.0), 2.0)
    names = ", ".join(part.source for part in parts)
    too_few = f"{names}: too few different conversations to hold some out of; --eval-steps 0 trains on all of them"
    check(len(drawn) == 0 or not (drawn < limit).all(), too_few)
    divided, said = [], []
    for part, number in zip(parts, numbers, strict=True):
        held = replace(part, weight=1, used=part.used[number < limit], dropped={}, held_out=True)
        held.lost = int(held.column("lost").sum())
        total, part.used, part.lost = part.conversations, part.used[number >= limit], part.lost - held.lost
        divided += [held] * (held.conversations > 0)
        said.append(
            f"{part.source} has no split {data.eval_split!r}: {held.conversations:,} of the {total:,} conversations of "
            f"{part.split} are held out (eval_fraction {data.eval_fraction})"
        )
    return divided, said


def lottery(content: np.ndarray, seed: int) -> np.ndarray:
    """Evenly distributed numbers from 0 to 1 that depend on nothing else (splitmix64,
    https://doi.org/10.1145/2660193.2660195)."""
    x = content.astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) / 2.0**64


def drop_copies(held_out: list[Part], trained: list[Part]) -> None:
    """Of what is held out, whatever is trained on as well. Raises UserError if nothing is left."""
    seen = np.concatenate([part.column("content") for part in trained])
    for part in held_out:
        copies, before = np.isin(part.column("content"), seen), part.conversations
        part.used = part.used[~copies]
        if copies.any():
            part.dropped = part.dropped | {"also trained on": before - part.conversations}
    if held_out and not any(len(part.used) for part in held_out):
        held_out[0].check_not_empty()


# ---------------------------------------------------------------- counting


def make_reports(parts: list[Part]) -> list[DataReport]:
    """Of each part, without a loop over its rows."""
    contents = [part.column("content")[part.column("piece") == 0] for part in parts]
    ends = np.cumsum([len(content) for content in contents])
    _, first = np.unique(np.concatenate(contents), return_index=True)  # of several copies
    different = np.diff(np.searchsorted(np.sort(first), [0, *ends]))
    return [
        DataReport(
            source=part.source,
            split=part.split,
            held_out=part.held_out,
            weight=part.weight,
            conversations=part.conversations,
            pieces=len(part.used),
            turns=int(part.column("turns").sum()),
            tokens=int(part.column("length").sum()),
            speakers={speaker: int(part.column(speaker).sum()) for speaker in SPEAKERS},
            trained_tokens=int(part.column("targets").sum()),
            lost_tokens=part.lost,
            cut=int((part.column("cut") > 0).sum()),
            longest=int(part.column("tokens").max(initial=0)),
            duplicates=part.conversations - int(number),
            dropped=part.dropped,
            unused=unused_fields(part),
        )
        for part, number in zip(parts, different, strict=True)
    ]


def unused_fields(part: Part) -> dict[str, int]:
    """Fields that play no part, the most frequent first, and how many rows have them."""
    names = part.pieces.data.column("unused").combine_chunks().take(pa.array(part.used))
    fields: Counter[str] = Counter()
    for entry in pc.value_counts(names).to_pylist():
        fields.update(dict.fromkeys(filter(None, entry["values"].split("\n")), entry["counts"]))
    return dict(fields.most_common())
