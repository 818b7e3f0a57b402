"""What a run sees of its data, counted: a line for each source on the terminal, and numbers for show.py."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import TrainConfig
from files import replace_file


@dataclass
class DataReport:
    """What one pass over a source has, on one side: to train on, or held out."""

    source: str
    split: str
    held_out: bool
    # How often it is passed an epoch; not in the numbers below.
    weight: int
    # Rows that are used, the pieces that they become, and their turns.
    conversations: int
    pieces: int
    turns: int
    # Tokens of all pieces, and by speaker; those that are learned; the assistant's that no piece learns.
    tokens: int
    speakers: dict[str, int]
    trained_tokens: int
    lost_tokens: int
    # Conversations that are cut off, or that have a turn longer than a row; and the tokens of the longest, uncut.
    cut: int
    longest: int
    # Conversations that say the same as an earlier one.
    duplicates: int
    # Reason to number of rows.
    dropped: dict[str, int]
    # Field that plays no part to number of rows that have it.
    unused: dict[str, int]

    @property
    def rows(self) -> int:
        """Those of the source on this side."""
        return self.conversations + sum(self.dropped.values())

    def __str__(self) -> str:
        lost = self.lost_tokens / max(self.lost_tokens + self.trained_tokens, 1)
        of = f"{self.source}, {self.split}{', held out' * self.held_out}{f', {self.weight} times' * (self.weight > 1)}"
        facts = (
            (True, f"{self.conversations:,} conversations{f' in {self.pieces:,} pieces' * self.is_split}"),
            (True, f"{self.tokens:,} tokens, {self.trained_tokens / max(self.tokens, 1):.0%} of them trained on"),
            (self.lost_tokens, f"{self.lost_tokens:,} tokens to learn ({lost:.0%}) lost to max_seq_len"),
            (self.cut, f"{self.cut:,} conversations cut"),
            (self.duplicates, f"{self.duplicates:,} duplicates"),
            *((count, f"{count:,} dropped: {reason}") for reason, count in self.dropped.items()),
            (self.unused, f"not used: {', '.join(self.unused)}"),
        )
        return f"{of}: " + "; ".join(text for said, text in facts if said)

    @property
    def is_split(self) -> bool:
        return self.pieces > self.conversations


def too_few_rows(config: TrainConfig, rows: int, rows_per_step: int) -> str:
    """Why a run with so many rows an epoch is refused; nothing if it has a step."""
    short = f"{', '.join(config.data.dataset)}: its {rows} rows don't fill one step of {rows_per_step}"
    return f"{short}; lower batch_size or gradient_accumulation_steps" if rows < rows_per_step else ""


def write_skipped(run: str | Path, skipped: list[dict[str, Any]]) -> str:
    """Malformed rows into the run's skipped.jsonl, and a line that says so."""
    path = Path(run, "skipped.jsonl")
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in skipped))
    return f"{len(skipped):,} malformed rows were skipped; {path} has them, with their reasons"
