"""Look inside: what is trained on, how rows are packed, what a model is made of, how runs went.

python show.py data chats.jsonl tiny --max-seq-len 512   # what a run with these flags would see of its data
python show.py tokens "Hello!" "Hi, how are you?"    # a conversation as coloured tokens
python show.py rows chitchat                         # a dataset's rows, packed
python show.py model tiny                            # the architecture as a table
python show.py complete base "Once upon a time"      # how a base model goes on, and what else it might have written
python show.py nf4 runs/tiny                         # a weight's numbers, and the 16 levels that NF4 has for them
python show.py runs runs/tiny runs/other             # runs, compared in a picture
python show.py idea attention                        # labels, attention, experts, ranks: a picture of the idea
"""

import itertools
import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from config import PRESETS, ModelConfig, check
from launch.command_line import Arguments, one_line_errors, parse_arguments, parse_flags

# torch, datasets and matplotlib take a while to import, so each command imports what it needs.


# ---------------------------------------------------------------- tokens


@dataclass
class Tokens:
    """A conversation as its tokens: green is trained on, grey is only read."""

    # What a user and an assistant say in turn.
    texts: Annotated[Positional[tuple[str, ...]], arg(metavar="TEXT")] = ("Hello",)
    # Draw them into this picture instead.
    out: str = ""

    def show(self) -> None:
        from tokenizer import Tokenizer
        from view.terminal import LEGEND, colour, on_screen, printable

        texts = [*self.texts, *["Hello! How can I help you?"] * (len(self.texts) % 2)]
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        tokenizer = Tokenizer()
        ids, mask = tokenizer.render(messages)
        if not self.out:
            print(on_screen(f"{LEGEND} and each token's id\n\n{colour(tokenizer, ids, mask, show_ids=True)}"))
            return
        from view.plots import draw_tokens

        draw_tokens([printable(tokenizer, [i]) for i in ids], mask, self.out)
        print(f"wrote {self.out}")


# ---------------------------------------------------------------- a run's data


@dataclass
class Data:
    """What a run sees of its data: python show.py data DATASET [DATASET ...] [PRESET] [the flags of the run].

    A table, histograms, and rows in colour: green is trained on, grey is only read.
    """

    # Show this row of the source, the first being 1, with all of its pieces.
    row: int = 0
    # Show the longest piece.
    longest: bool = False
    # Show the shortest piece.
    shortest: bool = False
    # Show so many pieces, drawn at random (by the run's --seed).
    random: int = 0
    # Draw the histograms into this picture instead.
    out: str = ""

    def show_run(self, arguments: Arguments) -> None:
        """Show the data of a run that is started with these arguments. Raises UserError where train_sft.py does."""
        import numpy as np

        from datacollator import DataCollator, RowStream
        from dataset import column, load_data
        from launch.start import find_start
        from parallel import join_world
        from view.terminal import LEGEND, histogram, on_screen, pick, shares, table

        config, tokenizer, *_ = find_start(arguments, join_world(arguments.config.compute.device))
        options, seed = config.data, config.compute.seed
        data = load_data(options, tokenizer, seed, want_eval=config.watch.eval_steps > 0)
        collator = DataCollator(options.max_seq_len, tokenizer.pad_token_id, options.packing)
        rows = RowStream(data.train, collator, seed, options.shuffle)
        targets = column(data.train, "targets")
        if self.out:
            from view.plots import draw_histograms

            draw_histograms({"tokens of a piece": rows.lengths, "of them trained on": targets}, self.out)
            print(f"wrote {self.out}")
            return
        parts = shares(data)
        if self.row:
            found = [(part, i) for part in parts for i in part.pieces_of(self.row - 1)]
            check(found != [], f"no piece of row {self.row} is used: there is no such row, or it was dropped")
        else:
            print(*data.notes, table(data, rows, config), "", sep="\n")
            print(
                histogram(rows.lengths, "tokens of a piece"), histogram(targets, "of them trained on"), "", sep="\n\n"
            )
            trained = [part for part in parts if not part.report.held_out]
            places = np.concatenate([np.arange(part.places.start, part.places.stop) for part in trained])
            chosen = places[pick(rows.lengths[places], self.longest, self.shortest, self.random, seed)].tolist()
            found = [(part, i) for i in chosen for part in trained if i in part.places]
        print(on_screen("\n".join([f"{LEGEND}\n", *(f"{part.describe(i, tokenizer)}\n" for part, i in found)])))


def show_data(words: list[str]) -> None:
    """The flags of `Data` are taken out; of the rest the words at the start are datasets and a preset."""
    parsed: Any = parse_flags(Data, words, "show.py data", Data.__doc__, return_unknown_args=True)
    look, rest = parsed
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), rest))
    sources = [name for name in names if name not in PRESETS]
    flags = [*(["--dataset", *sources] if sources else []), *rest[len(names) :]]
    look.show_run(parse_arguments([*(name for name in names if name in PRESETS), *flags, "--dry-run"]))


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

        from data.sources import open_splits
        from datacollator import DataCollator, RowStream
        from dataset import load_dataset_split
        from tokenizer import Tokenizer
        from view.terminal import LEGEND, colour, draw_row, on_screen

        tokenizer = Tokenizer()
        split = self.split or next(iter(open_splits(self.dataset)))
        data, report = load_dataset_split(self.dataset, split, tokenizer, self.max_seq_len)
        rows = RowStream(data, DataCollator(self.max_seq_len, tokenizer.pad_token_id))
        if self.out:
            from view.plots import draw_packing

            fullest = max(range(rows.rows_per_epoch), key=lambda i: len(rows.row_indices(i)))
            batch = rows.batch([fullest])
            draw_packing(batch["sequence_ids"][0].numpy(), batch["labels"][0].numpy(), self.out)
            print(f"wrote {self.out}")
            return
        short = int(np.argmin(np.abs(rows.lengths - 150)))  # one that fits on a screen
        print(on_screen(f"{report}\n\n{LEGEND}\n\n{colour(tokenizer, *rows.piece(short))}\n"))
        padding = 1 - report.counts["tokens"] / (rows.rows_per_epoch * self.max_seq_len)
        print(f"{rows.rows_per_epoch:,} rows of {self.max_seq_len:,} tokens, {padding:.2%} padding; the first ten:\n")
        for i in range(min(10, rows.rows_per_epoch)):
            print(on_screen(draw_row(rows.lengths[rows.row_indices(i)].tolist(), self.max_seq_len)))


# ---------------------------------------------------------------- a text, continued


@dataclass
class Complete:
    """How a model goes on with a text, and how likely it found each token and what else it might have written."""

    # A model directory, a run directory or a LoRA adapter's.
    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")]
    # What to go on with.
    text: Annotated[Positional[str], arg(metavar="TEXT")]
    # Tokens to write, always the likeliest.
    max_new_tokens: int = 20

    def show(self) -> None:
        import torch

        from checkpoint import load_model_and_tokenizer
        from generation import continuations, room_for_answer
        from view.terminal import colour, on_screen, printable

        model, tokenizer = load_model_and_tokenizer(self.checkpoint)
        model.eval()
        given = tokenizer.encode(self.text)
        room = room_for_answer(model, given, self.max_new_tokens)
        ((written, _),) = continuations(model, [given], room, tokenizer.stop_ids)
        ids = given + written
        print(on_screen(f"{colour(tokenizer, ids, [0] * len(given) + [1] * len(written))}\n"))
        with torch.inference_mode():
            probabilities = model(torch.tensor([ids]))[0].softmax(dim=-1)  # (T, V): of the token after each
        for place in range(len(given) - 1, len(ids) - 1):
            shares, tokens = probabilities[place].topk(4)
            choices = [f"{printable(tokenizer, [int(i)])!r} {p:.0%}" for p, i in zip(shares, tokens, strict=True)]
            print("   ".join(f"{choice:16}" for choice in choices).rstrip())


# ---------------------------------------------------------------- the model


@dataclass
class Model:
    """The parameters of a preset's model, and what its cache takes."""

    # tiny, base, mini, v2_lite; none: all of them.
    presets: Annotated[Positional[tuple[str, ...]], arg(metavar="PRESET")] = ()

    def show(self) -> None:
        from launch.start import model_shape

        for preset in self.presets or PRESETS:
            check(preset in PRESETS, f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
            print(f"{preset}\n\n{describe(model_shape(PRESETS[preset], preset, None))}\n")


def describe(config: ModelConfig) -> str:
    """The architecture as a table, and what its cache takes against multi-head attention's."""
    from launch.cost import cache_entries, parameter_counts

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


# ---------------------------------------------------------------- four bits


@dataclass
class Nf4:
    """The numbers of one weight, each over the largest of its block of 64, and the 16 levels that NF4 has for them."""

    # A model directory or a run directory.
    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")]
    # A matrix of the blocks, or a stack of experts.
    weight: str = "model.layers.1.mlp.experts.gate_up_proj"
    # The picture to write.
    out: str = "nf4.png"

    def show(self) -> None:
        import torch

        from checkpoint import iterate_weights, load_config, resolve_checkpoint
        from quantization import BLOCK, LEVELS, quantize
        from view.plots import draw_levels

        directory = resolve_checkpoint(self.checkpoint)
        weights = iterate_weights(directory, load_config(directory))
        weight = next((tensor for name, tensor in weights if name == self.weight), torch.empty(0))
        right = weight.dim() > 1 and weight.shape[-1] % BLOCK == 0
        check(right, f"{directory} has no matrix {self.weight} with rows of whole blocks of {BLOCK}")
        codes, absmax = quantize(weight)
        scaled = weight.float().view(-1, BLOCK) / absmax.clamp(min=1e-38)[:, None]
        shares = (codes >> 4).bincount(minlength=16) + (codes & 15).bincount(minlength=16)
        draw_levels(scaled.flatten().numpy(), LEVELS, (shares / shares.sum()).numpy(), self.weight, self.out)
        print(f"wrote {self.out}")


# ---------------------------------------------------------------- runs


@dataclass
class Runs:
    """The metrics of one or several runs in a picture: losses, rates, norms, the experts' load, speed."""

    # Run directories.
    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN")]
    # The picture to write.
    out: str = "runs.png"
    # Only these metrics, as in --metrics loss eval_bpb; none: all.
    metrics: tuple[str, ...] = ()

    def show(self) -> None:
        from launch.run_directory import read_metrics
        from view.plots import PANELS, plot_runs

        check(self.runs != (), "name a run's directory, or several")
        known = {panel.metric for panel in PANELS}
        check(known >= {*self.metrics}, f"--metrics: choose from {', '.join(sorted(known))}")
        plot_runs({run: read_metrics(run) for run in self.runs}, self.out, self.metrics)
        print(f"wrote {self.out}")


@dataclass
class Idea:
    """A picture of: labels shifted under tokens, attention expanded and absorbed, the way to experts, rows of ranks."""

    name: Positional[Literal["labels", "attention", "experts", "ranks"]]
    # The picture to write.
    out: str = "idea.png"

    def show(self) -> None:
        from docs.draw import IDEAS

        IDEAS[self.name](self.out)
        print(f"wrote {self.out}")


COMMANDS: Any = Data | Complete | Tokens | Rows | Model | Nf4 | Runs | Idea


def main() -> None:
    with one_line_errors():
        if sys.argv[1:2] == ["data"]:
            return show_data(sys.argv[2:])
        parse_flags(COMMANDS, sys.argv[1:], "show.py", __doc__).show()


if __name__ == "__main__":
    main()
