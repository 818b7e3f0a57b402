"""Data in the terminal: a table of what a run trains on, histograms, tokens and packed rows in colour."""

import itertools
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from config import TrainConfig
from files import printable

if TYPE_CHECKING:
    from datacollator import RowStream
    from dataset import RunData
    from tokenizer import Tokenizer


# ---------------------------------------------------------------- tables


def table(data: "RunData", train: "RowStream", config: TrainConfig, processes: int = 1) -> str:
    """Return a column of counts per source and side, then the rows, steps and epochs of the run."""
    counts = pd.DataFrame([report.facts() for report in data.reports]).T
    sides = [(report.source, f"{report.split}{' (held out)' if report.held_out else ''}") for report in data.reports]
    counts.columns = pd.MultiIndex.from_tuples(sides)
    order = sorted(counts.index, key=lambda name: (name.startswith("dropped: "), name.startswith("not used: ")))
    text = printable(counts.loc[order].to_string(na_rep="-", sparsify=False))
    return f"{text}\n\n{course(train, config, processes)}"


def course(train: "RowStream", config: TrainConfig, processes: int) -> str:
    """Return how many rows an epoch has, and how many epochs the run's steps are."""
    rows, width, batch = train.rows_per_epoch, train.collator.max_seq_len, config.batch
    rows_per_step = batch.rows_per_step(processes)
    steps = batch.max_steps or batch.remaining_steps(rows, processes)
    padding = 1 - train.lengths.sum() / (rows * width)
    packed = f" ({padding:.1%} padding)" if config.data.packing else ", one conversation each"
    epochs = f"{steps:,} steps of {rows_per_step} rows are {steps * rows_per_step / rows:.3g} epochs"
    problem = config.too_few_rows(rows, processes)
    return f"an epoch has {rows:,} rows of up to {width:,} tokens{packed}; {problem or epochs}"


def spread(columns: dict[str, np.ndarray]) -> str:
    """Return a table of the smallest and largest value, the median and the deciles next to it."""
    names = {0.0: "least", 0.1: "10%", 0.5: "median", 0.9: "90%", 1.0: "most"}
    return pd.DataFrame(columns).quantile(list(names)).T.rename(columns=names).map("{:,.0f}".format).to_string()


# ---------------------------------------------------------------- tokens and rows in colour

# Two shades each, so that neighbouring tokens can be told apart.
TRAINED, CONTEXT = ("\x1b[30;42m", "\x1b[30;102m"), ("\x1b[37;100m", "\x1b[37;40m")
FAINT, RESET = "\x1b[2m", "\x1b[0m"
LEGEND = f"{TRAINED[0]} trained {TRAINED[1]} on {RESET} {CONTEXT[0]} only {CONTEXT[1]} read {RESET}"


def on_screen(text: str) -> str:
    """Return text without colours unless it goes to a terminal; FORCE_COLOR keeps them, NO_COLOR removes them
    (https://no-color.org)."""
    wanted = sys.stdout.isatty() or os.environ.get("FORCE_COLOR")
    return text if wanted and not os.environ.get("NO_COLOR") else re.sub(r"\x1b\[[\d;]*m", "", text)


def colour(tokenizer: "Tokenizer", ids: Iterable[int], mask: Iterable[int], show_ids: bool = False) -> str:
    """Return a conversation with its tokens in colour. Tokens that share a character are shown together. Text that
    spells a control token gets a backslash: \\<|im_end|>."""
    blocks: list[tuple[str, list[int], int]] = []  # text, its tokens, whether they are trained on
    together: list[int] = []
    for token, trained in zip(ids, mask, strict=True):
        together.append(int(token))
        text = printable(tokenizer.decode(together))
        if not text.endswith("\N{REPLACEMENT CHARACTER}") or len(together) == 4:
            blocks.append((text, together, trained))
            together = []
    if together:
        blocks.append((printable(tokenizer.decode(together)), together, trained))
    control = set(tokenizer.control_ids.values())
    names = "|".join(map(re.escape, tokenizer.control_ids))
    written = "".join("\0" * len(text) if tokens[0] in control else text for text, tokens, _ in blocks)
    spelled = {match.start() for match in re.finditer(names, written)}
    shown, start = "", 0
    for i, (text, tokens, trained) in enumerate(blocks):
        marked = "".join(f"\\{c}" if start + j in spelled else c for j, c in enumerate(text)).replace("\n", "↵")
        shown += (TRAINED if trained else CONTEXT)[i % 2] + marked + RESET
        shown += f"{FAINT}{'+'.join(map(str, tokens))}{RESET} " if show_ids else ""
        shown += "\n" if "\n" in text else ""
        start += len(text)
    return shown


def draw_row(lengths: Sequence[int], capacity: int, width: int = 100) -> str:
    """Return a packed row as one block per conversation with its length, and dots for padding."""
    ends = [round(end * width / capacity) for end in itertools.accumulate(lengths)]
    blocks, start = "", 0
    for i, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        text = str(length) if len(str(length)) <= end - start else ""
        blocks += f"\x1b[30;{46 if i % 2 else 42}m{text:^{end - start}}{RESET}"
        start = end
    return blocks + "·" * (width - start)
