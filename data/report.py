"""What was found in a run's data, as counts: a line per source on the terminal, and numbers for show.py."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import TrainConfig
from files import printable, replace_file


@dataclass
class DataReport:
    """Counts of one pass over a source, on one side: trained on, or held out."""

    # The source's name, shortened to what tells it from the others.
    source: str
    split: str
    held_out: bool
    # Passes per epoch; not in the counts below.
    weight: int
    # Rows that are used, and the pieces that they become.
    conversations: int
    pieces: int
    # Tokens of all pieces, and those of them that are trained on.
    tokens: int
    trained_tokens: int
    # Conversations that are cut off, or that have a turn longer than a piece.
    cut: int
    # Conversations that say the same as an earlier one.
    duplicates: int
    # Rows that contain control tokens of a chat template as text.
    templated: int
    # Reason to number of rows.
    dropped: dict[str, int]
    # Columns that rows were read from, like "question + answer", to number of rows.
    read_as: dict[str, int]
    # Columns and fields that play no part.
    unused: list[str]

    @property
    def rows(self) -> int:
        """Number of the source's rows on this side."""
        return self.conversations + sum(self.dropped.values())

    def __str__(self) -> str:
        facts = [
            f"{self.conversations:,} conversations" + (f" in {self.pieces:,} pieces" if self.is_split else ""),
            f"{self.tokens:,} tokens, {self.trained_tokens / max(self.tokens, 1):.0%} of them trained on",
            f"read as {', '.join(self.read_as) or 'nothing'}",
        ]
        if self.cut:
            facts.append(f"{self.cut:,} conversations cut")
        if self.duplicates:
            facts.append(f"{self.duplicates:,} duplicates")
        if self.templated:
            facts.append(f"{self.templated:,} rows with control tokens as text, which is how they are learned")
        facts += [f"{count:,} dropped: {reason}" for reason, count in self.dropped.items()]
        if self.unused:
            facts.append(f"not used: {', '.join(self.unused)}")
        side = ", held out" if self.held_out else f", {self.weight} times" if self.weight > 1 else ""
        return printable(f"{self.source}, {self.split}{side}: {'; '.join(facts)}")

    @property
    def is_split(self) -> bool:
        return self.pieces > self.conversations


def too_few_rows(config: TrainConfig, rows: int, rows_per_step: int) -> str:
    """Return why a run with this number of rows per epoch is refused, or nothing if it has a step."""
    if rows >= rows_per_step:
        return ""
    names = ", ".join(config.data.dataset)
    return (
        f"{names}: its {rows} rows do not fill one step of {rows_per_step}; lower batch_size or "
        "gradient_accumulation_steps"
    )


def write_skipped(run: str | Path, skipped: list[dict[str, Any]]) -> str:
    """Write malformed rows to the run's skipped.jsonl. Return a line that says so."""
    path = Path(run, "skipped.jsonl")
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in skipped))
    return f"{len(skipped):,} malformed rows were skipped; {path} has them, with their reasons"
