"""What was found in a run's data, as counts: a line per source on the terminal, and numbers for show.py."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from config import TrainConfig
from files import printable, replace_file


class DataReport(NamedTuple):
    """Counts of one pass over a source, on one side: trained on, or held out."""

    # The source's name, shortened to what tells it from the others.
    source: str
    split: str
    held_out: bool
    # Passes per epoch; not in the counts.
    weight: int
    # Conversations, pieces, tokens, trained on; and unless they are 0: cut, duplicates, "dropped: REASON" and others.
    counts: dict[str, int]

    def facts(self) -> dict[str, str]:
        """Return the counts in words, with the share of tokens that is trained on."""
        facts = {printable(name): f"{count:,}" for name, count in self.counts.items()}
        share = self.counts["trained on"] / max(self.counts["tokens"], 1)
        return facts | {"trained on": f"{facts['trained on']} ({share:.0%})"}

    def __str__(self) -> str:
        side = ", held out" if self.held_out else f", {self.weight} times" if self.weight > 1 else ""
        counts = "; ".join(f"{text} {name}" for name, text in self.facts().items())
        return printable(f"{self.source}, {self.split}{side}: {counts}")


def too_few_rows(config: TrainConfig, rows: int, rows_per_step: int) -> str:
    """Return why a run with this number of rows per epoch is refused, or nothing if it has a step."""
    names = ", ".join(config.data.dataset)
    too_few = f"{names}: {rows} rows do not fill one step of {rows_per_step}"
    return f"{too_few}; lower batch_size or gradient_accumulation_steps" if rows < rows_per_step else ""


def write_skipped(run: str | Path, skipped: list[dict[str, Any]]) -> str:
    """Write malformed rows to the run's skipped.jsonl. Return a line that says so."""
    path = Path(run, "skipped.jsonl")
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in skipped))
    return f"{len(skipped):,} malformed rows were skipped; {path} has them, with their reasons"
