"""Load conversations from anywhere, check each row, and tokenise them once.

    Hub, directory, file or built-in ──open_source──▶ rows ──tokenize──▶ pieces ──hold_out──▶ trained on, held out

`datasets` keeps the result on disk, memory-mapped, and finds it again by a fingerprint of what was read, the tokenizer,
`max_seq_len`, `long_conversations`, `columns` and the code involved.

>>> data = DataConfig(dataset=("chatterbot",), train_split="train", eval_split="test", max_seq_len=128)
>>> found = load_data(data, Tokenizer(vocab_size=512), seed=0, want_eval=True)
>>> print(found.reports[1])
chatterbot, test, held out: 44 conversations; 46 pieces; 2,583 tokens; 1,472 (57%) trained on; 44 read as messages
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from config import DataConfig, UserError
from data import formats, sources
from data.pieces import tokenize
from files import printable, replace_file
from tokenizer import Tokenizer


@dataclass
class DataReport:
    """A split of a source on one side: trained on, or held out."""

    # The source's name, shortened to what tells it from the others.
    source: str
    split: str
    # The pieces that are used; their columns: data/pieces.py.
    pieces: datasets.Dataset
    # Names of columns that are not read.
    unused: list[str]
    # Reason to number of rows.
    dropped: dict[str, int]
    # Malformed rows: source, place, reason, error and row.
    malformed: list[dict[str, Any]]
    held_out: bool = False
    # Passes per epoch; not in the counts.
    weight: int = 1
    # Conversations, pieces, tokens, trained on; and unless they are 0: cut, duplicates, "dropped: REASON" and others.
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def conversations(self) -> int:
        return int((column(self.pieces, "piece") == 0).sum())

    def texts(self, name: str) -> dict[str, int]:
        """Return the texts in a column of the pieces, the most frequent first, and how often each occurs."""
        return {text: count for text, count in Counter(column(self.pieces, name)).most_common() if text}

    def check_not_empty(self) -> None:
        if len(self.pieces) == 0:
            causes = ", ".join(f"{count} for {reason}" for reason, count in self.dropped.items())
            rows = f"all {sum(self.dropped.values())} rows were dropped"
            raise UserError(printable(f"{self.source}, split {self.split}: {rows}: {causes}"))

    def facts(self) -> dict[str, str]:
        """Return the counts in words, with the share of tokens that is trained on."""
        facts = {printable(name): f"{count:,}" for name, count in self.counts.items()}
        share = self.counts["trained on"] / max(self.counts["tokens"], 1)
        return facts | {"trained on": f"{facts['trained on']} ({share:.0%})"}

    def __str__(self) -> str:
        side = ", held out" if self.held_out else f", {self.weight} times" if self.weight > 1 else ""
        counts = "; ".join(f"{text} {name}" for name, text in self.facts().items())
        return printable(f"{self.source}, {self.split}{side}: {counts}")


class RunData(NamedTuple):
    """The data that a run trains on and evaluates on. The datasets' columns: data/pieces.py."""

    train: datasets.Dataset
    held_out: datasets.Dataset | None
    # What is trained on, in the order of the sources, then what is held out.
    reports: list[DataReport]
    # What was decided about splits and files, one line each.
    notes: list[str]
    # Malformed rows: source, place, reason, error and row.
    skipped: list[dict[str, Any]]


def load_data(data: DataConfig, tokenizer: Tokenizer, seed: int, want_eval: bool) -> RunData:
    """Return exactly what a run with this configuration sees.

    A source without the split `eval_split` has `eval_fraction` of what it would train on held out. Raises UserError if
    a source cannot be read, has nothing to learn or nothing to evaluate on, and for malformed rows unless they are
    skipped.
    """
    if not sys.stderr.isatty():  # each redrawn bar would be a line of a log
        datasets.disable_progress_bars()
    columns = formats.parse_columns(data.columns)
    named = [parse_source(source) for source in data.dataset]
    shown = short_names([name for name, _ in named])
    notes: list[str] = []
    trained, held_out, to_divide = [], [], []
    for name, weight in named:
        source = sources.open_source(name)
        train_split, eval_split = choose_splits(source, data, want_eval)
        notes += notes_on(source, shown[name], train_split, data, want_eval and not eval_split)
        trained.append(replace(read_split(source, shown[name], train_split, tokenizer, data), weight=weight))
        if eval_split:
            held_out.append(replace(read_split(source, shown[name], eval_split, tokenizer, data), held_out=True))
        elif want_eval:
            to_divide.append(trained[-1])
    malformed = [row for side in trained + held_out for row in side.malformed]
    if malformed and not data.skip_bad_rows:
        raise UserError(describe_malformed(malformed))
    for side in trained + held_out:
        side.check_not_empty()
    if to_divide:
        divided, decided = hold_out(to_divide, data, seed, needed=not held_out)
        held_out, notes = held_out + divided, notes + decided
    drop_copies(held_out, trained)
    add_counts(trained)
    add_counts(held_out)
    reports = trained + held_out
    if columns and not any(f"read as {formats.main_columns(columns)}" in report.counts for report in reports):
        raise UserError(f"columns: no row has {', '.join(columns.values())}")
    return RunData(
        datasets.concatenate_datasets([side.pieces for side in trained for _ in range(side.weight)]),
        datasets.concatenate_datasets([side.pieces for side in held_out]) if held_out else None,
        reports,
        [printable(note) for note in notes],
        malformed,
    )


def column(dataset: datasets.Dataset, name: str) -> np.ndarray:
    """Return a column of numbers or texts, without a loop over rows."""
    values = dataset.data.column(name).to_numpy()
    return values if dataset._indices is None else values[dataset._indices.column(0).to_numpy()]


def keep(dataset: datasets.Dataset, mask: np.ndarray) -> datasets.Dataset:
    """Return the rows where the mask is true."""
    return dataset.select(np.flatnonzero(mask))


# ---------------------------------------------------------------- sources and their splits


def parse_source(source: str) -> tuple[str, int]:
    """Return the name and the number of passes per epoch that "a.jsonl:2" gives. Raises UserError."""
    name, _, weight = source.rpartition(":")
    if not name or not re.fullmatch(r"[-+.\d]+", weight) or Path(source).exists():
        return source, 1
    if not weight.isdecimal() or int(weight) == 0:
        raise UserError(f"dataset {source}: {weight} must be a whole number above 0")
    return name, int(weight)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Map local paths to the shortest ends that tell them apart, and other names to themselves."""
    ends = {name: ["/".join(Path(name).parts[-n:]) for n in range(1, len(Path(name).parts))] for name in names}
    taken = Counter(end for several in ends.values() for end in several)
    local = {name for name in names if Path(name).exists()}
    return {name: next((end for end in ends[name] if taken[end] == 1 and name in local), name) for name in names}


def choose_splits(source: sources.Source, data: DataConfig, want_eval: bool) -> tuple[str, str]:
    """Return the split to train on, the only one if there is no other, and the split to evaluate on, "" if there is
    none. Raises UserError if some of the data should be evaluated on, and none can be."""
    train, splits = data.train_split, source.splits
    if len(splits) == 1 and train not in splits and not re.search(r"[\[+]", train):
        (train,) = splits
    known = splits.keys() & split_names(data.eval_split)
    if want_eval and not known and not data.eval_fraction:
        found = f"{source.name} has no split {data.eval_split!r}, only {', '.join(splits)}"
        raise UserError(f"{found}, and eval_fraction is 0; --eval-steps 0 evaluates nothing")
    return train, data.eval_split if want_eval and known else ""


def split_names(split: str) -> set[str]:
    """Return the names of splits in an expression.

    >>> sorted(split_names("train[5:]+test"))
    ['test', 'train']
    """
    return set(re.sub(r"\[.*?\]", "", split).split("+"))


def notes_on(source: sources.Source, shown: str, train_split: str, data: DataConfig, lacks_eval: bool) -> Iterator[str]:
    """Yield what a person should know about the splits and files of a source, one line each."""
    if train_split != data.train_split:
        yield f"{shown} has no split {data.train_split!r}; its only one is trained on: {train_split!r}"
    rest = [split for split in source.splits if split not in split_names(f"{train_split}+{data.eval_split}")]
    if rest:
        hint = f" (--eval-split {rest[0]})" if lacks_eval else ""
        yield f"{shown}: neither trained on nor evaluated on: split {', '.join(rest)}{hint}"
    yield from (f"{shown}: {note}" for note in source.notes)
    for rows in source.splits.values():
        places = pa.chunked_array([[]], pa.string()) if rows.spans else rows.table.data.column("place")
        several = places.filter(pc.match_substring_regex(places, r"lines \d+ to \d+$"))
        if len(several):
            yield f"{shown}: {len(several):,} rows have fields of several lines, the first in {several[0]}"


def read_split(source: sources.Source, shown: str, split: str, tokenizer: Tokenizer, data: DataConfig) -> DataReport:
    """Return a split of a source with its pieces, not counted yet. Raises UserError if there are no rows."""
    rows, unused = source.select(split).known_columns(formats.parse_columns(data.columns))
    if len(rows) == 0:
        raise UserError(f"{source.name}, split {split}, has no rows")
    pieces = tokenize(rows, tokenizer, data)
    reasons = column(pieces, "reason")
    malformed = []
    for piece in keep(pieces, column(pieces, "error") != ""):
        found = {"source": shown, "place": rows.place(piece["row"]), "row": rows.text(piece["row"])}
        malformed.append(found | {"reason": piece["reason"], "error": piece["error"]})
    dropped = dict(Counter(reasons[reasons != ""]))
    return DataReport(shown, split, keep(pieces, reasons == ""), unused, dropped, malformed)


# ---------------------------------------------------------------- malformed rows

MOST_CAUSES = 8


def describe_malformed(rows: list[dict[str, Any]]) -> str:
    """Return one line per cause, with its first places and what to do."""
    lines = []
    for (source, _), cases in pd.DataFrame(rows).groupby(["source", "reason"], sort=False):
        where = "; ".join(cases["place"][:3]) + ("; ..." if len(cases) > 3 else "")
        counted = f"{len(cases):,} rows, " if len(cases) > 1 else ""
        lines.append(" ".join(printable(f"{source}, {counted}{where}: {cases['error'].iloc[0]}").split()))
    if len(lines) == 1:
        return f"{lines[0]} (--skip-bad-rows drops such rows)"
    if len(lines) > MOST_CAUSES:
        lines[MOST_CAUSES:] = [f"and {len(lines) - MOST_CAUSES:,} more causes"]
    return "\n  ".join([f"{len(rows):,} rows cannot be used (--skip-bad-rows drops them):", *lines])


def write_skipped(run: str | Path, skipped: list[dict[str, Any]]) -> str:
    """Write malformed rows to the run's skipped.jsonl. Return a line that says so."""
    path = Path(run, "skipped.jsonl")
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in skipped))
    return f"{len(skipped):,} malformed rows were skipped; {path} has them, with their reasons"


# ---------------------------------------------------------------- what is held out


def hold_out(sides: list[DataReport], data: DataConfig, seed: int, needed: bool) -> tuple[list[DataReport], list[str]]:
    """Move the conversations whose number in a lottery is below eval_fraction to new, held-out sides. Return those, and
    notes.

    The number depends on the seed and on the text, so a conversation stays on its side when others are added, and
    copies are on the same side. needed: if no number is below eval_fraction, the lowest one is held out.
    """
    numbers = [lottery(column(side.pieces, "content"), seed) for side in sides]
    drawn, limit = np.concatenate(numbers), data.eval_fraction
    if needed and not (drawn < limit).any():
        limit = np.nextafter(drawn.min(initial=1.0), 2.0)
    if len(drawn) and (drawn < limit).all():
        names = ", ".join(side.source for side in sides)
        raise UserError(f"{names}: too few different conversations to hold some out; --eval-steps 0 holds out none")
    divided, notes = [], []
    for side, number in zip(sides, numbers, strict=True):
        held = replace(side, held_out=True, weight=1, pieces=keep(side.pieces, number < limit), dropped={})
        divided += [held] if held.conversations else []
        notes.append(
            f"{side.source} has no split {data.eval_split!r}: {held.conversations:,} of the {side.conversations:,} "
            f"conversations of {side.split} are held out (eval_fraction {data.eval_fraction})"
        )
        side.pieces = keep(side.pieces, number >= limit)
    return divided, notes


def lottery(content: np.ndarray, seed: int) -> np.ndarray:
    """Return evenly distributed numbers from 0 to 1 that depend on nothing else (pandas hashes with splitmix64)."""
    return pd.util.hash_array(content.astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)) / 2.0**64


def drop_copies(held_out: list[DataReport], trained: list[DataReport]) -> None:
    """Drop held-out conversations that also occur in the training data. Raises UserError if nothing is left."""
    seen = np.concatenate([column(side.pieces, "content") for side in trained])
    for side in held_out:
        copies, before = np.isin(column(side.pieces, "content"), seen), side.conversations
        side.pieces = keep(side.pieces, ~copies)
        if copies.any():
            side.dropped = side.dropped | {"also trained on": before - side.conversations}
    if held_out and not any(len(side.pieces) for side in held_out):
        held_out[0].check_not_empty()


# ---------------------------------------------------------------- counting


def add_counts(sides: list[DataReport]) -> None:
    """Count what each side has, vectorised."""
    seen = np.array([], np.int64)
    for side in sides:
        contents = column(side.pieces, "content")[column(side.pieces, "piece") == 0]
        different = np.setdiff1d(contents, seen)
        seen = np.union1d(seen, different)
        unused = Counter(dict.fromkeys(side.unused, side.conversations))
        for names, count in side.texts("unused").items():
            unused.update(dict.fromkeys(names.split("\n"), count))
        usual = {
            "conversations": side.conversations,
            "pieces": len(side.pieces),
            "tokens": int(column(side.pieces, "length").sum()),
            "trained on": int(column(side.pieces, "targets").sum()),
        }
        rare = {
            "cut": int((column(side.pieces, "cut") > 0).sum()),
            "duplicates": len(contents) - len(different),
            "with control tokens as text": int(column(side.pieces, "templated").sum()),
            **{f"read as {columns}": count for columns, count in side.texts("read_as").items()},
            **{f"dropped: {reason}": count for reason, count in side.dropped.items()},
            **{f"not used: {name}": count for name, count in unused.items()},
        }
        side.counts = usual | {name: count for name, count in rare.items() if count}
