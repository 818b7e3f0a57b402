"""Look inside: what is trained on, how rows are packed, what a model is made of, how runs went.

python show.py tokens "Hello!" "Hi, how are you?"    # a conversation as coloured tokens
python show.py rows chitchat                         # a dataset's rows, packed
python show.py model tiny                            # the architecture as a table
python show.py runs runs/tiny runs/other             # runs, compared in a picture
"""

import itertools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from config import PRESETS, ModelConfig, check
from engine.cli import one_line_errors, parse_flags

if TYPE_CHECKING:
    from tokenizer import Tokenizer

# torch, datasets and matplotlib take a while to import, so each command imports what it needs.


# ---------------------------------------------------------------- tokens

# Two shades each, so that neighbouring tokens can be told apart.
TRAINED, CONTEXT = ("\x1b[30;42m", "\x1b[30;102m"), ("\x1b[37;100m", "\x1b[37;40m")
FAINT, RESET = "\x1b[2m", "\x1b[0m"
LEGEND = f"{TRAINED[0]} trained {TRAINED[1]} on {RESET} {CONTEXT[0]} only {CONTEXT[1]} read {RESET}"


@dataclass
class Tokens:
    """A conversation as its tokens: green is trained on, grey is only read."""

    # What a user and an assistant say in turn.
    texts: Annotated[Positional[tuple[str, ...]], arg(metavar="TEXT")] = ("Hello",)
    # Draw them into this picture instead.
    out: str = ""

    def show(self) -> None:
        from tokenizer import Tokenizer

        texts = [*self.texts, *["Hello! How can I help you?"] * (len(self.texts) % 2)]
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        tokenizer = Tokenizer()
        ids, mask = tokenizer.render(messages)
        if not self.out:
            print(f"{LEGEND} and each token's id\n\n{colour(tokenizer, ids, mask, show_ids=True)}")
            return
        from engine.plots import draw_tokens

        draw_tokens([printable(tokenizer, i) for i in ids], mask, self.out)
        print(f"wrote {self.out}")


def printable(tokenizer: "Tokenizer", i: int) -> str:
    return tokenizer.decode([i]).replace("\n", "↵")


def colour(tokenizer: "Tokenizer", ids: Iterable[int], mask: Iterable[int], show_ids: bool = False) -> str:
    """A conversation for the terminal."""
    pieces = []
    for position, (i, trained) in enumerate(zip(ids, mask, strict=True)):
        text = printable(tokenizer, i)
        number = f"{FAINT}{i}{RESET} " if show_ids else ""
        line_break = "\n" if "↵" in text else ""
        pieces.append(f"{(TRAINED if trained else CONTEXT)[position % 2]}{text}{RESET}{number}{line_break}")
    return "".join(pieces)


# ---------------------------------------------------------------- rows


@dataclass
class Rows:
    """A dataset's conversations in packed rows, and one of them in colour."""

    # As in train_sft.py.
    dataset: Annotated[Positional[str], arg(metavar="DATASET")] = "chitchat"
    # "": its first.
    split: Annotated[Positional[str], arg(metavar="SPLIT")] = ""
    # Tokens a row.
    max_seq_len: int = 2048
    # Draw the row with the most conversations, and who attends to whom in it, into this picture instead.
    out: str = ""

    def show(self) -> None:
        import numpy as np

        from datacollator import DataCollator, RowStream
        from dataset import load_dataset_split
        from engine.sources import open_splits
        from tokenizer import Tokenizer

        tokenizer = Tokenizer()
        split = self.split or next(iter(open_splits(self.dataset)))
        data, report = load_dataset_split(self.dataset, split, tokenizer, self.max_seq_len)
        rows = RowStream(data, DataCollator(self.max_seq_len, tokenizer.pad_token_id))
        if self.out:
            from engine.plots import draw_packing

            fullest = max(range(rows.rows_per_epoch), key=lambda i: len(rows.row_indices(i)))
            batch = rows.batch([fullest])
            draw_packing(batch["sequence_ids"][0].numpy(), batch["labels"][0].numpy(), self.out)
            print(f"wrote {self.out}")
            return
        short = int(np.argmin(np.abs(rows.lengths - 150)))  # one that fits on a screen
        print(f"{report}\n\n{LEGEND}\n\n{colour(tokenizer, *rows.conversation(short))}\n")
        padding = 1 - report.tokens / (rows.rows_per_epoch * self.max_seq_len)
        print(f"{rows.rows_per_epoch:,} rows of {self.max_seq_len:,} tokens, {padding:.2%} padding; the first ten:\n")
        for i in range(min(10, rows.rows_per_epoch)):
            print(draw_row(rows.lengths[rows.row_indices(i)].tolist(), self.max_seq_len))


def draw_row(lengths: Sequence[int], capacity: int, width: int = 100) -> str:
    """A packed row for the terminal: a block for each conversation with its length, and dots for padding."""
    ends = [round(end * width / capacity) for end in itertools.accumulate(lengths)]
    blocks, start = "", 0
    for i, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        text = str(length) if len(str(length)) <= end - start else ""
        blocks += f"\x1b[30;{46 if i % 2 else 42}m{text:^{end - start}}{RESET}"
        start = end
    return blocks + "·" * (width - start)


# ---------------------------------------------------------------- the model


@dataclass
class Model:
    """The parameters of a preset's model, and what its cache takes."""

    # tiny, base, mini, v2_lite; none: all of them.
    presets: Annotated[Positional[tuple[str, ...]], arg(metavar="PRESET")] = ()

    def show(self) -> None:
        for preset in self.presets or PRESETS:
            check(preset in PRESETS, f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
            print(f"{preset}\n\n{describe(PRESETS[preset].model)}\n")


def describe(config: ModelConfig) -> str:
    """The architecture as a table, and what its cache takes against multi-head attention's."""
    from engine.cost import cache_entries, parameter_counts

    counts = parameter_counts(config)
    counts["all"] = sum(total for total, _ in counts.values()), sum(active for _, active in counts.values())
    lines = [f"{'':20}{'parameters':>16}{'active':>16}"]
    lines += [f"{part:20}{total:16,}{active:16,}" for part, (total, active) in counts.items()]
    latent, heads = cache_entries(config)
    lines.append(
        f"\ncache per token in bf16: {2 * latent:,} bytes; keys and values of all heads would take {2 * heads:,} "
        f"({heads / latent:.1f} times as much)"
    )
    return "\n".join(lines)


# ---------------------------------------------------------------- runs


@dataclass
class Runs:
    """The metrics of one or several runs in a picture: losses, rates, norms, the experts' load, speed."""

    # Run directories.
    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN")]
    # The picture to write.
    out: str = "runs.png"

    def show(self) -> None:
        from engine.plots import plot_runs
        from engine.run_directory import read_metrics

        check(self.runs != (), "name a run's directory, or several")
        plot_runs({run: read_metrics(run) for run in self.runs}, self.out)
        print(f"wrote {self.out}")


COMMANDS: Any = Tokens | Rows | Model | Runs


def main() -> None:
    with one_line_errors():
        parse_flags(COMMANDS, sys.argv[1:], "show.py", __doc__).show()


if __name__ == "__main__":
    main()
