"""Look inside: what is trained on, how rows are packed, what a model consists of, how runs went.

python show.py data chats.jsonl tiny --max-seq-len 512   # what a run with these flags would see of its data
python show.py tokens "Hello!" "Hi, how are you?"        # a conversation as coloured tokens
python show.py rows chitchat                             # a dataset's packed rows
python show.py model tiny                                # the architecture as a table
python show.py runs runs/tiny runs/other                 # runs compared in a table and a picture
"""

import itertools
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from config import PRESETS, DataConfig, UserError, flatten
from files import printable, read_json
from launch.command_line import Arguments, one_line_errors, parse_arguments, parse_flags

# torch, datasets and matplotlib take a while to import, so each command imports what it needs.


# ---------------------------------------------------------------- tokens


@dataclass
class Tokens:
    """A conversation as its tokens: green is trained on, grey is only read."""

    # What a user and an assistant say in turn.
    texts: Annotated[Positional[tuple[str, ...]], arg(metavar="TEXT")] = ("Hello",)
    # chatml, llama3 or deepseek.
    chat_template: str = "chatml"

    def show(self) -> None:
        from tokenizer import Tokenizer
        from view.terminal import LEGEND, colour, on_screen

        texts = [*self.texts, *(["Hello! How can I help you?"] if len(self.texts) % 2 else [])]
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        tokenizer = Tokenizer(chat_template=self.chat_template)
        shown = colour(tokenizer, *tokenizer.render(messages), show_ids=True)
        print(on_screen(f"{LEGEND} and each token's id\n\n{shown}"))


# ---------------------------------------------------------------- a run's data


@dataclass
class Data:
    """The data that a run sees: python show.py data DATASET [DATASET ...] [PRESET] [the flags of the run].

    Tables, and pieces in colour: green is trained on, grey is only read.
    """

    # Show all pieces of this row of each source; the first row is 1.
    row: int = 0
    # Show this many random pieces, by the run's --seed.
    random: int = 1

    def show_run(self, arguments: Arguments) -> None:
        """Show the data of a run that is started with these arguments. Raises UserError where train_sft.py does."""
        from datacollator import DataCollator, RowStream
        from dataset import column, load_data
        from launch.start import find_start
        from parallel import join_world
        from view.terminal import LEGEND, colour, on_screen, spread, table

        config, tokenizer, *_ = find_start(arguments, join_world(arguments.config.compute.device))
        options, seed = config.data, config.compute.seed
        data = load_data(options, tokenizer, seed, want_eval=config.watch.eval_steps > 0)
        found = [
            (report, i)
            for report in data.reports
            for i, number in enumerate(column(report.pieces, "row").tolist())
            if number == self.row - 1 or not (self.row or report.held_out)  # row 0: all that are trained on
        ]
        if not found:
            raise UserError(f"no piece of row {self.row} is used: no such row exists, or it was dropped")
        if not self.row:
            collator = DataCollator(options.max_seq_len, tokenizer.pad_token_id, options.packing)
            rows = RowStream(data.train, collator, seed, options.shuffle)
            counts = {"tokens per piece": rows.lengths, "targets per piece": column(data.train, "targets")}
            print(*data.notes, table(data, rows, config), "", spread(counts), "", sep="\n")
            found = random.Random(seed).sample(found, min(max(self.random, 0), len(found)))
        print(on_screen(LEGEND))
        for report, i in found:
            piece = report.pieces[i]
            where = f"{report.source}, {report.split}, row {piece['row'] + 1}, piece {piece['piece'] + 1}"
            side = "held out" if report.held_out else "trained on"
            print(f"\n{where}, {side}: {piece['length']:,} tokens, {piece['targets']:,} of them trained on")
            print(on_screen(colour(tokenizer, piece["input_ids"], piece["mask"])))


def show_data(words: list[str]) -> None:
    """Run `Data` with its own flags; of the rest, the words at the start are datasets and a preset."""
    parsed: Any = parse_flags(Data, args=words, prog="show.py data", return_unknown_args=True)
    look, rest = parsed
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), rest))
    sources = [name for name in names if name not in PRESETS]
    flags = [*(["--dataset", *sources] if sources else []), *rest[len(names) :]]
    look.show_run(parse_arguments([*(name for name in names if name in PRESETS), *flags, "--dry-run"]))


# ---------------------------------------------------------------- rows


@dataclass
class Rows:
    """The packed rows of a dataset's first split, one block per conversation, and the first conversation in colour."""

    # As in train_sft.py.
    dataset: Annotated[Positional[str], arg(metavar="DATASET")] = "chitchat"
    # Tokens per row.
    max_seq_len: int = 2048
    # chatml, llama3 or deepseek.
    chat_template: str = "chatml"

    def show(self) -> None:
        from data.sources import open_source
        from datacollator import DataCollator, RowStream
        from dataset import load_data
        from tokenizer import Tokenizer
        from view.terminal import LEGEND, colour, draw_row, on_screen

        tokenizer = Tokenizer(chat_template=self.chat_template)
        split = next(iter(open_source(self.dataset).splits))
        options = DataConfig((self.dataset,), train_split=split, max_seq_len=self.max_seq_len)
        data = load_data(options, tokenizer, seed=0, want_eval=False)
        rows, (report,) = RowStream(data.train, DataCollator(self.max_seq_len, tokenizer.pad_token_id)), data.reports
        print(on_screen(f"{report}\n\n{LEGEND}\n\n{colour(tokenizer, *rows.piece(0))}\n"))
        padding = 1 - report.counts["tokens"] / (rows.rows_per_epoch * self.max_seq_len)
        print(f"{rows.rows_per_epoch:,} rows of {self.max_seq_len:,} tokens, {padding:.2%} padding; the first ten:\n")
        for i in range(min(10, rows.rows_per_epoch)):
            print(on_screen(draw_row(rows.lengths[rows.row_indices(i)].tolist(), self.max_seq_len)))


# ---------------------------------------------------------------- the model


@dataclass
class Model:
    """The parameters of a preset's model, and the size of its cache."""

    # tiny, base, mini, v2_lite; none: all of them.
    presets: Annotated[Positional[tuple[str, ...]], arg(metavar="PRESET")] = ()

    def show(self) -> None:
        import pandas as pd

        from launch.cost import cache_entries, parameter_counts
        from launch.start import model_shape

        for preset in self.presets or PRESETS:
            if preset not in PRESETS:
                raise UserError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
            config = model_shape(PRESETS[preset], preset, None)
            counts = pd.DataFrame(parameter_counts(config), index=["parameters", "active"]).T
            counts.loc["all"] = counts.sum()
            print(f"{preset}\n\n{counts.map('{:,}'.format).to_string()}")
            latent, heads = cache_entries(config)
            compared = f"keys and values of all heads would take {2 * heads:,} ({heads / latent:.1f} times as much)"
            print(f"\ncache per token in bf16: {2 * latent:,} bytes; {compared}\n")


# ---------------------------------------------------------------- runs


@dataclass
class Runs:
    """Runs compared: a table of the fields that differ and of last and best metrics, and a picture of all metrics."""

    # Run directories.
    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN")]
    # The picture to write; "": none.
    out: str = "runs.png"
    # The table as a .csv file.
    csv: str = ""

    def show(self) -> None:
        import pandas as pd

        from launch.run_directory import read_metrics
        from view.plots import plot_runs

        if not self.runs:
            raise UserError("name a run's directory, or several")
        lines = {run: read_metrics(run) for run in self.runs}
        table = pd.DataFrame(compare(lines)).fillna("-")
        print(printable(table.to_string(index=False)))
        if self.csv:
            table.to_csv(self.csv, index=False)
            print(f"wrote {self.csv}")
        if self.out:
            plot_runs(lines, self.out)
            print(f"wrote {self.out}")


# Metrics in the table, and what is best.
BEST: dict[str, Callable] = {"loss": min, "eval_loss": min, "eval_bpb": min, "tokens_per_second": max}


def compare(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, str]]:
    """Return a row per run: its name, the fields in which the configurations differ, its last step, and the last and
    the best value of each metric."""
    configs = [flatten(read_json(Path(run, "config.json"))) for run in runs]
    names = dict.fromkeys(name for config in configs for name in config if name != "output_dir")
    fields = [name for name in names if len({str(config.get(name)) for config in configs}) > 1]
    table = []
    for (run, lines), config in zip(runs.items(), configs, strict=True):
        row = {"run": run} | {name: str(config.get(name)) for name in fields}
        row["step"] = str(max((line["step"] for line in lines), default=0))
        for metric, best in BEST.items():
            found = [line[metric] for line in lines if line.get(metric) is not None]
            row |= {metric: f"{found[-1]:.4g}", f"best {metric}": f"{best(found):.4g}"} if found else {}
        table.append(row)
    return table


COMMANDS: Any = Data | Tokens | Rows | Model | Runs


def main() -> None:
    with one_line_errors():
        if sys.argv[1:2] == ["data"]:
            return show_data(sys.argv[2:])
        parse_flags(COMMANDS, args=sys.argv[1:], prog="show.py", description=__doc__).show()


if __name__ == "__main__":
    main()
