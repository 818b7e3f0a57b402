"""What a run sees of its data, for a person at a terminal: a table, histograms, coloured tokens and rows."""

import itertools
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from config import TrainConfig
from data.report import DataReport, too_few_rows

if TYPE_CHECKING:
    import datasets

    from datacollator import RowStream
    from dataset import RunData
    from tokenizer import Tokenizer


# ---------------------------------------------------------------- the table


def table(data: "RunData", train: "RowStream", config: TrainConfig, processes: int = 1) -> str:
    """A column for each source and side, then what follows for the run."""
    columns = [report.facts() for report in data.reports]
    names = list(dict.fromkeys(name for column in columns for name in column))
    names.sort(key=lambda name: (name.startswith("dropped: "), name.startswith("not used: ")))
    cells = [[column.get(name, "-") for column in columns] for name in names]
    heads = [f"{report.source}\n{report.split}{', held out' * report.held_out}".split("\n") for report in data.reports]
    widths = [max(map(len, column)) for column in zip(*cells, *zip(*heads, strict=True), strict=True)]
    first = max(map(len, names))
    rows = [("", *line) for line in zip(*heads, strict=True)] + [
        (name, *row) for name, row in zip(names, cells, strict=True)
    ]
    lines = [
        "  ".join((f"{row[0]:{first}}", *(f"{c:>{w}}" for c, w in zip(row[1:], widths, strict=True)))) for row in rows
    ]
    return "\n".join([*(line.rstrip() for line in lines), "", course(train, config, processes)])


def course(train: "RowStream", config: TrainConfig, processes: int) -> str:
    """Rows, steps and epochs that follow."""
    rows, width, batch = train.rows_per_epoch, train.collator.max_seq_len, config.batch
    rows_per_step = batch.rows_per_step(processes)
    steps = batch.max_steps or batch.remaining_steps(rows, processes)
    padding = 1 - train.lengths.sum() / (rows * width)
    packed = f" ({padding:.1%} padding)" if config.data.packing else ", a conversation each"
    epochs = f"{steps:,} steps of {rows_per_step} rows are {steps * rows_per_step / rows:.3g} epochs"
    problem = too_few_rows(config, rows, rows_per_step)
    return f"an epoch has {rows:,} rows of up to {width:,} tokens{packed}; {problem or epochs}"


# ---------------------------------------------------------------- histograms


def histogram(values: np.ndarray, title: str, width: int = 50, bins: int = 10) -> str:
    """How many of the values (not negative) lie in each of some equal ranges, as bars for the terminal."""
    top = max(int(values.max(initial=1)), 1)
    edges = np.unique(np.linspace(0, top + 1, min(bins, top + 1) + 1).round().astype(int))
    counts, _ = np.histogram(values, edges)
    labels = [
        f"{low:,} to {high - 1:,}" if high - low > 1 else f"{low:,}" for low, high in itertools.pairwise(edges.tolist())
    ]
    lines = [title]
    for label, count in zip(labels, counts.tolist(), strict=True):
        lines.append(f"{label:>18} {bar(count / max(counts.max(), 1), width)} {count:,}")
    return "\n".join(lines)


def bar(share: float, width: int) -> str:
    """In eighths of a character; what is more than nothing can be seen."""
    eighths = max(round(share * width * 8), int(share > 0))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


# ---------------------------------------------------------------- rows


class Share(NamedTuple):
    """A source's pieces on one side, each once however often they are passed an epoch."""

    report: DataReport
    # That side's, and where in it they stand.
    dataset: "datasets.Dataset"
    places: range

    def pieces_of(self, row: int) -> list[int]:
        """Where the pieces of a row of the source stand; the first row is 0."""
        from dataset import column

        rows = column(self.dataset, "row")[self.places.start : self.places.stop]
        return (self.places.start + np.flatnonzero(rows == row)).tolist()

    def describe(self, place: int, tokenizer: "Tokenizer") -> str:
        """The piece there, with where it comes from, in colour."""
        piece, report = self.dataset[place], self.report
        where = f"{report.source}, {report.split}, row {piece['row'] + 1}, piece {piece['piece'] + 1}"
        facts = f"{piece['length']:,} tokens, {piece['targets']:,} of them to learn"
        text = colour(tokenizer, piece["input_ids"], piece["mask"])
        return f"{where}, {'held out' if report.held_out else 'trained on'}: {facts}\n{text}"


def shares(data: "RunData") -> list[Share]:
    """In the order of the reports, as load_data puts sources one after another."""
    found, ends = [], {False: 0, True: 0}
    for report in data.reports:
        side = data.held_out if report.held_out else data.train
        start, ends[report.held_out] = (
            ends[report.held_out],
            ends[report.held_out] + report.counts["pieces"] * report.weight,
        )
        if side:
            found.append(Share(report, side, range(start, start + report.counts["pieces"])))
    return found


def pick(lengths: Sequence[int] | np.ndarray, longest: bool, shortest: bool, random: int, seed: int) -> list[int]:
    """The longest, the shortest and some random ones; if none is wanted, one that fits on a screen."""
    lengths = np.asarray(lengths)
    found = [int(lengths.argmax())] * longest + [int(lengths.argmin())] * shortest
    number = min(random, len(lengths))
    found += np.random.default_rng(seed).choice(len(lengths), number, replace=False).tolist()
    return list(dict.fromkeys(found)) or [int(np.abs(lengths - 150).argmin())]


# ---------------------------------------------------------------- tokens in colour

# Two shades each, so that neighbouring tokens can be told apart.
TRAINED, CONTEXT = ("\x1b[30;42m", "\x1b[30;102m"), ("\x1b[37;100m", "\x1b[37;40m")
FAINT, RESET = "\x1b[2m", "\x1b[0m"
LEGEND = f"{TRAINED[0]} trained {TRAINED[1]} on {RESET} {CONTEXT[0]} only {CONTEXT[1]} read {RESET}"


def on_screen(text: str) -> str:
    """As it is for a terminal, else without colours; FORCE_COLOR keeps them, NO_COLOR (https://no-color.org) never."""
    wanted = sys.stdout.isatty() or os.environ.get("FORCE_COLOR")
    return text if wanted and not os.environ.get("NO_COLOR") else re.sub(r"\x1b\[[\d;]*m", "", text)


def printable(tokenizer: "Tokenizer", ids: list[int]) -> str:
    return tokenizer.decode(ids).replace("\n", "↵")


def colour(tokenizer: "Tokenizer", ids: Iterable[int], mask: Iterable[int], show_ids: bool = False) -> str:
    """A conversation for the terminal. The tokens that a character is cut into are shown together."""
    blocks: list[str] = []
    together: list[int] = []
    for i, trained in zip(ids, mask, strict=True):
        together.append(int(i))
        text = printable(tokenizer, together)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(together) < 4:
            continue
        number = f"{FAINT}{'+'.join(map(str, together))}{RESET} " if show_ids else ""
        line_break = "\n" if "↵" in text else ""
        blocks.append(f"{(TRAINED if trained else CONTEXT)[len(blocks) % 2]}{text}{RESET}{number}{line_break}")
        together = []
    return "".join(blocks) + printable(tokenizer, together)


def draw_row(lengths: Sequence[int], capacity: int, width: int = 100) -> str:
    """A packed row for the terminal: a block for each conversation with its length, and dots for padding."""
    ends = [round(end * width / capacity) for end in itertools.accumulate(lengths)]
    blocks, start = "", 0
    for i, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        text = str(length) if len(str(length)) <= end - start else ""
        blocks += f"\x1b[30;{46 if i % 2 else 42}m{text:^{end - start}}{RESET}"
        start = end
    return blocks + "·" * (width - start)
